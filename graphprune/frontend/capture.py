"""The entry to the front end: a model becomes a `Program` through `torch.export`.

Nothing is traced symbolically: `torch.export` (non-strict) runs the model's own code and records
where every node came from. A transformers decoder is captured once, with its KV cache as inputs and
outputs and with batch, new and past lengths dynamic; that one graph then serves scoring,
verification, rewriting and export. Models on the meta device are captured without weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from graphprune.errors import UsageError
from graphprune.frontend.branches import export_along_example
from graphprune.frontend.plain_modules import capture_call
from graphprune.frontend.torch_export import evaluation_mode
from graphprune.frontend.transformers_models import capture_transformers, is_transformers_model
from graphprune.ir.program import Program


def capture(
    model: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    cache: bool | None = None,
    along_example: bool = False,
) -> Program:
    """Capture `model` into a program that shares its weights.

    Parameters
    ----------
    model
        A transformers model, or any `nn.Module`; may be on the meta device. It is captured in
        evaluation mode and left as it was.
    example_inputs
        Positional (a sequence) or keyword (a mapping) inputs. Not needed for transformers models,
        for which they follow from the config.
    dynamic_shapes
        As for `torch.export.export`; without it the first dimension of every example is dynamic
        where the model allows it.
    cache
        Whether a decoder is captured with its KV cache; by default it is wherever it has one.
    along_example
        Whether a model that branches on data is captured along the path that its example takes.
        The program is wrong for inputs that would take another path, and a note says where that is.

    Raises
    ------
    CaptureError
        When `torch.export` refuses, naming the module and line that it named.
    UsageError
        When a module that is no transformers model comes without example inputs.
    """
    follow = [export_along_example] if along_example else []
    with evaluation_mode(model):
        if example_inputs is not None:
            return capture_call(model, example_inputs, dynamic_shapes, follow=follow).limited()
        if not is_transformers_model(model):
            raise UsageError(
                f"{type(model).__name__} is no transformers model: give example_inputs"
            )
        return capture_transformers(model, cache, follow=follow)
