"""What a target means, and which units a budget takes."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from architectures import coupling_of, program_of
from torch import Tensor

import graphprune as gp
from graphprune.analysis.coupling import Coupling
from graphprune.analysis.groups import Group
from graphprune.errors import SelectionError
from graphprune.plan.plan import Plan
from graphprune.plan.steps import Step
from graphprune.selection.cost import Costs
from graphprune.selection.selector import Selector
from graphprune.selection.targets import TARGETS, target_groups

NAME = "llama-gqa"


def groups_of(role: str, name: str = NAME) -> list[Group]:
    return [group for group in coupling_of(name).groups if group.role == role]


def random_scores(groups: Sequence[Group], name: str = NAME, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    coupling = coupling_of(name)
    return {
        group.name: torch.rand(
            (*(coupling.group(parent).size for parent in group.parents), group.size),
            generator=generator,
            dtype=torch.float64,
        )
        for group in groups
    }


def select(
    selector: Selector,
    groups: Sequence[Group],
    scores: dict[str, Tensor] | None = None,
    name: str = NAME,
) -> dict[str, dict[tuple[int, ...], tuple[int, ...]]]:
    """Group -> parents' units -> the units that go."""
    chosen = selector.select(coupling_of(name), groups, scores or random_scores(groups, name))
    return {cut.group: dict(cut.units) for cut in chosen}


def counts(
    selector: Selector,
    groups: Sequence[Group],
    scores: dict[str, Tensor] | None = None,
    name: str = NAME,
) -> list[int]:
    found = select(selector, groups, scores, name)
    return [len(next(iter(found[g.name].values()))) if g.name in found else 0 for g in groups]


def parameters_after(coupling: Coupling, groups: Sequence[Group], counts: Sequence[int]) -> int:
    return Costs(coupling).after("params", {g.name: n for g, n in zip(groups, counts, strict=True)})


def removed_share(selector: Selector, groups: Sequence[Group], name: str = NAME) -> float:
    """The part of the parameters that are gone once the cuts are carried out."""
    program = program_of(name)
    chosen = selector.select(coupling_of(name), groups, random_scores(groups, name))
    pruned = gp.apply(program, Plan((Step(program.fingerprint(), tuple(chosen)),)))
    return 1 - pruned.parameter_count() / program.parameter_count()


# -- targets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "name", "role", "count"),
    [
        ("ffn", "llama-gqa", "ffn", 2),
        ("ffn", "mixtral", "expert-unit", 2),
        ("kv-heads", "gpt2", "kv-head", 2),
        ("query-heads", "llama-gqa", "query-slot", 2),
        ("head-dim", "gpt2", "head-dim", 4),
        ("rope-dim", "gemma3", "rope-pair", 2),
        ("experts", "mixtral", "expert", 2),
        ("hidden", "bert", "residual", 1),
        ("channels", "resnet", "channel", 8),
    ],
)
def test_a_target_means_all_groups_of_its_roles(
    target: str, name: str, role: str, count: int
) -> None:
    found = target_groups(coupling_of(name), target)
    assert [group.role for group in found] == [role] * count
    assert found == groups_of(role, name)


@pytest.mark.parametrize(
    ("spelled", "target"),
    [
        ("kv-head", "kv-heads"),
        ("query-slot", "query-heads"),
        ("query-head", "query-heads"),
        ("head-dims", "head-dim"),
        ("rope-pair", "rope-dim"),
        ("residual", "hidden"),
    ],
)
def test_roles_singulars_and_plurals_are_targets(spelled: str, target: str) -> None:
    coupling = coupling_of("llama-gqa")
    assert target_groups(coupling, spelled) == target_groups(coupling, target)


def test_an_unknown_target_is_refused_with_the_nearest_name() -> None:
    coupling = coupling_of("llama-gqa")
    with pytest.raises(SelectionError, match=r"matches no group .*; did you mean 'hidden'"):
        target_groups(coupling, "hiden")
    with pytest.raises(SelectionError, match=r"matches no group of this program; its groups are"):
        target_groups(coupling, "channels")


def test_every_target_is_tested_above() -> None:
    (mark,) = test_a_target_means_all_groups_of_its_roles.pytestmark
    assert {case[0] for case in mark.args[1]} == set(TARGETS)


@pytest.mark.parametrize("name", ["llama-gqa", "qwen3", "gpt2", "mixtral", "bert", "resnet"])
def test_all_is_what_equals_zeroing_but_the_residual_stream(name: str) -> None:
    found = target_groups(coupling_of(name), "all")
    left = [group for group in coupling_of(name).groups if group not in found]
    assert found
    assert {group.role for group in left} - {"expert"} == {"residual"}


def test_all_takes_rescaled_groups_and_leaves_approximate_ones() -> None:
    class Net(torch.nn.Module):
        def __init__(self, norm: torch.nn.Module) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(8, 12)
            self.norm = norm
            self.last = torch.nn.Linear(12, 16)
            self.out = torch.nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.relu(self.last(self.norm(self.inner(x)))))

    sizes = {}
    for norm in (torch.nn.LayerNorm(12), torch.nn.RMSNorm(12), torch.nn.Identity()):
        program = gp.capture(Net(norm), example_inputs=(torch.ones(2, 8),))
        found = target_groups(gp.analyze(program), "all")
        sizes[type(norm).__name__] = {group.size: group.exactness for group in found}
    assert sizes == {
        "LayerNorm": {16: "exact"},
        "RMSNorm": {12: "rescaled", 16: "exact"},
        "Identity": {12: "exact", 16: "exact"},
    }


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("model.layers.1.mlp:ffn", ["model.layers.1.mlp:ffn"]),
        ("model.layers.?.mlp:*", ["model.layers.0.mlp:ffn", "model.layers.1.mlp:ffn"]),
        ("*layers.0*:query-slot", ["model.layers.0.self_attn:query-slot"]),
        ("*:rope-pair", ["model:rope-pair"]),
    ],
)
def test_a_target_may_be_a_pattern(pattern: str, names: list[str]) -> None:
    assert [group.name for group in target_groups(coupling_of(NAME), pattern)] == names


def test_a_pattern_may_reach_the_residual_stream() -> None:
    assert {g.role for g in target_groups(coupling_of(NAME), "*")} >= {"residual", "ffn"}


@pytest.mark.parametrize("target", ["nothing.*", "fnn", "", "channels", "FFN"])
def test_a_target_that_matches_nothing_says_what_there_is(target: str) -> None:
    with pytest.raises(SelectionError) as caught:
        target_groups(coupling_of(NAME), target)
    assert repr(target) in str(caught.value)
    assert "its groups are ffn, head-dim, kv-head, query-slot, residual, rope-pair" in str(
        caught.value
    )


def test_a_program_without_groups_says_so() -> None:
    program = gp.capture(torch.nn.Linear(4, 4), example_inputs=(torch.ones(2, 4),))
    for target in ("all", "ffn", "*"):
        with pytest.raises(SelectionError, match="it has no group that can be pruned"):
            target_groups(gp.analyze(program), target)


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (("model.layers.0.*",), ["model.layers.1.mlp:ffn"]),
        (("*.1.mlp.down_proj.weight",), ["model.layers.0.mlp:ffn"]),
        (("*:kv-head",), ["model.layers.0.mlp:ffn", "model.layers.1.mlp:ffn"]),
        ((), ["model.layers.0.mlp:ffn", "model.layers.1.mlp:ffn"]),
    ],
)
def test_groups_are_skipped_by_their_name_or_a_weight(
    skip: tuple[str, ...], left: list[str]
) -> None:
    assert [group.name for group in target_groups(coupling_of(NAME), "ffn", skip)] == left


def test_a_skip_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(SelectionError, match=r"skip pattern 'layers\.9' matches no group and no"):
        target_groups(coupling_of(NAME), "ffn", ["*.0.*", "layers.9"])


def test_skipping_everything_is_refused() -> None:
    with pytest.raises(SelectionError, match="every group of target 'ffn' is skipped"):
        target_groups(coupling_of(NAME), "ffn", ["*gate_proj*"])


# -- which units ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.1, 0.98])
def test_every_group_loses_its_least_important_units(ratio: float) -> None:
    groups = groups_of("ffn")
    scores = random_scores(groups)
    for group in groups:
        (units,) = select(Selector(ratio), groups, scores)[group.name].values()
        ranked = sorted(range(48), key=lambda unit: scores[group.name][unit])
        assert units == tuple(sorted(ranked[: math.floor(48 * ratio)]))


def test_of_equal_units_the_first_go() -> None:
    groups = groups_of("ffn")
    equal = {group.name: torch.ones(48, dtype=torch.float64) for group in groups}
    chosen = select(Selector(0.25), groups, equal)
    assert [dict(units) for units in chosen.values()] == [{(): tuple(range(12))}] * 2
    steps = {group.name: (torch.arange(48) // 20).double().flip(0) for group in groups}
    (units, _) = select(Selector(0.5), groups, steps).values()
    # The last twenty are the lowest; of the twenty before them the first four follow.
    assert units == {(): (8, 9, 10, 11, *range(28, 48))}


def test_of_equal_groups_the_first_goes() -> None:
    groups = groups_of("ffn")
    equal = {group.name: torch.ones(48, dtype=torch.float64) for group in groups}
    assert counts(Selector(0.25, "global"), groups, equal) == [24, 0]
    assert counts(Selector(0.25, "global"), groups[::-1], equal) == [24, 0]


def test_a_dependent_group_loses_other_units_under_every_parent() -> None:
    groups = groups_of("head-dim")
    scores = random_scores(groups)
    for group, units in select(Selector(0.5), groups, scores).items():
        assert list(units) == [(0,), (1,)]
        for (kv,), lost in units.items():
            ranked = scores[group][kv].argsort().tolist()
            assert lost == tuple(sorted(ranked[:4]))
        assert units[0,] != units[1,]


def test_the_same_scores_select_the_same_units_in_any_order_of_groups() -> None:
    groups = list(coupling_of(NAME).groups)
    scores = random_scores(groups)
    for scope in ("local", "global"):
        forwards = select(Selector(0.3, scope), groups, scores)
        backwards = select(Selector(0.3, scope), groups[::-1], scores)
        assert forwards == backwards


# -- how many: units ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "expected"), [(0.25, 12), (0.2, 9), (1 / 48, 1), (0.9999, 47), (0.3, 14)]
)
def test_a_ratio_of_units_is_rounded_down(ratio: float, expected: int) -> None:
    assert counts(Selector(ratio), groups_of("ffn")) == [expected] * 2


def test_groups_too_small_for_the_ratio_stay_whole() -> None:
    groups = [*groups_of("ffn"), *groups_of("kv-head")]
    assert counts(Selector(0.25), groups) == [12, 12, 0, 0]


@pytest.mark.parametrize(
    ("round_to", "expected"), [(1, 12), (4, 12), (8, 8), (16, 0), (5, 8), (48, 0)]
)
def test_a_multiple_of_round_to_is_kept(round_to: int, expected: int) -> None:
    groups = groups_of("ffn")
    if not expected:
        with pytest.raises(SelectionError, match=f"kept in multiples of {round_to}, is less than"):
            counts(Selector(0.25, round_to=round_to), groups)
        return
    assert counts(Selector(0.25, round_to=round_to), groups) == [expected] * 2
    assert (48 - expected) % round_to == 0


def test_round_to_beyond_a_group_leaves_it_whole() -> None:
    groups = [*groups_of("ffn"), *groups_of("kv-head")]
    assert counts(Selector(0.5, round_to=8), groups) == [24, 24, 0, 0]


@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_group_keeps_one_of_the_sizes_that_it_may_keep(scope: Any) -> None:
    groups = groups_of("ffn")
    sizes = {groups[0].name: (3, 30, 45), groups[1].name: range(7, 49, 7)}
    for ratio in (0.1, 0.3, 0.5, 0.9):
        left = [48 - n for n in counts(Selector(ratio, scope, sizes=sizes), groups)]
        assert left[0] in (3, 30, 45, 48)
        assert left[1] % 7 == 0 or left[1] == 48
        assert sum(left) >= 96 * (1 - ratio)
    assert removed_share(Selector(scope=scope, params=0.2, sizes=sizes), groups) >= 0.2


def test_sizes_count_for_the_groups_that_have_them_only() -> None:
    groups = groups_of("ffn")
    selector = Selector(0.5, round_to=10, sizes={groups[1].name: (40,)})
    assert counts(selector, groups) == [18, 8]
    with pytest.raises(SelectionError, match="kept in multiples of 10 and one of 40, is less"):
        counts(Selector(0.05, round_to=10, sizes={groups[1].name: (40,)}), groups)


NORMALIZERS: dict[str, Callable[[list[float]], float]] = {
    "none": lambda scores: 1.0,
    "mean": lambda scores: sum(scores) / len(scores),
    "max": max,
    "sum": sum,
    "l2": lambda scores: math.sqrt(sum(score**2 for score in scores)),
}


@pytest.mark.parametrize("normalize", NORMALIZERS)
@pytest.mark.parametrize("ratio", [0.1, 0.4])
def test_the_least_important_units_of_all_groups_go(normalize: Any, ratio: float) -> None:
    groups = [*groups_of("ffn"), *groups_of("rope-pair"), *groups_of("kv-head")]
    scores = random_scores(groups)
    for power, group in enumerate(groups):
        scores[group.name] = scores[group.name] ** (power + 1) * 3.0**power + 0.01
    ranked = []
    for index, group in enumerate(groups):
        values = sorted(scores[group.name].tolist())
        scale = NORMALIZERS[normalize](values)
        ranked += [(value / scale, index) for value in values[:-1]]  # one unit always stays
    budget = math.floor(sum(group.size for group in groups) * ratio)
    taken = Counter(index for _, index in sorted(ranked)[:budget])
    expected = [taken[index] for index in range(len(groups))]
    assert counts(Selector(ratio, "global", normalize=normalize), groups, scores) == expected
    assert sum(expected) == budget


def test_how_scores_are_normalized_matters() -> None:
    groups = groups_of("ffn")
    scores = random_scores(groups)
    scores[groups[0].name] *= 1e-3
    assert counts(Selector(0.25, "global", normalize="none"), groups, scores) == [24, 0]
    for normalize in ("mean", "max", "sum", "l2"):
        found = counts(Selector(0.25, "global", normalize=normalize), groups, scores)
        assert sum(found) == 24
        assert all(number >= 8 for number in found)


def test_scores_of_zero_are_normalized_too() -> None:
    groups = groups_of("ffn")
    scores = random_scores(groups)
    scores[groups[1].name] *= 0
    for normalize in NORMALIZERS:
        selector = Selector(0.25, "global", normalize=normalize)  # type: ignore[arg-type]
        assert counts(selector, groups, scores) == [0, 24]


def test_one_unit_of_every_group_stays_wherever_the_scores_are() -> None:
    groups = [*groups_of("ffn"), *groups_of("kv-head")]
    scores = random_scores(groups)
    for group in groups_of("kv-head"):
        scores[group.name] *= 1e-9
    assert counts(Selector(0.1, "global", normalize="none"), groups, scores)[2:] == [1, 1]


def test_a_dependent_group_is_ranked_by_its_mean_over_parents() -> None:
    groups = groups_of("head-dim")
    scores = {
        groups[0].name: torch.tensor([[1.0] * 8, [9.0] * 8], dtype=torch.float64),
        groups[1].name: torch.tensor([[4.0] * 8, [4.0] * 8], dtype=torch.float64),
    }
    assert counts(Selector(0.25, "global", normalize="none"), groups, scores) == [0, 4]


def test_round_to_holds_in_scope_global() -> None:
    groups = groups_of("ffn")
    for seed in range(3):
        scores = random_scores(groups, seed=seed)
        found = counts(Selector(0.5, "global", round_to=8), groups, scores)
        assert all((48 - count) % 8 == 0 for count in found)
        assert 48 - 16 <= sum(found) <= 48


# -- how many: parameters -------------------------------------------------------------------------

UNIT = {"ffn": 3 * 32, "kv-head": 2 * 16 * 32 + 2 * 8 * 32, "rope-pair": 2 * 2 * 6 * 32}
"""Parameters that a unit of llama-gqa holds: slices of 32 hidden in all its weights."""


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize(
    ("roles", "ratio"),
    [(["ffn"], 0.1), (["ffn"], 0.25), (["ffn", "kv-head"], 0.3), (["ffn", "rope-pair"], 0.2)],
)
def test_a_budget_of_parameters_is_met_within_one_unit(
    roles: list[str], ratio: float, scope: Any
) -> None:
    groups = list(itertools.chain.from_iterable(map(groups_of, roles)))
    share = removed_share(Selector(scope=scope, params=ratio), groups)
    # In scope group all groups of a size lose a unit at once.
    units = [UNIT[group.role] for group in groups]
    one = (sum(units) if scope == "local" else max(units)) / program_of(NAME).parameter_count()
    assert ratio <= share < ratio + one


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("name", ["gpt2", "mixtral", "resnet", "bert"])
def test_a_budget_of_parameters_is_the_smallest_that_suffices(name: str, scope: Any) -> None:
    coupling, ratio = coupling_of(name), 0.15
    groups = target_groups(coupling, "all")
    share = removed_share(Selector(scope=scope, params=ratio), groups, name)
    assert ratio <= share < ratio + 0.1
    found = counts(Selector(scope=scope, params=ratio), groups, None, name)
    before = program_of(name).parameter_count()
    left = parameters_after(coupling, groups, found)
    assert 1 - left / before == pytest.approx(share)


def test_the_residual_stream_meets_a_budget_of_parameters() -> None:
    groups = groups_of("residual")
    for ratio in (0.1, 0.5, 0.9):
        (count,) = counts(Selector(params=ratio), groups)
        before = program_of(NAME).parameter_count()
        part = [1 - parameters_after(coupling_of(NAME), groups, [n]) / before for n in range(32)]
        assert part[count - 1] < ratio <= part[count]


def test_round_to_holds_for_a_budget_of_parameters() -> None:
    groups = groups_of("ffn")
    for scope in ("local", "global"):
        selector = Selector(scope=scope, params=0.15, round_to=8)  # type: ignore[arg-type]
        found = counts(selector, groups)
        assert all((48 - count) % 8 == 0 for count in found)
        assert removed_share(selector, groups) >= 0.15


# -- how many: several budgets --------------------------------------------------------------------


def after(name: str, groups: Sequence[Group], found: Sequence[int], cost: Any) -> float:
    """The part of a cost that is gone."""
    costs = Costs(coupling_of(name))
    lost = {group.name: count for group, count in zip(groups, found, strict=True)}
    return 1 - costs.after(cost, lost) / costs.after(cost, {})


@pytest.mark.parametrize("scope", ["local", "global"])
def test_all_budgets_are_met_and_none_by_more_than_needed(scope: Any) -> None:
    groups = [*groups_of("ffn"), *groups_of("kv-head"), *groups_of("rope-pair")]
    budgets = {"params": 0.1, "macs": 0.15, "kv_bytes": 0.3}
    found = counts(Selector(scope=scope, **budgets), groups)
    assert all(after(NAME, groups, found, cost) >= part for cost, part in budgets.items())
    for left_out in budgets:
        alone = {cost: part for cost, part in budgets.items() if cost != left_out}
        fewer = counts(Selector(scope=scope, **alone), groups)
        assert sum(fewer) <= sum(found)


def test_only_what_saves_of_a_budget_goes_for_it() -> None:
    groups = [*groups_of("ffn"), *groups_of("kv-head")]
    found = counts(Selector(scope="global", kv_bytes=0.5), groups)
    assert found == [0, 0, 1, 1]
    scores = random_scores(groups)
    for group in groups_of("kv-head"):
        scores[group.name] *= 1e6
    both = counts(Selector(scope="global", kv_bytes=0.25, params=0.25), groups, scores)
    assert sum(both[2:]) == 1
    assert sum(both[:2]) > 0


def test_a_unit_that_saves_more_goes_first_at_equal_scores() -> None:
    groups = [*groups_of("ffn"), *groups_of("kv-head")]
    equal = {group.name: torch.ones(group.size, dtype=torch.float64) for group in groups}
    assert UNIT["kv-head"] > UNIT["ffn"]
    assert counts(Selector(scope="global", params=0.05), groups, equal)[:3] == [0, 0, 1]
    dear = {name: scores * (30 if "kv" in name else 1) for name, scores in equal.items()}
    assert counts(Selector(scope="global", params=0.05), groups, dear)[2:] == [0, 0]


def test_margins_decide_between_groups_and_scores_within() -> None:
    groups = groups_of("ffn")
    scores = random_scores(groups)
    margins = {groups[0].name: torch.ones(48), groups[1].name: torch.full((48,), 2.0)}
    selector = Selector(0.25, "global")
    chosen = selector.select(coupling_of(NAME), groups, scores, margins)
    assert [cut.group for cut in chosen] == [groups[0].name]
    lowest = scores[groups[0].name].argsort()[:24].sort().values.tolist()
    assert list(chosen[0].units[()]) == lowest


def test_a_cost_that_the_program_has_not_is_refused() -> None:
    with pytest.raises(SelectionError, match="the program has no bytes of the KV cache to lose"):
        select(Selector(kv_bytes=0.5), groups_of("channel", "resnet"), name="resnet")


def test_no_budget_is_refused() -> None:
    with pytest.raises(SelectionError, match="no budget"):
        Selector()


# -- refusing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1.0, 1.5, -0.1, float("nan"), float("inf")])
def test_a_ratio_outside_of_0_to_1_is_refused(ratio: float) -> None:
    with pytest.raises(SelectionError, match=r"ratio .* is not in \[0, 1\)"):
        Selector(ratio)


@pytest.mark.parametrize("round_to", [0, -8])
def test_round_to_is_positive(round_to: int) -> None:
    with pytest.raises(SelectionError, match=f"round_to {round_to} is not positive"):
        Selector(0.5, round_to=round_to)


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("ratio", [0.0, 0.02])
def test_a_ratio_that_removes_nothing_is_refused(ratio: float, scope: Any) -> None:
    with pytest.raises(SelectionError, match=f"{ratio:g} of the units, in groups of 2 units"):
        select(Selector(ratio, scope), groups_of("kv-head"))


@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_budget_of_parameters_that_cannot_be_met_says_what_can(scope: Any) -> None:
    groups = groups_of("ffn")
    most = 2 * 47 * UNIT["ffn"] / program_of(NAME).parameter_count()
    message = f"0.9 of the parameters cannot go: these groups hold at most {most:.3f}"
    with pytest.raises(SelectionError, match=message):
        select(Selector(scope=scope, params=0.9), groups)


def test_a_budget_of_units_that_cannot_be_met_says_what_can() -> None:
    groups = groups_of("kv-head")
    assert counts(Selector(0.5, "global"), groups) == [1, 1]
    with pytest.raises(SelectionError, match="0.9 of the units cannot go: .* can lose 2 of 4"):
        select(Selector(0.9, "global"), groups)
    with pytest.raises(SelectionError, match="0.6 of the units cannot go: .* can lose 48 of 96"):
        select(Selector(0.6, "global", round_to=24), groups_of("ffn"))
