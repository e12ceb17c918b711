"""The graph that torch's ONNX exporter is given: operators that it takes as they are.

The exporter takes apart what it has no translation for by running the whole graph anew with
symbolic sizes, which is most of what an export costs. A graph takes few such operators apart, so
they are taken apart one by one, and the graph is run anew only where that cannot be done.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._export.utils import _is_cia_op, _is_preservable_cia_op
from torch._subclasses import FakeTensor
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

from graphprune.errors import BackendError
from graphprune.ir.aten import is_mutating, is_view, plain_name
from graphprune.ir.exported import to_exported_program
from graphprune.ir.nodes import arguments_of, made_from, valued
from graphprune.ir.program import Program
from graphprune.ir.provenance import whereabouts


def prepared(program: Program, *, anew: bool = False) -> ExportedProgram:
    """Return `program` with every view a reshape, of a copy where dimensions moved.

    With `anew` the exporter runs it anew in any case.

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
        if list(map(str, moved.meta["val"].shape)) == list(map(str, node.meta["val"].shape)):
            node.target, node.args, node.kwargs = aten.clone.default, (moved,), {}
            continue
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
    exported = to_exported_program(dataclasses.replace(program, graph_module=module))
    if anew:
        return exported
    run, dynamic = exported.run_decompositions, len(_dynamic_sizes(graph))

    def decompose(table: Mapping[Any, Callable[..., Any]]) -> ExportedProgram:
        # Where an operator asked whether a size is the example's, it is that from now on.
        good = _decomposed(graph, table) and len(_dynamic_sizes(graph)) == dynamic
        return exported if good else run(dict(table))

    exported.run_decompositions = decompose
    return exported


def refuse_dynamic_windows(program: Program) -> None:
    """Refuse pools whose windows follow from dynamic sides: the exporter fixes the example's.

    Raises
    ------
    BackendError
        Naming the operator and its place.
    """
    for node in program.graph.nodes:
        if not plain_name(node).startswith("adaptive_"):
            continue
        image, wanted = node.all_input_nodes[0].meta["val"], arguments_of(node)["output_size"]
        wanted = [wanted] if isinstance(wanted, int) else wanted
        sides = image.shape[image.ndim - len(wanted) :]
        if any(isinstance(s, torch.SymInt) and w != 1 for s, w in zip(sides, wanted, strict=True)):
            raise BackendError(
                f"no ONNX export: {whereabouts(node)} pools dynamic sizes to {tuple(wanted)}, for "
                "which ONNX has no operator: capture the model with sizes that are fixed there"
            )


_COPIES = (torch.ops.aten.detach_.default, torch.ops.aten.detach.default)
"""What is a copy where nothing is differentiated."""


def _decomposed(graph: fx.Graph, table: Mapping[Any, Callable[..., Any]]) -> bool:
    """Take apart what is in `table` in place; False where something cannot be.

    The graph is good for `ExportedProgram.run_decompositions` then too.
    """
    for node in graph.nodes:
        if node.target in _COPIES:
            node.target = torch.ops.aten.clone.default
        if is_mutating(node) and not _write_elsewhere(node):
            return False
    for node in list(graph.nodes):
        if isinstance(node.target, torch._ops.HigherOrderOperator) or node.op == "get_attr":
            return False
        apart = node.target in table or _is_always_apart(node.target)
        if apart and not _take_apart(node, table):
            return False
    graph.lint()
    return True


def _dynamic_sizes(graph: fx.Graph) -> list[torch.SymInt]:
    """Return the sizes of inputs that are not known."""
    sizes = [size for node in graph.find_nodes(op="placeholder") for size in node.meta["val"].shape]
    return [s for s in sizes if isinstance(s, torch.SymInt) and s.node.maybe_as_int() is None]


def _is_always_apart(target: Any) -> bool:
    """Whether running a graph anew takes an operator apart that no table lists: one that aliases.

    A reshape is one, and the exporter has a translation of it.
    """
    return (
        isinstance(target, torch._ops.OpOverload)
        and target is not torch.ops.aten.reshape.default
        and _is_cia_op(target)
        and not _is_preservable_cia_op(target)
    )


def _write_elsewhere(node: fx.Node) -> bool:
    """Let a node that writes into a value make a new one, where nothing reads the old one later."""
    target: Any = node.target
    packet = getattr(torch.ops.aten, target._schema.name.removeprefix("aten::")[:-1], None)
    functional = getattr(packet, target._overloadname, None)
    written = node.args[0]
    if functional is None or not isinstance(written, fx.Node) or written.op != "call_function":
        return False
    source = written.args[0] if written.target is operator.getitem else written
    later = itertools.takewhile(lambda other: other is not node, reversed(node.graph.nodes))
    readers = set(written.users) - {node}
    if is_view(source) or any(map(is_view, readers)) or not readers.isdisjoint(later):  # type: ignore[arg-type]
        return False
    node.target = functional
    return True


def _take_apart(node: fx.Node, table: Mapping[Any, Callable[..., Any]]) -> bool:
    """Put what `table` makes of a node in its place; False where that is not plain operators."""
    given = list(dict.fromkeys(node.all_input_nodes))
    values: list[Any] = [other.meta.get("val") for other in given]
    if not values or not all(isinstance(value, FakeTensor) for value in values):
        return False

    def call(*tensors: Any) -> Any:
        held = dict(zip(given, tensors, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), held.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    with values[0].fake_mode, torch.no_grad():
        parts = make_fx(call, decomposition_table=dict(table))(*values).graph
    (result,) = parts.find_nodes(op="output")[0].args
    calls = [part for part in parts.nodes if part.op == "call_function"]
    plain = all(part.op in ("placeholder", "call_function", "output") for part in parts.nodes)
    if not plain or not isinstance(result, fx.Node):
        return False
    if any(part.target in table or is_mutating(part) for part in calls):
        return False
    copies = dict(zip(parts.find_nodes(op="placeholder"), given, strict=True))
    with node.graph.inserting_before(node):
        for part in calls:
            copies[part] = node.graph.node_copy(part, copies.__getitem__)
            copies[part].meta = {**node.meta, "val": part.meta["val"]}
        if result not in calls:  # it does nothing, and may be what leaves
            copies[result] = valued(made_from(node, torch.ops.aten.clone.default, copies[result]))
    node.replace_all_uses_with(copies[result])
    node.graph.erase_node(node)
    copies[result].name = node.name  # results are known by their names
    return True


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
    """Write pieces of a dynamic size as indices or slices: sequences cannot be simplified."""
    aten, given = torch.ops.aten, arguments_of(node)
    whole, dim = given["self"], given["dim"]
    sizes = [str(piece.shape[dim]) for piece in node.meta["val"]]
    equal = len(set(sizes)) == 1

    def made(target: Any, *args: Any) -> fx.Node:
        return valued(made_from(node, target, *args))

    with node.graph.inserting_before(node):
        if equal:
            apart = made(aten.unflatten.int, whole, dim, [len(sizes), -1])
        else:
            size = made(aten.sym_size.int, whole, dim)
            more = made(operator.add, size, given["chunks"] - 1)
            width = made(operator.floordiv, more, given["chunks"])
        for user in list(node.users):
            at: Any = user.args[1]
            if equal:
                piece = made(aten.select.int, apart, dim, at)
            else:
                bounds = (made(operator.mul, width, at), made(operator.mul, width, at + 1))
                piece = made(aten.slice.Tensor, whole, dim, *bounds)
                piece.meta["val"] = user.meta["val"]
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
