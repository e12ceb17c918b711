"""The ``genai_config.json`` by which onnxruntime-genai turns speech into text.

Reference: https://onnxruntime.ai/docs/genai/reference/config.html, for the type "whisper".
"""

from __future__ import annotations

from typing import Any

from graphprune.backends.onnx.encoder_decoder.parts import FILES, Parts
from graphprune.backends.onnx.runtime.genai_config import named_token
from graphprune.ir.program import Program
from graphprune.ir.provenance import declared_length


def speech_config(program: Program, parts: Parts) -> tuple[dict[str, Any] | None, str]:
    """Return the config of a model's parts, or None and why onnxruntime-genai cannot run them."""
    source = program.source
    if parts.layout != "genai":
        return None, parts.not_genai or f"its layout is {parts.layout}'s"
    if source is None:
        return None, "its config is unknown"
    config, generation = source.config, source.generation_config
    ends = named_token("eos_token_id", generation, config)
    if ends is None:
        return None, "neither its config nor its generation config names a token that ends a text"
    ends = list(ends) if isinstance(ends, list | tuple) else [ends]
    pad = named_token("pad_token_id", generation, config)
    start = named_token("decoder_start_token_id", generation, config)
    length = declared_length(vars(config)) or 448
    caches = {
        kind: [v for v in parts.programs["next"].inputs if v.name.startswith(f"past_key_{kind}")]
        for kind in ("self", "cross")
    }

    def described(role: Any, kind: str, inputs: dict[str, str], outputs: dict[str, str]) -> Any:
        heads, sizes = zip(*((int(v.shape[1]), int(v.shape[3])) for v in caches[kind]), strict=True)
        return {
            "filename": FILES["genai"][role],
            "head_size": max(sizes),
            "hidden_size": int(config.hidden_size),
            "num_attention_heads": max(heads),
            "num_key_value_heads": max(heads),
            "num_hidden_layers": len(heads),
            "session_options": {"log_id": "graphprune", "provider_options": []},
            "inputs": inputs,
            "outputs": outputs,
        }

    decoder = described(
        "next",
        "self",
        {
            "input_ids": "input_ids",
            "past_key_names": "past_key_self_%d",
            "past_value_names": "past_value_self_%d",
            "cross_past_key_names": "past_key_cross_%d",
            "cross_past_value_names": "past_value_cross_%d",
        },
        {
            "logits": program.outputs[0].name,
            "present_key_names": "present_key_self_%d",
            "present_value_names": "present_value_self_%d",
        },
    )
    encoder = described(
        "encoder",
        "cross",
        {"audio_features": "audio_features"},
        {
            "encoder_hidden_states": "encoder_hidden_states",
            "cross_present_key_names": "present_key_cross_%d",
            "cross_present_value_names": "present_value_cross_%d",
        },
    )
    model: dict[str, Any] = {
        "type": "whisper",
        "bos_token_id": start if isinstance(start, int) else ends[0],
        "eos_token_id": ends,
        "pad_token_id": ends[0] if pad is None else pad,
        "vocab_size": int(program.outputs[0].shape[2]),
        "context_length": length,
        "encoder": encoder,
        "decoder": decoder,
    }
    search = {
        "max_length": length,
        "past_present_share_buffer": False,
        "do_sample": False,
        "num_beams": 1,
    }
    return {"model": model, "search": search}, ""
