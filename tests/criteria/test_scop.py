"""SCOP against a few lines of PyTorch, on digits; and its adaptation against hooks in modules."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from architectures import build, coupling_of, inputs_of, inputs_to, model_of, program_of
from digits import Digits, DigitsNet, accuracy, captured, trained
from tiny_models import perturb
from torch import Tensor, nn
from torch.nn import functional

import graphprune as gp
from graphprune.analysis.groups import Group
from graphprune.calibration.data import Calibration
from graphprune.criteria import ScoringContext, criterion
from graphprune.criteria.knockoffs import permuted
from graphprune.criteria.scop import Scop, features, find_sites, mixed, units_at
from graphprune.errors import CalibrationError, SelectionError
from graphprune.ir.program import Program
from graphprune.pipeline.pipeline import Pipeline
from graphprune.plan.plan import Plan
from graphprune.plan.steps import Step
from graphprune.selection.selector import lowest_units
from graphprune.transforms.batch_norms import reestimate

# -- a network with batch norms --------------------------------------------------------------------


class Short(Scop):
    """As `scop`, sooner done."""

    epochs = 3


@cache
def small() -> tuple[DigitsNet, Program, Calibration]:
    """A network that was not trained, moved off where it starts, and 40 digits in two batches."""
    torch.manual_seed(0)
    net = DigitsNet(4, 6, 5)
    perturb(net)
    digits = Digits.split(0)[0]
    batches = [
        {"images": digits.images[rows], "labels": digits.labels[rows]}
        for rows in (slice(0, 24), slice(24, 40))
    ]
    return net, captured(net), Calibration.from_batches(batches)


def context_of_small(**options: Any) -> ScoringContext:
    _, program, calibration = small()
    coupling = gp.analyze(program)
    given = {"calibration": calibration, "seed": 3, **options}
    return ScoringContext(program, coupling, coupling.groups, **given)


def forward(net: DigitsNet, real: Tensor, control: Tensor, beta: list[Tensor]) -> Tensor:
    """The logits of mixed features, and in the same go the features of the knockoff."""
    for at, (conv, norm) in enumerate(zip(net.convs, net.norms, strict=True)):
        real, control = conv(real), conv(control)
        part = beta[at][:, None, None]
        real = norm(part * real + (1 - part) * control).relu()
        control = norm(control).relu()
        if at:
            real, control = functional.max_pool2d(real, 2), functional.max_pool2d(control, 2)
    return net.head(real.mean((2, 3)))


def by_hand(epochs: int, rate: float, seed: int) -> list[Tensor]:
    """Beta of every channel of `small`, as the paper trains it."""
    net, _, calibration = small()
    inner = [torch.zeros(len(norm.weight), requires_grad=True) for norm in net.norms]
    optimizer = torch.optim.Adam(inner, lr=rate, betas=(0.5, 0.9))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        controls = permuted(calibration, generator)
        for at in torch.randperm(len(controls), generator=generator).tolist():
            images, labels = calibration.batches[at]["images"], calibration.labels[at]  # type: ignore[index]
            beta = [each.sigmoid() for each in inner]
            logits = forward(net, images, controls[at]["images"], beta)
            gradients = torch.autograd.grad(functional.cross_entropy(logits, labels), inner)
            for each, gradient in zip(inner, gradients, strict=True):
                each.grad = gradient
            optimizer.step()
    return [each.detach().sigmoid().double() for each in inner]


def test_scores_are_those_of_a_few_lines_of_pytorch() -> None:
    net = small()[0]
    context = context_of_small()
    scores = Short().scores(context)
    beta = by_hand(Short.epochs, Short.rate, seed=3)
    assert len(scores) == len(beta) == 3
    for found, each, norm in zip(scores.values(), beta, net.norms, strict=True):
        expected = norm.weight.detach().abs().double() * (2 * each - 1)
        assert each.std() > 1e-3
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_the_controls_are_its_two_factors() -> None:
    context = context_of_small()
    both, gamma, beta = (
        criterion(name).scores(context) for name in ("scop", "scop-gamma", "scop-beta")
    )
    for norm, group in zip(small()[0].norms, context.groups, strict=True):
        assert torch.equal(gamma[group.name], norm.weight.detach().abs().double())
        assert torch.equal(both[group.name], gamma[group.name] * beta[group.name])
        assert bool((beta[group.name].abs() < 1).all())


@pytest.mark.parametrize("part", [0.0, 1.0])
def test_only_real_features_are_the_program_and_only_knockoffs_are_it_on_the_knockoff(
    part: float,
) -> None:
    _, program, calibration = small()
    context = context_of_small()
    sites = find_sites(context, "scop")
    (batch, _), (control, _) = calibration, permuted(calibration, torch.Generator())
    beta = {group.name: torch.full((group.size,), part) for group in context.groups}
    found = mixed(program, sites, batch, beta, features(program, sites, control)).all()
    assert torch.allclose(found, program(**(batch if part else control))["output"], atol=1e-6)


def test_a_unit_that_tells_more_than_its_control_rises_above_one_that_does_not() -> None:
    """The first channel is the label, the second noise: at a half the two noises cancel best."""
    conv, norm, head = nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2), nn.Linear(2, 2)
    with torch.no_grad():
        conv.weight.copy_(torch.eye(2)[:, :, None, None])
        head.weight.copy_(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
    net = nn.Sequential(conv, norm, nn.Flatten(), head).eval()
    labels = torch.arange(64) % 2
    noise = torch.randn(64, generator=torch.Generator().manual_seed(0))
    x = torch.stack([1.0 - 2 * labels, noise], 1)[:, :, None, None]
    program = gp.capture(net, example_inputs=(x,))
    coupling = gp.analyze(program)
    (group,) = coupling.groups
    data = Calibration.from_batches([{program.inputs[0].name: x, "labels": labels}])
    scorer = Scop()
    scorer.epochs, scorer.rate = 60, 0.05  # type: ignore[misc]
    context = ScoringContext(program, coupling, [group], data)
    telling, silent = scorer.factors(context, find_sites(context, "scop"))[group.name].tolist()
    assert telling > 0.85
    assert silent < 0.6


def test_a_residual_stream_has_one_factor_and_the_scale_of_all_its_norms() -> None:
    program, coupling = program_of("resnet"), coupling_of("resnet")
    group = next(g for g in coupling.groups if sum("normal" in w for w in g.weights()) > 8)
    context = ScoringContext(program, coupling, [group])
    sites = find_sites(context, "scop-gamma")
    norms = [w for w in group.weights() if w.endswith("normalization.weight")]
    assert len(sites) == len(norms) > 1
    expected = sum(program.weight(name).abs().double() for name in norms)
    found = criterion("scop-gamma").scores(context)[group.name]
    assert torch.allclose(found, expected, rtol=1e-6)


# -- the adaptation --------------------------------------------------------------------------------

CASES = {
    "ffn": ("llama-gqa", "model.layers.1.mlp.down_proj", torch.arange(48)),
    "kv-head": ("llama-gqa", "model.layers.0.self_attn.o_proj", torch.arange(32) // 16),
    "query-slot": ("llama-gqa", "model.layers.0.self_attn.o_proj", torch.arange(32) // 8),
    "head-dim": (
        "llama-gqa",
        "model.layers.0.self_attn.o_proj",
        8 * (torch.arange(32) // 16) + torch.arange(32) % 8,
    ),
}


def case(role: str) -> tuple[ScoringContext, Group, nn.Module, str, Tensor]:
    name, path, units = CASES[role]
    coupling = coupling_of(name)
    weight = f"{path}.weight"
    group = next(g for g in coupling.groups if g.role == role and weight in g.weights())
    batches = [inputs_of(program_of(name), batch=rows, seed=rows) for rows in (3, 2)]
    context = ScoringContext(program_of(name), coupling, [group], Calibration.from_batches(batches))
    return context, group, model_of(name), path, units


@pytest.mark.parametrize("role", CASES)
def test_without_batch_norms_features_are_mixed_at_what_consumes_them(role: str) -> None:
    context, group, _, path, units = case(role)
    program, model = context.program, build(CASES[role][0])
    (site,) = find_sites(context, "scop")
    assert torch.equal(site.units.expand(1, 1, -1).flatten(), units)
    data, control = inputs_of(program, seed=1), inputs_of(program, seed=2)
    beta = torch.rand(int(units.max()) + 1, generator=torch.Generator().manual_seed(0))
    kept = inputs_to(model, path, control).view(3, 9, -1)
    part = beta[units]
    model.get_submodule(path).register_forward_pre_hook(
        lambda _, args: (part * args[0] + (1 - part) * kept,)
    )
    with torch.no_grad():
        expected = model(**data).logits
        controls = features(program, [site], control)
        found = mixed(program, [site], data, {group.name: beta}, controls).all()
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, program(**data)["logits"], atol=1e-3)


@pytest.mark.parametrize("role", CASES)
def test_without_batch_norms_the_scale_is_the_deviation(role: str) -> None:
    context, group, model, path, units = case(role)
    found = criterion("scop-gamma").scores(context)[group.name]
    assert context.calibration is not None
    rows = torch.cat([inputs_to(model, path, batch) for batch in context.calibration])
    each = rows.double().std(0, correction=0)
    expected = torch.zeros(int(units.max()) + 1, dtype=torch.float64).index_add_(0, units, each)
    assert torch.allclose(found, expected.view(found.shape), rtol=1e-4)


def test_padding_is_not_counted_in_the_scale() -> None:
    context, group, *_ = case("ffn")
    batch = inputs_of(context.program, batch=2, length=6)["input_ids"]
    longer = functional.pad(batch, (0, 3), value=5)
    mask = functional.pad(torch.ones_like(batch), (0, 3))
    plain, padded = (
        criterion("scop-gamma").scores(
            ScoringContext(
                context.program, context.coupling, [group], Calibration.from_batches([given])
            )
        )[group.name]
        for given in ({"input_ids": batch}, {"input_ids": longer, "attention_mask": mask})
    )
    assert torch.allclose(plain, padded, rtol=1e-5)


def test_experts_are_refused_since_the_router_decides_which_are_seen() -> None:
    coupling = coupling_of("mixtral")
    group = next(g for g in coupling.groups if g.role == "expert")
    context = ScoringContext(program_of("mixtral"), coupling, [group])
    with pytest.raises(SelectionError, match=f"{group.name}: scop needs to know which unit"):
        find_sites(context, "scop")


def test_what_nothing_sums_over_is_refused() -> None:
    coupling = coupling_of("llama-gqa")
    group = next(g for g in coupling.groups if g.role == "rope-pair")
    with pytest.raises(SelectionError, match="scop scores what consumes it, and nothing does"):
        find_sites(ScoringContext(coupling.program, coupling, [group]), "scop")


def test_a_value_without_the_group_has_none_of_its_units() -> None:
    coupling = coupling_of("llama-gqa")
    ffn = next(g for g in coupling.groups if g.role == "ffn")
    (_, logits), *_ = coupling.program.output_nodes()
    assert units_at(coupling, ffn, logits) is None


@pytest.mark.parametrize("name", ["scop", "scop-beta"])
def test_data_is_needed(name: str) -> None:
    assert criterion(name).requires_calibration
    with pytest.raises(CalibrationError, match="needs calibration data, and none was given"):
        criterion(name).scores(context_of_small(calibration=None))


def test_the_scale_needs_data_only_where_no_batch_norm_is() -> None:
    assert len(criterion("scop-gamma").scores(context_of_small(calibration=None))) == 3
    context, group, *_ = case("ffn")
    without = ScoringContext(context.program, context.coupling, [group])
    with pytest.raises(CalibrationError, match="needs calibration data, and none was given"):
        criterion("scop-gamma").scores(without)


# -- labels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["taylor", "gate-batch"])
def test_other_criteria_take_the_loss_of_labels_too(rule: str) -> None:
    net, program, calibration = small()
    images = torch.cat([batch["images"] for batch in calibration])
    labels = torch.cat(list(calibration.labels or ()))
    context = context_of_small(
        calibration=Calibration.from_batches([{"images": images, "labels": labels}])
    )
    last = context.groups[-1]
    found = criterion(rule).scores(context)[last.name]
    seen: list[Tensor] = []
    handle = net.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    loss = functional.cross_entropy(net(images), labels)
    handle.remove()
    if rule == "gate-batch":
        (gradient,) = torch.autograd.grad(loss, seen)
        expected = (gradient * seen[0]).sum(0).abs()
    else:
        named = {name: each for name, each in net.named_parameters() if name in last.weights()}
        slopes = torch.autograd.grad(loss, list(named.values()))
        dims = {member.weight: member.dim for member in last.members}
        expected = torch.zeros(last.size)
        for (name, weight), slope in zip(named.items(), slopes, strict=True):
            expected += (weight * slope).abs().movedim(dims[name], 0).reshape(last.size, -1).sum(1)
    assert torch.allclose(found, expected.detach().double(), rtol=1e-4, atol=1e-8)


# -- what comes of it ------------------------------------------------------------------------------


def test_pruning_by_it_keeps_more_of_a_trained_network_than_the_other_way_round() -> None:
    train, test = Digits.split(0)
    program = captured(trained(train, 0))
    assert accuracy(program, test) > 97
    calibration, coupling = train.calibration(), gp.analyze(program)
    groups = coupling.groups[1:]
    scores = Short().scores(ScoringContext(program, coupling, groups, calibration))
    found = []
    for sign in (1, -1):
        chosen = [(g, lowest_units(sign * scores[g.name], g.size // 2)) for g in groups]
        step = Step(program.fingerprint(), tuple(group.cut(units) for group, units in chosen))
        left = gp.apply(program, Plan((step,)))
        found.append(accuracy(left.with_weights(reestimate(left, calibration)), test))
    assert found[0] > found[1] + 10


def test_it_prunes_in_a_pipeline() -> None:
    _, program, calibration = small()
    text = "prune{target=channels ratio=0.5 criterion=scop},verify,reestimate-norms,verify"
    result = Pipeline.parse(text).run(program, calibration=calibration)
    assert [result.program.weights[f"norms.{at}.weight"].shape[0] for at in range(3)] == [2, 3, 5]
