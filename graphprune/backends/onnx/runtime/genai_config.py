"""The ``genai_config.json`` by which onnxruntime-genai runs a decoder.

Reference: https://onnxruntime.ai/docs/genai/reference/config.html. Sizes of caches are read from
the model there, so that layers may differ in their KV heads (onnxruntime-genai 0.18).
"""

from __future__ import annotations

import re
from typing import Any

from graphprune.backends.onnx.attention.forms import Target
from graphprune.backends.onnx.dimension_names import output_names
from graphprune.ir.program import PAST, PRESENT, Program

_INPUTS = ("input_ids", "attention_mask")


def genai_config(
    program: Program, *, shares_buffers: bool, target: Target | None = None
) -> tuple[dict[str, Any] | None, str]:
    """Return the config of a decoder, or None and why onnxruntime-genai cannot run it.

    Parameters
    ----------
    program
        The program.
    shares_buffers
        Whether each past and present may be one buffer.
    target
        What runs the model.
    """
    source = program.source
    if source is None or not program.is_decoder:
        return None, "it is not a decoder with a cache"
    own = [value.name for value in program.inputs if not value.name.startswith(PAST)]
    if set(own) != set(_INPUTS):
        return None, f"it takes {', '.join(own)}"
    caches = [value for value in program.inputs if value.name.startswith(PAST)]
    layers = sorted({int(match[1]) for c in caches if (match := _layer(c.name))})
    plain = {f"{PAST}{layer}.{kind}" for layer in layers for kind in ("key", "value")}
    if layers != list(range(len(layers))) or {cache.name for cache in caches} != plain:
        return None, "not every layer has a cache of keys and values"
    shapes = {cache.name: cache.shape for cache in caches}
    for layer in layers:
        of_key, of_value = (shapes[f"{PAST}{layer}.{kind}"][3] for kind in ("key", "value"))
        if of_key != of_value:
            return None, f"keys have size {of_key} and values {of_value}: it keeps both alike"
    logits = program.outputs[0]
    if logits.name != "logits" or len(logits.shape) != 3 or not logits.dtype.is_floating_point:
        return None, f"its first output, {logits.name}, is not logits"
    config = source.config.get_text_config(decoder=True)
    generation = source.generation_config
    ids = {
        name: named_token(name, generation, config)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    if ids["eos_token_id"] is None:
        return None, "neither its config nor its generation config names a token that ends a text"
    ends = ids["eos_token_id"]
    ends = list(ends) if isinstance(ends, list | tuple) else [ends]
    pad = ids["pad_token_id"]
    length = program.context_length or 2048
    heads, sizes = zip(*((int(c.shape[1]), int(c.shape[3])) for c in caches), strict=True)
    model: dict[str, Any] = {
        "type": "decoder",
        "eos_token_id": ends,
        "pad_token_id": ends[0] if pad is None else pad,
        "vocab_size": int(logits.shape[2]),
        "context_length": length,
        "decoder": {
            "filename": "model.onnx",
            "head_size": max(sizes),
            "hidden_size": int(config.hidden_size),
            "num_attention_heads": int(config.num_attention_heads),
            "num_hidden_layers": len(layers),
            "num_key_value_heads": max(heads),
            "session_options": {"log_id": "graphprune", "provider_options": _provider(target)},
            "inputs": {
                **{name: name for name in _INPUTS},
                "past_key_names": f"{PAST}%d.key",
                "past_value_names": f"{PAST}%d.value",
            },
            "outputs": {
                "logits": output_names(program)[0],
                "present_key_names": f"{PRESENT}%d.key",
                "present_value_names": f"{PRESENT}%d.value",
            },
        },
    }
    if isinstance(ids["bos_token_id"], int):
        model["bos_token_id"] = ids["bos_token_id"]
    search: dict[str, Any] = {
        "max_length": length,
        "past_present_share_buffer": shares_buffers,
        "do_sample": bool(getattr(generation, "do_sample", False)),
    }
    for name in ("temperature", "top_k", "top_p", "repetition_penalty"):
        value = getattr(generation, name, None)
        if value is not None:
            search[name] = value
    return {"model": model, "search": search}, ""


def _layer(name: str) -> re.Match[str] | None:
    return re.fullmatch(rf"{re.escape(PAST)}(\d+)\.\w+", name)


def named_token(name: str, *configs: Any) -> Any:
    """Return a token's number from the first of `configs` that names it."""
    return next((v for c in configs if (v := getattr(c, name, None)) is not None), None)


def _provider(target: Target | None) -> list[dict[str, dict[str, str]]]:
    if target == "cuda":
        return [{"cuda": {"enable_cuda_graph": "0"}}]
    if target == "tensorrt":
        return [{"tensorrt": {}}]
    return []
