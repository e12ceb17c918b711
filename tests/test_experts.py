"""Experts go by never being chosen: a router's logit of minus infinity is the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from architectures import (
    build,
    coupling_of,
    inputs_of,
    perturb,
    program_of,
    random_plan,
    relative_error,
)
from torch import Tensor, nn

import graphprune as gp
from graphprune.coupling import Coupling
from graphprune.errors import PlanError, RewriteError
from graphprune.plan import Plan, Step, cut_of
from graphprune.selection import Selector, target_groups

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
    assert [(group.size, group.least) for group in groups] == [(4, 2), (4, 2)]
    cuts = tuple(cut_of(group, {(): gone}) for group in groups)
    pruned = Plan((Step(program.fingerprint(), cuts),)).apply(program)

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
    pruned = plan.apply(program)
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
    sizes = [(group.size, group.least) for group in experts(coupling)]
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
    assert gp.verify(program, plan, plan.apply(program)).max_relative_error <= 1e-4


def test_as_many_stay_as_are_chosen_at_once() -> None:
    program, coupling = program_of("mixtral"), coupling_of("mixtral")
    group = experts(coupling)[0]
    with pytest.raises(PlanError, match="2 of its units are chosen at once and must stay"):
        cut_of(group, {(): (0, 1, 2)})
    scores = {each.name: torch.arange(4.0).double() for each in experts(coupling)}
    chosen = target_groups(coupling, "experts")
    cuts = Selector(0.9).select(coupling, chosen, scores)
    assert [cut.count for cut in cuts] == [2, 2]
    (cut,) = cuts[:1]
    text = Plan((Step(program.fingerprint(), (cut,)),)).to_json(indent=None)
    spoilt = Plan.from_json(text.replace('"units": [[[], [0, 1]]]', '"units": [[[], [0, 1, 2]]]'))
    with pytest.raises(RewriteError, match="chooses 2 units, and 1 are left"):
        spoilt.apply(program)


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
    gp.verify(program, plan, plan.apply(program))


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
