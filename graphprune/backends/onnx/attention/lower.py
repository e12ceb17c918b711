"""Write each attention of a graph as one operator of ONNX, in the form that is legal for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from graphprune.analysis.attention.recognize import (
    Cached,
    Recognition,
    RecognizedAttention,
    plain,
    recognize_attentions,
)
from graphprune.analysis.attention.rotary import Rotary
from graphprune.backends.onnx.attention.angles import Angles
from graphprune.backends.onnx.attention.forms import (
    STANDARD_OPSET,
    STATIC_OPSET,
    AttentionForm,
    Form,
    Rotations,
    Target,
    form_of,
    read_by_several,
    rotations_of,
)
from graphprune.backends.onnx.attention.static import StaticCaches
from graphprune.backends.onnx.attention.writer import Writer
from graphprune.ir.aten import CASTS, COPIES, RESHAPES, is_mutating, name_of
from graphprune.ir.nodes import arguments_of, copy_of
from graphprune.ir.program import PAST, Program, value_of

_ATEN = torch.ops.aten


def lower_attention(
    program: Program, target: Target, opset: int, *, rotary: bool = True
) -> tuple[Program, tuple[AttentionForm, ...]]:
    """`program` with every attention in the best form that is legal for `target` and `opset`.

    Where `rotary` says so, a rotary embedding of queries and keys goes into `gqa`, with the angles
    of as many positions as the model's config names (`Angles` says where they come from).

    The result is for the exporter alone: operators of ONNX stand in its graph, which give zeros
    when they are run. A decoder with attention of the form `gqa` takes masks that pad on the right,
    and a chunk on a filled cache for a batch of one.

    Returns
    -------
    tuple
        The program, and the form of each attention in the order of the graph.
    """
    sites = recognize_attentions(program)
    shared = read_by_several(sites)
    read: Rotations | None = None if rotary else {}
    pasts = [value for value in program.inputs if value.name.startswith(PAST)]
    without: frozenset[Form] = frozenset()
    while True:
        graph, copies = copy_of(program.graph)
        choices = [form_of(site, target, opset, shared, without) for site in sites]
        if partly := _partly(sites, choices, len(pasts)) - without:
            without |= partly
            continue
        fused = [
            (site, choice.form)
            for site, choice in zip(sites, choices, strict=True)
            if isinstance(site, RecognizedAttention) and choice.form != "decomposed"
        ]
        if not fused:
            return program, tuple(choices)
        inside = [site for site, form in fused if form == "gqa"]
        if read is None:  # other rounds have no more of them
            read = rotations_of(program, inside)
        rotations: Rotations = {site: read[site] for site in inside if site in read}
        lowering = _Lowering(program, graph, copies, rotations)
        for site, form in fused:
            lowering.replace(site, form)
        _drop_round_trips(graph)
        graph.eliminate_dead_code(_is_kept)
        whole = [site for site, form in fused if form in ("gqa", "static")]
        held = {cached.joined for site in whole for cached in site.caches or ()}
        alive = {node for node in held if copies[node].users}
        if not alive:
            break
        shared |= alive
    tables = lowering.angles.weights
    graph.lint()
    for index, found in enumerate(sites):
        if found in rotations:
            positions = rotations[found][0].positions
            why = f"{choices[index].why}, rotary inside"
            choices[index] = dataclasses.replace(choices[index], why=why, positions=positions)
    lowered = dataclasses.replace(
        program,
        graph_module=fx.GraphModule(torch.nn.Module(), graph),
        inputs=tuple(value_of(v.name, copies[node]) for v, node in program.input_nodes()),
        weights={**program.weights, **tables},
        kinds={**program.kinds, **dict.fromkeys(tables, "constant")},
    )
    return lowered, tuple(choices)


def _partly(
    sites: Sequence[Recognition], choices: Sequence[AttentionForm], pasts: int
) -> frozenset[Form]:
    """Return the forms that some caches of a program are in, and that are of all or of none.

    Static caches are of one length. A gqa that counts a mask's ones puts the tokens that follow a
    padded row behind its last one, where other attention has them behind the padding.
    """
    held: dict[Form, set[fx.Node]] = {"static": set(), "gqa": set()}
    for site, choice in zip(sites, choices, strict=True):
        if choice.form not in held or not isinstance(site, RecognizedAttention):
            continue
        if choice.form == "static" or site.mask.padding is not None:
            held[choice.form].update(cached.past for cached in site.caches or ())
    return frozenset(form for form, found in held.items() if 0 < len(found) < pasts)


def _is_kept(node: fx.Node) -> bool:
    """Return whether a node stays though nothing uses it; dropout, which is off, does not."""
    return node.op in ("placeholder", "output") or is_mutating(node)


def _drop_round_trips(graph: fx.Graph) -> None:
    """Let what takes rows of heads take them as they were before heads came apart."""
    for node in graph.nodes:
        source = node
        while name_of(source) in RESHAPES | COPIES - CASTS:
            source = source.all_input_nodes[0]
            before, after = source.meta["val"], node.meta["val"]
            if name_of(node) in RESHAPES and str(before.shape) == str(after.shape):
                node.replace_all_uses_with(source)
                break


class _Lowering(Writer):
    """Puts operators of ONNX into a graph in place of its attentions."""

    def __init__(
        self,
        program: Program,
        graph: fx.Graph,
        copies: dict[fx.Node, fx.Node],
        rotations: Rotations,
    ) -> None:
        super().__init__(graph)
        inputs = {value.name: copies[node] for value, node in program.input_nodes()}
        self.static = StaticCaches(self, inputs.get("input_ids"), inputs.get("attention_mask"))
        self.copies = copies
        self.rotations = rotations
        self.lengths: dict[Any, tuple[fx.Node, fx.Node]] = {}
        self.angles = Angles(self, program, copies)

    def replace(self, site: RecognizedAttention, form: Form) -> None:
        """Put an operator in the place of `site`."""
        self.at = self.copies[site.node]
        write: dict[Form, Callable[[RecognizedAttention], fx.Node]] = {
            "gqa": self._gqa,
            "mha": self._mha,
            "static": self._static,
            "standard": self._standard,
        }
        with self.graph.inserting_before(self.at):
            attended = write[form](site)
        self.at.replace_all_uses_with(attended)

    def _gqa(self, site: RecognizedAttention) -> fx.Node:
        assert site.caches is not None
        keys, values = site.caches
        query, key = (self._rows(node) for node in (site.query, keys.new))
        if site in self.rotations:
            query, key = map(self._rows_before, self.rotations[site])
        rows = [query, key, self._rows(values.new)]
        if site.mask.padding is not None and not self.lengths:
            rows[0] = self._spoiled(rows[0], self.copies[site.mask.padding])
        batch, new = (self.size(rows[0], dim) for dim in (0, 1))
        past = [self.copies[cached.past] for cached in (keys, values)]
        total = self.sum(self.size(past[0], 2), new)
        width = site.sizes[0]
        attributes = {
            "num_heads": site.heads,
            "kv_num_heads": site.kv_heads,
            "scale": site.scale,
            "do_rotary": int(site in self.rotations),
        }
        if site in self.rotations:
            attributes["rotary_interleaved"] = int(self.rotations[site][0].interleaved)
        if site.mask.window is not None:
            attributes["local_window_size"] = site.mask.window
        if site.softcap is not None:
            attributes["softcap"] = site.softcap
        held = [batch, site.kv_heads, total, width]
        out, key, value = self.operator(
            "com.microsoft::GroupQueryAttention",
            [*rows, *past, *self._lengths(site, batch, total), *self._further(site)],
            attributes,
            [[batch, new, site.heads * width], held, held],
        )
        for cached, made in ((keys, key), (values, value)):
            self._replace_cache(cached, made)
        return self._heads_first(out, site)

    def _further(self, site: RecognizedAttention) -> list[fx.Node | None]:
        """Angles, positions, a bias and a sink, as far as there are any."""
        further: list[fx.Node | None] = [None] * 5
        if site in self.rotations:
            further[:2] = self.angles.of(self.rotations[site][0])
        if site.sink is not None:
            further[4] = self.copies[site.sink]
        while further and further[-1] is None:
            further.pop()
        return further

    def _rows_before(self, rotary: Rotary) -> fx.Node:
        """Return what is rotated, as ``[batch, length, heads * size]``."""
        if rotary.heads_first:
            return self._rows(rotary.source)
        return self._joined(self.copies[rotary.source])

    def _spoiled(self, query: fx.Node, padding: fx.Node) -> fx.Node:
        """`query` without a number in the rows that are padded on the left.

        The operator counts keys and would take the padding for the first ones: such rows shall
        come out as NaN, not as something else than the program computes.
        """
        first = self.call(_ATEN.slice.Tensor, padding, 1, 0, 1)
        left = self.call(_ATEN.eq.Scalar, first, 0)
        left = self.call(_ATEN.unsqueeze.default, left, 2)
        none = self.call(_ATEN.scalar_tensor.default, 0.0, dtype=query.meta["val"].dtype)
        spoil = self.call(_ATEN.where.ScalarSelf, left, float("nan"), none)
        return self.call(_ATEN.add.Tensor, query, spoil)

    def _replace_cache(self, cached: Cached, made: fx.Node) -> None:
        """Let `made` be the output, and lengths be read where they come from.

        Whatever else reads the cache is of the attention that is replaced, or keeps it alive.
        """
        joined, output = self.copies[cached.joined], self.graph.output_node()
        outputs: Any = output.args[0]
        output.args = (tuple(made if plain(node) is joined else node for node in outputs),)
        for user in list(joined.users):
            if user.target is _ATEN.sym_size.int:
                dim = int(arguments_of(user)["dim"]) % 4
                with self.graph.inserting_before(joined):
                    past = self.copies[cached.past]
                    static = dim == 2 and past in self.static.caches
                    size = self.static.held() if static else self.size(past, dim)
                    if dim == 2:
                        size = self.sum(size, self.size(self.copies[cached.new], dim))
                user.replace_all_uses_with(size)

    def _mha(self, site: RecognizedAttention) -> fx.Node:
        query = self._rows(site.query)
        batch, new = (self.size(query, dim) for dim in (0, 1))
        (out,) = self.operator(
            "com.microsoft::MultiHeadAttention",
            [query, *map(self._keys, (site.key, site.value)), None, None, self._bias(site)],
            {"num_heads": site.heads, "scale": site.scale},
            [[batch, new, site.heads * site.sizes[1]]],
        )
        return self._heads_first(out, site)

    def _standard(self, site: RecognizedAttention) -> fx.Node:
        key, value = (self.copies[node] for node in (site.key, site.value))
        mask = self.copies[site.mask.node] if site.mask.node is not None else None
        return self._attention(site, key, value, mask, STANDARD_OPSET)

    def _attention(
        self,
        site: RecognizedAttention,
        key: fx.Node,
        value: fx.Node,
        mask: fx.Node | None,
        version: int,
    ) -> fx.Node:
        query = self.copies[site.query]
        (out,) = self.operator(
            "::Attention",
            [query, key, value, *([mask] if mask is not None else [])],
            {"scale": site.scale},
            [[self.size(query, 0), site.heads, self.size(query, 2), site.sizes[1]]],
            version=version,
        )
        return out

    def _static(self, site: RecognizedAttention) -> fx.Node:
        """Write new keys and values behind the past ones, into caches that keep their length."""
        assert site.caches is not None and site.mask.node is not None
        pasts = [self.copies[cached.past] for cached in site.caches]
        made = [
            self.static.written(past, self.copies[cached.new])
            for past, cached in zip(pasts, site.caches, strict=True)
        ]
        for cached, cache in zip(site.caches, made, strict=True):
            self._replace_cache(cached, cache)
        mask = self.static.wide(self.copies[site.mask.node], pasts[0])
        return self._attention(site, made[0], made[1], mask, STATIC_OPSET)

    def _rows(self, node: fx.Node) -> fx.Node:
        """``[batch, heads, length, size]`` as ``[batch, length, heads * size]``."""
        inner, copy = plain(node), self.copies[node]
        turned = inner.target is _ATEN.transpose.int and set(inner.args[1:]) in ({1, 2}, {1, -2})
        if turned:
            copy = self.copies[inner.all_input_nodes[0]]
        else:
            copy = self.call(_ATEN.transpose.int, copy, 1, 2)
        return self._joined(copy)

    def _joined(self, node: fx.Node) -> fx.Node:
        """``[batch, length, heads, size]`` with heads and sizes in one dimension."""
        _, _, heads, width = node.meta["val"].shape
        sizes = [self.size(node, 0), self.size(node, 1), heads * width]
        return self.call(_ATEN.reshape.default, node, sizes)

    def _keys(self, node: fx.Node) -> fx.Node:
        """Keys or values for MultiHeadAttention: cached ones have their heads first."""
        return self.copies[node] if node.target is _ATEN.cat.default else self._rows(node)

    def _heads_first(self, rows: fx.Node, site: RecognizedAttention) -> fx.Node:
        """``[batch, length, heads * size]`` as ``[batch, heads, length, size]``.

        Where the graph goes back at once, it goes on from the rows.
        """
        sizes = [self.size(rows, 0), self.size(rows, 1), site.heads, site.sizes[1]]
        apart = self.call(_ATEN.reshape.default, rows, sizes)
        pending = [self.at]
        while pending:
            for user in list(pending.pop().users):
                if user.target is _ATEN.transpose.int and user.args[1:] in ((1, 2), (2, 1)):
                    user.replace_all_uses_with(apart)
                elif plain(user) is self.at:
                    pending.append(user)
        return self.call(_ATEN.transpose.int, apart, 1, 2)

    def _bias(self, site: RecognizedAttention) -> fx.Node | None:
        """Return what is added to scores, of as many rows as there are queries."""
        if site.mask.node is None:
            return None
        mask, query = self.copies[site.mask.node], self.copies[site.query]
        value, dtype = mask.meta["val"], query.meta["val"].dtype
        if value.dtype == torch.bool:
            zero = self.call(_ATEN.scalar_tensor.default, 0.0, dtype=dtype)
            least = torch.finfo(dtype).min
            mask = self.call(_ATEN.where.ScalarOther, mask, zero, least)
        elif value.dtype != dtype:
            mask = self.call(_ATEN._to_copy.default, mask, dtype=dtype)
        for _ in range(4 - value.dim()):
            mask = self.call(_ATEN.unsqueeze.default, mask, 0)
        sizes = [-1, -1, self.size(query, 2), self.size(self.copies[site.key], 2)]
        return self.call(_ATEN.expand.default, mask, sizes)

    def _lengths(
        self, site: RecognizedAttention, batch: Any, total: Any
    ) -> tuple[fx.Node, fx.Node]:
        """Return how many keys of each row count, less one, and how many keys there are."""
        padding = self.copies[site.mask.padding] if site.mask.padding is not None else None
        key = padding if padding is not None else site.caches
        if key not in self.lengths:
            if padding is not None:
                counted = self.call(_ATEN.sum.dim_IntList, padding, [1])
                last = self.call(_ATEN.sub.Tensor, counted, 1)
                last = self.call(_ATEN._to_copy.default, last, dtype=torch.int32)
                total = self.size(padding, 1)
            else:
                less = self.sum(total, -1)
                last = self.call(_ATEN.full.default, [batch], less, dtype=torch.int32)
            whole = self.call(_ATEN.scalar_tensor.default, total, dtype=torch.int32)
            self.lengths[key] = last, whole
        return self.lengths[key]
