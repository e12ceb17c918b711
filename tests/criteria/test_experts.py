"""Criteria for experts, against the outputs of single experts, however code takes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from architectures import build, coupling_of, perturb, program_of
from mixtures import CHOSEN, WIDTH, Dense, Looped, Mixture, Picked
from torch import Tensor, nn

import graphprune as gp
from graphprune.analysis.coupling import Coupling
from graphprune.calibration.data import Calibration
from graphprune.criteria import Scores, ScoringContext, criterion
from graphprune.errors import SelectionError
from graphprune.pipeline.pipeline import Pipeline
from graphprune.selection.targets import target_groups


def context_of(
    program: gp.Program, coupling: Coupling, batches: list[dict[str, Tensor]]
) -> ScoringContext:
    groups = target_groups(coupling, "experts")
    return ScoringContext(program, coupling, groups, Calibration.from_batches(batches))


def scores_of(context: ScoringContext, name: str) -> list[Tensor]:
    found: Scores = criterion(name).scores(context)
    return [found[group.name].flatten() for group in context.groups]


def deepseek() -> nn.Module:
    """Sigmoids with a correction, the better one of two groups of experts, beside shared ones."""
    torch.manual_seed(0)
    config = tf.DeepseekV3Config(
        vocab_size=61,
        hidden_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        first_k_dense_replace=0,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=4,
        max_position_embeddings=64,
    )
    return perturb(tf.DeepseekV3ForCausalLM(config))


def gpt_oss() -> nn.Module:
    """Experts and a router with biases."""
    torch.manual_seed(0)
    config = tf.GptOssConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        layer_types=["full_attention"],
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    return perturb(tf.GptOssForCausalLM(config))


@pytest.mark.parametrize("make", [deepseek, gpt_oss])
def test_scores_are_of_the_experts_of_published_architectures(make: Any) -> None:
    model = make()
    program = gp.capture(model)
    ids = torch.randint(0, 61, (3, 12), generator=torch.Generator().manual_seed(1))
    context = context_of(
        program, gp.analyze(program), [{"input_ids": ids[:2]}, {"input_ids": ids[2:]}]
    )
    (layer,) = model.model.layers
    seen: list[Any] = []
    layer.mlp.experts.register_forward_pre_hook(lambda _, given: seen.append(given))
    with torch.no_grad():
        model(ids, use_cache=False)
        (hidden, chosen, gates), *_ = seen
        gates = gates / gates.sum(-1, keepdim=True)
        for expert, (reap, count) in enumerate(
            zip(*(scores_of(context, name)[0] for name in ("reap", "frequency")), strict=True)
        ):
            token, slot = torch.where(chosen == expert)
            alone = torch.full((len(token), 1), expert), torch.ones(len(token), 1)
            added = gates[token, slot] * layer.mlp.experts(hidden[token], *alone).norm(dim=-1)
            expected = added.mean().item() if len(token) else 0.0
            assert reap.item() == pytest.approx(expected, rel=1e-4)
            assert count == len(token)


def test_groups_of_experts_lose_equally_many_and_the_router_follows() -> None:
    program = gp.capture(deepseek())
    ids = torch.randint(0, 61, (3, 12), generator=torch.Generator().manual_seed(1))
    result = Pipeline.parse("prune{target=experts ratio=0.5 criterion=reap},verify").run(
        program, calibration=Calibration.from_batches([{"input_ids": ids}]), quiet=True
    )
    ((cut,),) = (step.cuts for step in result.plan.steps)
    assert [len(gone) for gone in cut.units.values()] == [2, 2]
    left = result.program.weights
    for name in ("gate.weight", "gate.e_score_correction_bias", "experts.down_proj"):
        assert len(left[f"model.layers.0.mlp.{name}"]) == 4


def test_weights_alone_tell_experts_apart() -> None:
    program, coupling = program_of("mixtral"), coupling_of("mixtral")
    context = ScoringContext(program, coupling, target_groups(coupling, "experts"))
    for layer, scores in enumerate(scores_of(context, "aimer")):
        experts: Any = build("mixtral").get_submodule(f"model.layers.{layer}.mlp.experts")
        for expert, score in enumerate(scores.tolist()):
            parts = experts.gate_up_proj[expert].flatten(), experts.down_proj[expert].flatten()
            weights = torch.cat(parts).double()
            ratio = weights.abs().mean() / weights.square().mean().sqrt()
            assert score == pytest.approx(1 - ratio.item(), rel=1e-6)


@pytest.mark.parametrize("name", ["reap", "frequency", "aimer"])
def test_what_no_router_chooses_is_refused(name: str) -> None:
    groups = target_groups(coupling_of("mixtral"), "kv-heads")
    ids = torch.zeros(1, 4, dtype=torch.int64)
    data = Calibration.from_batches([{"input_ids": ids}])
    context = ScoringContext(program_of("mixtral"), coupling_of("mixtral"), groups, data)
    with pytest.raises(SelectionError, match="kv-head: its units are no experts"):
        criterion(name).scores(context)


@pytest.mark.parametrize("form", [Picked, Dense, Looped])
def test_scores_are_of_the_outputs_of_experts_whatever_runs_them(form: type[Mixture]) -> None:
    model = form().eval()
    x = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(1))
    program = gp.capture(model, (x[:20],))
    batches = [{program.inputs[0].name: part} for part in x.split(20)]
    context = context_of(program, gp.analyze(program), batches)
    gates, chosen = model.router(x).softmax(-1).topk(CHOSEN, -1)
    gates = gates / gates.sum(-1, keepdim=True)
    for expert, (reap, count) in enumerate(
        zip(*(scores_of(context, name)[0] for name in ("reap", "frequency")), strict=True)
    ):
        token, slot = torch.where(chosen == expert)
        added = gates[token, slot] * model.alone(expert, x[token]).norm(dim=-1)
        assert reap.item() == pytest.approx(added.mean().item(), rel=1e-5)
        assert count == len(token)
