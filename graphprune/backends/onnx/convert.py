"""Convert a program to ONNX's operators, by torch's exporter."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import logging
import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphprune.backends.onnx.dimension_names import check_dimensions, output_names
from graphprune.backends.onnx.translations import translations
from graphprune.errors import BackendError, first_line
from graphprune.ir.exported import to_exported_program
from graphprune.ir.nodes import arguments_of, made_from, size_environment, valued
from graphprune.ir.program import Program
from graphprune.ir.provenance import module_path, source_line

if TYPE_CHECKING:
    import onnx_ir
    from torch.export import ExportedProgram

_LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


def convert(program: Program, opset: int) -> onnx_ir.Model:
    """Return `program` in ONNX's operators, as the exporter leaves it.

    Raises
    ------
    BackendError
        When an operator has no counterpart, or the exporter fixes a size that is dynamic.
    """
    try:
        with _silence(), _sizes_kept(program):
            converted = torch.onnx.export(
                _reshaping(program),
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
    except Exception as error:  # any operator's translation may fail in any way
        raise BackendError(f"no ONNX export: {_why(program, error)}") from error
    assert converted is not None
    check_dimensions(converted.model, program)
    return converted.model


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


def _reshaping(program: Program) -> ExportedProgram:
    """`program` for the exporter, with every view a reshape, of a copy where dimensions moved.

    Whether a view is possible depends on strides, and the exporter's decompositions change those.
    """
    aten = torch.ops.aten
    graph = fx.Graph()
    results = []
    copied: Any = graph.graph_copy(program.graph, {})
    for node in copied:
        # Neither an input nor a weight may leave as it came, nor anything twice.
        own = node.op != "placeholder" and node not in results
        results.append(
            node if own else _with_meta(graph.call_function(aten.clone.default, (node,)))
        )
    graph.output(tuple(results))
    for node in list(graph.nodes):
        if node.target in (aten.rsub.Scalar, aten.rsub.Tensor):
            _promote(node)
        if node.target is aten.chunk.default:
            _write_out_pieces(node)
        if node.target in (
            aten.max_pool1d.default,
            aten.max_pool2d.default,
            aten.max_pool3d.default,
        ):
            _keep_padding(node)
        if node.target not in (aten.view.default, aten.reshape.default):
            continue
        node.target = aten.reshape.default
        moved = node.all_input_nodes[0]
        if moved.target in (
            aten.transpose.int,
            aten.permute.default,
        ):
            with graph.inserting_before(node):
                copy = graph.call_function(
                    aten.clone.default, (moved,), {"memory_format": torch.contiguous_format}
                )
            node.update_arg(0, _with_meta(copy))
    module = fx.GraphModule(torch.nn.Module(), graph)
    return to_exported_program(dataclasses.replace(program, graph_module=module))


def _keep_padding(node: fx.Node) -> None:
    """Pad by the least number above zero where a pool of maxima follows, not by zeros.

    ONNX Runtime's PadFusion gives zeros to the pool as padding of its own, which is of -inf.
    """
    pad = node.all_input_nodes[0]
    if pad.target is torch.ops.aten.pad.default:
        given = arguments_of(pad)
        if given["mode"] == "constant" and not given["value"]:
            pad.args = (pad.args[0], given["pad"])
            tiny = torch.finfo(pad.meta["val"].dtype).tiny
            pad.kwargs = {"mode": "constant", "value": tiny}


def _write_out_pieces(node: fx.Node) -> None:
    """Write equal pieces of a dynamic size as indices: sequences cannot be simplified."""
    whole, dim = node.args[0], node.args[2] if len(node.args) > 2 else 0
    sizes = [piece.shape[dim] for piece in node.meta["val"]]
    if any(size is not sizes[0] and str(size) != str(sizes[0]) for size in sizes):
        return
    with node.graph.inserting_before(node):
        apart = valued(made_from(node, torch.ops.aten.unflatten.int, whole, dim, [len(sizes), -1]))
        for user in list(node.users):
            piece = valued(made_from(user, torch.ops.aten.select.int, apart, dim, user.args[1]))
            user.replace_all_uses_with(piece)
            node.graph.erase_node(user)
    node.graph.erase_node(node)


def _promote(node: fx.Node) -> None:
    """Whole numbers that are subtracted from a real one, as what they become by that."""
    whole, kind = node.all_input_nodes[0], node.meta["val"].dtype
    if whole.meta["val"].dtype != kind:
        with node.graph.inserting_before(node):
            cast = valued(made_from(whole, torch.ops.aten._to_copy.default, whole, dtype=kind))
        node.replace_input_with(whole, cast)


def _with_meta(copy: fx.Node) -> fx.Node:
    """`copy`, a clone of its first argument, with the meta data of that."""
    meta = copy.all_input_nodes[0].meta
    copy.meta = {**meta, "val": meta["val"].contiguous()}
    return copy


def simplify(model: onnx_ir.Model, weights: set[str]) -> None:
    """Fold constants and drop what does nothing, but leave every weight under its own name."""
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
        onnx_ir.passes.Sequential(
            common.CommonSubexpressionEliminationPass(),
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.RemoveUnusedNodesPass(),
            common.OutputFixPass(),
            common.NameFixPass(),
        )(model)


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
