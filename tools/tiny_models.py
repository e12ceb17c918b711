"""Tiny random models of every type that transformers registers, built from their configs alone.

A config is shrunk by the names of its fields, which families share; where that does not give a
model that runs, `FIELDS` holds values for the type. All of it is data about configs.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from graphprune.frontend.example_inputs import example_of

VOCABULARY = 96

TASKS = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq-lm": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "speech-encoder": "MODEL_FOR_CTC_MAPPING_NAMES",
    "speech-seq2seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
}
"""Task -> the mapping of transformers' auto classes that lists its types."""

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "dim": 32,
    "embed_dim": 32,
    "embedding_size": 32,
    "word_embed_proj_dim": 32,
    "emb_dim": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "d_ff": 48,
    "d_inner": 48,
    "n_inner": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "moe_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "kv_channels": 8,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "n_ctx": 64,
    "max_seq_len": 64,
    "max_source_positions": 64,
    "max_target_positions": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "sliding_window": 4,
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_n_groups": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "chunk_size": 8,
    "depths": 1,
    "depth": 1,
    "hidden_sizes": [16, 32, 48, 64, 80],
    "embed_dims": [16, 32, 48, 64],
    "conv_dim": 16,
    "conv_channels": 16,
    "conv_depthwise_kernel_size": 5,
    "conv_kernel_size": 5,
    "subsampling_conv_channels": 16,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 32,
    "output_hidden_size": 32,
    "codevector_dim": 16,
    "proj_codevector_dim": 16,
    "num_codevectors_per_group": 8,
    "tdnn_dim": 16,
    "xvector_output_dim": 16,
    "context_size": 16,
    "input_dim": 16,
    "input_feat_per_channel": 16,
    "feature_projection_input_dim": 16,
    "left_max_position_embeddings": 8,
    "position_buckets": 8,
    "speech_encoder_layers": 2,
    "speech_encoder_attention_heads": 4,
    "speech_encoder_intermediate_size": 48,
    "encoder_num_hidden_layers": 2,
    "decoder_num_hidden_layers": 2,
    "encoder_num_attention_heads": 4,
    "decoder_num_attention_heads": 4,
    "encoder_num_key_value_heads": 4,
    "decoder_num_key_value_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "num_mel_bins": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "decoder_start_token_id": 2,
    "blank_token_id": 6,
    "image_token_id": 3,
    "audio_token_id": 4,
    "video_token_id": 5,
    "layerdrop": 0.0,
    "num_labels": 5,
}
"""Field of a config -> a small value, wherever a config has that field."""

_STAGES = {"depths": [1, 2], "num_heads": [2, 4], "embed_dim": 16}
_WINDOWS = {**_STAGES, "patch_size": 2, "window_size": 4}
_SPEECH_CONFORMER = {
    "hidden_dim": 32,
    "dim_head": 8,
    "output_dim": 12,
    "max_pos_emb": 32,
}
_TOKENIZER = {"num_filters": 4, "downsampling_ratios": [2, 4], "depths": [1, 1, 1]}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_MLA = {"num_key_value_heads": 4}

FIELDS: dict[str, dict[str, Any]] = {
    "axk1": _MLA,
    "axk2": _MLA,
    "bailing_hybrid": {**_MLA, **_HYBRID},
    "bamba": {"attn_layer_indices": [1]},
    "bit": {"num_groups": 4, "embedding_size": 16},
    "blip_2_qformer": {"encoder_hidden_size": 32},
    "blt": {"num_hidden_layers": 2, "encoder_hash_byte_group_vocab": 64},
    "blt_local_decoder": {"hidden_size_global": 32},
    "blt_local_encoder": {"hidden_size_global": 32},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "convnext": {"patch_size": 2},
    "convnextv2": {"patch_size": 2},
    "cvt": {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_top_k": 2, "hidden_size": 32},
    },
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "deepseek_v32": _MLA,
    "dia_decoder": {
        "cross_num_attention_heads": 4,
        "cross_num_key_value_heads": 4,
        "cross_head_dim": 8,
        "cross_hidden_size": 32,
    },
    "donut-swin": _WINDOWS,
    "dots3_note_audio_encoder": {
        "num_key_value_heads": 4,
        "downsample_hidden_size": 16,
        "adapter_input_size": 32,
        "adapter_out_dim": 32,
        "conv_output_size": 256,
    },
    "dots3_note_text": {
        **_MLA,
        "per_layer_config": {},
        "index_topk": 4,
        "index_head_dim": 16,
        "index_n_heads": 4,
    },
    "dots3_note_vision_encoder": {
        "per_layer_config": {},
        "adapter_in_dim": 32,
        "adapter_out_dim": 32,
    },
    "efficientnet": {"width_coefficient": 0.1, "depth_coefficient": 0.3, "hidden_dim": 128},
    "esmc": _MLA,
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16},
    "focalnet": {"embed_dim": 16, "focal_levels": [2] * 4},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "gemma3n_text": {
        "intermediate_size": 48,
        "num_kv_shared_layers": 0,
        "num_hidden_layers": 5,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
    },
    "gemma4_text": {
        "num_hidden_layers": 6,
        "global_head_dim": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
    },
    "glm4_moe_lite": _MLA,
    "glm_moe_dsa": _MLA,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granite_speech5_encoder": _MLA,
    "granite_speech_encoder": _SPEECH_CONFORMER,
    "granite_speech_plus_encoder": _SPEECH_CONFORMER,
    "granitemoehybrid": _HYBRID,
    "hgnet_v2": {
        "embedding_size": 16,
        "stem_channels": [3, 8, 16],
        "stage_in_channels": [16, 16, 32, 48],
        "stage_mid_channels": [8, 8, 16, 16],
        "stage_out_channels": [16, 32, 48, 64],
        "stage_num_blocks": [1, 1, 2, 1],
        "stage_numb_of_layers": [2, 2, 2, 2],
    },
    "hiera": {"embed_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**_MLA, **_HYBRID, "linear_head_dim": 8, "linear_num_heads": 4},
    "kyutai_speech_to_text": {
        "num_codebooks": 4,
        "codebook_vocab_size": 32,
        "audio_pad_token_id": 224,
    },
    "levit": {
        "image_size": 64,
        "patch_size": 16,
        "hidden_sizes": [16, 32, 48],
        "num_attention_heads": [2, 4, 6],
        "key_dim": [8, 8, 8],
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"num_hidden_layers": 4},
    "longcat_flash": _MLA,
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "masked-lm:reformer": {"is_decoder": False},
    "mimi": {"upsample_groups": 4, "num_filters": 4, "codebook_dim": 16, "codebook_size": 32},
    "minicpm3": _MLA,
    "mobilebert": {"hidden_size": 48, "true_hidden_size": 32, "intra_bottleneck_size": 32},
    "mobilenet_v1": {"depth_multiplier": 0.125},
    "mobilenet_v2": {"depth_multiplier": 0.125},
    "mobilevit": {
        "hidden_sizes": [16, 24, 32],
        "neck_hidden_sizes": [16, 16, 24, 32, 40, 48, 64],
        "patch_size": 2,
    },
    "mobilevitv2": {
        "image_size": 64,
        "patch_size": 2,
        "width_multiplier": 0.125,
        "n_attn_blocks": [1, 1, 1],
    },
    "moonshine_streaming": {"num_key_value_heads": 4},
    "moonshine_streaming_encoder": {
        "num_key_value_heads": 4,
        "sliding_windows": [[16, 4], [16, 0]],
    },
    "nemotron3_diarization": {"head_config": {"audio_hidden_size": 32}},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mlp", "moe"],
        "n_groups": 1,
        "moe_shared_expert_intermediate_size": 16,
    },
    "neomme": {"per_layer_config": {}, "head_dim": 16},
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2, "expert_capacity": 64},
    "perceiver": {
        "num_latents": 8,
        "d_latents": 32,
        "num_self_attends_per_block": 1,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
    },
    "phi4_multimodal": {"vision_config": {"hidden_size": 32, "image_size": 32, "patch_size": 8}},
    "pp_lcnet": {"scale": 0.25, "class_expand": 64},
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_5_text": _HYBRID,
    "qwen3_asr_encoder": {"downsample_hidden_size": 16, "output_dim": 32},
    "qwen3_next": _HYBRID,
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 64},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 4,
    },
    "regnet": {"groups_width": 8},
    "roc_bert": {"pronunciation_vocab_size": VOCABULARY, "shape_vocab_size": VOCABULARY},
    "shieldgemma2": {"yes_token_index": 6, "no_token_index": 7},
    "swin": _WINDOWS,
    "swinv2": {**_WINDOWS, "pretrained_window_sizes": [0, 0]},
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "textnet": {"stem_out_channels": 16},
    "vibevoice_acoustic_tokenizer": _TOKENIZER,
    "vibevoice_acoustic_tokenizer_encoder": _TOKENIZER,
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "chunk_size": 64},
    "xmod": {"default_language": "en_XX"},
    "youtu": _MLA,
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
"""Model type (after its task, where that matters) -> fields whose values above do not fit it."""


def types_of(task: str) -> list[str]:
    """Every model type that transformers registers for `task`, sorted."""
    from transformers.models.auto import modeling_auto

    return sorted(getattr(modeling_auto, TASKS[task]))


def tiny_config(model_type: str, fields: Mapping[str, Any] | None = None) -> Any:
    """Make the config of a tiny model of `model_type`, with the values of `fields` in front."""
    from transformers import CONFIG_MAPPING

    return _shrunk(CONFIG_MAPPING[model_type], fields or {})


def _shrunk(config_class: Any, fields: Mapping[str, Any]) -> Any:
    names = inspect.signature(config_class.__init__).parameters
    try:
        default = config_class()
    except Exception:  # noqa: BLE001 - some configs have no defaults that fit together
        default = None
    held = {} if default is None else vars(default)
    values = {name: _like(held.get(name), value) for name, value in SMALL.items() if name in names}
    values |= {**FIELDS.get(config_class.model_type, {}), **fields}
    for name in getattr(config_class, "sub_configs", {}):
        if name in names and (held.get(name) is not None or name in values):
            inner = type(held[name]) if name in held else config_class.sub_configs[name]
            values[name] = _shrunk(inner, values.get(name, {}))
    return config_class(**values)


def _like(default: Any, value: Any) -> Any:
    """`value` for as many stages as `default` is a list for; `default` where it is a number."""
    if isinstance(default, list | tuple):
        return value[: len(default)] if isinstance(value, list) else [value] * len(default)
    return default if isinstance(value, list) else value


def tiny_model(task: str, model_type: str) -> nn.Module:
    """Make a tiny model with random weights, the same each time, in evaluation mode."""
    import transformers
    from transformers.models.auto import modeling_auto

    name = getattr(modeling_auto, TASKS[task])[model_type]
    name = name if isinstance(name, str) else name[0]
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    config = tiny_config(model_type, FIELDS.get(f"{task}:{model_type}"))
    if not isinstance(config, model_class.config_class):  # of a model with other inputs beside text
        config = config.get_text_config(decoder=True)
    model = perturb(model_class(config))
    _count_statistics(model)
    return model


def perturb(model: nn.Module) -> nn.Module:
    """Move every parameter and running statistic of `model` by a random amount.

    No norm, bias or statistic is then the initial one or zero, so that a slip in any of them shows.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand_like(buffer) * 0.2)
    return model.eval()


def _count_statistics(model: nn.Module) -> None:
    """Give every batch normalisation the statistics of random inputs.

    With any others signals fade from layer to layer, until the outputs depend on no weight.
    """
    norms = [each for each in model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    inputs = {name: torch.cat([of] * 8) for name, of in example_of(model).inputs.items()}
    for value in inputs.values():
        if value.is_floating_point():
            value.normal_()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = None  # the mean over all calls, of which there is one
        norm.reset_running_stats()
    with torch.no_grad():
        model(**inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum
