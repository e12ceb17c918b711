"""Write the program as an ONNX model, or as a package with everything that runs one."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from graphprune.errors import UsageError
from graphprune.pipeline.pass_base import COUPLING, Analysis, Context, Outcome, Pass

if TYPE_CHECKING:
    from graphprune.backends.onnx.weights.quantize import Quantization
    from graphprune.ir.program import Program


@dataclass(frozen=True)
class ExportOnnx(Pass):
    """Write an ONNX model with the program's inputs and outputs by the same names.

    A path that ends in ``.onnx`` names a file. Any other names a directory, which gets all that
    runs the model: tokenizer, configs (of onnxruntime-genai too), the plan and a parity record.

    Before
    ------
    Any program.

    After
    -----
    The same program; file or directory is complete, or was not written at all.

    Options
    -------
    path
        The file or directory, under the output folder of the run unless it is absolute.
    target
        What runs it: "cpu" or "cuda" (ONNX Runtime with its own operators for attention),
        "portable" or "tensorrt" (ONNX's own). Without one, the file has no fused operators.
    opset
        The version of ONNX's operator set to write; by default 20, or what the target is best
        served with. From 24 on, "portable" has caches that keep their length, which a runtime may
        write in place (TensorScatter); where it lacks that, attention is taken apart.
    layout
        Of an encoder-decoder, how its parts lie in a directory: "optimum" (an encoder, a decoder of
        the first tokens and one of those that follow) or "genai" (an encoder and a decoder, for
        speech); by default "genai" where onnxruntime-genai runs the model, else "optimum". Of one
        model, "browser" puts it where transformers.js looks: ``onnx/model.onnx``,
        ``model_q4.onnx``.
    logits
        Of which tokens a decoder gives logits: all, or each row's last one, which is all that
        generating text needs.
    weights
        What matrices become, for the targets "cpu" and "cuda": "int4" or "int8" (weight-only, by
        ONNX Runtime's own quantizers); without it they stay as they are.
    block
        How many numbers of a row of a quantized matrix share a scale; it divides every row.
    algorithm
        "default" (rounding), "hqq" or "k-quant".
    head
        What the matrix that makes logits becomes: "int4", "int8" or "float"; by default what the
        others do.
    embedding
        What embeddings become, of the same; by default they stay, but one that is the head's matrix
        as well is what that is.
    activations
        "float", or "int8": rounded too where they meet quantized weights. By default rounded where
        a model makes tokens one by one on a CPU, whose products of one token that makes four times
        as fast.
    zeros
        Whether blocks of four bits by "default" have a zero of their own, which halves what
        quantizing costs in loss (Gemma 3 270M: 0.25 nats in place of 0.49). Without them products
        of one token are a sixth faster on a CPU, those of a prompt no faster, and loss and speed
        are those of onnxruntime-genai's builder. What the other algorithms make has them.
    check
        Whether to check the file with `onnx.checker` once it is written, and to run it in ONNX
        Runtime; a directory by the whole protocol of `graphprune.backends.onnx.parity`. A quantized
        model is compared with the values that its weights stand for; what quantizing costs is
        measured on the calibration: by its labels, or on text that nothing was fitted to.

    Requires
    --------
    Nothing.

    Preserves
    ---------
    Everything.

    Refuses
    -------
    A program that cannot be exported, a type that the target has no kernels for (`BackendError`), a
    file that exists, a directory in use, what cannot be written (`OutputError`), an empty path, an
    opset below 18 (the first that torch's exporter writes). A layout for what is no
    encoder-decoder, and genai's for one that onnxruntime-genai cannot run. Quantized weights for
    another target, and what ONNX Runtime has no quantizer or no operators for (`UsageError`,
    `BackendError`).

    Reference
    ---------
    `graphprune.backends.onnx.export`; `torch.onnx.export` with ``dynamo=True``.

    Example
    -------
    >>> str(ExportOnnx(path="out/model.onnx", check=False))
    'export-onnx{path=out/model.onnx check=false}'
    """

    name: ClassVar[str] = "export-onnx"
    required: ClassVar[bool] = True
    preserves: ClassVar[frozenset[Analysis[Any]]] = frozenset({COUPLING})

    path: str = "model.onnx"
    target: Literal["portable", "cpu", "cuda", "tensorrt"] | None = None
    opset: int | None = None
    layout: Literal["optimum", "genai", "browser"] | None = None
    logits: Literal["all", "last"] = "all"
    weights: Literal["int4", "int8"] | None = None
    block: int = 32
    algorithm: Literal["default", "hqq", "k-quant"] = "default"
    head: Literal["int4", "int8", "float"] | None = None
    embedding: Literal["int4", "int8", "float"] | None = None
    activations: Literal["float", "int8"] | None = None
    zeros: bool = True
    check: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path:
            raise UsageError("export-onnx: the path is empty")
        if self.opset is not None and self.opset < 18:
            raise UsageError(f"export-onnx: opset {self.opset} is below 18")
        if self.layout is not None and self.path.endswith(".onnx"):
            raise UsageError("export-onnx: layout is of a directory, and the path names a file")
        if self.weights is not None:
            self._quantization(self.weights)
        elif given := [name for name in _OF_WEIGHTS if getattr(self, name) != _default(name)]:
            raise UsageError(f"export-onnx: {given[0]} is of quantized weights: say weights=int4")

    def _quantization(self, weights: Literal["int4", "int8"]) -> Quantization:
        from graphprune.backends.onnx.weights.quantize import Quantization

        return Quantization(weights, **{name: getattr(self, name) for name in _OF_WEIGHTS})

    def refuse_early(self, program: Program, *, settled: bool) -> None:
        """Refuse a target, an opset or a layout that cannot be, and blocks that do not divide."""
        from graphprune.backends.onnx.package import check_package

        chosen = self._quantization(self.weights) if self.weights is not None else None
        check_package(
            program,
            target=self.target,
            opset=self.opset,
            layout=self.layout,
            quantization=chosen,
            settled=settled,
            one_model=self.path.endswith(".onnx"),
        )

    def run(self, program: Program, context: Context) -> Outcome:
        """Write the file, and return `program` as it is."""
        from graphprune.backends.onnx.package import write_package

        path = context.path(self.path)
        options: dict[str, Any] = {
            "target": self.target,
            "opset": self.opset,
            "logits": self.logits,
            "check": self.check,
        }
        if self.weights is not None:
            options["quantization"] = self._quantization(self.weights)
        with context.bar(f"exporting {self.path}"):
            if path.suffix == ".onnx":
                report = program.export_onnx(path, **options)
            else:
                if self.weights is not None and (data := context.calibration) is not None:
                    unseen = data.held_out or data.batches
                    options["samples"] = list(data.labeled()) if data.labels else unseen
                    options["original"] = context.original
                options |= {"plan": context.plan_of(program), "layout": self.layout}
                report = write_package(program, path, **options)
        details: dict[str, Any] = {"path": self.path, "opset": report.opset}
        if self.target is not None:
            details |= {"target": self.target, "attention": dict(report.attention)}
        if report.quantized:
            details["quantized"] = dict(report.quantized)
            details["notes"] = list(report.notes)
        return Outcome(program, details=details)


_OF_WEIGHTS = ("block", "algorithm", "head", "embedding", "activations", "zeros")
"""Options that say how weights are quantized."""


def _default(name: str) -> Any:
    return next(field.default for field in fields(ExportOnnx) if field.name == name)
