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
    from graphprune.backends.onnx.runtime.runner import OnnxRunner
    from graphprune.calibration.data import Calibration
    from graphprune.errors import GraphPruneError, VerificationError
    from graphprune.evaluation.perplexity import perplexity
    from graphprune.frontend.capture import capture
    from graphprune.io import reference
    from graphprune.ir.program import Program
    from graphprune.pipeline.pipeline import Pipeline
    from graphprune.plan.plan import Plan
    from graphprune.transforms.apply import apply_plan as apply
    from graphprune.verification.verify import verify

_HOMES = {
    "Calibration": "graphprune.calibration.data:Calibration",
    "Coupling": "graphprune.analysis.coupling:Coupling",
    "GraphPruneError": "graphprune.errors:GraphPruneError",
    "OnnxRunner": "graphprune.backends.onnx.runtime.runner:OnnxRunner",
    "Pipeline": "graphprune.pipeline.pipeline:Pipeline",
    "Plan": "graphprune.plan.plan:Plan",
    "Program": "graphprune.ir.program:Program",
    "VerificationError": "graphprune.errors:VerificationError",
    "analyze": "graphprune.analysis.coupling:analyze",
    "apply": "graphprune.transforms.apply:apply_plan",
    "capture": "graphprune.frontend.capture:capture",
    "load": "graphprune.backends.load:load",
    "perplexity": "graphprune.evaluation.perplexity:perplexity",
    "reference": "graphprune.io.reference",
    "verify": "graphprune.verification.verify:verify",
}
"""Public name -> where it is defined, as an entry point writes it."""

__all__ = [
    "Calibration",
    "Coupling",
    "GraphPruneError",
    "OnnxRunner",
    "Pipeline",
    "Plan",
    "Program",
    "VerificationError",
    "__version__",
    "analyze",
    "apply",
    "capture",
    "load",
    "perplexity",
    "reference",
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
