"""Walks along an axis, from weight to weight."""

from __future__ import annotations

import pytest
from architectures import coupling_of

from graphprune.errors import UsageError
from graphprune.report.coupling_paths import CouplingPaths

MLP = "model.layers.0.mlp"


def steps(group: str, first: str, second: str, name: str = "llama-gqa") -> list[tuple[str, str]]:
    chains = CouplingPaths(coupling_of(name))
    names = {node: weight for weight, node in chains.coupling.program.weight_nodes()}
    found = chains.between(group, first, second)
    return [(str(step.operator.target), names.get(step.value, "")) for step in found]


def test_the_gate_meets_the_down_projection_through_the_activation() -> None:
    down = f"{MLP}.down_proj.weight"
    assert steps(f"{MLP}:ffn", f"{MLP}.gate_proj.weight", down) == [
        ("aten.linear.default", ""),
        ("aten.silu.default", ""),
        ("aten.mul.Tensor", ""),
        ("aten.linear.default", down),
    ]


def test_a_walk_back_has_the_same_operators_in_reverse() -> None:
    coupling = coupling_of("llama-gqa")
    for group in coupling.groups:
        first, *_, last = members if len(members := group.weights()) > 1 else (members * 2)
        there = [operator for operator, _ in steps(group.name, first, last)]
        back = [operator for operator, _ in steps(group.name, last, first)]
        assert len(there) == len(back)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "bert", "t5", "resnet", "gemma3"])
def test_all_members_of_every_group_are_reached(name: str) -> None:
    coupling = coupling_of(name)
    chains = CouplingPaths(coupling)
    nodes = dict(coupling.program.weight_nodes())
    for group in coupling.groups:
        first, *others = group.weights()
        tree = chains.tree(group.name, first)
        assert all(nodes[other] in tree for other in others), group.name


def test_experts_are_coupled_by_an_index() -> None:
    (group, *_) = [group for group in coupling_of("mixtral").groups if group.role == "expert"]
    router = next(weight for weight in group.weights() if "gate.weight" in weight)
    packed = next(weight for weight in group.weights() if "down" in weight)
    with pytest.raises(UsageError, match="picked by index"):
        steps(group.name, router, packed, "mixtral")


def test_what_is_no_member_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"model\.norm\.weight is no member of .*:ffn"):
        CouplingPaths(coupling_of("llama-gqa")).between(
            f"{MLP}:ffn", f"{MLP}.up_proj.weight", "model.norm.weight"
        )
