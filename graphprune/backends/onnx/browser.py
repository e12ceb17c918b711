"""The layout in which transformers.js finds a model: ``onnx/model.onnx``, or ``model_q4.onnx``.

The library fills empty caches by the names of sizes, and knows that of the batch as ``batch_size``.

Reference: transformers.js 4 (its data types and the suffixes of their files).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from graphprune.backends.onnx.encoder_decoder.anatomy import is_encoder_decoder
from graphprune.backends.onnx.weights.held import MODEL
from graphprune.backends.onnx.weights.quantize import Quantization
from graphprune.backends.onnx.weights.widths import picked_from
from graphprune.errors import BackendError
from graphprune.ir.program import Program

FOLDER = "onnx"
_SUFFIXES = {"int4": "_q4", "int8": "_quantized"}


def check_browser(program: Program, quantization: Quantization | None) -> None:
    """Refuse a program that transformers.js (4) or onnxruntime-web (1.30) takes no model of.

    Raises
    ------
    BackendError
        When it is an encoder-decoder, or rows of quantized weights would be picked.
    """
    if is_encoder_decoder(program):
        raise BackendError(
            "transformers.js takes an encoder-decoder whose decoder is one model with a branch for "
            "the first tokens, which is not written: layout=optimum writes two"
        )
    if quantization is not None and (names := picked_from(program, quantization)):
        raise BackendError(
            f"onnxruntime-web picks no rows of quantized weights, as of {names[0]}: give "
            "embedding=float, and head=float where it is the same matrix"
        )


def arrange(folder: Path, program: Program, quantization: Quantization | None) -> str:
    """Move the model in `folder` to where transformers.js looks; returns its file from there on."""
    import onnx

    half = program.outputs[0].dtype == torch.float16
    suffix = "_fp16" if half else ""
    if quantization is not None:
        suffix = _SUFFIXES[quantization.weights] + ("f16" if half else "")
    name = f"model{suffix}.onnx"
    (folder / FOLDER).mkdir()
    model = onnx.load(folder / MODEL, load_external_data=False)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param == "batch":
                size.dim_param = "batch_size"
    data = folder / f"{MODEL}.data"
    if data.is_file():
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = f"{name}_data"
        data.rename(folder / FOLDER / f"{name}_data")
        _say_external(folder / "config.json")
    onnx.save(model, folder / FOLDER / name)
    (folder / MODEL).unlink()
    return f"{FOLDER}/{name}"


def _say_external(path: Path) -> None:
    """Say in a config that weights lie beside the model."""
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        config["transformers.js_config"] = {"use_external_data_format": True}
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
