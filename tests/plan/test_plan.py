"""Plans as data: printed, kept, read back, applied again, and refused where they make no sense."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import (
    build,
    coupling_of,
    program_of,
    random_cuts,
    random_plan,
)

import graphprune as gp
from graphprune.analysis.groups import Group
from graphprune.errors import GraphPruneError, PlanError
from graphprune.ir.program import Program
from graphprune.plan.index_map import IndexMap
from graphprune.plan.plan import Plan
from graphprune.plan.steps import Cut, Merge, Step
from graphprune.transforms.heads.kv_heads import find_heads
from graphprune.transforms.heads.merge import merge_of

ATTENTION = "model.layers.0.self_attn"


def group_of(program: Program, name: str) -> Group:
    return gp.analyze(program).group(name)


def cutting(program: Program, **units: Any) -> Plan:
    """Cut units of layer 0 by the group's last name, with ``_`` for ``-``."""
    cuts = []
    for name, chosen in units.items():
        where = "model.layers.0.mlp" if name == "ffn" else ATTENTION
        group = group_of(program, f"{where}:{name.replace('_', '-')}")
        cuts.append(group.cut(chosen if isinstance(chosen, dict) else {(): chosen}))
    return Plan((Step(program.fingerprint(), tuple(cuts)),))


def merging(program: Program, groups: int, name: str = f"{ATTENTION}:kv-head") -> Plan:
    (heads,) = [heads for heads in find_heads(program) if heads.name == name]
    return Plan((Step(program.fingerprint(), (), (merge_of(heads, groups),)),))


@cache
def chain() -> tuple[Plan, Program]:
    """Head dimensions and FFN units go, then KV heads merge, then a KV head goes."""
    first = cutting(
        program_of("llama-mha"), head_dim={(head,): (head, 7) for head in range(4)}, ffn=(3, 5, 40)
    )
    pruned = gp.apply(program_of("llama-mha"), first)
    second = merging(pruned, 2)
    merged = gp.apply(pruned, second)
    third = cutting(merged, kv_head=(1,))
    return first + second + third, gp.apply(merged, third)


def span(start: int, stop: int) -> list[int]:
    return list(range(start, stop))


# -- as text --------------------------------------------------------------------------------------


def test_a_plan_reads_as_what_happens() -> None:
    plan, _ = chain()
    first, second, third = (step.fingerprint for step in plan.steps)
    assert str(plan).splitlines() == [
        f"step 1, for program {first}",
        f"  remove       2 of 8 head-dim of {ATTENTION}:head-dim per unit of {ATTENTION}:kv-head",
        "  remove      3 of 48 ffn of model.layers.0.mlp:ffn",
        f"step 2, for program {second}",
        f"  merge      4 into 2 KV heads of {ATTENTION}:kv-head",
        f"step 3, for program {third}",
        f"  remove       1 of 2 kv-head of {ATTENTION}:kv-head",
    ]
    assert len({first, second, third}) == 3


def test_an_empty_plan_says_so_and_is_false() -> None:
    assert str(Plan()) == "an empty plan"
    assert not Plan()
    assert Plan.from_json(Plan().to_json()) == Plan()
    assert chain()[0]


def test_an_empty_plan_changes_nothing() -> None:
    program = program_of("llama-mha")
    assert gp.apply(program, Plan()) is program
    Plan().check(program)
    assert Plan().removed == {}


# -- as JSON --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "mixtral", "resnet"])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_plan_is_read_back_from_its_json(name: str, indent: int | None) -> None:
    plan = random_plan(coupling_of(name), ratio=None)
    again = Plan.from_json(plan.to_json(indent))
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert str(again) == str(plan)
    assert again.removed == plan.removed


def test_a_plan_of_several_steps_is_kept_in_a_file(tmp_path: Path) -> None:
    plan, _ = chain()
    plan.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_text() == plan.to_json() + "\n"
    assert Plan.load(tmp_path / "plan.json") == plan
    assert sum((Plan((step,)) for step in plan.steps), Plan()) == plan


def test_a_reviewer_finds_units_and_slices_in_the_json() -> None:
    document = json.loads(chain()[0].to_json())
    assert document.keys() == {"format", "steps"}
    heads, ffn = document["steps"][0]["cuts"]
    assert heads["parents"] == [f"{ATTENTION}:kv-head"]
    assert heads["units"] == [[[head], [head, 7]] for head in range(4)]
    assert ffn["units"] == [[[], [3, 5, 40]]]
    assert {member["weight"].split(".")[-2] for member in ffn["members"]} == {
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    (merge,) = document["steps"][1]["merges"]
    assert (merge["size"], merge["groups"]) == (4, 2)


def test_the_same_decisions_give_the_same_text() -> None:
    program = gp.capture(build("llama-gqa"))
    texts = {
        random_plan(coupling, ratio=None, seed=3).to_json()
        for coupling in (coupling_of("llama-gqa"), gp.analyze(program), gp.analyze(program))
    }
    assert len(texts) == 1
    group = coupling_of("llama-gqa").group("model.layers.0.mlp:ffn")
    assert group.cut({(): (9, 2, 5, 2)}) == group.cut({(): (2, 5, 9)})
    dims = coupling_of("llama-gqa").group(f"{ATTENTION}:head-dim")
    forwards, backwards = {(0,): (1,), (1,): (2,)}, {(1,): (2,), (0,): (1,)}
    cuts = [dims.cut(units) for units in (forwards, backwards)]
    texts = {Plan((Step("program", (cut,)),)).to_json() for cut in cuts}
    assert len(texts) == 1


# -- applied again --------------------------------------------------------------------------------


def assert_same(one: Program, other: Program) -> None:
    assert one.fingerprint() == other.fingerprint()
    assert list(one.weights) == list(other.weights)
    assert all(torch.equal(weight, other.weights[name]) for name, weight in one.weights.items())
    assert one.graph_module.code == other.graph_module.code
    assert (one.inputs, one.outputs) == (other.inputs, other.outputs)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "resnet"])
def test_a_plan_that_was_kept_makes_a_fresh_copy_the_same(name: str, tmp_path: Path) -> None:
    plan = random_plan(coupling_of(name))
    plan.save(tmp_path / "plan.json")
    fresh = gp.capture(build(name))
    again = gp.apply(fresh, Plan.load(tmp_path / "plan.json"))
    assert_same(gp.apply(program_of(name), plan), again)
    assert gp.verify(fresh, plan, again).max_weight_error == 0


def test_several_steps_with_a_merge_are_applied_again() -> None:
    plan, program = chain()
    fresh = gp.capture(build("llama-mha"))
    assert_same(program, gp.apply(fresh, Plan.from_json(plan.to_json())))
    gp.verify(fresh, plan, program)


# -- in the coordinates of the first program -----------------------------------------------------


def test_what_was_removed_is_counted_as_the_first_program_does() -> None:
    removed = chain()[0].removed
    mlp = "model.layers.0.mlp"
    assert removed[f"{mlp}.gate_proj.weight"] == {0: [3, 5, 40]}
    assert removed[f"{mlp}.down_proj.weight"] == {1: [3, 5, 40]}
    # The first step takes unit 7 of every head and unit `head` of each; then heads 2 and 3 merge
    # and go, with both of their queries.
    dims = sorted({8 * head + unit for head in (0, 1) for unit in (head, 7)} | set(span(16, 32)))
    assert removed[f"{ATTENTION}.v_proj.weight"] == {0: dims}
    assert removed[f"{ATTENTION}.o_proj.weight"] == {1: dims}
    assert removed[f"{ATTENTION}.k_proj.weight"] == {0: span(16, 32)}
    assert removed[f"{ATTENTION}.q_proj.weight"] == {0: span(16, 32)}
    assert removed.keys() == {
        *(f"{ATTENTION}.{name}_proj.weight" for name in "qkvo"),
        *(f"{mlp}.{name}_proj.weight" for name in ("gate", "up", "down")),
    }


def test_of_a_head_that_was_merged_all_parts_go() -> None:
    program = program_of("llama-mha")
    first = merging(program, 2)
    middle = gp.apply(program, first)
    plan = first + cutting(middle, head_dim={(0,): (3,), (1,): (5,)})
    assert plan.removed == {
        f"{ATTENTION}.v_proj.weight": {0: [3, 11, 21, 29]},
        f"{ATTENTION}.o_proj.weight": {1: [3, 11, 21, 29]},
    }
    assert first.removed == {}


def test_heads_that_are_merged_after_others_went_are_the_ones_that_were_left() -> None:
    program = program_of("llama-mha")
    first = cutting(program, kv_head=(1, 2))
    middle = gp.apply(program, first)
    second = merging(middle, 1)
    last = gp.apply(middle, second)
    plan = first + second + cutting(last, head_dim={(): (5,)})
    assert plan.removed[f"{ATTENTION}.k_proj.weight"] == {0: span(8, 24)}
    assert plan.removed[f"{ATTENTION}.v_proj.weight"] == {0: [5, *span(8, 24), 29]}
    assert plan.removed[f"{ATTENTION}.o_proj.weight"] == {1: [5, *span(8, 24), 29]}


def test_heads_in_one_fused_weight_are_counted_apart() -> None:
    program = program_of("gpt2")
    attention = "transformer.h.0.attn"
    first = merging(program, 2, f"{attention}.c_attn:kv-head")
    middle = gp.apply(program, first)
    group = next(g for g in gp.analyze(middle).groups if g.role == "kv-head")
    plan = first + Plan((Step(middle.fingerprint(), (group.cut({(): (0,)}),)),))
    columns = [*span(0, 16), *span(32, 48), *span(64, 80)]
    assert plan.removed == {
        f"{attention}.c_attn.weight": {1: columns},
        f"{attention}.c_attn.bias": {0: columns},
        f"{attention}.c_proj.weight": {0: span(0, 16)},
    }
    gp.verify(program, plan, gp.apply(program, plan))


def test_one_step_may_cut_heads_and_merge_what_is_left() -> None:
    program = program_of("llama-mha")
    cut = cutting(program, kv_head=(1, 2))
    merges = merging(gp.apply(program, cut), 1).steps[0].merges
    plan = Plan((dataclasses.replace(cut.steps[0], merges=merges),))
    gp.verify(program, plan, gp.apply(program, plan))
    assert plan.removed[f"{ATTENTION}.k_proj.weight"] == {0: span(8, 24)}


# -- index maps -----------------------------------------------------------------------------------


def test_a_member_maps_units_to_indices() -> None:
    plain = IndexMap("w", 0, 4, 2, 20)
    assert [plain.indices(unit) for unit in (0, 1, 3)] == [[4, 5], [6, 7], [10, 11]]
    looped = IndexMap("w", 0, 1, 1, 24, ((2, 12), (3, 4)), ("kv", None))
    assert looped.indices(2) == [3, 7, 11, 15, 19, 23]
    assert looped.indices(2, {"kv": 1}) == [15, 19, 23]
    assert looped.indices(0, {"other": 1}) == [1, 5, 9, 13, 17, 21]


def test_a_cut_lists_what_goes_in_every_member() -> None:
    members = (
        IndexMap("v", 0, 0, 1, 8, ((2, 4),), ("kv",)),
        IndexMap("o", 1, 0, 1, 8, ((2, 4),), ("kv",)),
    )
    cut = Cut("d", 4, "head-dim", {(0,): (1, 3), (1,): (0, 1)}, ("kv",), members)
    assert cut.count == 2
    assert list(cut.indices()) == [("v", 0, [1, 3, 4, 5]), ("o", 1, [1, 3, 4, 5])]
    assert Cut("d", 4, "head-dim", {}, (), members).count == 0


def test_a_merge_lists_what_becomes_one() -> None:
    members = (
        IndexMap("qkv", 0, 8, 2, 24),
        IndexMap("qkv", 0, 16, 2, 24),
        IndexMap("b", 0, 0, 1, 4),
    )
    merge = Merge("kv", 4, 2, members)
    assert merge.width == 2
    fused, bias = merge.runs()
    pairs = [[8, 10], [9, 11], [12, 14], [13, 15], [16, 18], [17, 19], [20, 22], [21, 23]]
    assert fused == ("qkv", 0, pairs)
    assert bias == ("b", 0, [[0, 1], [2, 3]])


# -- what no group allows -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "units", "message"),
    [
        ("model.layers.0.mlp:ffn", {(): (48,)}, "it has only 48 units"),
        ("model.layers.0.mlp:ffn", {(): (-1,)}, "it has only 48 units"),
        ("model.layers.0.mlp:ffn", {(): tuple(range(48))}, "all of its 48 units would go"),
        (f"{ATTENTION}:head-dim", {(0,): (1,), (1,): (1, 2)}, r"unequally many units \(\[1, 2\]\)"),
        (f"{ATTENTION}:head-dim", {(0,): (1, 1), (1,): (1, 2)}, "unequally many units"),
        (f"{ATTENTION}:head-dim", {(0,): range(8), (1,): range(8)}, "all of its 8 units would go"),
        (f"{ATTENTION}:head-dim", {(0,): (9,), (1,): (0,)}, "it has only 8 units"),
        ("model.layers.0.mlp:ffn", {}, "unequally many units"),
    ],
)
def test_a_cut_that_makes_no_sense_is_refused(name: str, units: Any, message: str) -> None:
    group = coupling_of("llama-gqa").group(name)
    with pytest.raises(PlanError, match=f"^{name}: .*{message}"):
        group.cut(units)


def test_units_that_are_the_same_under_every_parent_may_be_given_once() -> None:
    program, group = (
        program_of("llama-gqa"),
        coupling_of("llama-gqa").group(f"{ATTENTION}:head-dim"),
    )
    once, each = group.cut({(): (2, 6)}), group.cut({(0,): (2, 6), (1,): (2, 6)})
    assert (once.parents, each.parents) == ((), group.parents)
    plans = [Plan((Step(program.fingerprint(), (cut,)),)) for cut in (once, each)]
    assert plans[0].removed == plans[1].removed
    assert_same(*(gp.apply(program, plan) for plan in plans))


# -- another program ------------------------------------------------------------------------------


def test_a_program_that_it_was_not_made_for_is_refused_with_both_fingerprints() -> None:
    plan, other = random_plan(coupling_of("llama-gqa")), program_of("llama-mha")
    message = (
        f"the plan was made for program {plan.steps[0].fingerprint}, "
        f"this one is {other.fingerprint()}"
    )
    for refuse in (lambda p: gp.apply(p, plan), plan.check, lambda p: gp.verify(p, plan, p)):
        with pytest.raises(PlanError) as caught:
            refuse(other)
        assert str(caught.value) == message


def test_a_plan_is_not_applied_twice() -> None:
    plan, program = chain()
    with pytest.raises(PlanError, match="the plan was made for program"):
        gp.apply(program, plan)


def test_steps_that_do_not_follow_each_other_are_refused() -> None:
    plan, _ = chain()
    program = program_of("llama-mha")
    with pytest.raises(PlanError, match=plan.steps[2].fingerprint):
        gp.apply(program, Plan((plan.steps[0], plan.steps[2])))
    with pytest.raises(PlanError, match=plan.steps[1].fingerprint):
        Plan(plan.steps[::-1][1:]).check(program)


def test_the_values_of_weights_do_not_matter_to_a_plan() -> None:
    program, plan = program_of("llama-gqa"), random_plan(coupling_of("llama-gqa"))
    doubled = program.with_weights({n: 2 * w for n, w in program.weights.items() if w.ndim == 2})
    pruned = gp.apply(doubled, plan)
    assert pruned.fingerprint() == gp.apply(program, plan).fingerprint()


# -- files that are no plan -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a plan, since it is no JSON: Expecting"),
        ("{", "not a plan, since it is no JSON: Expecting"),
        ("no plan", "not a plan, since it is no JSON: Expecting"),
        ("[]", "not a plan: it holds list, and a plan is an object"),
        ("3", "not a plan: it holds int"),
        ("null", "not a plan: it holds NoneType"),
        ('"format"', "not a plan: it holds str"),
        ("{}", "not a plan: it has no 'format'"),
        ('{"format": 4, "steps": []}', "plan format 4 is none of 1 to 3"),
        ('{"format": "1", "steps": []}', "plan format 1 is none of 1 to 3"),
        ('{"format": 2, "steps": []}', "not a plan: it has no 'edits'"),
        ('{"format": 1}', "not a plan: it has no 'steps'"),
        ('{"format": 1, "steps": 5}', "not a plan: steps is no list"),
        ('{"format": 1, "steps": [null]}', "not a plan: steps[0] is no object"),
        ('{"format": 1, "steps": [{}]}', "not a plan: it has no 'fingerprint'"),
        ('{"format": 1, "steps": [{"fingerprint": "x"}]}', "not a plan: it has no 'cuts'"),
        ("[" * 100_000, "not a plan, "),
    ],
)
def test_text_that_is_no_plan_is_refused(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_json(text)
    assert str(caught.value).startswith(words)
    assert "\n" not in str(caught.value)
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match=r"plan\.json: "):
        Plan.load(tmp_path / "plan.json")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "absent.json", tmp_path, tmp_path / "binary.json"):
        with pytest.raises(PlanError, match="cannot be read"):
            Plan.load(path)


def edited(change: Callable[[Any], object]) -> str:
    """The plan of `chain` as JSON, changed in some place."""
    document = json.loads(chain()[0].to_json())
    change(document)
    return json.dumps(document)


def put(key: str, value: object, *path: Any) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        place = document["steps"]
        for step in path:
            place = place[step]
        place[key] = value

    return change


HEADS: tuple[Any, ...] = (0, "cuts", 0)
FFN: tuple[Any, ...] = (0, "cuts", 1)
MERGE: tuple[Any, ...] = (1, "merges", 0)

SILLY: dict[str, tuple[Callable[[Any], object], str]] = {
    "unknown group": (put("group", "model.layers.7.mlp:ffn", *FFN), "layers.7.mlp:ffn"),
    "group of another role": (put("group", f"{ATTENTION}:kv-head", *FFN), "kv-head"),
    "unknown heads": (put("group", "nowhere:kv-head", *MERGE), "nowhere:kv-head"),
    "another size": (put("size", 47, *FFN), "mlp:ffn"),
    "another number of heads": (put("size", 8, *MERGE), "kv-head"),
    "unit out of range": (put("units", [[[], [3, 48]]], *FFN), "only 48 units"),
    "negative unit": (put("units", [[[], [-1]]], *FFN), "-1"),
    "unit that is a fraction": (put("units", [[[], [1.5]]], *FFN), "1.5"),
    "unit that is a text": (put("units", [[[], ["3"]]], *FFN), "'3'"),
    "unit that is a boolean": (put("units", [[[], [True]]], *FFN), "True"),
    "unit twice": (put("units", [[[], [3, 3]]], *FFN), "each once"),
    "units out of order": (put("units", [[[], [5, 3]]], *FFN), "in order"),
    "units that are a text": (put("units", [[[], "35"]], *FFN), "no list"),
    "no units": (put("units", [], *FFN), "mlp:ffn"),
    "all units": (put("units", [[[], list(range(48))]], *FFN), "all of its 48 units would go"),
    "units under parents that it has not": (put("units", [[[0], [3]]], *FFN), "mlp:ffn"),
    "a parent left out": (
        put("units", [[[h], [h, 7]] for h in range(3)], *HEADS),
        "every unit of its parents",
    ),
    "a parent that does not exist": (
        put("units", [[[h], [2, 7]] for h in (0, 1, 2, 9)], *HEADS),
        "every unit of its parents",
    ),
    "parents that lose unequally many": (
        put("units", [[[h], [h, 7][: h + 1]] for h in range(4)], *HEADS),
        "unequally many units",
    ),
    "parents of another group": (put("parents", ["model.layers.0.mlp:ffn"], *HEADS), "head-dim"),
    "unknown parents": (put("parents", ["nowhere"], *HEADS), "head-dim"),
    "parents left out": (put("parents", [], *HEADS), "head-dim"),
    "members left out": (put("members", [], *FFN), "mlp:ffn"),
    "a member of another weight": (put("weight", "nowhere", *FFN, "members", 0), "mlp:ffn"),
    "a member of another dimension": (put("dim", 1, *FFN, "members", 0), "mlp:ffn"),
    "a dimension that does not exist": (put("dim", 5, *FFN, "members", 0), "mlp:ffn"),
    "a member beyond its weight": (put("offset", 40, *FFN, "members", 0), "reaches beyond"),
    "a member of another extent": (put("extent", 10**12, *FFN, "members", 0), "mlp:ffn"),
    "loops without groups": (put("outer", [], *HEADS, "members", 0), "head-dim"),
    "groups without loops": (put("outer_groups", [], *HEADS, "members", 0), "head-dim"),
    "no KV heads": (put("groups", 0, *MERGE), "0 groups do not divide 4"),
    "groups that do not divide": (put("groups", 3, *MERGE), "3 groups do not divide 4"),
    "groups that are a text": (put("groups", "2", *MERGE), "'2'"),
    "no fingerprint": (put("fingerprint", None, 0), "None"),
    "a group cut twice": (
        lambda document: document["steps"][0]["cuts"].append(document["steps"][0]["cuts"][1]),
        "cut twice",
    ),
}


@pytest.mark.parametrize(("change", "words"), SILLY.values(), ids=SILLY)
def test_a_plan_that_makes_no_sense_is_refused_in_a_line(
    change: Callable[[Any], object], words: str
) -> None:
    with pytest.raises(PlanError) as caught:
        gp.apply(program_of("llama-mha"), Plan.from_json(edited(change)))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def mutations() -> Iterator[tuple[str, str]]:
    """(where and what, a plan in JSON) with any one place left out or something else."""
    document = json.loads(chain()[0].to_json(None))

    def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        keys = value if isinstance(value, dict) else range(min(len(value), 2))
        for key in keys:
            yield (*path, key)
            if isinstance(value[key], dict | list):
                yield from places(value[key], (*path, key))

    for path in places(document):
        for value in (None, "x", -1, 1.5, 10**6, True, [], {}, [[]], [[0, 1]], "left out"):
            changed = copy.deepcopy(document)
            place = changed
            for key in path[:-1]:
                place = place[key]
            if value == "left out":
                del place[path[-1]]
            else:
                place[path[-1]] = value
            yield f"{path} is {value!r}", json.dumps(changed)


def test_whatever_is_changed_in_a_plan_nothing_but_a_refusal_comes_of_it() -> None:
    program, result = program_of("llama-mha"), chain()[1]
    carried_out: set[str] = set()
    for what, text in mutations():
        try:
            plan = Plan.from_json(text)
            plan.check(program)
        except PlanError as error:
            assert "\n" not in str(error), what
            continue
        assert str(plan)
        assert all(plan.removed.values())
        if (same := plan.to_json(None)) in carried_out:
            continue
        carried_out.add(same)
        for use in (lambda p: gp.apply(p, plan), lambda p: gp.verify(p, plan, result)):  # noqa: B023
            with contextlib.suppress(GraphPruneError):
                use(program)
    assert carried_out


# -- when the rewriter refuses --------------------------------------------------------------------


def test_a_step_made_by_hand_is_refused_in_a_line_too() -> None:
    program, coupling = program_of("llama-mha"), coupling_of("llama-mha")
    (whole, *_) = random_cuts(coupling, roles={"head-dim"})
    units = {**whole.units, (0,): whole.units[0,][:-1]}
    step = Step(program.fingerprint(), (dataclasses.replace(whole, units=units),))
    with pytest.raises(GraphPruneError) as caught:
        gp.apply(program, Plan((step,)))
    assert "\n" not in str(caught.value)


DRAWN = {
    "kind": "text",
    "sha256": "0f" * 32,
    "samples": 10,
    "length": 64,
    "tokens": 640,
    "first tokens": [1],
    "tokenizer": "abc",
    "seed": 0,
}


def test_a_plan_says_how_its_calibration_was_drawn(tmp_path: Path) -> None:
    plan = dataclasses.replace(random_plan(coupling_of("llama-gqa")), calibration=DRAWN)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again.calibration == DRAWN
    told = "calibrated with 10 windows of 64 tokens, beginning with 1, tokenizer abc"
    assert told in str(again)
    assert (again + Plan()).calibration == DRAWN == again.without_edits().calibration


def test_a_plan_without_calibration_is_written_as_before() -> None:
    plan = random_plan(coupling_of("llama-gqa"))
    assert "calibration" not in plan.to_json()
    assert Plan.from_json(plan.to_json()).calibration is None


@pytest.mark.parametrize(
    "damage", [7, [], {"samples": "ten"}, {"first tokens": "1"}, {"sha256": None}], ids=repr
)
def test_a_malformed_calibration_is_no_plan(damage: Any) -> None:
    data = json.loads(random_plan(coupling_of("llama-gqa")).to_json())
    with pytest.raises(PlanError, match="not a plan"):
        Plan.from_json(json.dumps(data | {"calibration": damage}))
