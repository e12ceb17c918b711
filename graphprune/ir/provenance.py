"""Where a node came from: module, layer and source line, for messages and reports."""

from __future__ import annotations

import re
from pathlib import Path

from torch import fx

from graphprune.ir.aten import printed_name


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
    if not lines:
        return ""
    path, line = lines[-1].split(", ")[:2]
    name = path.removeprefix("File ").strip('"')
    parts = Path(name).parts
    start = next((i for i in range(len(parts) - 1, -1, -1) if parts[i] == "site-packages"), -1)
    return f"{'/'.join(parts[start + 1 :] if start >= 0 else parts[-1:])}:{line.split()[-1]}"


def _without_wrapper(path: str) -> str:
    return path.removeprefix("L['self'].").removeprefix("inner.").removeprefix("inner")
