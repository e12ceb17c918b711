"""A Llama of a few thousand weights whose tokens are bytes, saved as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS = 1
"""The token that a tokenizer of `byte_tokenizer` begins with, where it does."""

CHAT = "{% for message in messages %}{{ message.role[0] }}:{{ message.content }};{% endfor %}"


def byte_tokenizer(*, begins: bool = False, chats: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, which may begin every text with `BOS` and may have a chat template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if begins:
        token = letters[BOS]
        inner.post_processor = processors.TemplateProcessing(
            single=f"{token} $A", special_tokens=[(token, BOS)]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    if begins:
        tokenizer.bos_token = letters[BOS]
    if chats:
        tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + CHAT
    return tokenizer


def byte_llama(**changes: Any) -> LlamaForCausalLM:
    settings = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def save_checkpoint(directory: Path) -> Path:
    byte_llama().save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory
