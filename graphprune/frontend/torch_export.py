"""One call of `torch.export`: quiet, in evaluation mode, with one line of error."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from graphprune.errors import CaptureError, first_line
from graphprune.frontend.patches.export_time import (
    cheap_records,
    no_code,
    no_collections,
    sizes_compared_once,
    whole_layers,
)
from graphprune.frontend.patches.known_results import known_results
from graphprune.frontend.patches.torch_code import (
    explicit_masks,
    lengths_followed,
    no_autocast_regions,
    no_grad_regions,
    no_moves_in_place,
    no_packed_sequences,
    plain_branches,
    quiet_export,
)
from graphprune.frontend.recurrences.replaced import loops_replaced
from graphprune.ir.program import Note
from graphprune.weights.models import fill


@dataclass(frozen=True)
class Exported:
    """The result of `torch.export`, and which path through branches on data it holds."""

    program: ExportedProgram
    path: Note | None = None


Follow = Callable[[nn.Module, tuple[Any, ...], Any, Exception], Exported]
"""Another way to export a module where the first one raised an exception (the last argument)."""


def export(
    module: nn.Module,
    args: tuple[Any, ...],
    shapes: Any,
    name: str,
    *,
    follow: Sequence[Follow] = (),
    fallback: Any = None,
) -> Exported:
    """Export `module`; where that fails, as each of `follow` does, then with other shapes.

    Parameters
    ----------
    module, args, shapes
        As `torch.export.export` takes them.
    name
        The model's name in errors.
    follow
        What to try where a model branches on data.
    fallback
        Dynamic shapes to try last.

    Raises
    ------
    CaptureError
        In one line, with the place in the model's code.
    """
    try:
        return Exported(export_once(module, args, shapes))
    except Exception as error:
        if follow:
            fill(module)  # which way it goes is for its values to say
        refused = CaptureError(f"torch.export could not capture {name}: {line_and_place(error)}")
        for attempt in follow:
            try:
                return attempt(module, args, shapes, error)
            except CaptureError as failed:
                refused.at_all_sizes = failed.at_all_sizes
                refused.last_attempt = str(failed)
            except Exception as failed:  # noqa: BLE001 - the first error says more
                refused.last_attempt = line_and_place(failed)
        if fallback is None or refused.at_all_sizes:
            raise refused from error
        return export(module, args, fallback, name, follow=follow)


def export_once(module: nn.Module, args: tuple[Any, ...], shapes: Any) -> ExportedProgram:
    """Call `torch.export.export`, whatever it raises."""
    # Without no_grad, the grad-mode switches in transformers' rotary code become sub-graphs.
    with torch.no_grad(), warnings.catch_warnings(), _all_patches(module, args):
        warnings.simplefilter("ignore")
        return torch.export.export(module.eval(), args, dynamic_shapes=shapes, strict=False)


@contextlib.contextmanager
def _all_patches(module: nn.Module, args: tuple[Any, ...]) -> Iterator[None]:
    device = pytree.tree_leaves(args)[0].device.type
    regions = no_autocast_regions(device), no_grad_regions()
    layers = whole_layers(), no_packed_sequences(), explicit_masks()
    calls = quiet_export(), cheap_records(), no_code(), no_collections()
    sizes = known_results(), sizes_compared_once()
    code = no_moves_in_place(), plain_branches(), lengths_followed(module), loops_replaced(module)
    with contextlib.ExitStack() as stack:
        for patch in (*calls, *sizes, *code, *layers, *regions):
            stack.enter_context(patch)
        yield


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch `model` to evaluation, and every module back to its own mode at the end.

    Parts of it that `torch.compile` wraps run as they are written.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, training in modes:
            module.training = training


def line_and_place(error: BaseException) -> str:
    """Return the first line of `error`, with the last line of the model's code on its way."""
    place = place_of(error)
    return first_line(error, typed=True) + (f" (at {place})" if place else "")


def place_of(error: BaseException) -> str:
    """Return file and line of the model's code where `error` came up; "" outside of any."""
    place = ""
    trace = error.__traceback__
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        if "/transformers/models/" in path or "/torch/" not in path and "/graphprune/" not in path:
            place = f"{'/'.join(path.split('/')[-2:])}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place
