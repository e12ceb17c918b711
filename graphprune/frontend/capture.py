"""The entry to the front end: `capture` makes a `Program` of a model, through `torch.export`.

Nothing is traced symbolically: `torch.export` (non-strict) runs the model's own code and records
where every node came from. A transformers decoder is captured once, with its KV cache as inputs and
outputs and with batch, new and past lengths dynamic; that one graph then serves scoring,
verification, rewriting and export. Models on the meta device are captured without weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from graphprune.errors import CaptureError, UsageError, refuse_other
from graphprune.frontend.branches import export_along_example
from graphprune.frontend.plain_modules import capture_call
from graphprune.frontend.torch_export import Follow, evaluation_mode
from graphprune.frontend.transformers_models import (
    capture_transformers,
    capture_transformers_call,
    is_transformers_model,
)
from graphprune.ir.program import Program
from graphprune.weights.dispatched import gathered
from graphprune.weights.placement import Placement


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
        A transformers model, or any `nn.Module`; may be on the meta device, or spread over devices,
        memory and disk by accelerate (``device_map``). It is captured in evaluation mode and left
        as it was.
    example_inputs
        Positional (a sequence) or keyword (a mapping) inputs. Not needed for transformers models,
        for which they follow from the config.
    dynamic_shapes
        As for `torch.export.export`; without it the first dimension of every example, and all
        dimensions of an example with fewer than four, are dynamic where the model allows it. What
        became fixed or limited stands in the program's notes.
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
    model = _bare(model)
    follow = [export_along_example] if along_example else []
    try:
        with gathered(model) as device, evaluation_mode(model):
            if example_inputs is not None:
                program = _capture_example(model, example_inputs, dynamic_shapes, follow)
            elif is_transformers_model(model):
                program = capture_transformers(model, cache, follow=follow)
            else:
                raise UsageError(
                    f"{type(model).__name__} is no transformers model: give example_inputs"
                )
        return program if device is None else replace(program, placement=Placement(device))
    except CaptureError as error:
        if not isinstance(error.__cause__, GuardOnDataDependentSymNode):
            raise
        why = error.last_attempt if along_example else ""
        if not along_example:
            try:
                capture(
                    model,
                    example_inputs,
                    dynamic_shapes=dynamic_shapes,
                    cache=cache,
                    along_example=True,
                )
            except CaptureError as again:
                why = again.last_attempt or str(again)
        way = (
            f"along its example it fails too: {why}; give what its code works out there from "
            "values as an input, or capture the modules around it"
            if why
            else "along_example=True captures the path that the example takes"
        )
        refused = CaptureError(f"{error}; {way}")
        refused.last_attempt = why
        raise refused from error.__cause__


def _capture_example(
    model: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any],
    dynamic_shapes: Any,
    follow: Sequence[Follow],
) -> Program:
    if is_transformers_model(model):
        return capture_transformers_call(model, example_inputs, dynamic_shapes, follow=follow)
    return capture_call(model, example_inputs, dynamic_shapes, follow=follow).limited()


def _bare(model: nn.Module) -> nn.Module:
    """Return the module that is run, without what torch wraps around it; refuse what is no code."""
    name = type(model).__name__
    if isinstance(model, torch.export.ExportedProgram):
        raise CaptureError("an ExportedProgram is captured already: give the module it was made of")
    parts = model.named_modules() if isinstance(model, nn.Module) else ()
    for path, part in parts:
        if isinstance(part, torch.jit.ScriptModule):
            what = f"{path} of {name}" if path else name
            raise CaptureError(f"{what} is TorchScript: give the module that it was made of")
    if isinstance(model, fx.GraphModule) and "_guards_fn" in dict(model.named_children()):
        raise CaptureError(f"{name} is an exported graph: give the module that it was made of")
    refuse_other(model, than=nn.Module, how="give a model; graphprune.load(DIR) reads a checkpoint")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return _bare(model.module)
    if isinstance(inner := model._modules.get("_orig_mod"), nn.Module):  # torch.compile
        return _bare(inner)
    adapted = next((m for m in model.modules() if type(m).__module__.startswith("peft.")), None)
    if adapted is not None:
        prompts = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
        way = (
            "prompts that it learnt cannot be merged into its weights; give the model without them"
            if prompts
            else "merge them into its weights first, model = model.merge_and_unload()"
        )
        raise CaptureError(f"{name} has adapters of peft ({type(adapted).__name__}): {way}")
    return model
