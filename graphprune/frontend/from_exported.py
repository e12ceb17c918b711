"""From an `ExportedProgram` to a `Program`: weights by the model's names, a canonical graph."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator
from torch.export.graph_signature import InputKind

from graphprune.errors import CaptureError
from graphprune.frontend.canonicalize import canonicalize, write_to_copies, written_to
from graphprune.frontend.torch_export import Exported
from graphprune.ir.aten import printed_name
from graphprune.ir.program import Kind, Note, Program, value_of
from graphprune.ir.provenance import Source, layer_of, module_path, source_line
from graphprune.weights.models import named_tensors, stored_weights, values_held


def to_program(
    exported: Exported,
    model: nn.Module,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: Source | None = None,
    notes: tuple[Note, ...] = (),
    stand_ins: Mapping[int, str] | None = None,
    state: Collection[str] = (),
) -> Program:
    """Make a program of `exported` that shares the weights of `model`.

    Parameters
    ----------
    exported
        An export of `model`, or of a wrapper that holds it as ``inner``.
    model
        Whose names and tensors the weights get.
    input_names, output_names
        For the graph's inputs, and its last outputs, in order; the outputs before them are dropped.
    source, notes, stand_ins
        As the program keeps them.
    state
        Buffers that the call replaces by others.

    Raises
    ------
    CaptureError
        When the graph holds something that is no operator, such as a loop or `torch.vmap`.
    """
    if exported.path:
        notes = (*notes, exported.path)
    _refuse_regions(exported.program.graph_module.graph)
    signature, lifted_constants = exported.program.graph_signature, exported.program.constants
    graph_module = exported.program.graph_module
    graph = graph_module.graph
    canonical, aliases = _ties(model)
    originals = named_tensors(model)
    stored, elsewhere = set(model.state_dict(keep_vars=True)), stored_weights(model)
    placeholders = {node.name: node for node in graph.find_nodes(op="placeholder")}
    weights: dict[str, Tensor] = {}
    kinds: dict[str, Kind] = {}
    nodes: dict[str, fx.Node] = {}
    user: list[fx.Node] = []
    for spec in signature.input_specs:
        node = placeholders[spec.arg.name]
        if spec.kind == InputKind.USER_INPUT:
            user.append(node)
            continue
        target = (spec.target or "").removeprefix("inner.")
        name = canonical.get(target, target)
        if name in nodes:
            # A tied weight has a placeholder per name; one of them is enough.
            node.replace_all_uses_with(nodes[name])
            graph.erase_node(node)
            continue
        nodes[name] = node
        tensor = originals.get(name, lifted_constants.get(spec.target or ""))
        assert tensor is not None, f"torch.export lifted {name!r} and kept no value"
        weights[name] = elsewhere.get(name, tensor).detach()
        if spec.kind == InputKind.PARAMETER:
            kinds[name] = "parameter"
        elif spec.kind == InputKind.BUFFER:
            kinds[name] = "buffer" if name in stored else "derived"
        else:
            kinds[name] = "constant"
    written = write_to_copies(graph)
    state = {*state, *(name for name, node in nodes.items() if node in written)}
    if state:
        said = ", ".join(sorted(state))
        notes = (*notes, Note("state", f"what a call leaves in {said} is not kept for the next"))
    constants = {nodes[n]: weights[n] for n, kind in kinds.items() if kind == "constant"}
    lifted = canonicalize(graph, constants, stand_ins or {})
    for name in [n for n, kind in kinds.items() if kind == "constant" and not nodes[n].users]:
        graph.erase_node(nodes[name])
        del weights[name], kinds[name]
    made = {".".join(filter(None, (module_path(n), n.name))): v for n, v in lifted.items()}
    weights = {**made, **weights}
    kinds = {**dict.fromkeys(made, "constant"), **kinds}
    (output,) = graph.find_nodes(op="output")
    count = len(output_names)
    output.args = (tuple(output.args[0][-count:]),)
    graph.lint()
    graph_module.recompile()
    return Program(
        graph_module=graph_module,
        weights=weights,
        kinds=kinds,
        aliases=aliases,
        inputs=tuple(value_of(name, node) for name, node in zip(input_names, user, strict=True)),
        outputs=tuple(
            value_of(name, node) for name, node in zip(output_names, output.args[0], strict=True)
        ),
        source=source,
        ranges=dict(exported.program.range_constraints),
        notes=notes,
        stand_ins=stand_ins or {},
    )


def written_parameters(exported: Exported) -> list[str]:
    """Return the parameters that a call writes in place, by the names of what was exported."""
    specs = {each.arg.name: each for each in exported.program.graph_signature.input_specs}
    written = [specs[node.name] for node in written_to(exported.program.graph)]
    return [str(each.target) for each in written if each.kind == InputKind.PARAMETER]


def _refuse_regions(graph: fx.Graph) -> None:
    """Refuse what torch keeps as a graph of its own, or as a call that is no operator."""
    for node in graph.nodes:
        transforms = getattr(node.target, "__module__", "").startswith("torch._functorch")
        if transforms or isinstance(node.target, HigherOrderOperator):
            what = "torch.func" if transforms else printed_name(node.target)
            where = " in ".join(filter(None, (source_line(node), module_path(node))))
            raise CaptureError(
                f"the model calls {what}, which a graph cannot be read through (at {where}): write "
                "it with operators on whole tensors, or as Python's own loops and branches"
            )


def _ties(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Map every name of a tied weight to its first name; the second map lacks the first names."""
    first: dict[int, str] = {}
    canonical: dict[str, str] = {}
    for name, tensor in named_tensors(model).items():
        canonical[name] = first.setdefault(id(tensor), name)
    return canonical, {name: to for name, to in canonical.items() if name != to}


@contextlib.contextmanager
def few_values(program: Program, model: nn.Module) -> Iterator[Program]:
    """Let `program` and `model` compute with few values for a while, where weights lie in files.

    What a model does at other sizes is in its code, which weights do not change. So the matrices
    of all layers that are alike have the values of the first such layer, and are read once for all
    sizes. Vectors keep theirs, by which one layer differs from another.

    Yields
    ------
    Program
        What to compare with `model` for this while.
    """
    stored = stored_weights(model)
    types, firsts = program.compute_types, dict[Hashable, str]()
    of = {
        n: firsts.setdefault(_kind(n, w, types[n]), n)
        for n, w in program.weights.items()
        if n in stored
    }
    names = {name: of.get(program.aliases.get(name, name), name) for name in stored}
    if not names:
        yield program
        return
    with values_held(model, names) as values:
        held = {name: values[name] for name in of}
        yield replace(program, weights={**program.weights, **held})


def _kind(name: str, weight: Tensor, computed: torch.dtype) -> Hashable:
    """Return what weights have in common that may have the same values.

    What is numbered by itself is no layer: it may be one of several heads, or of experts. In half
    precision, one layer over and over may go past what numbers can hold.
    """
    layer = layer_of(name)
    inside = name.removeprefix(layer)
    if weight.ndim < 2 or not layer or inside.count(".") < 2 or computed is torch.float16:
        return name
    return layer.rpartition(".")[0], inside, weight.shape, weight.dtype
