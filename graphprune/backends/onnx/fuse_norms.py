"""Fuse norms, and the residual addition before them, into single operators of ONNX Runtime.

The rules are onnxscript's, which calls them experimental: they are used where they are found. ONNX
Runtime's own fusions at load do not know the spelling that torch's exporter writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx
    import onnx_ir

_NAMED_AS_STANDARD = ("SimplifiedLayerNormalization",)
"""Operators of ONNX Runtime that lie in ONNX's own domain, where ONNX knows none of them."""


def fuse_norms(model: onnx_ir.Model) -> int:
    """Fuse root mean square norms, and sums before them, in place; returns how many norms."""
    try:
        from onnxscript.rewriter.ort_fusions import rms_normalization, skip_normalization

        norms = rms_normalization.fuse_rms_normalization
        skips = skip_normalization.fuse_skip_rms_normalization
    except (ImportError, AttributeError):
        return 0
    count = int(norms(model))
    if count:
        skips(model)
    return count


def as_checked(model: onnx.ModelProto) -> bool:
    """Move operators that ONNX does not know to ONNX Runtime's domain; whether there are any."""
    moved = [node for node in model.graph.node if node.op_type in _NAMED_AS_STANDARD]
    for node in moved:
        node.domain = "com.microsoft"
    if moved and all(entry.domain != "com.microsoft" for entry in model.opset_import):
        model.opset_import.add(domain="com.microsoft", version=1)
    return bool(moved)
