"""A directory with everything that runs a model: ONNX, tokenizer, configs, plan and parity record.

``model.onnx``
    The model; external data lies beside it. An encoder-decoder is a model for each of its parts
    (`graphprune.backends.onnx.encoder_decoder.parts` names the files of each layout).
``config.json``, ``generation_config.json``, the tokenizer
    As Hugging Face's libraries take them.
``genai_config.json``
    What onnxruntime-genai generates by, for a decoder and for speech.
``plan.json``
    What was removed and merged, if anything was.
``parity.json``
    The target, the form of every attention, versions, and how exact the model is; of quantized
    weights how far they are from what they were, and what that costs.
``quality.safetensors``
    What that was measured on, where there was text or other samples.
``program.json``, ``graph.json``, ``weights.safetensors``
    The program itself as the archive back end has it, but for the weights that lie in the
    model under their own names: `graphprune.load` takes the directory, and parity can be proven
    again wherever the model is to run. Of a quantized model it is the program with the values that
    its weights stand for.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch

from graphprune.backends.archive import archive
from graphprune.backends.huggingface.choose_form import choose_form
from graphprune.backends.huggingface.files import write_config, write_generation_config
from graphprune.backends.huggingface.model import quiet
from graphprune.backends.onnx.attention.forms import Target, forms_in
from graphprune.backends.onnx.browser import arrange, check_browser
from graphprune.backends.onnx.dimension_names import dimension_names
from graphprune.backends.onnx.encoder_decoder.parts import (
    FILES,
    Layout,
    Role,
    check_layout,
    has_parts,
)
from graphprune.backends.onnx.encoder_decoder.proof import proven_parts
from graphprune.backends.onnx.encoder_decoder.speech import speech_config
from graphprune.backends.onnx.encoder_decoder.write import parts_run, verify_parts, write_parts
from graphprune.backends.onnx.export import OnnxReport, check_export, export
from graphprune.backends.onnx.last_logits import last_only
from graphprune.backends.onnx.parity import FULL, SHARED, Parity, compare
from graphprune.backends.onnx.quality import (
    check_quality,
    distances_said,
    keep,
    measure,
    model_run,
)
from graphprune.backends.onnx.runtime.genai_config import genai_config
from graphprune.backends.onnx.session import CPU, provider_name
from graphprune.backends.onnx.weights.held import (
    MODEL,
    models_in,
    not_in_models,
    weights_beside,
)
from graphprune.backends.onnx.weights.quantize import Quantization
from graphprune.backends.onnx.weights.widths import check_widths
from graphprune.errors import BackendError, CheckpointError, ParityError, first_line
from graphprune.io.atomic import as_json, staged_directory
from graphprune.ir.compare import tolerance_of
from graphprune.ir.program import Program
from graphprune.plan.plan import Plan
from graphprune.weights.tensors import type_name

PARITY = "parity.json"

PackageLayout = Literal["optimum", "genai", "browser"]

_FORMAT, _VERSION = "graphprune-onnx", 1


@dataclass(frozen=True)
class Package:
    """The record that a package holds of itself.

    Parameters
    ----------
    directory
        Where it is.
    target
        What it was written for.
    provider
        The execution provider of ONNX Runtime that serves the target.
    dtype
        Element type of the model's outputs, such as "float32".
    padding
        Sides on which rows may be padded: "both", or "right" where attention counts a mask's ones.
    shares_buffers
        Whether each past and present may be one buffer, longer than what it holds.
    attention
        Every module that attends with the form it is written in, and why not in a better one.
    parity
        The largest relative error of each check, as it was written; empty when it was not run.
    quantization
        How weights were quantized, how far each is from what it was, and the quality of the model;
        None where none is.
    layout, parts
        The layout, and the file of each part of an encoder-decoder; None for one model.
    file
        The file of the one model.
    """

    directory: Path
    target: Target | None
    provider: str
    dtype: str
    padding: str
    shares_buffers: bool
    attention: Mapping[str, str]
    parity: Mapping[str, float]
    quantization: Mapping[str, Any] | None = None
    layout: PackageLayout | None = None
    parts: Mapping[Role, str] | None = None
    file: str = MODEL

    @property
    def model(self) -> Path:
        """The ONNX model."""
        return self.directory / self.file


def is_package(directory: str | PathLike[str]) -> bool:
    """Return whether `directory` looks like one that `write_package` wrote."""
    return (Path(directory) / PARITY).is_file() and bool(models_in(Path(directory)))


def read_package(directory: str | PathLike[str]) -> Package:
    """Return what the package in `directory` says of itself.

    Raises
    ------
    CheckpointError
        When there is none, or its record is damaged or of another release.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder with an ONNX package")
    if not is_package(folder):
        missing = MODEL if (folder / PARITY).is_file() else PARITY
        way = (
            "; it is a checkpoint, of which the pass export-onnx{path=package} makes one"
            if (folder / "config.json").is_file()
            else ""
        )
        raise CheckpointError(f"{folder} holds no ONNX package: {missing} is missing{way}")
    try:
        record = json.loads((folder / PARITY).read_text(encoding="utf-8"))
        if (record["format"], record["version"]) != (_FORMAT, _VERSION):
            raise CheckpointError(f"{folder / PARITY} is not of a package that this release reads")
        fields = {field.name for field in dataclasses.fields(Package)} - {"directory"}
        for name in ("quantization", "layout", "parts"):
            record.setdefault(name, None)
        record.setdefault("file", MODEL)
        package = Package(folder, **{name: record[name] for name in fields})
        files = list(package.parts.values()) if package.parts else [package.file]
        if lacking := [file for file in files if not (folder / file).is_file()]:
            raise CheckpointError(f"{folder} holds no ONNX package: {lacking[0]} is missing")
        return package
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / PARITY} is damaged: {first_line(error)}") from error


def write_package(
    program: Program,
    directory: str | PathLike[str],
    *,
    plan: Plan | None = None,
    target: Target | None = None,
    logits: Literal["all", "last"] = "all",
    check: bool = True,
    quantization: Quantization | None = None,
    samples: Sequence[Mapping[str, torch.Tensor]] = (),
    original: Program | None = None,
    layout: PackageLayout | None = None,
    **options: Any,
) -> OnnxReport:
    """Write `program` as a package.

    Parameters
    ----------
    program
        The program; its weights may be on any device but meta.
    directory
        The directory to make; it may exist if it is empty.
    plan
        What was removed and merged to come to `program`.
    target, logits, check, options
        As for `export`; the program that the package holds has the same logits as its model. With
        `check`, the whole protocol of `graphprune.backends.onnx.parity` is run in ONNX Runtime on
        the CPU, whatever the target, and what changes outputs there is not fused.
    quantization
        How weights are quantized; the package's program has the values that they stand for.
    samples
        Batches that the quality of a quantized model is measured on.
    original
        The program before pruning, whose loss on them is measured too.
    layout
        The layout of an encoder-decoder's parts; by default genai's for speech, and optimum's for
        all else. One whose decoder cannot be run token by token is written as a whole call then.
        "browser" puts one model where transformers.js looks for it.

    Raises
    ------
    BackendError
        When the program cannot be exported or the model is not exact, onnxruntime-genai cannot run
        an encoder-decoder whose layout is to be its own.
    OutputError
        When `directory` is not empty or cannot be written. Nothing is left behind.
    UsageError
        When there is no such target or opset, or a layout is named for what has no parts.
    """
    program = last_only(program) if logits == "last" else program
    parts, proven, why_whole = proven_parts(program, _checked(program, layout, quantization))
    if quantization is not None:
        by_token = parts is not None or program.is_decoder
        quantization = quantization.settled(target, by_token=by_token)
    with staged_directory(directory) as staged:
        describe = archive.describe(program)
        if parts is not None:
            report = write_parts(
                program,
                parts,
                staged,
                proven,
                target=target,
                check=check,
                quantization=quantization,
                **options,
            )
        else:
            report = export(
                program,
                staged / MODEL,
                target=target,
                check=FULL if check else False,
                quantization=quantization,
                **options,
            )
        describe(staged, not_in_models(program, models_in(staged), report.quantized))
        notes = [*report.notes, *why_whole, *_write_config(program, staged)]
        forms = forms_in(report.attention)
        quantized = None
        if quantization is not None:
            quantized = {**quantization.to_dict(), "distances": dict(report.quantized)}
            if parts is not None:
                run = parts_run(program, parts.layout, FILES[parts.layout], staged)
            else:
                run = model_run(program, staged / MODEL)
            said = measure(program, run, samples, original) if check else None
            if said is not None:
                keep(said[1], staged)
                quantized["quality"] = said[0].to_dict()
            unknown = "what quantizing costs was not measured: there are no samples"
            notes.append(unknown if said is None else str(said[0]))
        # Where it was not run, it is known by its form: one operator keeps every cache.
        shares = SHARED in report.parity if report.parity else forms in ({"gqa"}, {"static"})
        if parts is not None:
            genai, why = speech_config(program, parts)
        else:
            genai, why = genai_config(program, shares_buffers=shares, target=target)
        if layout == "browser":
            genai, why = None, "the model lies where a browser looks for it"
        if genai is None:
            notes.append(f"no genai_config.json: {why}")
        else:
            _write_json(staged / "genai_config.json", genai)
        file = arrange(staged, program, quantization) if layout == "browser" else MODEL
        if plan:
            plan.save(staged / "plan.json")
        record = {
            "format": _FORMAT,
            "version": _VERSION,
            "target": target,
            "provider": provider_name(target if target in ("cuda", "tensorrt") else "cpu"),
            "dtype": type_name(program.outputs[0].dtype),
            "opset": report.opset,
            "padding": "right" if "gqa" in forms else "both",
            "shares_buffers": shares,
            "attention": dict(report.attention),
            "operators": dict(report.operators),
            "parity": dict(report.parity),
            "quantization": quantized,
            "layout": layout if parts is None else parts.layout,
            "file": file,
            "parts": None if parts is None else FILES[parts.layout],
            "tolerance": tolerance_of(program.outputs[0].dtype),
            "versions": _versions(),
            "notes": notes,
        }
        _write_json(staged / PARITY, record)
        size = sum(path.stat().st_size for path in staged.rglob("*.onnx*"))
    path = str(Path(directory) / file if parts is None else directory)
    return dataclasses.replace(report, path=path, bytes=size, notes=tuple(notes))


def check_package(
    program: Program,
    *,
    target: Target | None,
    opset: int | None,
    layout: PackageLayout | None,
    quantization: Quantization | None,
    settled: bool,
    one_model: bool = False,
) -> None:
    """Refuse what `write_package` cannot do, as far as it is known before any work.

    Where the sizes of `program` are not `settled`, blocks are not tried on them; `one_model` is
    said where a file is written in place of a package.
    """
    check_export(program, target, opset, quantization)
    of_parts = _checked(program, layout, quantization)
    if not one_model and has_parts(program, of_parts) and of_parts:
        check_layout(program, of_parts)
    if quantization is not None and settled:
        check_widths(program, quantization)


def verify_package(directory: str | PathLike[str], *, provider: str | None = None) -> Parity:
    """Prove that the model of a package gives what its program gives, by the whole protocol.

    Parameters
    ----------
    directory
        The package.
    provider
        The execution provider to run it on; by default the CPU's, which runs models of every
        target that are not in bfloat16.

    Returns
    -------
    Parity
        The largest error of each check.

    Raises
    ------
    BackendError
        When ONNX Runtime cannot load the model, or does not run it on `provider`.
    ParityError
        Past tolerance, naming the check and the output, and whether the model without fused
        operators differs as well.
    CheckpointError
        When the package is damaged.
    """
    package = read_package(directory)
    program = archive.load(package.directory, weights_beside(package.directory))
    names, provider = dimension_names(program), provider or CPU
    quantized, folder, layout = package.quantization, package.directory, package.layout
    if package.parts is not None:
        assert layout == "optimum" or layout == "genai"
        ran = verify_parts(
            program, layout, package.parts, folder, provider, quantized=quantized is not None
        )
        run = parts_run(program, layout, package.parts, folder, provider)
    else:
        try:
            ran = compare(
                program,
                package.model,
                names,
                counts=package.padding == "right",
                protocol=FULL,
                provider=provider,
                quantized=quantized is not None,
                static="static" in forms_in(package.attention),
            )
        except ParityError as error:
            raise ParityError(f"{error}; {_without_fused(program, names, provider)}") from error
        run = model_run(program, package.model, provider)
    if quantized is None:
        return ran
    notes = [distances_said(quantized["distances"])]
    if "quality" in quantized and ran.version is not None:
        notes.append(check_quality(quantized["quality"], program, run, folder))
    return dataclasses.replace(ran, notes=(*ran.notes, *notes))


def _without_fused(program: Program, names: Mapping[str, str], provider: str) -> str:
    """Run the same checks where nothing is fused, for whoever looks for the fault."""
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / MODEL
        try:
            export(program, plain, check=False)
            ran = compare(program, plain, names, protocol=FULL, provider=provider)
        except BackendError as error:
            return f"without fused operators: {error}"
        return f"without fused operators the largest error is {ran.max_relative_error or 0:.1e}"


def _checked(
    program: Program, layout: PackageLayout | None, quantization: Quantization | None
) -> Layout | None:
    """Return a layout of parts; None for one of a single model, which is refused for others."""
    if layout == "browser":
        check_browser(program, quantization)
        return None
    return layout


def _write_config(program: Program, folder: Path) -> list[str]:
    """Write the model's config with its new sizes; returns what is to be said of it."""
    if program.source is None:
        return []
    chosen = choose_form(program)
    write_generation_config(program.source, folder / "generation_config.json")
    if chosen.model is not None:
        write_config(chosen.model, folder)
        return []
    with quiet():
        program.source.config.to_json_file(folder / "config.json")
    why = chosen.form.reason
    return [f"config.json has the sizes of the model that was loaded: {why}"]


def _versions() -> dict[str, str]:
    from graphprune.io.version import __version__

    found = {"graphprune": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _write_json(path: Path, data: Any) -> None:
    path.write_text(as_json(data, indent=2) + "\n", encoding="utf-8")
