"""graphprune: a compiler that makes neural networks smaller.

A model is captured into a `torch.fx` graph, an analysis finds which slices of which weights are
coupled, passes prune and merge them, a verifier proves each step, and back ends write a Hugging
Face checkpoint and an ONNX model. Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Calibration": "graphprune.calibration",
    "Coupling": "graphprune.coupling",
    "GraphPruneError": "graphprune.errors",
    "OnnxRunner": "graphprune.backends.onnx_runner",
    "Pipeline": "graphprune.pipeline",
    "Plan": "graphprune.plan",
    "Program": "graphprune.program",
    "VerificationError": "graphprune.errors",
    "analyze": "graphprune.coupling",
    "capture": "graphprune.capture",
    "load": "graphprune.loading",
    "perplexity": "graphprune.evaluate",
    "verify": "graphprune.verify",
}
"""Public name -> the module that defines it."""

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'graphprune' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """This package: `graphprune.capture` stays a function when its module is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system binds every sub-module it loads as an attribute of its package.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
