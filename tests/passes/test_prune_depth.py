"""Blocks and branches that go: which ones, exactly, and what of the checkpoint follows."""

from __future__ import annotations

import copy
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build, coupling_of, inputs_of, program_of, relative_error
from torch import Tensor, nn

import graphprune as gp
from graphprune.analysis.residual.branches import Branches
from graphprune.backends.huggingface.save import checkpoint_form
from graphprune.backends.huggingface.shorter_lists import counted_as_before
from graphprune.errors import PlanError, SelectionError, VerificationError
from graphprune.ir.program import PAST, Program
from graphprune.passes.prune_depth import PruneDepth
from graphprune.passes.verify import Verify
from graphprune.pipeline.pass_manager import Result
from graphprune.pipeline.pipeline import Pipeline
from graphprune.plan.plan import Plan
from graphprune.selection import depth
from graphprune.transforms.fold_branches import joints


def tokens(rows: int = 3, length: int = 12) -> dict[str, Tensor]:
    ids = torch.randint(0, 60, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def calibration() -> gp.Calibration:
    return gp.Calibration.from_batches([tokens()])


def run(name: str, *passes: Any) -> Result:
    return Pipeline(passes).run(program_of(name), calibration=calibration(), quiet=True)


def removed(result: Result) -> list[str]:
    names: list[str] = result.report.passes[0].details["removed"]
    return names


# -- which ones go: references that share nothing but transformers ---------------------------------


def without(model: nn.Module, parts: tuple[str, ...]) -> nn.Module:
    """A model in which modules give zeros."""
    model = copy.deepcopy(model)
    for part in parts:
        model.get_submodule(part).register_forward_hook(lambda _, __, out: torch.zeros_like(out))
    return model


def loss_of(model: nn.Module) -> float:
    batch = tokens()
    with torch.no_grad():
        logits = model(**batch).logits[:, :-1]
    ids = batch["input_ids"][:, 1:]
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).item()


def test_branches_go_greedily_by_loss() -> None:
    model = build("gemma3")
    ends = {"self_attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
    named = {
        f"model.layers.{layer}.{name}": f"model.layers.{layer}.{end}"
        for layer, (name, end) in itertools.product(range(3), ends.items())
    }
    gone: list[str] = []
    losses = [loss_of(model)]
    for _ in range(2):
        measured = {
            name: loss_of(without(model, tuple(named[each] for each in (*gone, name))))
            for name in named
            if name not in gone
        }
        gone.append(min(measured, key=measured.__getitem__))
        losses.append(measured[gone[-1]])
    result = run("gemma3", PruneDepth(count=2, unit="branch"))
    assert removed(result)[0] == gone[0]
    told = result.report.passes[0].details["loss, before and after each"]
    assert told[:2] == pytest.approx(losses[:2], abs=2e-4)
    assert told[2] == pytest.approx(
        loss_of(without(model, tuple(named[each] for each in removed(result)))), abs=2e-4
    )


def test_long_texts_are_compared_on_some_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    branches = Branches(coupling_of("llama-gqa").types)
    units = depth.depth_units(branches, "block")
    monkeypatch.setattr(depth, "PREDICTIONS", 12)  # of 33: one of three
    (chosen,), losses = depth.by_loss(branches, units, 1, calibration())
    model, ids = build("llama-gqa"), tokens()["input_ids"]

    def loss(parts: tuple[str, ...]) -> float:
        with torch.no_grad():
            logits = without(model, parts)(**tokens()).logits[:, :-1].flatten(0, 1)[::3]
        return nn.functional.cross_entropy(logits, ids[:, 1:].flatten()[::3]).item()

    alone = {
        unit.name: loss((f"{unit.name}.self_attn.o_proj", f"{unit.name}.mlp")) for unit in units
    }
    assert chosen.name == min(alone, key=alone.__getitem__)
    assert losses == pytest.approx([loss(()), alone[chosen.name]], rel=1e-5)


def test_blocks_go_by_how_far_they_turn_the_stream() -> None:
    model = build("gemma3")
    with torch.no_grad():
        states = model.model(**tokens(), output_hidden_states=True).hidden_states
        states = list(states)[:3]  # the last one is normalized
        seen: list[Tensor] = []
        model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model.model(**tokens())
    states.append(seen[0])
    turned = [
        (1 - nn.functional.cosine_similarity(one, other, dim=-1)).mean().item()
        for one, other in itertools.pairwise(states)
    ]
    result = run("gemma3", PruneDepth(count=1, criterion="cosine"))
    assert removed(result) == [f"model.layers.{turned.index(min(turned))}"]


# -- what is left ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma3", "opt"])
def test_the_result_is_the_model_without_the_block(name: str) -> None:
    result = run(name, PruneDepth(count=1, skip=("*.layers.1",)))
    (gone,) = removed(result)
    model = copy.deepcopy(build(name))
    layers = model.get_submodule(gone.rpartition(".")[0])
    del layers[int(gone.rpartition(".")[2])]
    for config in (model.config, model.get_submodule(gone.partition(".")[0]).config):
        config.num_hidden_layers = len(layers)
    with torch.no_grad():
        expected = model(**tokens(), use_cache=False).logits
    assert relative_error(expected, result.program(**tokens())["logits"]) < 1e-5
    caches = [value.name for value in result.program.inputs if value.name.startswith(PAST)]
    assert caches == [f"{PAST}{i}.{part}" for i in range(len(layers)) for part in ("key", "value")]


def test_a_plan_applies_again_and_to_no_other_program() -> None:
    result = run("gemma3", PruneDepth(ratio=0.34))
    assert "remove the branch model.layers." in str(result.plan)
    again = Plan.from_json(result.plan.to_json())
    assert again == result.plan and '"format": 3' in again.to_json()
    smaller = gp.apply(program_of("gemma3"), again)
    assert smaller.fingerprint() == result.program.fingerprint()
    with pytest.raises(PlanError, match="the plan was made for program"):
        gp.apply(program_of("llama-gqa"), again)
    wrong = again.to_json().replace("self_attn.q_norm", "self_attn.q_normal")
    with pytest.raises(PlanError, match=r"the plan's branches and the program's differ"):
        gp.apply(program_of("gemma3"), Plan.from_json(wrong))
    with pytest.raises(VerificationError):
        gp.verify(program_of("gemma3"), again, program_of("gemma3"))


def test_it_follows_and_precedes_other_cuts() -> None:
    text = "prune{target=ffn ratio=0.25 criterion=l2},prune-depth{count=1 unit=branch}"
    program, data = program_of("gemma3"), calibration()
    result = Pipeline.parse(text).run(program, calibration=data, quiet=True)
    assert [bool(step.branches) for step in result.plan.steps] == [False, True]
    turned = ",".join(reversed(text.replace(",", ", ").split(", ")))
    result = Pipeline.parse(f"{turned},reconstruct").run(program, calibration=data, quiet=True)
    assert [bool(step.branches) for step in result.plan.steps] == [True, False]
    with pytest.raises(PlanError, match="refit before prune-depth"):
        Pipeline.parse(f"{text},reconstruct").run(program, calibration=data, quiet=True)


# -- checkpoints ----------------------------------------------------------------------------------


def reloaded(program: Program, folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    program.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_a_checkpoint_has_fewer_layers_and_generates_the_same(tmp_path: Path) -> None:
    result = run("gemma3", PruneDepth(count=1, skip=("model.layers.1", "model.layers.2")))
    (gone,) = removed(result)
    assert checkpoint_form(result.program).kind == "plain"
    model = reloaded(result.program, tmp_path)
    before = build("gemma3")
    types = list(before.config.layer_types)
    del types[int(gone[-1])]
    assert model.config.num_hidden_layers == 2 and model.config.layer_types == types
    ids = tokens(1, 6)["input_ids"]
    found = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    expected = ids
    for _ in range(6):
        logits = result.program(input_ids=expected)["logits"]
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
    assert found.tolist() == expected.tolist()
    original = program_of("gemma3")
    again = gp.load(tmp_path)
    gone = {name for step in result.plan.steps for name in step.whole}
    named = counted_as_before(again, original.weights, gone)
    assert set(named.weights) == set(result.program.weights) != set(again.weights)
    assert gp.verify(original, result.plan, named).proves_sizes


def test_half_a_block_is_no_plain_checkpoint(tmp_path: Path) -> None:
    result = run("gemma3", PruneDepth(count=1, unit="branch", criterion="cosine"))
    form = checkpoint_form(result.program)
    assert form.kind == "remote-code"
    assert re.match(r"no config says that model\.layers\.\S+ is not there", form.reason)
    result.program.save(tmp_path / "archive")
    assert gp.load(tmp_path / "archive").fingerprint() == result.program.fingerprint()


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 3}, "3 of 3 cannot go, only 2: all of the 6 residual branches would go"),
        ({"count": 3, "unit": "branch", "skip": ("*.mlp",)}, "nothing would be left in the KV"),
        ({"count": 1, "skip": ("*.attn",)}, r"skip pattern '\*.attn' matches no block"),
        ({"ratio": 0.1}, "nothing to prune: 0.1 of 3 blocks is less than one"),
    ],
)
def test_what_cannot_go_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        run("gemma3", PruneDepth(criterion="cosine", **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of ratio and count"),
        ({"ratio": 0.5, "count": 1}, "give one of ratio and count"),
        ({"ratio": 25.0}, r"ratio 25 is not in \[0, 1\); 25 % is 0.25"),
        ({"count": -1}, "count -1 is negative"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        PruneDepth(**options)


def test_layers_that_normalize_their_sums_cannot_go_as_a_whole() -> None:
    program = program_of("bert")
    data = gp.Calibration.from_batches([inputs_of(program)])
    with pytest.raises(SelectionError, match=r"keeps .*LayerNorm.bias, which is used without its"):
        Pipeline([PruneDepth(count=1)]).run(program, calibration=data, quiet=True)


def test_nothing_goes_without_a_budget() -> None:
    result = run("llama-gqa", PruneDepth(ratio=0))
    assert not result.plan and result.program is program_of("llama-gqa")


# -- what takes over ------------------------------------------------------------------------------

LAST = {"llama-gqa": "model.layers.0.mlp.down_proj", "opt": "model.decoder.layers.0.fc2"}
"""The last matrix before the second of two blocks."""


def folded(name: str, **options: Any) -> Result:
    """The program without its second block."""
    first = LAST[name].partition(".0.")[0]
    given = {"count": 1, "criterion": "cosine", "skip": (f"{first}.0",), **options}
    return run(name, PruneDepth(**given))


@pytest.mark.parametrize("name", LAST)
def test_a_fold_is_the_least_squares_map_to_the_stream_behind_what_went(name: str) -> None:
    model: Any = build(name)
    matrix, first = model.get_submodule(LAST[name]), LAST[name].partition(".0.")[0]
    block = model.get_submodule(f"{first}.1")
    seen: dict[str, Tensor] = {}
    matrix.register_forward_hook(lambda _, args, __: seen.update(x=args[0]))
    block.register_forward_hook(lambda _, args, out: seen.update(s=args[0], t=out))
    with torch.no_grad():
        model(**tokens())
    x, lacking = seen["x"].flatten(0, -2).double(), (seen["t"] - seen["s"]).flatten(0, 1).double()
    if matrix.bias is not None:
        x = torch.cat([x, torch.ones(len(x), 1)], 1)
    gram = x.T @ x
    candidates = []
    for damp in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0):  # which of them is the data's choice
        ridge = gram + damp * gram.diagonal().mean() * torch.eye(len(gram))
        candidates.append(torch.linalg.solve(ridge, x.T @ lacking).T)
    result = folded(name, fold="linear")
    change = result.program.weights[f"{LAST[name]}.weight"] - matrix.weight.detach()
    assert change.abs().max() > 1e-3
    (best,) = [
        each for each in candidates if relative_error(each[:, : change.shape[1]], change) < 1e-3
    ]
    if matrix.bias is not None:
        moved = result.program.weights[f"{LAST[name]}.bias"] - matrix.bias.detach()
        assert relative_error(best[:, -1], moved) < 1e-3


def test_a_folded_program_is_verified_and_a_plain_checkpoint() -> None:
    first = LAST["llama-gqa"].partition(".0.")[0]
    depth = PruneDepth(count=1, criterion="cosine", fold="linear", skip=(f"{first}.0",))
    result = run("llama-gqa", depth, Verify())
    assert checkpoint_form(result.program).kind == "plain"
    assert result.program.parameter_count() == folded("llama-gqa").program.parameter_count()


def test_branches_behind_are_brought_to_the_stream_of_the_original() -> None:
    layers = "model.layers"
    kept = (f"{layers}.0.self_attn", f"{layers}.1.self_attn", f"{layers}.1.mlp")
    original = program_of("llama-gqa")(**tokens())["logits"]
    given = {"unit": "branch", "skip": kept}
    results = {fold: folded("llama-gqa", fold=fold, **given) for fold in ("none", "stream")}
    errors = {
        fold: relative_error(original, result.program(**tokens())["logits"])
        for fold, result in results.items()
    }
    assert errors["stream"] < errors["none"]
    told = results["stream"].report.passes[0].details["held-out error"]
    assert list(told) == list(kept) and all(0 <= error <= 1 for error in told.values())


def test_a_branch_beside_the_one_that_went_takes_over() -> None:
    branches = Branches(coupling_of("gpt-neox").types)
    beside = [branch.name for branch in branches.all if branch.layer.endswith(".0")]
    (joint,) = joints(branches, {beside[0]}, "linear")
    assert joint.branch.name == beside[1]
    assert joint.end is joint.branch.sum.node


@pytest.mark.parametrize(
    ("name", "kept", "why"),
    [
        ("llama-gqa", 1, "model.layers.0.self_attn cannot be folded: no branch precedes it"),
        ("gemma3", 0, "model.layers.[01].mlp cannot take over what is removed behind it: .* mul"),
    ],
)
def test_what_nothing_can_take_over_is_refused(name: str, kept: int, why: str) -> None:
    depth = PruneDepth(count=1, criterion="cosine", fold="linear", skip=(f"*.layers.{kept}",))
    with pytest.raises(PlanError, match=why):
        run(name, depth)
