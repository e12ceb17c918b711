"""Whatever looks at data or weights, on a device that is not there; see `elsewhere`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from architectures import coupling_of, inputs_of, program_of
from elsewhere import DEVICE, Elsewhere, Present, moved, placed

import graphprune as gp
from graphprune.analysis.matrices import contractions
from graphprune.calibration.data import Calibration
from graphprune.calibration.statistics import observe
from graphprune.criteria import CRITERIA, ScoringContext, experts
from graphprune.evaluation.ablation import sensitivity
from graphprune.evaluation.comparison import compare
from graphprune.ir.program import Program
from graphprune.selection.allocation import loss_margins

pytestmark = [
    pytest.mark.unverified,
    pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'", "ignore:CUDA is not"),
]

NAME = "llama-gqa"


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with Present():
        yield


def data_of(name: str, count: int = 6) -> Calibration:
    """Batches on the CPU, as a tokenizer makes them."""
    program = program_of(name)
    batches = [inputs_of(program, batch=2, seed=seed) for seed in range(count // 2)]
    if name in ("vit", "resnet"):
        batches = [{**batch, "labels": torch.tensor([0, 1])} for batch in batches]
    return Calibration.from_batches(batches)


def here(value: Any) -> torch.Tensor:
    return value.inner if isinstance(value, Elsewhere) else value


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(here(found), expected, rtol=1e-4, atol=1e-6)


OWN = sorted(n for n, each in CRITERIA.items() if each.__module__.startswith("graphprune."))


@pytest.mark.parametrize("name", OWN)
def test_every_criterion_scores_on_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = CRITERIA[name]()
    routed = type(scorer).__module__ == experts.__name__
    model = "resnet" if name == "scop-gamma" else "mixtral" if routed else NAME
    roles = ("expert",) if routed else ("ffn", "channel")
    program, data = program_of(model), data_of(model)
    groups = [each for each in coupling_of(model).groups if each.role in roles][:1]
    if hasattr(scorer, "epochs"):
        monkeypatch.setattr(type(scorer), "epochs", 1)
    there = moved(program)
    coupling = gp.analyze(there)
    found = scorer.scores(ScoringContext(there, coupling, groups, data))
    expected = scorer.scores(ScoringContext(program, coupling_of(model), groups, data))
    for group in groups:
        same(found[group.name], expected[group.name])


PIPELINES = [
    "prune{target=ffn ratio=0.25 criterion=magnitude}",
    "prune{target=ffn ratio=0.25 criterion=taylor},reconstruct",
    "prune{target=hidden ratio=0.25 criterion=l1}",
    "prune{target=ffn ratio=0.25 criterion=obs normalize=loss scope=global}",
    "merge-kv-heads{groups=1 init=mean},reconstruct",
    "merge-kv-heads{groups=1 init=random}",
    "merge-kv-heads{groups=1 init=aligned}",
    "sparsify{pattern=0.5 criterion=magnitude}",
    "sparsify{pattern=0.5 criterion=random}",
    "sparsify{pattern=2:4 criterion=wanda permute=true}",
    "prune-depth{count=1 fold=stream skip=model.layers.0}",
    "sparsify{pattern=0.5 criterion=wanda-variant}",
    "sparsify{pattern=0.5 criterion=sparsegpt}",
    "sparsify{pattern=0.5 criterion=alps}",
    "sparsify{pattern=0.5 criterion=wanda scope=global sequential=false}",
    "evolve{target=ffn params=0.05 steps=1 generations=1 children=2}",
    "recover{method=full steps=2 batch=2 micro=2}",
    "recover{method=lora steps=2 batch=2 micro=2}",
    "prune{target=ffn ratio=0.25 criterion=l2},recover{method=full steps=2 batch=2 distil=0.5}",
]


def ran(program: Program, text: str, model: str = NAME) -> Program:
    result = gp.Pipeline.parse(text).run(program, calibration=data_of(model), quiet=True)
    return result.program


@pytest.mark.parametrize("at", [moved, placed])
@pytest.mark.parametrize("text", PIPELINES)
def test_every_pass_runs_on_the_device(text: str, at: Callable[[Program], Program]) -> None:
    there, expected = ran(at(program_of(NAME)), text), ran(program_of(NAME), text)
    for name, weight in there.weights.items():
        assert weight.device == (DEVICE if at is moved else torch.device("cpu")), name
        assert weight.shape == expected.weights[name].shape
    if "recover" not in text:  # whose products are of bfloat16 on a device
        batch = next(iter(data_of(NAME)))
        torch.testing.assert_close(
            here(there(**batch)["logits"]), expected(**batch)["logits"], rtol=1e-3, atol=1e-4
        )


def test_norms_are_taken_anew_on_the_device() -> None:
    program = program_of("resnet")
    there = ran(moved(program), "reestimate-norms", "resnet").weights
    for name, weight in ran(program, "reestimate-norms", "resnet").weights.items():
        assert there[name].device == DEVICE, name
        same(there[name], weight)


def test_experts_are_refitted_on_the_device() -> None:
    text, program = (
        "prune{target=experts ratio=0.25 criterion=l2},reconstruct",
        program_of("mixtral"),
    )
    there = ran(moved(program), text, "mixtral").weights
    for name, weight in ran(program, text, "mixtral").weights.items():
        assert there[name].device == DEVICE, name
        torch.testing.assert_close(here(there[name]), weight, rtol=1e-3, atol=1e-5)


def comparison(program: Program) -> Any:
    batches = list(data_of(NAME))
    found = dataclasses.asdict(compare(program, program, batches))
    return [*found.pop("distances").values(), *found.values()]


def study(program: Program) -> Any:
    coupling = gp.analyze(program)
    found = sensitivity(coupling, list(data_of(NAME)), "ffn", blocks=2, keep_one=False)
    return [effect.difference for row in found.rows for effect in row.removed]


def margins(program: Program) -> Any:
    coupling = gp.analyze(program)
    groups = [group for group in coupling.groups if group.role == "ffn"]
    context = ScoringContext(program, coupling, groups, data_of(NAME))
    found = loss_margins(context, CRITERIA["l2"]().scores(context), levels=2)
    return [here(each).tolist() for each in found.values()]


def statistics(program: Program) -> Any:
    found = observe(program, contractions(program).matrices, data_of("mixtral"), "gram")
    return [here(each.gram).sum().item() for each in found.values() if each.gram is not None]


@pytest.mark.parametrize(
    ("model", "measure"),
    [(NAME, comparison), (NAME, study), (NAME, margins), ("mixtral", statistics)],
)
def test_what_is_measured_is_measured_on_the_device(
    model: str, measure: Callable[[Program], Any]
) -> None:
    found, expected = measure(moved(program_of(model))), measure(program_of(model))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=1e-5)


def test_what_is_left_out_is_made_on_the_device() -> None:
    program = moved(program_of(NAME))
    filled = program.fill({"input_ids": torch.zeros(1, 3, dtype=torch.int64)})
    assert {tensor.device for tensor in filled.values()} == {DEVICE}


def test_tensors_of_two_devices_are_not_mixed() -> None:
    there = torch.zeros(2, device=DEVICE)
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        there + torch.zeros(2)
