"""Experts go by never being chosen: a router's logit of minus infinity is the reference."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from architectures import (
    VOCABULARY,
    build,
    coupling_of,
    inputs_of,
    perturb,
    program_of,
    random_plan,
    relative_error,
)
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

import graphprune as gp
from graphprune.analysis.coupling import Coupling
from graphprune.backends.huggingface.save import checkpoint_form
from graphprune.calibration.data import Calibration
from graphprune.criteria import CRITERIA, ScoringContext, criterion
from graphprune.criteria.base import check_scores
from graphprune.errors import PlanError, RewriteError
from graphprune.plan.plan import Plan
from graphprune.plan.steps import Step
from graphprune.selection.cost import Costs
from graphprune.selection.selector import Selector
from graphprune.selection.targets import target_groups

DEEPSEEK = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def experts(coupling: Coupling) -> list[Any]:
    return [group for group in coupling.groups if group.role == "expert"]


@pytest.mark.parametrize("gone", [(0,), (1, 3)])
def test_removal_equals_a_router_that_never_chooses_them(gone: tuple[int, ...]) -> None:
    program, coupling = program_of("mixtral"), coupling_of("mixtral")
    groups = experts(coupling)
    assert [(group.size, group.min_units) for group in groups] == [(4, 2), (4, 2)]
    cuts = tuple(group.cut({(): gone}) for group in groups)
    pruned = gp.apply(program, Plan((Step(program.fingerprint(), cuts),)))

    model: Any = build("mixtral")

    for layer in model.model.layers:

        def masked(hidden: Tensor, gate: Any = layer.mlp.gate) -> Any:
            # Written from the paper: softmax over the logits, the two largest, made to sum to one.
            logits = nn.functional.linear(hidden, gate.weight)
            logits[..., list(gone)] = -torch.inf
            weights, chosen = logits.softmax(-1).topk(2, -1)
            return logits, weights / weights.sum(-1, keepdim=True), chosen

        layer.mlp.gate.forward = masked
    inputs = inputs_of(program)
    with torch.no_grad():
        expected = model(**inputs).logits
    assert relative_error(expected, pruned(**inputs)["logits"]) <= 1e-5


def test_what_is_left_is_a_mixtral_of_fewer_experts(tmp_path: Path) -> None:
    program, coupling = program_of("mixtral"), coupling_of("mixtral")
    plan = random_plan(coupling, roles={"expert"})
    pruned = gp.apply(program, plan)
    gp.verify(program, plan, pruned)
    pruned.save_pretrained(tmp_path / "small")
    model = tf.MixtralForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert model.config.num_local_experts == 3
    assert model.model.layers[0].mlp.experts.gate_up_proj.shape[0] == 3
    inputs = inputs_of(program)
    with torch.no_grad():
        assert relative_error(model(**inputs).logits, pruned(**inputs)["logits"]) <= 1e-5


@pytest.mark.parametrize("groups", [1, 2])
def test_experts_behind_a_sigmoid_in_groups_and_beside_shared_ones(groups: int) -> None:
    torch.manual_seed(0)
    config = tf.DeepseekV3Config(**DEEPSEEK, n_group=groups, topk_group=groups)
    model = perturb(tf.DeepseekV3ForCausalLM(config))
    program = gp.capture(model)
    coupling = gp.analyze(program)
    sizes = [(group.size, group.min_units) for group in experts(coupling)]
    assert sizes == ([(8, 2)] if groups == 1 else [(4, 2)])
    weights = {name for group in experts(coupling) for name in group.weights()}
    assert weights == {
        f"model.layers.1.mlp.{name}"
        for name in (
            "gate.weight",
            "gate.e_score_correction_bias",
            "experts.gate_up_proj",
            "experts.down_proj",
        )
    }
    plan = random_plan(coupling)
    assert gp.verify(program, plan, gp.apply(program, plan)).max_relative_error <= 1e-4


def test_as_many_stay_as_are_chosen_at_once() -> None:
    program, coupling = program_of("mixtral"), coupling_of("mixtral")
    group = experts(coupling)[0]
    with pytest.raises(PlanError, match="2 of its units are chosen at once and must stay"):
        group.cut({(): (0, 1, 2)})
    scores = {each.name: torch.arange(4.0).double() for each in experts(coupling)}
    chosen = target_groups(coupling, "experts")
    cuts = Selector(0.9).select(coupling, chosen, scores)
    assert [cut.count for cut in cuts] == [2, 2]
    (cut,) = cuts[:1]
    text = Plan((Step(program.fingerprint(), (cut,)),)).to_json(indent=None)
    spoilt = Plan.from_json(text.replace('"units": [[[], [0, 1]]]', '"units": [[[], [0, 1, 2]]]'))
    with pytest.raises(RewriteError, match="chooses 2 units, and 1 are left"):
        gp.apply(program, spoilt)


class Choosy(nn.Module):
    """Picks a row of a table by the largest of some logits, or by something computed from it."""

    def __init__(self, shift: int = 0, least: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(6, 8)
        self.table = nn.Parameter(torch.randn(8, 5))
        self.shift = shift
        self.largest = not least

    def forward(self, x: Tensor) -> Tensor:
        _, places = self.router(x).topk(2, -1, largest=self.largest)
        return self.table[places + self.shift if self.shift else places].sum(-2)


def test_rows_picked_by_what_was_chosen_are_coupled_with_it() -> None:
    x = torch.randn(3, 6)
    program = gp.capture(Choosy(), (x,))
    coupling = gp.analyze(program)
    (group,) = [group for group in coupling.groups if group.size == 8]
    assert set(group.weights()) == {"router.weight", "router.bias", "table"}
    plan = random_plan(coupling)
    gp.verify(program, plan, gp.apply(program, plan))


@pytest.mark.parametrize(
    ("model", "why"),
    [(Choosy(shift=-1), "picked by index"), (Choosy(least=True), "the largest of it are picked")],
)
def test_what_cannot_be_followed_is_frozen(model: nn.Module, why: str) -> None:
    coupling = gp.analyze(gp.capture(model, (torch.randn(3, 6),)))
    assert [group for group in coupling.groups if "router.weight" in group.weights()] == []
    assert why in coupling.explain("table", 0) + coupling.explain("router.weight", 0)


def test_a_softmax_that_nothing_picks_by_is_frozen() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Softmax(-1), nn.Linear(8, 5))
    coupling = gp.analyze(gp.capture(model, (torch.randn(3, 6),)))
    assert "softmax runs over it" in coupling.explain("0.weight", 0)


# -- experts as modules -------------------------------------------------------------------------


class LoopedConfig(tf.LlamaConfig):
    model_type = "looped"

    def __init__(self, num_experts: int = 4, experts_per_token: int = 2, **rest: Any) -> None:
        self.num_experts, self.experts_per_token = num_experts, experts_per_token
        super().__init__(**rest)


class Looped(nn.Module):
    """Experts in a list, of which code takes one after the other, as published code does."""

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        self.num_experts, self.top_k = config.num_experts, config.experts_per_token
        self.gate = nn.Linear(config.hidden_size, self.num_experts, bias=False)
        self.experts = nn.ModuleList(LlamaMLP(config) for _ in range(self.num_experts))
        self.shared = LlamaMLP(config)

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.view(-1, hidden.shape[-1])
        shares = self.gate(rows).softmax(-1, dtype=torch.float)
        weights, chosen = shares.topk(self.top_k, -1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(rows.dtype)
        out = torch.zeros_like(rows)
        mask = nn.functional.one_hot(chosen, self.num_experts).permute(2, 1, 0)
        for i in range(self.num_experts):
            slot, token = torch.where(mask[i])
            out.index_add_(0, token, self.experts[i](rows[token]) * weights[token, slot, None])
        return (out + self.shared(rows)).view(hidden.shape)


class LoopedForCausalLM(tf.LlamaForCausalLM):
    config_class = LoopedConfig

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = Looped(config)
        self.post_init()


@cache
def looped() -> tuple[Any, Coupling]:
    torch.manual_seed(0)
    config = LoopedConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    model = perturb(LoopedForCausalLM(config))
    return model, gp.analyze(gp.capture(model))


def looped_plan(*gone: tuple[int, ...]) -> Plan:
    coupling = looped()[1]
    cuts = [g.cut({(): u}) for g, u in zip(experts(coupling), gone, strict=True)]
    return Plan((Step(coupling.program.fingerprint(), tuple(cuts)),))


def test_a_decoder_of_fewer_modules_is_loaded_by_plain_transformers(tmp_path: Path) -> None:
    model, coupling = looped()
    plan = looped_plan((0,), (2,))
    pruned = gp.apply(coupling.program, plan)
    gp.verify(coupling.program, plan, pruned)
    inputs = inputs_of(coupling.program)
    masked = copy.deepcopy(model)
    for layer, gone in zip(masked.model.layers, (0, 2), strict=True):
        layer.mlp.gate.register_forward_hook(
            lambda _, given, logits, gone=gone: logits.index_fill(
                -1, torch.tensor(gone), -torch.inf
            )
        )
    with torch.no_grad():
        assert relative_error(masked(**inputs).logits, pruned(**inputs)["logits"]) <= 1e-5

    assert dict(checkpoint_form(pruned).changes) == {"num_experts": 3}
    pruned.save_pretrained(tmp_path / "small")
    small = LoopedForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert len(small.model.layers[0].mlp.experts) == 3
    kept = model.model.layers[1].mlp.experts[3].up_proj.weight
    assert torch.equal(small.model.layers[1].mlp.experts[2].up_proj.weight, kept)
    with torch.no_grad():
        assert relative_error(small(**inputs).logits, pruned(**inputs)["logits"]) <= 1e-5


def test_costs_tell_which_expert_goes() -> None:
    _, coupling = looped()
    first, _ = experts(coupling)
    narrow = coupling.group("model.layers.0.mlp.experts.1:ffn")
    costs, program = Costs(coupling), coupling.program
    expert, row = 3 * 16 * 12, 16
    assert costs.unit("params", first.name) == expert + row
    for gone in (0, 1):
        cuts = (first.cut({(): (gone,)}), narrow.cut({(): tuple(range(4))}))
        plan = Plan((Step(program.fingerprint(), cuts),))
        left = costs.after("params", {first.name: [gone], narrow.name: 4})
        assert left == gp.apply(program, plan).parameter_count()
    assert costs.after("macs", {first.name: 1}) == costs.after("macs", {}) - costs.unit(
        "macs", first.name
    )


@pytest.mark.parametrize("aggregate", ["sum", "mean", "max", "product", "last"])
def test_scores_are_those_of_packed_weights(aggregate: Any) -> None:
    _, coupling = looped()
    group, program = experts(coupling)[0], coupling.program
    context = ScoringContext(program, coupling, [group], aggregate=aggregate)
    found = criterion("l2").scores(context)[group.name]
    parts = ["gate", *(f"experts.{{}}.{name}" for name in ("gate_proj", "up_proj", "down_proj"))]
    packed = [
        torch.stack(
            [
                program.weights[f"model.layers.0.mlp.{part.format(i)}.weight"].detach().double()
                for i in range(4)
            ]
        )
        for part in parts[1:]
    ]
    router = program.weights["model.layers.0.mlp.gate.weight"].detach().double()
    squares = torch.stack([each.square().flatten(1).sum(1) for each in (router, *packed)])
    combined = {
        "sum": squares.sum(0),
        "mean": squares.mean(0),
        "max": squares.amax(0),
        "product": squares.prod(0),
        "last": squares[-1],
    }
    assert torch.allclose(found, combined[aggregate])


@pytest.mark.parametrize(
    "name", [n for n in CRITERIA if not n.startswith("scop") and n != "frequency"]
)
def test_criteria_score_experts_that_are_modules(name: str) -> None:
    _, coupling = looped()
    batches = [{"input_ids": torch.randint(61, (2, 6))} for _ in range(2)]
    calibration = Calibration.from_batches(batches)
    context = ScoringContext(coupling.program, coupling, experts(coupling), calibration)
    scores = criterion(name).scores(context)
    check_scores(scores, context)
    assert all(len(each.unique()) == 4 for each in scores.values())


def test_a_pipeline_prunes_them_and_what_is_in_them() -> None:
    _, coupling = looped()
    passes = (
        "prune{target=ffn ratio=0.25 criterion=l2},prune{target=experts ratio=0.5 criterion=l2},"
        "verify"
    )
    result = gp.Pipeline.parse(passes).run(coupling.program)
    assert {cut.role for cut in result.plan.steps[0].cuts} == {"ffn"}
    assert [cut.count for cut in result.plan.steps[1].cuts] == [2, 2]
    changes = {"num_experts": 2, "intermediate_size": 9}
    assert dict(checkpoint_form(result.program).changes) == changes


class Unpacked(nn.Module):
    """The experts of a transformers model, taken out of their packed weights into a list."""

    def __init__(self, packed: Any) -> None:
        super().__init__()
        pairs = zip(packed.gate_up_proj.data, packed.down_proj.data, strict=True)
        self.experts = nn.ModuleList(nn.ParameterList(map(torch.clone, pair)) for pair in pairs)

    def forward(self, rows: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(rows)
        for i, (inside, outside) in enumerate(self.experts):
            token, slot = torch.where(chosen == i)
            gate, up = nn.functional.linear(rows[token], inside).chunk(2, -1)
            found = nn.functional.linear(nn.functional.silu(gate) * up, outside)
            out.index_add_(0, token, found * weights[token, slot, None])
        return out


def test_a_unit_of_each_group_owns_an_expert_in_each() -> None:
    torch.manual_seed(0)
    sizes = {**DEEPSEEK, "num_hidden_layers": 1, "first_k_dense_replace": 0}
    config = tf.DeepseekV3Config(**sizes, n_group=2, topk_group=1)
    model = perturb(tf.DeepseekV3ForCausalLM(config))
    mlp = model.model.layers[0].mlp
    mlp.experts = Unpacked(mlp.experts)
    program = gp.capture(model)
    coupling = gp.analyze(program)
    halves, places = experts(coupling)
    assert [(g.size, g.min_units, len(g.owned())) for g in (halves, places)] == [
        (2, 1, 16),
        (4, 2, 16),
    ]
    owned = {m.weight.split(".")[-2] for m in places.members if m.owner == 1}
    assert owned == {"1", "5"}
    for cuts in ({halves.name: (0,)}, {places.name: (1,)}, {halves.name: (1,), places.name: (3,)}):
        each = tuple(coupling.group(name).cut({(): units}) for name, units in cuts.items())
        plan = Plan((Step(program.fingerprint(), each),))
        pruned = gp.apply(program, plan)
        assert gp.verify(program, plan, pruned).max_relative_error <= 1e-5
        left = Costs(coupling).after("params", cuts)
        assert left == pruned.parameter_count()


# -- loops over the experts that are hit -----------------------------------------------------------


def test_a_loop_over_experts_that_are_hit_is_captured_for_all_of_them(tmp_path: Path) -> None:
    config = tf.SwitchTransformersConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=16,
        num_layers=2,
        num_decoder_layers=1,
        num_heads=2,
        num_experts=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=0,
        expert_capacity=64,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = perturb(tf.SwitchTransformersForConditionalGeneration(config).eval())
    program = gp.capture(model)
    assert "full-loops" in {note.kind for note in program.notes}
    for length in (1, 9):  # one token leaves experts without any
        ids = torch.randint(2, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))
        given = {"input_ids": ids, "decoder_input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            expected = model(**given).logits  # type: ignore[operator]
        assert relative_error(expected, program(**given)["logits"]) < 1e-5
    coupling = gp.analyze(program)
    groups = experts(coupling)
    assert {(group.size, group.min_units) for group in groups} == {(4, 1)}
    cuts = tuple(group.cut({(): (1,)}) for group in groups)
    plan = Plan((Step(program.fingerprint(), cuts),))
    pruned = gp.apply(program, plan)
    assert gp.verify(program, plan, pruned).max_relative_error < 1e-5
    pruned.save(tmp_path / "archive")
    loaded = gp.load(tmp_path / "archive")
    assert relative_error(pruned(**given)["logits"], loaded(**given)["logits"]) == 0.0
