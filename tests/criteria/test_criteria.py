"""Criteria against their definitions, on the models of transformers and with slices by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers as tf
from architectures import (
    VOCABULARY,
    build,
    calibration_of,
    coupling_of,
    inputs_of,
    inputs_to,
    model_of,
    perturb,
    program_of,
)
from torch import Tensor
from torch.nn import functional

import graphprune as gp
from graphprune.analysis.coupling import Coupling
from graphprune.analysis.groups import Group
from graphprune.calibration.data import Calibration
from graphprune.criteria import (
    CRITERIA,
    Criterion,
    ScoringContext,
    check_scores,
    criterion,
    experts,
    obs,
)
from graphprune.criteria.obs import removal_errors
from graphprune.criteria.units import unit_numbers
from graphprune.errors import (
    CalibrationError,
    EvaluationError,
    SelectionError,
    TrainingError,
    UsageError,
)
from graphprune.evaluation.perplexity import perplexity
from graphprune.ir.program import Program
from graphprune.pipeline.pipeline import Pipeline

Slices = list[tuple[str, int, list[int]]]
"""(parameter, dimension, indices) of everything that one unit holds."""


def group_of(coupling: Coupling, role: str, weight: str) -> Group:
    return next(g for g in coupling.groups if g.role == role and weight in g.weights())


def context_of(name: str, groups: Sequence[Group], **options: Any) -> ScoringContext:
    given = {"calibration": calibration_of(name), **options}
    return ScoringContext(program_of(name), coupling_of(name), groups, **given)


# -- slices by hand -------------------------------------------------------------------------------


def span(*starts: int, width: int = 8) -> list[int]:
    return [start + i for start in starts for i in range(width)]


def llama_ffn(unit: int) -> Slices:
    mlp = "model.layers.1.mlp"
    rows = [(f"{mlp}.gate_proj.weight", 0, [unit]), (f"{mlp}.up_proj.weight", 0, [unit])]
    return [*rows, (f"{mlp}.down_proj.weight", 1, [unit])]


def llama_kv_head(unit: int) -> Slices:
    """KV head 0 serves query heads 0 and 1, KV head 1 serves 2 and 3; eight rows each."""
    attention = "model.layers.0.self_attn"
    queries = span(16 * unit, 16 * unit + 8)
    return [
        (f"{attention}.q_proj.weight", 0, queries),
        (f"{attention}.k_proj.weight", 0, span(8 * unit)),
        (f"{attention}.v_proj.weight", 0, span(8 * unit)),
        (f"{attention}.o_proj.weight", 1, queries),
    ]


def llama_query_slot(kv: int, slot: int) -> Slices:
    attention = "model.layers.0.self_attn"
    rows = span(8 * (2 * kv + slot))
    return [(f"{attention}.q_proj.weight", 0, rows), (f"{attention}.o_proj.weight", 1, rows)]


def llama_head_dim(kv: int, unit: int) -> Slices:
    attention = "model.layers.0.self_attn"
    columns = [16 * kv + unit, 16 * kv + 8 + unit]
    return [
        (f"{attention}.v_proj.weight", 0, [8 * kv + unit]),
        (f"{attention}.o_proj.weight", 1, columns),
    ]


def llama_rope_pair(unit: int) -> Slices:
    slices: Slices = []
    for layer in (0, 1):
        attention = f"model.layers.{layer}.self_attn"
        for name, heads in (("q_proj", 4), ("k_proj", 2)):
            rows = [8 * head + half + unit for head in range(heads) for half in (0, 4)]
            slices.append((f"{attention}.{name}.weight", 0, rows))
    return slices


def llama_hidden(unit: int) -> Slices:
    reads = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    reads += ["mlp.gate_proj", "mlp.up_proj"]
    adds = ["self_attn.o_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"]
    slices: Slices = [("model.embed_tokens.weight", 1, [unit]), ("model.norm.weight", 0, [unit])]
    for layer in ("model.layers.0", "model.layers.1"):
        slices += [(f"{layer}.{name}.weight", 1, [unit]) for name in reads]
        slices += [(f"{layer}.{name}.weight", 0, [unit]) for name in adds]
    return slices


def llama_untied_hidden(unit: int) -> Slices:
    return [*llama_hidden(unit), ("lm_head.weight", 1, [unit])]


def gpt2_head(unit: int) -> Slices:
    attention, rows = "transformer.h.1.attn", span(8 * unit)
    columns = span(8 * unit, 32 + 8 * unit, 64 + 8 * unit)
    return [
        (f"{attention}.c_attn.weight", 1, columns),
        (f"{attention}.c_attn.bias", 0, columns),
        (f"{attention}.c_proj.weight", 0, rows),
    ]


def gpt2_key_dim(head: int, unit: int) -> Slices:
    columns = [8 * head + unit, 32 + 8 * head + unit]
    attention = "transformer.h.0.attn"
    return [(f"{attention}.c_attn.weight", 1, columns), (f"{attention}.c_attn.bias", 0, columns)]


def mixtral_expert_unit(unit: int) -> Slices:
    experts = "model.layers.1.mlp.experts"
    return [(f"{experts}.gate_up_proj", 1, [unit, 24 + unit]), (f"{experts}.down_proj", 2, [unit])]


def resnet_channel(unit: int) -> Slices:
    layer = "resnet.encoder.stages.0.layers.0.layer"
    return [
        (f"{layer}.0.convolution.weight", 0, [unit]),
        (f"{layer}.0.normalization.weight", 0, [unit]),
        (f"{layer}.0.normalization.bias", 0, [unit]),
        (f"{layer}.1.convolution.weight", 1, [unit]),
    ]


CASES: dict[str, tuple[str, str, Callable[..., Slices], tuple[int, ...]]] = {
    "ffn": ("llama-gqa", "ffn", llama_ffn, (48,)),
    "kv-head": ("llama-gqa", "kv-head", llama_kv_head, (2,)),
    "query-slot": ("llama-gqa", "query-slot", llama_query_slot, (2, 2)),
    "head-dim": ("llama-gqa", "head-dim", llama_head_dim, (2, 8)),
    "rope-pair": ("llama-gqa", "rope-pair", llama_rope_pair, (4,)),
    "hidden": ("llama-gqa", "residual", llama_untied_hidden, (32,)),
    "tied-hidden": ("llama-mha", "residual", llama_hidden, (32,)),
    "fused-head": ("gpt2", "kv-head", gpt2_head, (4,)),
    "fused-key-dim": ("gpt2", "head-dim", gpt2_key_dim, (4, 8)),
    "expert-unit": ("mixtral", "expert-unit", mixtral_expert_unit, (24,)),
    "channel": ("resnet", "channel", resnet_channel, (4,)),
}
"""Program, role, the slices of a unit by hand, and the sizes of its parents and its own."""


def group_of_case(case: str) -> Group:
    name, role, slices, sizes = CASES[case]
    group = group_of(coupling_of(name), role, slices(*(0 for _ in sizes))[0][0])
    kinds = program_of(name).kinds
    held = {weight for weight in group.weights() if kinds[weight] == "parameter"}
    assert held == {weight for weight, _, _ in slices(*(0 for _ in sizes))}
    return group


# -- the definitions ------------------------------------------------------------------------------


@cache
def weights_of(name: str) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model_of(name).named_parameters()}


@cache
def gradients_of(name: str) -> dict[str, Tensor]:
    """Of the mean next-token loss over all samples, taken on the model of transformers."""
    model = build(name)
    batches = [batch["input_ids"] for batch in calibration_of(name)]
    ids = torch.cat(batches)
    logits = model(input_ids=ids).logits
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@cache
def sample_gradients_of(name: str) -> list[dict[str, Tensor]]:
    """Of the mean next-token loss of each sample."""
    model, found = build(name), []
    named = dict(model.named_parameters())
    for row in torch.cat([batch["input_ids"] for batch in calibration_of(name)]):
        logits = model(input_ids=row[None]).logits
        loss = functional.cross_entropy(logits[0, :-1], row[1:])
        found.append(dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True)))
    return found


def elements_of(name: str, rule: str) -> dict[str, Tensor]:
    if rule in ("taylor-second", "taylor-mixed"):
        samples = sample_gradients_of(name)
        fisher = {n: torch.stack([each[n] ** 2 for each in samples]).mean(0) for n in samples[0]}
        second = {n: w * fisher[n] * w for n, w in weights_of(name).items()}
        if rule == "taylor-second":
            return second
        first = {n: torch.stack([each[n] for each in samples]).mean(0) for n in samples[0]}
        return {n: first[n] * w - second[n] / 2 for n, w in weights_of(name).items()}
    if rule.startswith("taylor"):
        gradients = gradients_of(name)
        return {n: weight * gradients[n] for n, weight in weights_of(name).items()}
    if rule == "wanda":
        return {n: w * norms_of(name).get(n, torch.ones(())) for n, w in weights_of(name).items()}
    return weights_of(name)


def norms_of(name: str) -> dict[str, Tensor]:
    """Norms of the inputs that the model's own layers see, shaped to multiply their weights."""
    found: dict[str, Tensor] = {}
    hooks = []
    for path, module in model_of(name).named_modules():
        kind = type(module).__name__
        if kind in ("Linear", "Conv1D"):

            def hook(_: Any, args: tuple[Tensor, ...], path: str = path, kind: str = kind) -> None:
                square = args[0].flatten(0, -2).square().sum(0)
                square = square + found.get(f"{path}.weight", torch.zeros(())).flatten() ** 2
                norm = square.sqrt()
                found[f"{path}.weight"] = norm if kind == "Linear" else norm[:, None]

            hooks.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        for batch in calibration_of(name):
            model_of(name)(**batch)
    for handle in hooks:
        handle.remove()
    return found


REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "l1": lambda part: part.abs().sum(),
    "l2": lambda part: (part**2).sum(),
    "magnitude": lambda part: (part**2).sum(),
    "taylor": lambda part: part.abs().sum(),
    "taylor-vector": lambda part: part.sum().abs(),
    "taylor-second": lambda part: part.abs().sum(),
    "taylor-mixed": lambda part: part.abs().sum(),
    "wanda": lambda part: part.abs().sum(),
}

COMBINE: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda members: members.sum(),
    "mean": lambda members: members.sum() / len(members),
    "max": lambda members: members.sort().values[-1],
    "product": lambda members: members.log().sum().exp(),
}


def by_definition(case: str, rule: str, aggregate: str = "sum") -> Tensor:
    name, _, slices, sizes = CASES[case]
    elements = elements_of(name, rule)
    scores = torch.zeros(sizes, dtype=torch.float64)
    for place in itertools.product(*map(range, sizes)):
        members = [
            REDUCE[rule](elements[weight].double().index_select(dim, torch.tensor(indices)))
            for weight, dim, indices in slices(*place)
        ]
        scores[place] = COMBINE[aggregate](torch.stack(members))
    return scores


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert found.dtype == torch.float64
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-4


def causal(case: str) -> bool:
    return CASES[case][0] != "resnet"


@pytest.mark.parametrize(
    ("case", "rule"),
    [
        (case, rule)
        for case in CASES
        for rule in REDUCE
        if (causal(case) or not rule.startswith("taylor"))
        # Wanda on what no module's hook sees: test_contractions.py and test_statistics.py
        and (rule != "wanda" or case not in ("expert-unit", "channel"))
    ],
)
def test_scores_follow_the_definition(case: str, rule: str) -> None:
    group = group_of_case(case)
    options = {} if causal(case) else {"calibration": None}
    scores = criterion(rule).scores(context_of(CASES[case][0], [group], **options))
    assert_close(scores[group.name], by_definition(case, rule))


@pytest.mark.parametrize("aggregate", COMBINE)
@pytest.mark.parametrize(
    ("case", "rule"),
    [
        ("kv-head", "l1"),
        ("fused-head", "l2"),
        ("ffn", "taylor"),
        ("query-slot", "taylor"),
        ("expert-unit", "taylor"),
        ("kv-head", "taylor-vector"),
    ],
)
def test_members_are_combined_as_asked(case: str, rule: str, aggregate: Any) -> None:
    group = group_of_case(case)
    context = context_of(CASES[case][0], [group], aggregate=aggregate)
    scores = criterion(rule).scores(context)[group.name]
    expected = by_definition(case, rule, aggregate)
    assert_close(scores, expected)


def test_all_groups_at_once_score_as_one_by_one() -> None:
    groups = coupling_of("llama-gqa").groups
    for rule in ("l2", "taylor"):
        together = criterion(rule).scores(context_of("llama-gqa", groups))
        assert list(together) == [group.name for group in groups]
        for group in groups:
            alone = criterion(rule).scores(context_of("llama-gqa", [group]))
            assert torch.allclose(alone[group.name], together[group.name], rtol=1e-6)


@pytest.mark.parametrize(
    ("case", "last"), [("ffn", "mlp.down_proj"), ("kv-head", "o_proj"), ("fused-head", "c_proj")]
)
def test_last_is_the_score_in_what_the_graph_uses_last(case: str, last: str) -> None:
    name, _, slices, sizes = CASES[case]
    group = group_of_case(case)
    scores = criterion("l1").scores(context_of(name, [group], aggregate="last"))[group.name]
    for unit in range(sizes[0]):
        ((weight, dim, indices),) = [each for each in slices(unit) if last in each[0]]
        part = weights_of(name)[weight].index_select(dim, torch.tensor(indices))
        assert float(scores[unit]) == pytest.approx(float(part.double().abs().sum()), rel=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_the_columns_of_a_unit_are_its_slices(case: str) -> None:
    name, _, slices, sizes = CASES[case]
    group, context = group_of_case(case), context_of(CASES[case][0], [group_of_case(case)])
    lines: dict[tuple[str, int], Tensor] = {}
    for member in group.members:
        size = program_of(name).weights[member.weight].shape[member.dim]
        line = unit_numbers(context.sizes(group), group, member, size)
        key = member.weight, member.dim
        lines[key] = torch.maximum(lines[key], line) if key in lines else line
    for number, place in enumerate(itertools.product(*map(range, sizes))):
        for weight, dim, indices in slices(*place):
            assert (lines[weight, dim] == number).nonzero().flatten().tolist() == sorted(indices)


@pytest.mark.parametrize(
    ("case", "path", "units"),
    [
        ("ffn", "model.layers.1.mlp.down_proj", torch.arange(48)),
        ("kv-head", "model.layers.0.self_attn.o_proj", torch.arange(32) // 16),
        ("query-slot", "model.layers.0.self_attn.o_proj", torch.arange(32) // 8),
    ],
)
def test_obs_is_what_the_consumer_loses(
    case: str, path: str, units: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(obs, "validated_damp", lambda *_: 0.05)
    name, _, _, sizes = CASES[case]
    group = group_of_case(case)
    rows = torch.cat([inputs_to(model_of(name), path, b) for b in calibration_of(name)]).double()
    expected = removal_errors(weights_of(name)[f"{path}.weight"], rows.T @ rows, units, damp=0.05)
    assert_close(
        criterion("obs").scores(context_of(name, [group]))[group.name], expected.view(sizes)
    )


class Gated(torch.nn.Module):
    """Multiplies what comes into a layer by a gate for each unit."""

    def __init__(self, inner: torch.nn.Module, units: Tensor) -> None:
        super().__init__()
        self.inner, self.units = inner, units
        self.gate = torch.nn.Parameter(torch.ones(int(units.max()) + 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.gate[self.units])


@pytest.mark.parametrize(
    ("case", "path", "units"),
    [
        ("ffn", "down_proj", torch.arange(48)),
        ("kv-head", "o_proj", torch.arange(32) // 16),
        ("query-slot", "o_proj", torch.arange(32) // 8),
        ("fused-head", "attn.c_proj", torch.arange(32) // 8),
    ],
)
@pytest.mark.parametrize("rule", ["gate", "gate-batch", "gate-token"])
def test_gates_have_the_gradients_of_gates_in_the_model(
    case: str, path: str, units: Tensor, rule: str
) -> None:
    """Michel et al., equation 2, with a gate that is really there."""
    name, _, slices, sizes = CASES[case]
    group = group_of_case(case)
    weights = [weight for weight, *_ in slices(*(0 for _ in sizes))]
    (path,) = {weight.removesuffix(".weight") for weight in weights if f"{path}.weight" in weight}
    model = build(name)
    parent, _, last = path.rpartition(".")
    gated = Gated(model.get_submodule(path), units)
    setattr(model.get_submodule(parent), last, gated)
    expected = torch.zeros(int(units.max()) + 1, dtype=torch.float64)
    for batch in calibration_of(name):
        ids = batch["input_ids"]
        for part in ids if rule == "gate" else [ids]:
            part = part if part.ndim == 2 else part[None]
            logits = model(input_ids=part).logits
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), part[:, 1:].flatten())
            (gradient,) = torch.autograd.grad(loss, [gated.gate])
            expected += gradient.double().abs()
    scores = criterion(rule).scores(context_of(name, [group]))[group.name]
    if rule == "gate-token":  # never less than what cancels out over a batch
        batched = criterion("gate-batch").scores(context_of(name, [group]))[group.name]
        assert bool((scores >= batched * (1 - 1e-6)).all())
        assert not torch.allclose(scores, batched)
    else:
        assert_close(scores, expected.view(sizes))


def test_where_the_absolute_value_is_taken_does_not_matter_for_one_token() -> None:
    program = program_of("llama-gqa")
    ids = inputs_of(program, batch=1, length=2)["input_ids"]
    groups = [group_of_case("kv-head")]
    options = {"calibration": Calibration.from_batches([{"input_ids": ids}])}
    by_sample, by_batch = (
        criterion(rule).scores(context_of("llama-gqa", groups, **options))[groups[0].name]
        for rule in ("gate", "gate-batch")
    )
    assert_close(by_sample, by_batch)


def test_obs_refuses_what_nothing_consumes() -> None:
    (group,) = [g for g in coupling_of("llama-gqa").groups if g.role == "rope-pair"][:1]
    with pytest.raises(SelectionError, match="obs scores what consumes it, and nothing does"):
        criterion("obs").scores(context_of("llama-gqa", [group]))


# -- query heads and their KV head -----------------------------------------------------------------


@cache
def wide_llama() -> Program:
    """Eight query heads on four KV heads, four wide."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=64,
    )
    return gp.capture(perturb(tf.LlamaForCausalLM(config)))


@pytest.mark.parametrize("rule", ["l1", "l2", "taylor", "taylor-vector"])
@pytest.mark.parametrize("kv", range(4))
def test_a_kv_head_is_scored_with_its_own_query_heads(kv: int, rule: str) -> None:
    """LLM-Pruner scored KV head 3 of a grouped-query model with the query heads of others."""
    program, coupling = wide_llama(), gp.analyze(wide_llama())
    attention = "model.layers.0.self_attn"
    only = {}
    for name, dim, rows in (
        ("q_proj", 0, span(8 * kv)),
        ("k_proj", 0, span(4 * kv, width=4)),
        ("v_proj", 0, span(4 * kv, width=4)),
        ("o_proj", 1, span(8 * kv)),
    ):
        weight = program.weight(f"{attention}.{name}.weight")
        kept = torch.zeros_like(weight)
        kept.index_copy_(dim, torch.tensor(rows), weight.index_select(dim, torch.tensor(rows)))
        only[f"{attention}.{name}.weight"] = kept
    lonely = program.with_weights(only)
    group = group_of(coupling, "kv-head", f"{attention}.k_proj.weight")
    calibration = Calibration.from_batches([inputs_of(program)])
    context = ScoringContext(lonely, coupling, [group], calibration=calibration)
    scores = criterion(rule).scores(context)[group.name]
    assert scores.nonzero().flatten().tolist() == [kv]


def test_the_kv_head_of_the_weakest_query_heads_goes() -> None:
    program = wide_llama()
    attention = "model.layers.0.self_attn"
    weak = program.weight(f"{attention}.q_proj.weight").clone()
    weak[16:24] = 0  # query heads 4 and 5, of KV head 2
    faint = program.with_weights({f"{attention}.q_proj.weight": weak})
    plan = Pipeline.parse("prune{target=kv-heads ratio=0.25 criterion=l1}").run(faint).plan
    lost = plan.removed
    assert lost[f"{attention}.k_proj.weight"][0] == span(8, width=4)
    assert lost[f"{attention}.q_proj.weight"][0] == span(16)
    assert lost[f"{attention}.o_proj.weight"][1] == span(16)


# -- what does not matter, and what does -----------------------------------------------------------


@pytest.mark.parametrize("rule", REDUCE)
def test_permuting_units_permutes_their_scores(rule: str) -> None:
    program, group = program_of("llama-gqa"), group_of_case("ffn")
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    places = [(weight, dim) for weight, dim, _ in llama_ffn(0)]
    moved = {weight: program.weight(weight).index_select(dim, order) for weight, dim in places}
    context = context_of("llama-gqa", [group])
    before = criterion(rule).scores(context)[group.name]
    after = criterion(rule).scores(replace(context, program=program.with_weights(moved)))
    assert_close(after[group.name], before[order])


@pytest.mark.parametrize("rule", ["taylor", "taylor-vector"])
def test_how_samples_are_batched_does_not_matter(rule: str) -> None:
    group = group_of_case("kv-head")
    ids = torch.cat([batch["input_ids"] for batch in calibration_of("llama-gqa")])
    found = []
    for size in (1, 4, 6):
        batches = [{"input_ids": chunk} for chunk in ids.split(size)]
        context = context_of("llama-gqa", [group], calibration=Calibration.from_batches(batches))
        found.append(criterion(rule).scores(context)[group.name])
    assert_close(found[0], found[1])
    assert_close(found[0], found[2])


@pytest.mark.parametrize("rule", ["taylor", "taylor-vector", "l2"])
def test_scoring_leaves_no_gradient_behind(rule: str) -> None:
    program = program_of("llama-gqa")
    before = {name: weight.clone() for name, weight in program.weights.items()}
    criterion(rule).scores(context_of("llama-gqa", coupling_of("llama-gqa").groups))
    assert all(weight.grad is None for weight in program.weights.values())
    assert all(torch.equal(before[name], weight) for name, weight in program.weights.items())


OF_EXPERTS = {n for n, each in CRITERIA.items() if each.__module__ == experts.__name__}


@pytest.mark.parametrize("rule", sorted(CRITERIA.keys() - OF_EXPERTS))
def test_the_same_seed_gives_the_same_scores(rule: str) -> None:
    groups = [g for g in coupling_of("llama-gqa").groups if g.role in ("ffn", "kv-head")]
    torch.manual_seed(1)
    first = criterion(rule).scores(context_of("llama-gqa", groups, seed=7))
    torch.manual_seed(2)
    again = criterion(rule).scores(context_of("llama-gqa", groups, seed=7))
    assert all(torch.equal(first[group.name], again[group.name]) for group in groups)
    other = criterion(rule).scores(context_of("llama-gqa", groups, seed=8))
    same = all(torch.equal(first[group.name], other[group.name]) for group in groups)
    assert same == (rule not in ("random", "scop", "scop-beta"))


def test_random_scores_do_not_depend_on_the_other_groups() -> None:
    groups = coupling_of("llama-gqa").groups
    together = criterion("random").scores(context_of("llama-gqa", groups, calibration=None))
    backwards = criterion("random").scores(context_of("llama-gqa", groups[::-1]))
    for group in groups:
        scores = together[group.name]
        assert torch.equal(scores, backwards[group.name])
        assert scores.min() >= 0 and scores.max() < 1
        assert len(scores.flatten().unique()) == scores.numel()
    one, two = (together[group.name] for group in groups if group.role == "ffn")
    assert not torch.equal(one, two)


def test_progress_is_told_of_weights_and_batches() -> None:
    told: list[str] = []

    def track(items: Iterable[Any], what: str) -> Iterable[Any]:
        told.append(what)
        return items

    context = context_of("llama-gqa", [group_of_case("ffn")], track=track)
    criterion("taylor").scores(context)
    assert told == ["scoring weights", "taking gradients"]


# -- refusing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["taylor", "taylor-vector"])
def test_data_is_needed_where_gradients_are(rule: str) -> None:
    assert criterion(rule).requires_calibration
    context = context_of("llama-gqa", [group_of_case("ffn")], calibration=None)
    with pytest.raises(CalibrationError, match="needs calibration data, and none was given"):
        criterion(rule).scores(context)


@pytest.mark.parametrize("rule", ["l1", "l2", "magnitude", "random"])
def test_data_is_not_needed_elsewhere(rule: str) -> None:
    assert not criterion(rule).requires_calibration
    group = group_of_case("ffn")
    scores = criterion(rule).scores(context_of("llama-gqa", [group], calibration=None))
    assert scores[group.name].shape == (48,)


@pytest.mark.parametrize("rule", ["taylor", "taylor-vector"])
def test_a_loss_that_is_no_number_is_refused(rule: str) -> None:
    program = program_of("llama-gqa")
    broken = torch.full_like(program.weight("model.norm.weight"), float("nan"))
    context = context_of("llama-gqa", [group_of_case("ffn")])
    context = replace(context, program=program.with_weights({"model.norm.weight": broken}))
    with pytest.raises(CalibrationError, match="the loss on the calibration data is not finite"):
        criterion(rule).scores(context)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_refused(value: float) -> None:
    group = group_of_case("ffn")
    context = context_of("llama-gqa", [group])
    scores = torch.ones(48, dtype=torch.float64)
    scores[5] = value
    with pytest.raises(SelectionError, match=f"{group.name}: .* scores that are not finite"):
        check_scores({group.name: scores}, context)


def test_scores_that_are_missing_or_misshapen_are_refused() -> None:
    group = group_of_case("head-dim")
    context = context_of("llama-gqa", [group])
    check_scores({group.name: torch.ones(2, 8)}, context)
    for scores in ({}, {group.name: torch.ones(8)}, {group.name: torch.ones(8, 2)}):
        with pytest.raises(SelectionError, match=f"{group.name}: .* no scores of the right shape"):
            check_scores(scores, context)


@cache
def meta_program() -> Program:
    with torch.device("meta"):
        return gp.capture(build("llama-gqa"))


@pytest.mark.parametrize("rule", REDUCE)
def test_a_program_without_weights_is_refused(rule: str) -> None:
    pipeline = Pipeline.parse(f"prune{{target=ffn ratio=0.5 criterion={rule}}}")
    with pytest.raises(SelectionError, match=f"{rule}: the program was captured without weights"):
        pipeline.run(meta_program(), calibration=calibration_of("llama-gqa"))


@pytest.mark.unverified  # without weights nothing can be run
def test_a_program_without_weights_is_pruned_at_random() -> None:
    pipeline = Pipeline.parse("prune{target=ffn ratio=0.5 criterion=random}")
    plan = pipeline.run(meta_program()).plan
    assert plan == pipeline.run(program_of("llama-gqa")).plan


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": torch.full((1, 4), VOCABULARY)}, "made token 61, the vocabulary has 61"),
        ({"pixels": torch.ones(1, 4)}, "calibration holds 'pixels'; the program takes input_ids"),
        ({"input_ids": torch.ones(3, 1, dtype=torch.int64)}, "no next token to predict"),
    ],
)
def test_data_that_does_not_fit_the_program_is_refused(
    batch: dict[str, Tensor], message: str
) -> None:
    context = context_of(
        "llama-gqa", [group_of_case("ffn")], calibration=Calibration.from_batches([batch])
    )
    with pytest.raises(CalibrationError, match=message):
        criterion("taylor").scores(context)


def test_a_program_without_a_next_token_is_refused() -> None:
    coupling = coupling_of("vit")
    batch = inputs_of(program_of("vit"), batch=2)
    context = ScoringContext(
        program_of("vit"), coupling, coupling.groups, Calibration.from_batches([batch])
    )
    with pytest.raises(CalibrationError, match="a next-token loss needs logits"):
        criterion("taylor").scores(context)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("tailor", "; did you mean 'taylor'?"),
        ("magnitud", "; did you mean 'magnitude'?"),
        ("taylor_vector", "; did you mean 'taylor-vector'?"),
        ("xyz", ""),
    ],
)
def test_an_unknown_criterion_names_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        criterion(name)
    assert str(caught.value) == f"there is no criterion {name!r}{hint}"


@pytest.mark.parametrize("given", [False, True])
def test_an_unknown_criterion_is_refused_before_any_pass_runs(given: bool) -> None:
    pipeline = Pipeline.parse("merge-kv-heads{groups=9},prune{target=ffn ratio=0.5 criterion=l3}")
    calibration = calibration_of("llama-gqa") if given else None
    with pytest.raises(UsageError, match="there is no criterion 'l3'; did you mean 'l2'"):
        pipeline.run(program_of("llama-gqa"), calibration=calibration)


def test_a_criterion_of_another_module_is_found_by_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(CRITERIA, "first", Criterion)  # so that what follows is undone

    class First(Criterion):
        name = "first"

        def scores(self, context: ScoringContext) -> dict[str, Tensor]:
            return {group.name: torch.arange(group.size).double() for group in context.groups}

    assert isinstance(criterion("first"), First)
    pipeline = Pipeline.parse("prune{target=ffn ratio=0.25 criterion=first}")
    (step,) = pipeline.run(program_of("llama-gqa")).plan.steps
    assert [cut.units for cut in step.cuts] == [{(): tuple(range(12))}] * 2


@pytest.mark.parametrize(
    "passes",
    [
        "prune{target=ffn ratio=0.5}",
        "prune{target=kv-heads ratio=0.5 criterion=gate}",
        "prune{target=ffn ratio=0.5 criterion=l2 scope=global normalize=loss}",
        "prune-depth{count=1 unit=branch}",
    ],
)
def test_next_tokens_are_no_loss_where_they_are_seen(passes: str) -> None:
    """A masked language model gives logits of the right shape, which predict no next token."""
    program = program_of("bert")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (2, 8), generator=generator)
    data = Calibration.from_batches([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    pipeline = Pipeline.parse(passes)
    with pytest.raises(CalibrationError, match="depends on the tokens after it"):
        pipeline.run(program, calibration=data, quiet=True)
    labeled = Calibration.from_batches([{**next(iter(data)), "labels": ids}])
    assert pipeline.run(program, calibration=labeled, quiet=True).plan


@pytest.mark.parametrize("cache", [True, False])
def test_what_is_hidden_scores_no_token(cache: bool) -> None:
    """Hidden states of a decoder without a head have the shape of logits, and are none."""
    program = gp.capture(model_of("llama-gqa").model, cache=cache)
    assert program.outputs[0].name == "last_hidden_state"
    data = Calibration.from_batches([{"input_ids": torch.arange(16).reshape(2, 8)}])
    for passes in ("prune{target=ffn ratio=0.5}", "prune{target=ffn ratio=0.5 criterion=gate}"):
        with pytest.raises(CalibrationError, match="last_hidden_state.*scores no tokens.*wanda"):
            Pipeline.parse(passes).run(program, calibration=data, quiet=True)
    with pytest.raises(TrainingError, match="last_hidden_state.*scores no tokens.*distil=1"):
        Pipeline.parse("recover{method=full steps=1}").run(program, calibration=data, quiet=True)
    with pytest.raises(EvaluationError, match="needs a causal language model"):
        perplexity(program, "some text", "no tokenizer is asked for")
