"""Where a program came from, and each of its nodes: for back ends, messages and reports."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx

from graphprune.ir.aten import printed_name

STANDS_FOR = "stands_for"
"""Key of a node's metadata: the name of a later value in whose place its own is read now."""


def stands_for(node: fx.Node) -> str:
    """Return the name of the value that `node` gives, in the program that it was made of."""
    return str(node.meta.get(STANDS_FOR, node.name))


# -- programs --------------------------------------------------------------------------------------

_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len")
"""What configs call the longest text, the common name first."""


def declared_length(*configs: Mapping[str, Any]) -> int | None:
    """Return the context length that the first of `configs`, in their order, declares."""
    lengths = (config.get(name) for config in configs for name in _LENGTHS)
    return next((n for n in lengths if type(n) is int and n > 0), None)


@dataclass(frozen=True)
class Source:
    """The origin of a program: what a back end needs to speak the model's own format.

    Parameters
    ----------
    config
        The transformers config object of the model (never edited).
    model_class
        The transformers class.
    directory
        The checkpoint directory, whose tokenizer is copied along; None for a model in memory.
    generation_config
        The model's generation config, if it has one.
    stored_dtype
        Element type of the checkpoint on disk, which may be narrower than the program's.
    stored_apart
        Weights that the checkpoint stores in another floating type, by name.
    """

    config: Any
    model_class: type
    directory: Path | None = None
    generation_config: Any = None
    stored_dtype: torch.dtype | None = None
    stored_apart: Mapping[str, torch.dtype] = field(default_factory=dict)

    def stored_type(self, name: str) -> torch.dtype | None:
        """Return the element type that the weight `name` has on disk, as far as is known."""
        return self.stored_apart.get(name, self.stored_dtype)

    @property
    def context_length(self) -> int | None:
        """The longest text that the config declares, in tokens; None where it does not."""
        config = self.config
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else None
        return declared_length({} if text is None else vars(text), vars(config))


# -- nodes -----------------------------------------------------------------------------------------


def module_path(node: fx.Node) -> str:
    """Return the dotted path of the module whose forward made `node` ("" for the model itself)."""
    stack = node.meta.get("nn_module_stack") or {}
    # Sizes that export itself reads off have a mark where a module would be.
    paths = [entry[0] for entry in stack.values() if not entry[0].startswith("_empty_nn_module")]
    return _without_wrapper(paths[-1]) if paths else ""


_LAYER = re.compile(r"(?:.*?\.)?\d+(?=\.|$)")


def layer_of(path: str) -> str:
    """Return the path of the numbered layer that a dotted path leads into, or "".

    Examples
    --------
    >>> layer_of("model.layers.3.mlp"), layer_of("model.norm")
    ('model.layers.3', '')
    """
    found = _LAYER.match(path)
    return found[0] if found else ""


def operator_of(node: fx.Node) -> str:
    """``operator in module`` of a node."""
    return f"{printed_name(node.target)} in {module_path(node) or 'the model'}"


def whereabouts(node: fx.Node) -> str:
    """``operator in module (file:line)`` of a node, or the name of an input or weight."""
    target = node.name if node.op == "placeholder" else printed_name(node.target)
    path, line = module_path(node), source_line(node)
    return f"{target}" + (f" in {path}" if path else "") + (f" ({line})" if line else "")


def source_line(node: fx.Node) -> str:
    """``file:line`` of the code that made `node`, or "" when it is not known."""
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    lines = [line for line in lines if "<eval_with_key>" not in line]  # code that torch makes
    if not lines:
        return ""
    path, line = lines[-1].split(", ")[:2]
    name = path.removeprefix("File ").strip('"')
    parts = Path(name).parts
    start = next((i for i in range(len(parts) - 1, -1, -1) if parts[i] == "site-packages"), -1)
    return f"{'/'.join(parts[start + 1 :] if start >= 0 else parts[-1:])}:{line.split()[-1]}"


def _without_wrapper(path: str) -> str:
    return path.removeprefix("L['self'].").removeprefix("inner.").removeprefix("inner")
