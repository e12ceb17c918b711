"""The ONNX back end: one file for prompts and single tokens alike, checked, run and compared.

A program goes through `torch.onnx.export` as it is, or for a target with attention lowered to one
operator. Inputs and outputs keep their names, weights their dotted ones (a tied weight is stored
once, one that is only read transposed is stored so, as ``NAME.transposed``), and dynamic sizes get
names that people know.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from graphprune.backends.onnx.attention.forms import OPSETS, AttentionForm, Target, check_target
from graphprune.backends.onnx.attention.lower import lower_attention
from graphprune.backends.onnx.convert import as_checked, convert, fuse_norms, simplify
from graphprune.backends.onnx.dimension_names import apply_names, dimension_names
from graphprune.backends.onnx.last_logits import last_only
from graphprune.backends.onnx.parity import QUICK, Parity, Protocol, compare
from graphprune.backends.onnx.session import check_opset
from graphprune.backends.onnx.weights.as_used import write_as_used
from graphprune.backends.onnx.weights.blocks import with_activations
from graphprune.backends.onnx.weights.held import with_held
from graphprune.backends.onnx.weights.one_file import placed_at
from graphprune.backends.onnx.weights.quantize import Quantization, quantize, shared_bytes
from graphprune.backends.onnx.weights.widths import check_widths
from graphprune.errors import BackendError, UsageError, first_line
from graphprune.io.atomic import staged_file
from graphprune.io.progress import DisplayFactory, display_factory, progress_bar
from graphprune.ir.program import Program

if TYPE_CHECKING:
    import onnx_ir

_LARGEST = 2**31 - 2**27
"""Bytes of weights up to which one file holds the model: protobuf ends at 2 GB, nodes included."""


@dataclass(frozen=True)
class OnnxReport:
    """The file that was written, and how far it was from the program when it was run.

    Parameters
    ----------
    path
        The ONNX file.
    bytes
        Its size, external data included.
    opset
        The version of ONNX's operator set.
    nodes
        Operators in its graph.
    max_relative_error
        The largest difference that ONNX Runtime showed, over the largest absolute value of the
        output concerned; None when it was not run.
    seconds
        What conversion, checks and runs took together.
    onnxruntime
        The version of ONNX Runtime that ran it, if one is installed.
    notes
        What was left out, for people.
    target
        What runs it, as it was asked for.
    attention
        For a target, every module that attends with the form that its attention is written in, and
        why not in a better one.
    operators
        How often each operator stands in the graph.
    parity
        The largest relative error of each check in ONNX Runtime.
    quantized
        Every weight that was quantized, with the length of what that changed over its own length.
    """

    path: str
    bytes: int
    opset: int
    nodes: int
    max_relative_error: float | None
    seconds: float
    onnxruntime: str | None
    notes: tuple[str, ...] = ()
    target: Target | None = None
    attention: Mapping[str, str] = field(default_factory=dict)
    operators: Mapping[str, int] = field(default_factory=dict)
    parity: Mapping[str, float] = field(default_factory=dict)
    quantized: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON takes them."""
        return {**dataclasses.asdict(self), "notes": list(self.notes)}


def export(
    program: Program,
    path: str | PathLike[str],
    *,
    target: Target | None = None,
    opset: int | None = None,
    logits: Literal["all", "last"] = "all",
    check: bool | Protocol = True,
    quantization: Quantization | None = None,
    external_data: bool | None = None,
    overwrite: bool = False,
    progress: bool | DisplayFactory = False,
) -> OnnxReport:
    """Write `program` as an ONNX model.

    Parameters
    ----------
    program
        The program; its weights may be on any device but meta.
    path
        The file to write. External data goes beside it, as ``<name>.data``.
    target
        What runs the model: "cpu" or "cuda", the providers of ONNX Runtime with its own operators;
        "portable" or "tensorrt", with those of ONNX alone. Attention becomes one operator then, and
        norms do for "cpu" and "cuda". A decoder of these two takes masks that pad on the right
        (rows padded on the left come out as NaN), and several tokens on a filled cache for a batch
        of one. None writes what any runtime reads.
    opset
        The version of ONNX's operator set, 18 or later; by default 20, or 23 for the targets but
        "cuda", as their attention needs it. From 24 on, caches of "portable" keep their length:
        past and present are as long as the text may become, and the mask tells what they hold.
    logits
        Of which tokens a decoder gives logits: of all, or of each row's last one ("last"), as
        generating text needs them; a prompt then does without the largest product for the others.
    check
        Whether to run the model in ONNX Runtime, if that is installed, and compare: a decoder on
        two prompts and ten decoded tokens or by the protocol that is given, anything else on
        batches of three and one. The model goes through `onnx.checker` in any case. What is fused
        and changes outputs by more than is allowed, or fails, is written as for no target, and the
        report says so.
    quantization
        How weights are quantized, for the targets "cpu" and "cuda". What the model is compared with
        then is the program with the values that quantized weights stand for.
    external_data
        Whether weights go to a file of their own; by default they do where one file cannot hold
        them (2 GB), or where two operators read the same quantized bytes.
    overwrite
        Whether an existing file may be replaced.
    progress
        Whether to show a progress bar, or what makes one.

    Returns
    -------
    OnnxReport
        What was written and how exact it is.

    Raises
    ------
    BackendError
        When an operator has no ONNX counterpart, a check fails, ONNX Runtime's outputs differ by
        more than 1e-4, the target has no kernels for the program's type, or ONNX Runtime does not
        read the opset. No file is left then.
    OutputError
        When `path` exists or cannot be written.
    UsageError
        When `opset` is below 18 or unknown to ONNX, or there is no such target.
    """
    opset = check_export(program, target, opset, quantization)
    if quantization is not None:
        quantization = quantization.settled(target, by_token=program.is_decoder)
        check_widths(program, quantization)
    if program.lacks_values:
        raise BackendError(
            "the program's weights are on the meta device: there is nothing to write"
        )
    if check:
        check_opset(opset)
    start = time.perf_counter()
    program = last_only(program) if logits == "last" else program
    names = dimension_names(program)
    show = display_factory() if progress is True else (progress or None)
    stages = 3 if check else 2
    notes = [note.text for note in program.notes]
    wanted = _parts(target)
    tried: list[frozenset[str]] = []
    failed: list[str] = []
    undone: tuple[AttentionForm, ...] = ()
    distances: Mapping[str, float] = {}
    with (
        staged_file(path, overwrite=overwrite) as staged,
        progress_bar(show, "ONNX", stages) as advance,
    ):
        for fused in _attempts(wanted):
            form, choices = program, tuple[AttentionForm, ...]()
            if target is not None and "attention" in fused:
                form, choices = lower_attention(program, target, opset, rotary="rotary" in fused)
                undone = choices
                if all(choice.positions is None for choice in choices):
                    fused -= {"rotary"}
            if fused in tried:
                continue
            tried.append(fused)
            try:
                named = {**dimension_names(form), **names}
                model = _written(form, program, named, opset, "norms" in fused)
                if quantization is not None:
                    distances = quantize(model, quantization, program.weights)
                write_as_used(model)
                advance(1)
                _save(model, staged, external_data)
                _check(staged)
                advance(1)
                ran = Parity(None, None)
                if check:
                    counts = any(choice.form == "gqa" for choice in choices)
                    protocol = QUICK if check is True else check
                    ran = compare(
                        with_held(program, staged) if distances else program,
                        staged,
                        names,
                        counts=counts,
                        protocol=protocol,
                        quantized=bool(distances),
                        static=any(choice.form == "static" for choice in choices),
                    )
                break
            except BackendError as error:
                failed.append(str(error))
                if not fused:
                    raise BackendError("; with fused operators: ".join(failed[::-1])) from error
        if lost := [part for part in wanted if part in tried[0] - fused]:
            what = " and ".join(lost)
            verb = "are" if what == "norms" or len(lost) > 1 else "is"
            notes.append(f"{what} {verb} not fused: {failed[-1]}")
        if not choices:
            choices = tuple(
                AttentionForm(c.module, "decomposed", f"{c.form} failed") for c in undone
            )
        if quantization is not None and quantization.activations == "int8":
            _round_activations(staged)
        notes += _limits(choices)
        size = sum(entry.stat().st_size for entry in staged.parent.iterdir())
    operators = Counter(
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph
    )
    return OnnxReport(
        path=str(path),
        bytes=size,
        opset=model.opset_imports.get("", opset),
        nodes=operators.total(),
        max_relative_error=ran.max_relative_error,
        seconds=time.perf_counter() - start,
        onnxruntime=ran.version,
        notes=(*notes, *ran.notes),
        target=target,
        attention={choice.module: str(choice) for choice in choices},
        operators=dict(sorted(operators.items())),
        parity=dict(ran.errors),
        quantized=distances,
    )


def check_export(
    program: Program,
    target: Target | None,
    opset: int | None,
    quantization: Quantization | None,
) -> int:
    """Refuse what `export` cannot do whatever the sizes are; returns the opset that is written.

    Raises
    ------
    BackendError
        When the target has no kernels for the program's type, or ONNX Runtime no quantizer.
    UsageError
        When `opset` is below 18 or unknown to ONNX, or there is no such target.
    """
    opset = OPSETS[target] if opset is None and target in OPSETS else opset or 20
    if opset < 18:
        raise UsageError(f"opset {opset} is below 18, the first that can be written")
    check_target(program, target, opset)
    if quantization is not None:
        quantization.check(target)
    return opset


def _parts(target: Target | None) -> tuple[str, ...]:
    """Return what is fused for `target`, in the order in which it is given up last to first."""
    if target is None:
        return ()
    return ("attention", "rotary", "norms") if target in ("cpu", "cuda") else ("attention",)


def _attempts(parts: Sequence[str]) -> Iterator[frozenset[str]]:
    """All of `parts`, then ever fewer: a rotary embedding goes inside attention alone."""
    whole = frozenset(parts)
    for lost in ((), ("norms",), ("rotary",), ("rotary", "norms"), parts):
        yield whole.difference(lost)


def _written(
    form: Program,
    program: Program,
    names: Mapping[str, str],
    opset: int,
    norms: bool,
) -> onnx_ir.Model:
    """`form`, which stands for `program`, in ONNX."""
    model = convert(form, opset)
    simplify(model, set(program.weights))
    apply_names(model, names)
    if norms:
        fuse_norms(model)
    return model


def _limits(choices: Sequence[AttentionForm]) -> list[str]:
    """Return what a graph with GroupQueryAttention does not take, for people."""
    if all(choice.form != "gqa" for choice in choices):
        return []
    limits = [
        "masks may pad on the right: rows that are padded on the left come out as NaN",
        "on a filled cache, several rows take one token at a time",
    ]
    if positions := {c.positions for c in choices if c.positions is not None}:
        limits.append(f"there are {min(positions)} positions, as many as the config names")
    return limits


def _save(model: onnx_ir.Model, path: Path, external_data: bool | None) -> None:
    import onnx_ir

    held = [value.const_value for value in model.graph.initializers.values()]
    size = sum(tensor.nbytes for tensor in held if tensor is not None)
    if external_data is False and size > _LARGEST:
        raise BackendError(f"{size / 1e9:.1f} GB of weights need external data: a file holds 2 GB")
    external = size > _LARGEST if external_data is None else external_data
    shared = shared_bytes(model)
    if external or (shared and external_data is None):
        for value in shared:
            value.const_value = None
        onnx_ir.external_data.unload_from_model(
            model, path.parent, f"{path.name}.data", size_threshold_bytes=256, alignment=4096
        )
        for value, same in shared.items():
            value.const_value = placed_at(same.const_value, value)
    onnx_ir.save(model, path)


def _round_activations(path: Path) -> None:
    import onnx

    onnx.save(with_activations(path, "int8"), path)


def _check(path: Path) -> None:
    import onnx

    model = onnx.load(path, load_external_data=False)
    moved = as_checked(model)
    checked = path.with_name(f"{path.name}.checked") if moved else path
    try:
        if moved:
            onnx.save(model, checked)
        onnx.checker.check_model(str(checked), full_check=True)
    except Exception as error:  # its exceptions share no base but Exception
        raise BackendError(f"onnx.checker refuses the model: {first_line(error)}") from error
    finally:
        if moved:
            checked.unlink(missing_ok=True)
