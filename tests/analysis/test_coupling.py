from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator

import networkx
import pytest
import torch
from architectures import (
    ARCHITECTURES,
    DECODERS,
    build,
    coupling_of,
    program_of,
    random_plan,
)
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.analysis.axes import Atom, Axes, Axis, Product, Sum
from graphprune.analysis.axis_cuts import AxisCut, kept_indices
from graphprune.analysis.coupling import Coupling
from graphprune.analysis.groups import Group, common_path
from graphprune.errors import UsageError
from graphprune.plan.index_map import IndexMap
from graphprune.plan.plan import Plan
from graphprune.plan.steps import Step
from graphprune.transforms.apply import apply_plan

LAYER = "model.layers.0"


class Between(nn.Module):
    """Any function between two linear layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(6, 8)
        self.b = nn.Linear(function(torch.zeros(2, 4, 8)).flatten(1).shape[1], 5)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self.a(x)).flatten(1))


def analyse(function: Callable[[Tensor], Tensor]) -> Coupling:
    return gp.analyze(gp.capture(Between(function), example_inputs=(torch.randn(2, 4, 6),)))


def summary(coupling: Coupling) -> dict[str, tuple[int, str, str]]:
    return {group.name: (group.size, group.role, group.exactness) for group in coupling.groups}


# -- groups -------------------------------------------------------------------------------------


def test_the_groups_of_a_llama() -> None:
    layers = {
        f"model.layers.{layer}.{name}": what
        for layer in range(2)
        for name, what in {
            "self_attn:kv-head": (2, "kv-head", "exact"),
            "self_attn:query-slot": (2, "query-slot", "exact"),
            "self_attn:head-dim": (8, "head-dim", "exact"),
            "mlp:ffn": (48, "ffn", "exact"),
        }.items()
    }
    assert summary(coupling_of("llama-gqa")) == {
        "residual": (32, "residual", "rescaled"),
        "model:rope-pair": (4, "rope-pair", "exact"),
        **layers,
    }


@pytest.mark.parametrize(
    ("name", "exactness", "why"),
    [
        (
            "llama-gqa",
            "rescaled",
            "mean over it at aten.mean.dim in model.layers.0.input_layernorm",
        ),
        ("gpt2", "approximate", "mean and variance over it at aten.layer_norm.default in transfor"),
        ("bert", "approximate", "at aten.layer_norm.default in bert.embeddings.LayerNorm"),
    ],
)
def test_a_group_that_is_not_exact_says_why(name: str, exactness: str, why: str) -> None:
    (group,) = [g for g in coupling_of(name).groups if g.role == "residual"]
    assert group.exactness == exactness
    assert why in group.why
    assert re.search(r"\(\S+\.py:\d+\)$", group.why)
    assert group.why in str(group)
    assert not any(g.why for g in coupling_of(name).groups if g.exactness == "exact")


def test_a_mean_of_rms_norm_is_told_from_the_statistics_of_layer_norm() -> None:
    for norm, exactness in ((F.rms_norm, "rescaled"), (F.layer_norm, "approximate")):
        (group,) = analyse(lambda h, norm=norm: norm(h, [8])).groups
        assert group.exactness == exactness


class Mixing(nn.Module):
    """Attention without a softmax, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value = (nn.Linear(5, width) for width in (6, 6, 8))
        self.out, self.up, self.down = nn.Linear(8, 5), nn.Linear(5, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (2, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        x = self.out((query @ (key.transpose(-1, -2) @ value)).transpose(1, 2).flatten(-2))
        return self.down(self.up(x).relu())


def test_units_of_products_of_two_values_are_none_of_an_mlp() -> None:
    coupling = gp.analyze(gp.capture(Mixing(), example_inputs=(torch.randn(2, 4, 5),)))
    roles = [(group.role, group.size) for group in coupling.groups]
    assert sorted(roles) == [("ffn", 5), ("ffn", 10), ("other", 2), ("other", 3), ("other", 4)]


def test_a_group_reads_like_its_members() -> None:
    assert str(coupling_of("llama-gqa").group(f"{LAYER}.self_attn:query-slot")).splitlines() == [
        "model.layers.0.self_attn:query-slot: 2 units, query-slot, exact",
        "  chosen per unit of model.layers.0.self_attn:kv-head",
        "  model.layers.0.self_attn.q_proj.weight dim 0: 0 + 16*[0,2) + 8*unit + [0,8)",
        "  model.layers.0.self_attn.o_proj.weight dim 1: 0 + 16*[0,2) + 8*unit + [0,8)",
    ]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_are_those_of_the_module_that_the_members_share(name: str) -> None:
    coupling = coupling_of(name)
    assert len({group.name for group in coupling.groups}) == len(coupling.groups)
    for group in coupling.groups:
        path, _, role = group.name.rpartition(":")
        assert re.fullmatch(re.escape(group.role) + r"(\.\d+)?", role)
        assert path.startswith(common_path(group.weights()))
        assert not path or any(weight.startswith(f"{path}.") for weight in group.weights())
        assert coupling.group(group.name) is group
        assert coupling.group_of(coupling.atom(group.name)) is group


def test_an_unknown_group_is_refused_with_the_nearest_name() -> None:
    coupling = coupling_of("llama-gqa")
    with pytest.raises(UsageError, match=r"no group 'model.layer.0.mlp:ffn'; did you mean 'model"):
        coupling.group("model.layer.0.mlp:ffn")
    with pytest.raises(
        UsageError, match=r"no group 'zzz'; there are such as model.layers.0\.\S+:.*ffn"
    ):
        coupling.group("zzz")


# -- members ------------------------------------------------------------------------------------


def units_at(axes: Axes, axis: Axis) -> Iterator[dict[Atom, int]]:
    """For every index of `axis` the unit of each atom that it stands for, in order."""
    axis = axes.head(axis)
    if isinstance(axis, Atom):
        yield from ({axis: unit} for unit in range(axis.size))
    elif isinstance(axis, Sum):
        for term in axis.terms:
            yield from units_at(axes, term)
    else:
        assert isinstance(axis, Product)
        parts = (list(units_at(axes, factor)) for factor in axis.factors)
        for places in itertools.product(*parts):
            yield {atom: unit for place in places for atom, unit in place.items()}


def members_of(group: Group) -> dict[tuple[str, int], list[IndexMap]]:
    found: dict[tuple[str, int], list[IndexMap]] = {}
    for member in group.members:
        found.setdefault((member.weight, member.dim), []).append(member)
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_index_maps_are_those_of_the_axes(name: str) -> None:
    coupling = coupling_of(name)
    axes = coupling.types.axes
    for group in coupling.groups:
        atom = coupling.atom(group.name)
        for (weight, dim), members in members_of(group).items():
            axis = coupling.types.weight(weight)[dim]
            size = coupling.program.weights[weight].shape[dim]
            assert {member.extent for member in members} == {size}
            places = list(units_at(axes, axis))
            for unit in range(group.size):
                expected = {i for i, place in enumerate(places) if place.get(atom) == unit}
                found = [member.indices(unit) for member in members]
                assert sorted(itertools.chain(*found)) == sorted(expected)
                kept = kept_indices(axes, axis, {atom: AxisCut(removed=(unit,))})
                assert expected == set(range(size)) - set(kept)


@pytest.mark.parametrize("name", ["llama-gqa", "phi3", "gpt-neox", "gpt2"])
def test_under_a_parent_only_its_part_of_a_unit_is_meant(name: str) -> None:
    coupling = coupling_of(name)
    dependent = [group for group in coupling.groups if group.parents]
    assert dependent
    for group in dependent:
        (parent,) = map(coupling.group, group.parents)
        for member in group.members:
            parts = [member.indices(0, {parent.name: place}) for place in range(parent.size)]
            assert sorted(itertools.chain(*parts)) == member.indices(0)
            (around,) = [
                m
                for m in parent.members
                if (m.weight, m.dim) == (member.weight, member.dim)
                and m.offset <= member.offset < m.offset + m.width
            ]
            for place, part in enumerate(parts):
                assert set(part) <= set(around.indices(place))


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gpt-neox", "mixtral"])
def test_each_group_alone_is_removed_as_it_says(name: str) -> None:
    coupling, program = coupling_of(name), program_of(name)
    tried = set()
    for group in coupling.groups:
        kind = (group.role, group.size, len(group.members))
        if kind in tried:
            continue
        tried.add(kind)
        plan = cut_alone(coupling, group)
        gp.verify(program, plan, gp.apply(program, plan))


# -- parents ------------------------------------------------------------------------------------


def parents_of(coupling: Coupling) -> dict[str, tuple[str, ...]]:
    return {
        group.role: tuple(p.rpartition(":")[2] for p in group.parents) for group in coupling.groups
    }


def test_query_slots_and_value_dimensions_depend_on_their_head() -> None:
    assert parents_of(coupling_of("llama-gqa")) == {
        "residual": (),
        "rope-pair": (),
        "kv-head": (),
        "query-slot": ("kv-head",),
        "head-dim": ("kv-head",),
        "ffn": (),
    }


def heads(h: Tensor) -> Tensor:
    return h.unflatten(2, (4, 2))


def turned(function: Callable[[Tensor, list[int]], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function of what is beside each other in several heads."""
    return lambda h: function(heads(h).transpose(2, 3), [4]).transpose(2, 3)


DEPENDENT = [
    pytest.param(lambda h: heads(h).relu(), id="function of each"),
    pytest.param(lambda h: heads(h) * heads(h).sum(-1, keepdim=True), id="sum in a head"),
    pytest.param(lambda h: F.rms_norm(heads(h), [2]), id="norm in a head"),
    pytest.param(
        lambda h: heads(h).mT.permute(0, 3, 1, 2) @ heads(h).permute(0, 2, 3, 1), id="scores"
    ),
]
MIXING = [
    pytest.param(lambda h: heads(h).sum(2), id="sum over heads"),
    pytest.param(lambda h: heads(h).softmax(2), id="softmax over heads"),
    pytest.param(lambda h: heads(h).cumsum(2), id="running sum over heads"),
    pytest.param(lambda h: heads(h).gather(2, heads(h).gt(0).long()), id="heads by index"),
    pytest.param(lambda h: heads(h)[:, :, 1:], id="some heads"),
    pytest.param(turned(F.rms_norm), id="rms norm over heads"),
    pytest.param(turned(F.layer_norm), id="layer norm over heads"),
    pytest.param(lambda h: heads(h) @ heads(h).mT, id="heads times heads"),
    pytest.param(
        lambda h: (heads(h)[:, :, :, None] * heads(h)[:, :, None]).sum(-1), id="pairs of heads"
    ),
]


def cut_alone(coupling: Coupling, group: Group) -> Plan:
    """Remove other units of `group` under every parent, and nothing else."""
    sizes = [range(coupling.group(parent).size) for parent in group.parents]
    units = {place: (sum(place) % group.size,) for place in itertools.product(*sizes)}
    return Plan((Step(coupling.program.fingerprint(), (group.cut(units),)),))


def innermost(coupling: Coupling) -> Group:
    """The group of the two places in each of four heads of the first layer."""
    (group,) = [g for g in coupling.groups if g.size == 2 and g.members[0].width == 1]
    return group


@pytest.mark.parametrize("function", DEPENDENT)
def test_other_units_may_go_under_every_parent(function: Callable[[Tensor], Tensor]) -> None:
    coupling = analyse(function)
    group = innermost(coupling)
    assert [coupling.group(parent).size for parent in group.parents] == [4]
    plan = cut_alone(coupling, group)
    gp.verify(coupling.program, plan, gp.apply(coupling.program, plan))


@pytest.mark.parametrize("function", MIXING)
def test_what_meets_across_parents_goes_alike_under_all(
    function: Callable[[Tensor], Tensor],
) -> None:
    coupling = analyse(function)
    group = innermost(coupling)
    assert not group.parents
    plan = cut_alone(coupling, group)
    gp.verify(coupling.program, plan, gp.apply(coupling.program, plan))


def test_a_linear_layer_over_heads_mixes_them() -> None:
    class Mixer(Between):
        def __init__(self) -> None:
            super().__init__(heads)
            self.mix = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = heads(self.a(x)).mT
            return self.b((h + self.mix(h)).flatten(1))

    coupling = gp.analyze(gp.capture(Mixer(), example_inputs=(torch.randn(2, 4, 6),)))
    assert not innermost(coupling).parents


# -- types and reasons --------------------------------------------------------------------------


def test_types_print_by_the_labels_of_roles() -> None:
    coupling = coupling_of("llama-gqa")
    types = {
        name.removeprefix(f"{LAYER}."): str(coupling.type_of(name))
        for name in coupling.program.weights
        if name.startswith(LAYER) and "norm" not in name
    }
    assert types == {
        "self_attn.q_proj.weight": "[(kv q [r + r]), hidden]",
        "self_attn.k_proj.weight": "[(kv [r + r]), hidden]",
        "self_attn.v_proj.weight": "[(kv d), hidden]",
        "self_attn.o_proj.weight": "[hidden, (kv q d)]",
        "mlp.gate_proj.weight": "[ffn, hidden]",
        "mlp.up_proj.weight": "[ffn, hidden]",
        "mlp.down_proj.weight": "[hidden, ffn]",
    }


def test_two_axes_of_one_role_are_told_apart() -> None:
    assert str(analyse(heads).type_of("a.weight")) == "[(ffn ffn2), 6]"


@pytest.mark.parametrize("name", ["llama-mha", "gpt2", "bert", "t5"])
def test_a_tied_name_has_the_type_of_its_weight(name: str) -> None:
    coupling = coupling_of(name)
    for alias, canonical in coupling.program.aliases.items():
        assert coupling.type_of(alias) == coupling.type_of(canonical)
        assert coupling.explain(alias, 0).startswith(f"{alias}, dimension 0: ")


def test_a_weight_that_does_not_exist_is_refused() -> None:
    coupling = coupling_of("llama-gqa")
    with pytest.raises(UsageError, match="no weight 'head'"):
        coupling.type_of("head")
    with pytest.raises(UsageError, match="no weight 'head'"):
        coupling.explain("head", 0)
    with pytest.raises(
        UsageError, match="lm_head.weight has 2 dimensions, there is no dimension 2"
    ):
        coupling.explain("lm_head.weight", 2)
    with pytest.raises(UsageError, match="dimension '0' of lm_head.weight: give its number"):
        coupling.explain("lm_head.weight", "0")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no weight 3"):
        coupling.explain(3, 0)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="there is no dimension -3"):
        coupling.explain("lm_head.weight", -3)


def test_a_pruned_dimension_is_explained_by_its_groups() -> None:
    coupling = coupling_of("llama-gqa")
    assert coupling.explain(f"{LAYER}.self_attn.k_proj.weight", 0).splitlines() == [
        "model.layers.0.self_attn.k_proj.weight, dimension 0: (kv [r + r])",
        "  2 units of group model.layers.0.self_attn:kv-head (kv-head, exact)",
        "  4 units of group model:rope-pair (rope-pair, exact)",
    ]
    norm = coupling.explain("model.norm.weight", -1).splitlines()
    assert norm[1] == "  32 units of group residual (residual, rescaled)"
    assert norm[2].startswith("    mean over it at aten.mean.dim in model.layers.0.input_layernorm")


@pytest.mark.parametrize(
    ("function", "why", "operator"),
    [
        pytest.param(lambda h: h.softmax(-1), "softmax runs over it", "softmax.int", id="softmax"),
        pytest.param(
            lambda h: torch.linalg.matrix_exp(h[..., :4]),
            "operator aten.linalg_matrix_exp.default has no rule",
            "linalg_matrix_exp.default",
            id="no rule",
        ),
        pytest.param(
            lambda h: h.exp().sum(-1),
            "summed over values that do not vanish",
            "sum.dim_IntList",
            id="sum",
        ),
    ],
)
def test_a_frozen_dimension_names_operator_and_line(
    function: Callable[[Tensor], Tensor], why: str, operator: str
) -> None:
    explained = analyse(function).explain("a.weight", 0).splitlines()[1]
    assert why in explained
    assert re.search(rf"frozen: .*, at aten\.{operator} \(test_coupling.py:\d+\)$", explained)


def test_a_frozen_dimension_names_the_module() -> None:
    explained = coupling_of("llama-gqa").explain("model.embed_tokens.weight", 0)
    assert "61 frozen: its rows are picked by index, at aten.embedding.default" in explained
    assert "in model.embed_tokens (torch/nn/modules/sparse.py:" in explained


def test_interfaces_are_frozen_as_such() -> None:
    coupling = coupling_of("vit")
    explained = coupling.explain("classifier.weight", 0)
    assert "frozen: it is dimension 1 of the output 'logits'" in explained


def test_single_places_are_fixed() -> None:
    coupling = gp.analyze(gp.capture(nn.Linear(3, 1), example_inputs=(torch.zeros(2, 3),)))
    assert "fixed: a dimension of single positions" in coupling.explain("weight", 0)


@pytest.mark.parametrize("name", ["llama-gqa", "mixtral", "resnet"])
def test_every_dimension_of_a_parameter_is_in_a_group_or_has_a_reason(name: str) -> None:
    coupling = coupling_of(name)
    reasons = {(weight, dim) for weight, dim, _ in coupling.frozen()}
    reached = {(m.weight, m.dim) for group in coupling.groups for m in group.members}
    for weight, tensor in coupling.program.weights.items():
        if coupling.program.kinds[weight] == "parameter":
            wide = {(weight, dim) for dim, size in enumerate(tensor.shape) if size > 1}
            assert wide <= reasons | reached


# -- as data ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-gqa", "resnet"])
def test_the_graph_is_bipartite_with_the_documented_attributes(name: str) -> None:
    coupling = coupling_of(name)
    graph = coupling.graph
    assert isinstance(graph, networkx.Graph)
    assert not graph.is_directed()
    weights = {node: data for node, data in graph.nodes(data=True) if data["kind"] == "weight"}
    groups = {node: data for node, data in graph.nodes(data=True) if data["kind"] == "group"}
    assert set(weights) == set(coupling.program.weights)
    assert set(groups) == {group.name for group in coupling.groups}
    for weight, data in weights.items():
        assert data["shape"] == tuple(coupling.program.weights[weight].shape)
        assert data["type"] == str(coupling.type_of(weight))
    for group in coupling.groups:
        data = groups[group.name]
        assert {k: data[k] for k in ("size", "role", "exactness")} == {
            "size": group.size,
            "role": group.role,
            "exactness": group.exactness,
        }
        reached = {
            (weight, d) for weight in graph[group.name] for d in graph[group.name][weight]["dims"]
        }
        assert reached == set(members_of(group))
    assert networkx.bipartite.is_bipartite_node_set(graph, groups)


def test_all_that_is_coupled_with_a_weight_is_one_line() -> None:
    coupling = coupling_of("llama-mha")
    assert sorted(coupling.graph[f"{LAYER}.self_attn.o_proj.weight"]) == [
        "model.layers.0.self_attn:head-dim",
        "model.layers.0.self_attn:kv-head",
        "model:residual",
    ]
    component = networkx.node_connected_component(coupling.graph, "model.norm.weight")
    assert component >= {group.name for group in coupling.groups}


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_json_holds_groups_types_and_reasons(name: str) -> None:
    coupling = coupling_of(name)
    data = json.loads(coupling.to_json())
    assert set(data) == {"fingerprint", "groups", "weights", "frozen"}
    assert data["fingerprint"] == coupling.program.fingerprint()
    for group, found in zip(coupling.groups, data["groups"], strict=True):
        assert found["parents"] == list(group.parents)
        for key in ("name", "size", "role", "exactness", "why"):
            assert found[key] == getattr(group, key)
        for member, held in zip(group.members, found["members"], strict=True):
            assert held["outer"] == [list(loop) for loop in member.outer]
            for key in ("weight", "dim", "offset", "width"):
                assert held[key] == getattr(member, key)
    assert data["weights"] == {
        weight: {"shape": list(tensor.shape), "type": str(coupling.type_of(weight))}
        for weight, tensor in coupling.program.weights.items()
    }
    reasons = {(entry["weight"], entry["dim"]): entry for entry in data["frozen"]}
    table = coupling.program.aliases.get("lm_head.weight", "model.embed_tokens.weight")
    assert reasons[table, 0]["why"] == "its rows are picked by index"
    assert reasons[table, 0]["where"].startswith("aten.embedding.default in ")
    assert json.loads(coupling.to_json(indent=None)) == data


def test_dot_text_has_a_line_for_every_node_and_edge() -> None:
    coupling = coupling_of("llama-gqa")
    first, *lines, last = coupling.to_dot().splitlines()
    assert (first, last) == ("graph coupling {", "}")
    quoted = r'"((?:[^"\\]|\\.)*)"'
    nodes = [m[1] for line in lines if (m := re.fullmatch(rf"  {quoted} \[shape=.*\];", line))]
    edges = [
        frozenset((m[1], m[2]))
        for line in lines
        if (m := re.fullmatch(rf"  {quoted} -- {quoted} \[label={quoted}\];", line))
    ]
    assert sorted(nodes) == sorted(coupling.graph.nodes)
    assert set(edges) == set(map(frozenset, coupling.graph.edges))
    assert len(nodes) + len(edges) == len(lines) - 2
    assert all(line.count('"') % 2 == 0 for line in lines)


# -- without weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_on_meta_the_groups_are_the_same(name: str) -> None:
    with torch.device("meta"):
        program = gp.capture(build(name))
    coupling, real = gp.analyze(program), coupling_of(name)
    assert coupling.groups == real.groups
    assert {w: str(coupling.type_of(w)) for w in program.weights} == {
        w: str(real.type_of(w)) for w in real.program.weights
    }


def test_a_plan_made_on_meta_is_for_the_model_with_weights() -> None:
    with torch.device("meta"):
        coupling = gp.analyze(gp.capture(build("gpt2")))
    plan = random_plan(coupling)
    program = program_of("gpt2")
    gp.verify(program, plan, gp.apply(program, plan))


# -- names --------------------------------------------------------------------------------------


def test_names_tell_where_a_group_lies() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 3))
    coupling = gp.analyze(gp.capture(net, (torch.randn(2, 4),)))
    assert [group.name for group in coupling.groups] == ["0:ffn", "2:ffn"]
    names = [group.name for group in coupling_of("opt").groups]
    attention = "model.decoder.layers.0.self_attn"
    assert f"{attention}.k_proj:head-dim" in names
    assert f"{attention}.v_proj:head-dim" in names


def test_groups_are_found_by_the_names_of_earlier_releases() -> None:
    coupling = coupling_of("opt")
    attention = "model.decoder.layers.0.self_attn"
    earlier = {f"{attention}:head-dim": "k_proj", f"{attention}:head-dim.2": "v_proj"}
    for name, module in earlier.items():
        assert coupling.group(name).name == f"{attention}.{module}:head-dim"
        assert coupling.current_names[name] == f"{attention}.{module}:head-dim"


def test_plans_of_earlier_releases_are_applied() -> None:
    coupling, program = coupling_of("opt"), program_of("opt")
    plan = random_plan(coupling, seed=3)
    text = plan.to_json()
    for earlier, now in coupling.current_names.items():
        if earlier not in {group.name for group in coupling.groups}:
            text = text.replace(f'"{now}"', f'"{earlier}"')
    assert ":head-dim.2" in text
    read, expected = Plan.from_json(text), apply_plan(program, plan)
    for name, weight in apply_plan(program, read).weights.items():
        assert torch.equal(weight, expected.weights[name])


# -- in a notebook ------------------------------------------------------------------------------


def test_groups_and_couplings_are_short_in_a_notebook() -> None:
    coupling = coupling_of("llama-gqa")
    group = coupling.group(f"{LAYER}.mlp:ffn")
    assert repr(group) == f"<Group {LAYER}.mlp:ffn: 48 units, ffn, exact, in 3 weights>"
    table = group._repr_html_()
    assert table.count("<tr>") == 4
    assert f"{LAYER}.mlp.down_proj.weight dim 1" in table
    lines = repr(coupling).splitlines()
    assert lines[0].startswith("<Coupling of LlamaForCausalLM: ")
    assert "  2 ffn of 48 units, exact" in lines
