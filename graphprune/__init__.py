"""graphprune: a compiler that makes neural networks smaller.

A model is captured into a `torch.fx` graph, an analysis finds which slices of which weights are
coupled, passes prune and merge them, a verifier proves each step, and back ends write a Hugging
Face checkpoint and an ONNX model. Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from graphprune.io.version import __version__

if TYPE_CHECKING:
    from graphprune.analysis.coupling import Coupling, analyze
    from graphprune.backends.load import load
    from graphprune.backends.onnx.encoder_decoder.runner import EncoderDecoderRunner
    from graphprune.backends.onnx.runtime.runner import OnnxRunner
    from graphprune.calibration.data import Calibration
    from graphprune.errors import GraphPruneError, VerificationError
    from graphprune.evaluation.ablation import sensitivity
    from graphprune.evaluation.perplexity import perplexity
    from graphprune.evaluation.sweep import sweep
    from graphprune.frontend.capture import capture
    from graphprune.io import reference
    from graphprune.ir.program import Program
    from graphprune.passes.export_onnx import ExportOnnx
    from graphprune.passes.merge_kv_heads import MergeKvHeads
    from graphprune.passes.print import Print
    from graphprune.passes.prune import Prune
    from graphprune.passes.reconstruct import Reconstruct
    from graphprune.passes.recover import Recover
    from graphprune.passes.reestimate_norms import ReestimateNorms
    from graphprune.passes.save_pretrained import SavePretrained
    from graphprune.passes.sparsify import Sparsify
    from graphprune.passes.verify import Verify
    from graphprune.pipeline.pass_manager import Result
    from graphprune.pipeline.pipeline import Pipeline
    from graphprune.pipeline.report import Report
    from graphprune.plan.plan import Plan
    from graphprune.search.compress import compress
    from graphprune.transforms.apply import apply_plan as apply
    from graphprune.verification.verify import verify

_HOMES = {
    "Calibration": "graphprune.calibration.data:Calibration",
    "Coupling": "graphprune.analysis.coupling:Coupling",
    "EncoderDecoderRunner": "graphprune.backends.onnx.encoder_decoder.runner:EncoderDecoderRunner",
    "ExportOnnx": "graphprune.passes.export_onnx:ExportOnnx",
    "GraphPruneError": "graphprune.errors:GraphPruneError",
    "MergeKvHeads": "graphprune.passes.merge_kv_heads:MergeKvHeads",
    "OnnxRunner": "graphprune.backends.onnx.runtime.runner:OnnxRunner",
    "Pipeline": "graphprune.pipeline.pipeline:Pipeline",
    "Plan": "graphprune.plan.plan:Plan",
    "Print": "graphprune.passes.print:Print",
    "Program": "graphprune.ir.program:Program",
    "Prune": "graphprune.passes.prune:Prune",
    "Reconstruct": "graphprune.passes.reconstruct:Reconstruct",
    "Recover": "graphprune.passes.recover:Recover",
    "ReestimateNorms": "graphprune.passes.reestimate_norms:ReestimateNorms",
    "Report": "graphprune.pipeline.report:Report",
    "Result": "graphprune.pipeline.pass_manager:Result",
    "SavePretrained": "graphprune.passes.save_pretrained:SavePretrained",
    "Sparsify": "graphprune.passes.sparsify:Sparsify",
    "VerificationError": "graphprune.errors:VerificationError",
    "Verify": "graphprune.passes.verify:Verify",
    "analyze": "graphprune.analysis.coupling:analyze",
    "apply": "graphprune.transforms.apply:apply_plan",
    "capture": "graphprune.frontend.capture:capture",
    "compress": "graphprune.search.compress:compress",
    "load": "graphprune.backends.load:load",
    "perplexity": "graphprune.evaluation.perplexity:perplexity",
    "reference": "graphprune.io.reference",
    "sensitivity": "graphprune.evaluation.ablation:sensitivity",
    "sweep": "graphprune.evaluation.sweep:sweep",
    "verify": "graphprune.verification.verify:verify",
}
"""Public name -> where it is defined, as an entry point writes it."""

__all__ = [
    "Calibration",
    "Coupling",
    "EncoderDecoderRunner",
    "ExportOnnx",
    "GraphPruneError",
    "MergeKvHeads",
    "OnnxRunner",
    "Pipeline",
    "Plan",
    "Print",
    "Program",
    "Prune",
    "Reconstruct",
    "Recover",
    "ReestimateNorms",
    "Report",
    "Result",
    "SavePretrained",
    "Sparsify",
    "VerificationError",
    "Verify",
    "__version__",
    "analyze",
    "apply",
    "capture",
    "compress",
    "load",
    "perplexity",
    "reference",
    "sensitivity",
    "sweep",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'graphprune' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    value: Any = import_module(module)
    if attribute:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
