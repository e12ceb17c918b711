"""Convert a program to ONNX's operators, by torch's exporter, and simplify what it makes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphprune.backends.onnx.dimension_names import check_dimensions, output_names
from graphprune.backends.onnx.prepare import prepared, refuse_dynamic_windows
from graphprune.backends.onnx.translations import translations
from graphprune.backends.onnx.weights.as_used import whole_numbers
from graphprune.errors import BackendError, first_line
from graphprune.frontend.patches.export_time import whole_layers
from graphprune.frontend.patches.known_results import known_results
from graphprune.ir.nodes import size_environment
from graphprune.ir.program import Program
from graphprune.ir.provenance import module_path, source_line
from graphprune.weights.models import light_zeros

if TYPE_CHECKING:
    import onnx
    import onnx_ir

_LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


def convert(program: Program, opset: int) -> onnx_ir.Model:
    """Return `program` in ONNX's operators, as the exporter leaves it.

    Its weights are made one by one, each time that they are used.

    Raises
    ------
    BackendError
        When an operator has no counterpart, or the exporter fixes a size that is dynamic.
    """
    refuse_dynamic_windows(program)
    try:
        try:
            model = _converted(program, opset)
        except Exception:  # noqa: BLE001 - the longer way may do, and else its error is the better one
            model = _converted(program, opset, anew=True)
    except Exception as error:  # any operator's translation may fail in any way
        raise BackendError(f"no ONNX export: {_why(program, error)}") from error
    check_dimensions(model, program)
    return model


def _converted(program: Program, opset: int, *, anew: bool = False) -> onnx_ir.Model:
    hollow = _hollow(program)
    # The exporter finds the sizes of a recurrent layer token by token, and fixes the length by it.
    with _silence(), _sizes_kept(program), _translations_kept(), known_results(), whole_layers():
        converted = torch.onnx.export(
            prepared(hollow, anew=anew),
            (),
            dynamo=True,
            opset_version=opset,
            input_names=[value.name for value in program.inputs],
            output_names=output_names(program),
            custom_translation_table=translations(),
            # Its own optimization renames, merges and transposes weights.
            optimize=False,
            verbose=False,
        )
    assert converted is not None
    _fill(converted.model, hollow, program)
    return converted.model


def _hollow(program: Program) -> Program:
    """Return `program` with zeros that take no memory for its parameters and buffers."""
    zeros = {
        name: light_zeros(weight.shape, program.compute_types[name])
        for name, weight in program.weights.items()
        if program.kinds[name] in ("parameter", "buffer") and not weight.is_complex()
    }
    return dataclasses.replace(program, weights={**program.weights, **zeros})


def _fill(model: onnx_ir.Model, hollow: Program, program: Program) -> None:
    """Let the initializers that are zeros of `hollow` be the weights, each made when it is used."""
    import onnx_ir

    names = {
        weight.data_ptr(): name
        for name, weight in hollow.weights.items()
        if weight is not program.weights[name] and weight.numel()
    }
    for value in model.graph.initializers.values():
        held: Any = value.const_value
        name = names.get(held.raw.data_ptr()) if isinstance(held.raw, Tensor) else None
        if name is not None:
            value.const_value = onnx_ir.LazyTensor(
                functools.partial(_made, type(held), program, name),
                dtype=held.dtype,
                shape=held.shape,
                name=held.name,
            )


def _made(kind: Callable[[Tensor], Any], program: Program, name: str) -> Any:
    return kind(program.take([name])[name].detach().cpu().contiguous())


@contextlib.contextmanager
def _translations_kept() -> Iterator[None]:
    """Let exports of one process share what is known of operators (torch 2.13 reads it each time).

    That takes a fifth of the export of a small model, and one `export` may convert several times.
    """
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    read = ONNXRegistry.from_torchlib

    def kept(opset_version: int) -> ONNXRegistry:
        if opset_version not in _translations:
            _translations[opset_version] = read(opset_version)
        registry = copy.copy(_translations[opset_version])
        registry.functions = {op: list(known) for op, known in registry.functions.items()}
        return registry

    ONNXRegistry.from_torchlib = staticmethod(kept)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = read  # type: ignore[method-assign]


_translations: dict[int, Any] = {}


@contextlib.contextmanager
def _sizes_kept(program: Program) -> Iterator[None]:
    """Give the sizes of `program` back what they are, whatever an export makes of them.

    The exporter runs the graph anew. An operator that it takes apart may ask whether a dynamic size
    is the example's, and the answer is kept as a fact in what all graphs of the program share.
    """
    env: Any = size_environment(program.graph)
    if env is None:
        yield
        return
    # An earlier export leaves behind sizes that depend on data, and a later one trips.
    env.pending_fresh_unbacked_symbols.clear()
    held = {
        name: copy.copy(value)
        for name, value in vars(env).items()
        if isinstance(value, dict | list | set)
    }
    try:
        yield
    finally:
        for name, value in held.items():
            setattr(env, name, value)
        # What is cached by these is looked up anew.
        env._version_counter += 1
        env._replacements_version_counter += 1


def simplify(model: onnx_ir.Model, weights: set[str]) -> None:
    """Fold constants and drop what does nothing, but leave every weight under its own name.

    Raises
    ------
    BackendError
        When the optimizer fails on what the exporter wrote.
    """
    try:
        _simplify(model, weights)
    except Exception as error:  # any operator's folding may fail in any way
        raise BackendError(f"no ONNX export: {first_line(error)}") from error


def _simplify(model: onnx_ir.Model, weights: set[str]) -> None:
    import onnx_ir
    from onnx_ir.passes import common
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules.common import _no_op

    # Its "x + 0" and "x * 1" are what is nearly so: an epsilon of 1e-8 would be dropped.
    nearly = {id(rule) for rule in _no_op.rules}
    rules = [rule for rule in rewriter._DEFAULT_REWRITE_RULES if id(rule) not in nearly]

    def fold(node: onnx_ir.Node) -> bool | None:
        held = any(value is not None and value.name in weights for value in node.inputs)
        return False if held else None

    with _silence():
        common.InlinePass()(model)
        for _ in range(2):
            optimizer.fold_constants_ir(model, should_fold=fold)
            rewriter.rewrite(model, rules)
        _keep_sizes(model)
        onnx_ir.passes.Sequential(
            common.CommonSubexpressionEliminationPass(),
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.RemoveUnusedNodesPass(),
            common.OutputFixPass(),
            common.NameFixPass(),
        )(model)


def _keep_sizes(model: onnx_ir.Model) -> None:
    """Let reshapes say which sizes stay, where they are told the sizes that were there already.

    Asking for a size and putting sizes together are operators of their own, several to each reshape
    of a decoder, which a single token waits for.
    """
    for node in list(model.graph):
        if node.op_type != "Reshape" or node.inputs[1].is_initializer():  # type: ignore[union-attr]
            continue
        given, made = node.inputs[0].shape, node.outputs[0].shape  # type: ignore[union-attr]
        kept = _kept_sizes(given, made) if given is not None and made is not None else None
        if kept is not None:
            node.attributes.pop("allowzero", None)
            node.replace_input_with(1, whole_numbers(model, *kept))


def _kept_sizes(given: onnx_ir.Shape, made: onnx_ir.Shape) -> list[int] | None:
    """Return the sizes `made`, zero for each that was `given`; None where one is unknown."""
    kept = []
    for at, size in enumerate(made):
        if isinstance(size, int) and size > 0:
            kept.append(size)
        elif at < len(given) and not isinstance(size, int) and size.value is not None:
            if given[at] != size:
                return None
            kept.append(0)
        else:
            return None
    return kept


_NAMED_AS_STANDARD = ("SimplifiedLayerNormalization",)
"""Operators of ONNX Runtime that lie in ONNX's own domain, where ONNX knows none of them."""


def fuse_norms(model: onnx_ir.Model) -> int:
    """Fuse root mean square norms, and sums before them, in place; returns how many norms.

    ONNX Runtime's own fusions at load do not know the spelling that torch's exporter writes. The
    rules are onnxscript's, which calls them experimental: they are used where they are found.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    try:
        from onnxscript.rewriter.ort_fusions import rms_normalization, skip_normalization

        norms = rms_normalization.fuse_rms_normalization
        skips = skip_normalization.fuse_skip_rms_normalization
    except (ImportError, AttributeError):
        return 0
    count = int(norms(model))
    if count:
        skips(model)
        _norm_before_turning(model)
        RemoveUnusedNodesPass()(model)
    return count


def _norm_before_turning(model: onnx_ir.Model) -> None:
    """Let norms over the last dimension read their rows unturned, where they are turned back after.

    Queries and keys are normed with heads in front, and operators read them with heads behind.
    """
    for node in list(model.graph):
        read = node.inputs[0] if node.op_type in _NAMED_AS_STANDARD else None
        turned = read.producer() if read is not None else None
        if turned is None or turned.op_type != "Transpose" or node.outputs[0].is_graph_output():
            continue
        order = list(turned.attributes["perm"].as_ints())
        back = [user for user, _ in node.outputs[0].uses()]
        last = len(order) - 1
        inside = order[last] == last and node.attributes["axis"].as_int() in (-1, last)
        if inside and back and all(_turns_back(user, order) for user in back):
            node.replace_input_with(0, turned.inputs[0])
            node.outputs[0].shape = back[0].outputs[0].shape
            for user in back:
                user.outputs[0].replace_all_uses_with(node.outputs[0], replace_graph_outputs=True)
                model.graph.remove(user, safe=True)


def _turns_back(node: onnx_ir.Node, order: Sequence[int]) -> bool:
    """Return whether `node` undoes a transpose to `order`."""
    if node.op_type != "Transpose":
        return False
    return [order[dim] for dim in node.attributes["perm"].as_ints()] == sorted(order)


def as_checked(model: onnx.ModelProto) -> bool:
    """Move operators that ONNX does not know to ONNX Runtime's domain; whether there are any."""
    moved = [node for node in model.graph.node if node.op_type in _NAMED_AS_STANDARD]
    for node in moved:
        node.domain = "com.microsoft"
    if moved and all(entry.domain != "com.microsoft" for entry in model.opset_import):
        model.opset_import.add(domain="com.microsoft", version=1)
    return bool(moved)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the exporter's own progress report and advice off the screen."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _why(program: Program, error: BaseException) -> str:
    """One line about `error`, with the operator, module and source line where they can be told."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    text = "\n".join(str(link) for link in chain)
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    if match := re.search(r"OpOverload\(op='([^']+)', overload='([^']+)'\)", text):
        operator = f"{match[1]}.{match[2]}"
        reason = f"{operator} has no counterpart"
        node = next((call for call in calls if str(call.target) == operator), None)
    else:
        reason = f"{type(chain[-1]).__name__}: {first_line(chain[-1])}"
        # Names of nodes do not survive decomposition, but where they came from does.
        traces = ((call, (call.meta.get("stack_trace") or "").strip()) for call in calls)
        node = next((call for call, trace in traces if trace and trace in text), None)
        reason = f"{node.target}: {reason}" if node is not None else reason
    where = ", ".join(filter(None, (module_path(node), source_line(node)))) if node else ""
    return f"{reason} (at {where})" if where else reason
