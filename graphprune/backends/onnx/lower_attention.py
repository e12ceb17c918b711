"""Attention as one operator of ONNX: which form is legal for each layer, and the graph with it.

`gqa` is com.microsoft's GroupQueryAttention, which holds the cache and takes KV heads as they are;
`mha` its MultiHeadAttention; `standard` the Attention of ONNX from opset 23 on; `decomposed` is
what torch's exporter makes of it. A layer gets the best form that its target has and that computes
what the layer does.

Reference: ONNX Runtime's contrib operators (docs/ContribOperators.md) and ONNX's Attention-23.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from graphprune.analysis.attention.recognize import (
    AttentionSite,
    Cached,
    Unread,
    plain,
    read_attention,
)
from graphprune.analysis.attention.rotary import Rotary, RotaryReader
from graphprune.analysis.kernel_sizes import HEADS, Runtime
from graphprune.errors import BackendError, UsageError
from graphprune.ir.nodes import arguments_of, copy_of, made_from, valued
from graphprune.ir.program import Program

Target = Runtime
Form = Literal["gqa", "mha", "standard", "decomposed"]

_ATEN = torch.ops.aten
_TYPES = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16}
"""Numbers of element types in ONNX."""

_FORMS: dict[Target, tuple[Form, ...]] = {
    "portable": ("standard",),
    "tensorrt": ("standard",),
    "cpu": ("gqa", "standard", "mha"),
    "cuda": ("gqa", "mha", "standard"),
}
"""What a target runs, best first."""

OPSETS: dict[Target, int] = {"portable": 23, "cpu": 23, "cuda": 20, "tensorrt": 23}
"""The opset that a target is best served with: CUDA's kernels for the newer ones are slower."""

STANDARD_OPSET = 23
"""The first opset that has Attention."""


Rotations = dict[AttentionSite | Unread, tuple[Rotary, Rotary]]
"""Attention -> how its queries and its new keys are rotated."""


@dataclass(frozen=True)
class Choice:
    """The form that an attention is written in.

    Parameters
    ----------
    module
        The dotted path of the module that attends.
    form
        The form.
    why
        What it is, or why it has no better form.
    positions
        Positions that its rotary embedding has angles for, where that is inside.
    """

    module: str
    form: Form
    why: str
    positions: int | None = None

    def __str__(self) -> str:
        return f"{self.form}: {self.why}"


def check_target(program: Program, target: Target | None, opset: int) -> None:
    """Refuse a target that cannot run `program`, or an opset that nothing knows.

    Raises
    ------
    BackendError
        When the target has no kernels for the element type of most of the program's weights.
    UsageError
        When there is no such target or opset.
    """
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset > newest:
        raise UsageError(
            f"opset {opset} is unknown to onnx {onnx.__version__}: it ends at {newest}"
        )
    if target is None:
        return
    if target not in _FORMS:
        raise UsageError(f"no target {target!r}: there are {', '.join(_FORMS)}")
    held: dict[torch.dtype, int] = {}
    for weight in program.weights.values():
        if weight.is_floating_point():
            held[weight.dtype] = held.get(weight.dtype, 0) + weight.numel()
    dtype = max(held, key=held.__getitem__, default=torch.float32)
    said = str(dtype).removeprefix("torch.")
    half = (torch.float16, torch.bfloat16)
    if target == "cuda" and dtype not in half:
        raise BackendError(
            f"target cuda takes a program in float16 or bfloat16, and this one is in {said}: "
            'load the model so, as graphprune.load(directory, dtype="float16") does'
        )
    if target == "cpu" and dtype == torch.bfloat16:
        raise BackendError(f"target cpu has no kernels for {said}: load the model in float32")


def lower(
    program: Program, target: Target, opset: int, *, rotary: bool = True
) -> tuple[Program, tuple[Choice, ...]]:
    """`program` with every attention in the best form that is legal for `target` and `opset`.

    Where `rotary` says so, a rotary embedding of queries and keys goes into `gqa`, with the angles
    of as many positions as the model's config names.

    The result is for the exporter alone: operators of ONNX stand in its graph, which give zeros
    when they are run. A decoder with attention of the form `gqa` takes masks that pad on the right,
    and a chunk on a filled cache for a batch of one.

    Returns
    -------
    tuple
        The program, and the form of each attention in the order of the graph.
    """
    sites = read_attention(program)
    shared = _twice_read(sites)
    read: Rotations | None = None if rotary else {}
    while True:
        graph, copies = copy_of(program.graph)
        choices = [_choice(site, target, opset, shared) for site in sites]
        fused = [
            (site, choice.form)
            for site, choice in zip(sites, choices, strict=True)
            if isinstance(site, AttentionSite) and choice.form != "decomposed"
        ]
        if not fused:
            return program, tuple(choices)
        inside = [site for site, form in fused if form == "gqa"]
        if read is None:  # other rounds have no more of them
            read = _rotations(program, inside)
        rotations: Rotations = {site: read[site] for site in inside if site in read}
        first = copies[next(node for _, node in program.input_nodes())]
        lowering = _Lowering(graph, copies, rotations, first)
        for site, form in fused:
            lowering.replace(site, form)
        _drop_round_trips(graph)
        graph.eliminate_dead_code(_is_kept)
        held = {cached.joined for site in inside for cached in site.caches or ()}
        alive = {node for node in held if copies[node].users}
        if not alive:
            break
        shared |= alive
    tables = lowering.place_tables()
    graph.lint()
    for index, found in enumerate(sites):
        if found in rotations:
            positions = rotations[found][0].positions
            why = f"{choices[index].why}, rotary inside"
            choices[index] = dataclasses.replace(choices[index], why=why, positions=positions)
    lowered = dataclasses.replace(
        program,
        graph_module=fx.GraphModule(torch.nn.Module(), graph),
        weights={**program.weights, **tables},
        kinds={**program.kinds, **dict.fromkeys(tables, "constant")},
    )
    return lowered, tuple(choices)


# -- what is legal --------------------------------------------------------------------------------


def _is_kept(node: fx.Node) -> bool:
    """Whether a node stays though nothing uses it; dropout, which does nothing here, does not."""
    schema = getattr(node.target, "_schema", None)
    return node.op in ("placeholder", "output") or (schema is not None and schema.is_mutable)


def _drop_round_trips(graph: fx.Graph) -> None:
    """Let what takes rows of heads take them as they were before heads came apart."""
    shaping = (_ATEN.view.default, _ATEN.reshape.default, _ATEN._unsafe_view.default)
    for node in graph.nodes:
        source = node
        while source.target in (*shaping, _ATEN.clone.default, _ATEN.contiguous.default):
            source = source.all_input_nodes[0]
            before, after = source.meta["val"], node.meta["val"]
            if node.target in shaping and str(before.shape) == str(after.shape):
                node.replace_all_uses_with(source)
                break


def _choice(
    site: AttentionSite | Unread, target: Target, opset: int, shared: set[fx.Node]
) -> Choice:
    if isinstance(site, Unread):
        return Choice(site.module, "decomposed", site.why)
    return Choice(site.module, *_best(site, target, opset, shared))


def _best(
    site: AttentionSite, target: Target, opset: int, shared: set[fx.Node]
) -> tuple[Form, str]:
    against: dict[Form, Callable[[], str]] = {
        "gqa": lambda: _not_gqa(site, target, shared),
        "mha": lambda: _not_mha(site),
        "standard": lambda: _not_standard(site, opset),
    }
    reasons: list[str] = []
    for form in _FORMS[target]:
        if why := against[form]():
            reasons.append(f"no {form}, for {why}")
        else:
            return form, ": ".join((_said(site), *reasons))
    return "decomposed", "; ".join(reasons)


def _said(site: AttentionSite) -> str:
    heads = f"{site.heads} query heads on {site.kv_heads} KV heads of {site.sizes[0]}"
    cap = f", soft cap {site.softcap:g}" if site.softcap else ""
    sink = ", sink" if site.sink is not None else ""
    return f"{heads}, {site.mask}{cap}{sink}"


def _not_gqa(site: AttentionSite, target: Target, shared: set[fx.Node]) -> str:
    """Why GroupQueryAttention does not compute what `site` does; "" where it does."""
    key, value = site.sizes
    dtype = site.query.meta["val"].dtype
    if site.caches is None:
        return "it has no cache"
    if any(cached.joined in shared for cached in site.caches):
        return "its cache is read elsewhere too"
    if site.mask.kind not in ("causal", "window"):
        return f"its mask is {site.mask}"
    if site.mask.node is not None and not site.mask.padded:
        return "its mask takes no padding"
    if key != value:
        return f"keys have size {key} and values {value}"
    if key % HEADS.least:
        return f"head size {key} is no multiple of {HEADS.least}"
    if target == "cuda" and dtype not in (torch.float16, torch.bfloat16):
        return f"no kernel of CUDA takes {str(dtype).removeprefix('torch.')}"
    return ""


def _not_mha(site: AttentionSite) -> str:
    """Why MultiHeadAttention does not compute what `site` does; "" where it does."""
    if site.heads != site.kv_heads:
        return f"{site.kv_heads} KV heads would have to be repeated"
    return _more_than_masked(site, "its scores are capped")


def _not_standard(site: AttentionSite, opset: int) -> str:
    """Why ONNX's own Attention does not compute what `site` does; "" where it does."""
    if opset < STANDARD_OPSET:
        return f"opset {opset} has no Attention, {STANDARD_OPSET} has"
    return _more_than_masked(
        site, "runtimes differ in whether they cap scores before they mask them"
    )


def _more_than_masked(site: AttentionSite, capped: str) -> str:
    """What there is beside scores and a mask tensor, `capped` for a soft cap; "" for nothing."""
    if site.sink is not None:
        return "it has a sink"
    if site.softcap is not None:
        return capped
    if site.mask.node is None and site.mask.kind == "causal":
        return "it is causal without a mask"
    return ""


def _rotations(program: Program, sites: Sequence[AttentionSite]) -> Rotations:
    """The rotary embedding of queries and new keys, where GroupQueryAttention has the like."""
    config = program.source and program.source.config.get_text_config(decoder=True)
    positions = getattr(config, "max_position_embeddings", None)
    if not sites or not isinstance(positions, int):
        return {}
    reader = RotaryReader(program, positions)
    found: Rotations = {}
    for site in sites:
        assert site.caches is not None
        query, key = reader.read(site.query), reader.read(site.caches[0].new)
        if query is None or key is None or site.sizes[0] % HEADS.best or query.width % HEADS.best:
            continue
        alike = query.interleaved == key.interleaved and query.cos.shape == key.cos.shape
        if alike and torch.equal(query.cos, key.cos) and torch.equal(query.sin, key.sin):
            found[site] = query, key
    return found


def _twice_read(sites: Sequence[AttentionSite | Unread]) -> set[fx.Node]:
    """Joined keys and values that several attentions read."""
    read = (site for site in sites if isinstance(site, AttentionSite))
    joined = [cached.joined for site in read for cached in site.caches or ()]
    return {node for node in joined if joined.count(node) > 1}


# -- the graph ------------------------------------------------------------------------------------


class _Lowering:
    """Puts operators of ONNX into a graph in place of its attentions."""

    def __init__(
        self,
        graph: fx.Graph,
        copies: dict[fx.Node, fx.Node],
        rotations: Rotations,
        first_input: fx.Node,
    ) -> None:
        self.graph = graph
        self.first_input = first_input
        self.copies = copies
        self.rotations = rotations
        self.at: fx.Node = next(iter(graph.nodes))
        self.lengths: dict[Any, tuple[fx.Node, fx.Node]] = {}
        self.tables: list[tuple[Tensor, Tensor, fx.Node, fx.Node]] = []

    def place_tables(self) -> dict[str, Tensor]:
        """The angles that operators read, by the names of weights that their nodes stand for."""
        return {
            f"rotary.{index}.{name}": table
            for index, (cos, sin, *_) in enumerate(self.tables)
            for name, table in (("cos", cos), ("sin", sin))
        }

    def replace(self, site: AttentionSite, form: Form) -> None:
        """Put an operator in the place of `site`."""
        self.at = self.copies[site.node]
        write: dict[Form, Callable[[AttentionSite], fx.Node]] = {
            "gqa": self._gqa,
            "mha": self._mha,
            "standard": self._standard,
        }
        with self.graph.inserting_before(self.at):
            attended = write[form](site)
        self.at.replace_all_uses_with(attended)

    def _gqa(self, site: AttentionSite) -> fx.Node:
        assert site.caches is not None
        keys, values = site.caches
        query, key = (self._rows(node) for node in (site.query, keys.new))
        if site in self.rotations:
            query, key = map(self._rows_before, self.rotations[site])
        rows = [query, key, self._rows(values.new)]
        if site.mask.padding is not None and not self.lengths:
            rows[0] = self._spoiled(rows[0], self.copies[site.mask.padding])
        batch, new = (self._size(rows[0], dim) for dim in (0, 1))
        past = [self.copies[cached.past] for cached in (keys, values)]
        total = self._sum(self._size(past[0], 2), new)
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
        out, key, value = self._operator(
            "com.microsoft::GroupQueryAttention",
            [*rows, *past, *self._lengths(site, batch, total), *self._further(site)],
            attributes,
            [[batch, new, site.heads * width], held, held],
        )
        for cached, made in ((keys, key), (values, value)):
            self._replace_cache(cached, made)
        return self._heads_first(out, site)

    def _further(self, site: AttentionSite) -> list[fx.Node | None]:
        """Angles, positions, a bias and a sink, as far as there are any."""
        further: list[fx.Node | None] = [None] * 5
        if site in self.rotations:
            further[:2] = self._angles(self.rotations[site][0])
        if site.sink is not None:
            further[4] = self.copies[site.sink]
        while further and further[-1] is None:
            further.pop()
        return further

    def _angles(self, rotary: Rotary) -> tuple[fx.Node, fx.Node]:
        """Nodes of its cosines and sines, which layers share."""
        for cos, sin, *nodes in self.tables:
            if cos is rotary.cos or (torch.equal(cos, rotary.cos) and torch.equal(sin, rotary.sin)):
                return nodes[0], nodes[1]
        made = []
        # They stand for weights, which come before inputs.
        with self.graph.inserting_before(self.first_input):
            for name, table in (("cos", rotary.cos), ("sin", rotary.sin)):
                node = self.graph.placeholder(f"rotary_{len(self.tables)}_{name}")
                node.meta["val"] = self.at.meta["val"].fake_mode.from_tensor(table)
                made.append(node)
        self.tables.append((rotary.cos, rotary.sin, made[0], made[1]))
        return made[0], made[1]

    def _rows_before(self, rotary: Rotary) -> fx.Node:
        """What is rotated, as ``[batch, length, heads * size]``."""
        if rotary.heads_first:
            return self._rows(rotary.source)
        return self._joined(self.copies[rotary.source])

    def _spoiled(self, query: fx.Node, padding: fx.Node) -> fx.Node:
        """`query` without a number in the rows that are padded on the left.

        The operator counts keys and would take the padding for the first ones: such rows shall
        come out as NaN, not as something else than the program computes.
        """
        first = self._call(_ATEN.slice.Tensor, padding, 1, 0, 1)
        left = self._call(_ATEN.eq.Scalar, first, 0)
        left = self._call(_ATEN.unsqueeze.default, left, 2)
        none = self._call(_ATEN.scalar_tensor.default, 0.0, dtype=query.meta["val"].dtype)
        spoil = self._call(_ATEN.where.ScalarSelf, left, float("nan"), none)
        return self._call(_ATEN.add.Tensor, query, spoil)

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
                    size = self._size(self.copies[cached.past], dim)
                    if dim == 2:
                        size = self._sum(size, self._size(self.copies[cached.new], dim))
                user.replace_all_uses_with(size)

    def _mha(self, site: AttentionSite) -> fx.Node:
        query = self._rows(site.query)
        batch, new = (self._size(query, dim) for dim in (0, 1))
        (out,) = self._operator(
            "com.microsoft::MultiHeadAttention",
            [query, *map(self._keys, (site.key, site.value)), None, None, self._bias(site)],
            {"num_heads": site.heads, "scale": site.scale},
            [[batch, new, site.heads * site.sizes[1]]],
        )
        return self._heads_first(out, site)

    def _standard(self, site: AttentionSite) -> fx.Node:
        query, key, value = (self.copies[node] for node in (site.query, site.key, site.value))
        mask = site.mask.node
        (out,) = self._operator(
            "::Attention",
            [query, key, value, *([self.copies[mask]] if mask is not None else [])],
            {"scale": site.scale},
            [[self._size(query, 0), site.heads, self._size(query, 2), site.sizes[1]]],
            version=STANDARD_OPSET,
        )
        return out

    def _rows(self, node: fx.Node) -> fx.Node:
        """``[batch, heads, length, size]`` as ``[batch, length, heads * size]``."""
        inner, copy = plain(node), self.copies[node]
        turned = inner.target is _ATEN.transpose.int and set(inner.args[1:]) in ({1, 2}, {1, -2})
        if turned:
            copy = self.copies[inner.all_input_nodes[0]]
        else:
            copy = self._call(_ATEN.transpose.int, copy, 1, 2)
        return self._joined(copy)

    def _joined(self, node: fx.Node) -> fx.Node:
        """``[batch, length, heads, size]`` with heads and sizes in one dimension."""
        _, _, heads, width = node.meta["val"].shape
        sizes = [self._size(node, 0), self._size(node, 1), heads * width]
        return self._call(_ATEN.reshape.default, node, sizes)

    def _keys(self, node: fx.Node) -> fx.Node:
        """Keys or values for MultiHeadAttention: cached ones have their heads first."""
        return self.copies[node] if node.target is _ATEN.cat.default else self._rows(node)

    def _heads_first(self, rows: fx.Node, site: AttentionSite) -> fx.Node:
        """``[batch, length, heads * size]`` as ``[batch, heads, length, size]``.

        Where the graph goes back at once, it goes on from the rows.
        """
        sizes = [self._size(rows, 0), self._size(rows, 1), site.heads, site.sizes[1]]
        apart = self._call(_ATEN.reshape.default, rows, sizes)
        pending = [self.at]
        while pending:
            for user in list(pending.pop().users):
                if user.target is _ATEN.transpose.int and user.args[1:] in ((1, 2), (2, 1)):
                    user.replace_all_uses_with(apart)
                elif plain(user) is self.at:
                    pending.append(user)
        return self._call(_ATEN.transpose.int, apart, 1, 2)

    def _bias(self, site: AttentionSite) -> fx.Node | None:
        """What is added to scores, of as many rows as there are queries."""
        if site.mask.node is None:
            return None
        mask, query = self.copies[site.mask.node], self.copies[site.query]
        value, dtype = mask.meta["val"], query.meta["val"].dtype
        if value.dtype == torch.bool:
            zero = self._call(_ATEN.scalar_tensor.default, 0.0, dtype=dtype)
            least = torch.finfo(dtype).min
            mask = self._call(_ATEN.where.ScalarOther, mask, zero, least)
        elif value.dtype != dtype:
            mask = self._call(_ATEN._to_copy.default, mask, dtype=dtype)
        for _ in range(4 - value.dim()):
            mask = self._call(_ATEN.unsqueeze.default, mask, 0)
        sizes = [-1, -1, self._size(query, 2), self._size(self.copies[site.key], 2)]
        return self._call(_ATEN.expand.default, mask, sizes)

    def _lengths(self, site: AttentionSite, batch: Any, total: Any) -> tuple[fx.Node, fx.Node]:
        """How many keys of each row count, less one; and how many places the mask has."""
        padding = self.copies[site.mask.padding] if site.mask.padding is not None else None
        key = padding if padding is not None else site.caches
        if key not in self.lengths:
            if padding is not None:
                counted = self._call(_ATEN.sum.dim_IntList, padding, [1])
                last = self._call(_ATEN.sub.Tensor, counted, 1)
                last = self._call(_ATEN._to_copy.default, last, dtype=torch.int32)
                total = self._size(padding, 1)
            else:
                less = self._sum(total, -1)
                last = self._call(_ATEN.full.default, [batch], less, dtype=torch.int32)
            whole = self._call(_ATEN.scalar_tensor.default, total, dtype=torch.int32)
            self.lengths[key] = last, whole
        return self.lengths[key]

    # -- nodes --

    def _operator(
        self,
        name: str,
        inputs: Sequence[fx.Node | None],
        attributes: dict[str, int | float],
        shapes: Sequence[Sequence[Any]],
        version: int | None = None,
    ) -> list[fx.Node]:
        """The results of an operator of ONNX, as `torch.onnx.ops.symbolic_multi_out` has it."""
        domain, _, kind = name.rpartition("::")
        whole = {k: v for k, v in attributes.items() if isinstance(v, int)}
        real = {k: v for k, v in attributes.items() if k not in whole}
        positions = [[i, i + 1] for group in (whole, real) for i in range(len(group))]
        dtype = _TYPES[next(node for node in inputs if node is not None).meta["val"].dtype]
        made = self._call(
            torch.ops.onnx_symbolic._symbolic_multi_out.default,
            list(inputs),
            kind,
            [dtype] * len(shapes),
            shapes=[list(shape) for shape in shapes],
            attr_keys=[*whole, *real],
            attr_types=["i"] * len(whole) + ["f"] * len(real),
            attr_pos=positions,
            attr_ints=list(whole.values()),
            attr_floats=[float(number) for number in real.values()],
            attr_strs=[],
            metadata_props_keys=[],
            metadata_props_values=[],
            domain=domain,
            version=version,
        )
        return [self._call(operator.getitem, made, index) for index in range(len(shapes))]

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made = made_from(self.at, target, *args, **kwargs)
        return valued(made, self.at.meta["val"].fake_mode)

    def _size(self, node: fx.Node, dim: int) -> Any:
        size = node.meta["val"].shape[dim]
        return size if type(size) is int else self._call(_ATEN.sym_size.int, node, dim)

    def _sum(self, left: Any, right: Any) -> Any:
        if not isinstance(left, fx.Node) and not isinstance(right, fx.Node):
            return left + right
        return self._call(operator.add, left, right)
