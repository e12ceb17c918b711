"""What the tests of the ONNX back end share: one reading of the exporter's table of functions."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache

import pytest
from torch.onnx._internal.exporter._registration import ONNXRegistry


@pytest.fixture(autouse=True, scope="session")
def one_reading() -> Iterator[None]:
    """Read onnxscript's functions once, a tenth of the time of every export."""
    read = cache(ONNXRegistry.from_torchlib)

    def from_torchlib(*args: object, **options: object) -> ONNXRegistry:
        registry = copy.copy(read(*args, **options))
        registry.functions = {op: list(of) for op, of in registry.functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))
        yield
