"""The loop against a plain one on the model; checkpoints, early stop, samples, objectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build, inputs_of, program_of
from torch import Tensor
from torch.nn import functional

import graphprune as gp
from graphprune.analysis.matrices import contractions
from graphprune.calibration.data import Calibration
from graphprune.calibration.logits import Logits, WholeLogits
from graphprune.errors import CalibrationError, OutputError, TrainingError
from graphprune.ir.program import Program
from graphprune.training.loop import Checkpoint, Trained, TrainingConfig, train
from graphprune.training.lora import Adapters
from graphprune.training.objective import Objective
from graphprune.training.samples import Samples
from graphprune.training.trainable import AllWeights, Trainable, kept_zeros

NAME = "llama-gqa"
CE = Objective("logits")
CONFIG = TrainingConfig(steps=5, lr=1e-2, batch=4, micro=2, every=2)


def parameters_of(program: Program) -> list[str]:
    return [name for name, kind in program.kinds.items() if kind == "parameter"]


def everything(program: Program, **options: Any) -> AllWeights:
    return AllWeights(program, parameters_of(program), **options)


def adapters(program: Program) -> Adapters:
    return Adapters(program, contractions(program).matrices, dropout=0.2)


def samples_of(program: Program, count: int = 6, seed: int = 0) -> Samples:
    batch = inputs_of(program, batch=count, seed=seed)
    rows = Calibration.from_batches([batch])
    return Samples.split(rows, 0, 0)[0]


def fit(
    student: Trainable,
    config: TrainingConfig = CONFIG,
    objective: Objective = CE,
    name: str = NAME,
    **options: Any,
) -> Trained:
    program = program_of(name)
    held = samples_of(program, 3, seed=1)
    return train(student, objective, samples_of(program), held, config, **options)


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(w, second[n]) for n, w in first.items()
    )


# -- the loop --------------------------------------------------------------------------------------


def test_a_plain_loop_on_the_model_gives_the_same_weights() -> None:
    program, model = program_of(NAME), build(NAME)
    config = TrainingConfig(
        steps=3, lr=1e-2, batch=6, micro=2, warmup=1, weight_decay=0.1, clip=0.5
    )
    student = everything(program)
    fit(student, config)
    wide = [p for p in model.parameters() if p.ndim >= 2]
    narrow = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": wide, "weight_decay": 0.1}, {"params": narrow, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    (batch,) = samples_of(program).all(6)
    for rate in (0.005, 0.01, 0.005):
        for group in optimizer.param_groups:
            group["lr"] = rate
        model(**batch, labels=batch["input_ids"]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    new = student.weights()
    assert new.keys() == {name for name, _ in model.named_parameters()}
    for name, weight in model.named_parameters():
        assert torch.allclose(new[name], weight, atol=2e-5), name
        assert not torch.allclose(new[name], program.weights[name], atol=1e-3)


@pytest.mark.parametrize("micro", [1, 4, 100])
def test_how_many_run_at_once_makes_no_difference(micro: int) -> None:
    """Padded rows among them: every predicted token counts the same."""
    program = program_of(NAME)
    ids = inputs_of(program, batch=6)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    samples = Samples.split(Calibration.from_batches([batch]), 0, 0)[0]
    found = []
    for size in (2, micro):
        student = everything(program)
        config = replace(CONFIG, steps=1, batch=6, micro=size)
        trained = train(student, CE, samples, samples, config)
        found.append((student.weights(), trained.measured))
    (first, losses), (second, others) = found
    assert losses == pytest.approx(others, rel=1e-5)
    # AdamW's first step is of one size for all, so that what has next to no gradient may differ.
    changed = sum(int(((first[n] - second[n]).abs() > 1e-4).sum()) for n in first)
    assert changed < 1e-3 * program.parameter_count()


@pytest.mark.parametrize("make", [everything, adapters])
def test_the_loss_goes_down_and_the_same_seed_gives_the_same(
    make: Callable[[Program], Trainable],
) -> None:
    runs = []
    for seed in (0, 0, 1):
        student = make(program_of(NAME))
        trained = train(
            student,
            CE,
            samples_of(program_of(NAME)),
            Samples(()),
            TrainingConfig(steps=8, lr=1e-2, batch=4, seed=seed),
        )
        assert trained.measured[8] < trained.measured[0]
        runs.append(student.weights())
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_training_leaves_the_random_numbers_of_others_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit(adapters(program_of(NAME)))
    assert torch.equal(torch.rand(3), expected)


def test_the_program_is_not_edited() -> None:
    program = program_of(NAME)
    before = {name: weight.clone() for name, weight in program.weights.items()}
    student = everything(program)
    fit(student)
    assert same(before, program.weights)
    assert not any(weight.requires_grad for weight in student.weights().values())


def test_rates() -> None:
    constant = TrainingConfig(steps=5, lr=2.0, warmup=1, schedule="constant")
    assert [constant.rate(step) for step in range(5)] == [1.0, 2.0, 2.0, 2.0, 2.0]
    linear = TrainingConfig(steps=4, lr=2.0)
    assert [linear.rate(step) for step in range(4)] == [2.0, 1.5, 1.0, 0.5]


def test_a_loss_that_is_not_finite_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"not finite at step \d+, where the learning rate"):
        fit(everything(program_of(NAME)), TrainingConfig(steps=9, lr=1e30, batch=4, clip=0))


# -- half precision and zeros ----------------------------------------------------------------------


def test_weights_of_half_precision_have_masters() -> None:
    """Steps far smaller than a weight's last place add up."""
    program = gp.capture(build(NAME).to(torch.bfloat16))
    student = everything(program)
    fit(student, TrainingConfig(steps=40, lr=2e-5, batch=4, schedule="constant"))
    assert {each.dtype for each in student.parameters.values()} == {torch.float32}
    new = student.weights()
    assert {each.dtype for each in new.values()} == {torch.bfloat16}
    name = "model.layers.0.input_layernorm.weight"
    moved = (student.parameters[name].detach() - program.weights[name].float()).abs().max()
    assert 2e-4 < moved < 1e-3


def test_zeros_stay_zero_and_the_rest_moves() -> None:
    program = program_of(NAME)
    up = "model.layers.0.mlp.up_proj.weight"
    norm = "model.norm.weight"
    torch.manual_seed(0)
    gone = torch.rand(program.weights[up].shape) < 0.5
    sparse = {up: program.weights[up].masked_fill(gone, 0), norm: torch.zeros(32)}
    program = program.with_weights(sparse)
    zeros = kept_zeros(program, parameters_of(program))
    assert zeros.keys() == {up}
    assert torch.equal(zeros[up], gone)
    student = everything(program, zeros=zeros)
    train(student, CE, samples_of(program), Samples(()), replace(CONFIG, weight_decay=0.1))
    new = student.weights()
    assert not new[up][gone].any()
    assert (new[up] != program.weights[up])[~gone].all()
    assert new[norm].any()


# -- checkpoints -----------------------------------------------------------------------------------


class Cut(Exception):
    """What ends a run before its time."""


def cut_after(steps: int) -> Callable[[float], None]:
    done = 0.0

    def advance(count: float) -> None:
        nonlocal done
        done += count
        if done >= steps:
            raise Cut

    return advance


@pytest.mark.parametrize("patience", [None, 2, 5])
@pytest.mark.parametrize("make", [everything, adapters])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    make: Callable[[Program], Trainable], patience: int | None, tmp_path: Path
) -> None:
    config = TrainingConfig(
        steps=7, lr=3e-2, batch=4, micro=3, warmup=2, every=2, patience=patience
    )
    whole = make(program_of(NAME))
    expected = fit(whole, config)
    checkpoint = Checkpoint(tmp_path / "deep" / "here.pt", {"of": "this"})
    with pytest.raises(Cut):
        fit(make(program_of(NAME)), config, checkpoint=checkpoint, advance=cut_after(3))
    student = make(program_of(NAME))
    seen: list[float] = []
    found = fit(student, config, checkpoint=checkpoint, advance=seen.append)
    assert found.resumed == 2
    assert seen == [2, *[1] * (found.step - 2)]
    assert replace(found, resumed=0) == expected
    assert same(student.weights(), whole.weights())
    again = make(program_of(NAME))
    assert fit(again, config, checkpoint=checkpoint).resumed == expected.step
    assert same(again.weights(), whole.weights())


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    fit(everything(program_of(NAME)), checkpoint=Checkpoint(path, {"lr": 0.1, "data": "a"}))
    for identity, message in (
        ({"lr": 0.2, "data": "a"}, "was written with lr 0.1, not 0.2: give another place"),
        ({"lr": 0.1, "data": "b"}, "was written with data a, not b"),
        ({"lr": 0.1}, "was written with data a, not None"),
    ):
        with pytest.raises(TrainingError, match=message):
            Checkpoint(path, identity).read()
    path.write_bytes(b"no checkpoint")
    with pytest.raises(TrainingError, match="is no checkpoint of a training"):
        Checkpoint(path, {}).read()


def test_where_no_checkpoint_can_be_written_no_step_is_done(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        fit(
            everything(program_of(NAME)),
            checkpoint=Checkpoint(tmp_path / "file" / "here.pt", {}),
            advance=cut_after(1),
        )


# -- early stop ------------------------------------------------------------------------------------


class Curve:
    """A parameter that training moves down by one a step, and a loss that says where it is."""

    def __init__(self, losses: list[float]) -> None:
        self.parameters = {"at": torch.zeros(1, requires_grad=True)}
        self.losses = losses

    def logits(self, batch: Mapping[str, Tensor], output: str, training: bool) -> Logits:
        at = self.parameters["at"]
        return WholeLogits(at if training else torch.tensor(self.losses[round(-at.item())])[None])

    def weights(self) -> dict[str, Tensor]:
        return {"at": self.parameters["at"].detach().clone()}


class Given(Objective):
    def __call__(self, logits: Logits, batch: Any) -> Tensor:
        return logits.all().sum()

    measure = __call__

    def check(self, student: Trainable, batch: Any) -> None: ...


@pytest.mark.parametrize(
    ("losses", "patience", "done", "best"),
    [
        ([5, 4, 3, 2, 1], 1, 4, 4),
        ([5, 4, 6, 3, 1], 1, 2, 1),
        ([5, 4, 6, 3, 1], 2, 4, 4),
        ([5, 4, 4, 4, 4], 2, 3, 1),
        ([5, 6, 7, 8, 9], 3, 3, 0),
        ([5, 4, 6, 7, 8], None, 4, 4),
    ],
)
def test_it_stops_when_patience_is_over_and_takes_the_best(
    losses: list[float], patience: int | None, done: int, best: int
) -> None:
    curve = Curve(losses)
    rows = Samples([{"x": torch.zeros(1)}])
    config = TrainingConfig(steps=4, lr=1.0, schedule="constant", every=1, patience=patience)
    trained = train(curve, Given("loss"), rows, rows, config)
    assert (trained.step, trained.best) == (done, best)
    assert trained.stopped is (done < 4)
    assert trained.measured == dict(enumerate(losses[: done + 1]))
    assert round(-curve.weights()["at"].item()) == best


# -- samples ---------------------------------------------------------------------------------------


def numbered(count: int) -> Calibration:
    return Calibration.from_batches([{"x": torch.arange(count)[:, None]}])


def test_an_epoch_takes_every_sample_once_in_another_order() -> None:
    samples = Samples.split(numbered(10), 0, 0)[0]
    assert samples.steps(4) == 3
    epochs = [
        [torch.cat([b["x"] for b in samples.of_step(step, 4, 3, seed)]).flatten().tolist()
         for step in steps]
        for seed, steps in ((0, range(3)), (0, range(3, 6)), (1, range(3)))
    ]  # fmt: skip
    for epoch in epochs:
        assert [len(step) for step in epoch] == [4, 4, 2]
        assert sorted(sum(epoch, [])) == list(range(10))
    assert epochs[0] != epochs[1]
    assert epochs[0] != epochs[2]


@pytest.mark.parametrize(("part", "count"), [(0.0, 0), (0.01, 1), (0.3, 3), (0.9, 9)])
def test_held_out_samples_are_not_trained_on(part: float, count: int) -> None:
    kept, held = Samples.split(numbered(10), part, 0)
    assert len(held) == count
    both = [int(row["x"]) for each in (kept, held) for row in each.rows]
    assert sorted(both) == list(range(10))
    if 1 < count < 9:
        other = Samples.split(numbered(10), part, 1)[1]
        assert [int(r["x"]) for r in held.rows] != [int(r["x"]) for r in other.rows]


def test_too_few_samples_to_hold_any_out_are_refused() -> None:
    with pytest.raises(TrainingError, match="1 samples are too few to hold out 0.1 of them"):
        Samples.split(numbered(1), 0.1, 0)


def test_samples_of_other_lengths_run_apart() -> None:
    batches = [{"x": torch.zeros(2, length)} for length in (3, 5, 3)]
    samples = Samples.split(Calibration.from_batches(batches), 0, 0)[0]
    shapes = [tuple(batch["x"].shape) for batch in samples.of_step(0, 6, 3, 0)]
    assert shapes == [(3, 3), (1, 3), (2, 5)]


# -- objectives ------------------------------------------------------------------------------------


def scaled(program: Program, by: float = 1.5) -> Program:
    """Another program of the same shape."""
    return program.with_weights({n: program.weights[n] * by for n in parameters_of(program)})


def test_a_teacher_is_mixed_in_by_its_weight() -> None:
    program = program_of(NAME)
    teacher = scaled(program)
    ids = inputs_of(program)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    outputs = WholeLogits(program(**batch)["logits"])
    ours, theirs = (p(**batch)["logits"].log_softmax(-1)[mask.bool()] for p in (program, teacher))
    divergence = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    loss = CE(outputs, batch)
    for weight in (0.25, 1.0):
        objective = Objective("logits", teacher, weight)
        expected = (1 - weight) * loss + weight * divergence
        assert float(objective(outputs, batch)) == pytest.approx(float(expected), rel=1e-5)
        measured = divergence if weight == 1 else loss
        assert float(objective.measure(outputs, batch)) == pytest.approx(float(measured), rel=1e-5)


@pytest.mark.parametrize("name", [NAME, "bert", "vit", "resnet", "t5"])
def test_distilling_brings_every_kind_of_program_nearer_to_its_teacher(name: str) -> None:
    program = program_of(name)
    student = everything(scaled(program, 1.2))
    config = TrainingConfig(steps=8, lr=1e-3, batch=6)
    trained = fit(student, config, Objective("logits", program, 1.0), name)
    assert trained.measured[8] < 0.9 * trained.measured[0]


def test_what_is_no_logits_is_matched_in_the_mean_square() -> None:
    program = gp.capture(torch.nn.Linear(4, 3), example_inputs=(torch.randn(2, 4),))
    batch = {program.inputs[0].name: torch.randn(5, 4)}
    output = program.outputs[0].name
    teacher = scaled(program, 2.0)
    found = Objective(output, teacher, 1.0)(WholeLogits(program(**batch)[output]), batch)
    assert float(found) == pytest.approx(0.25)


def test_a_decoder_with_an_encoder_predicts_its_own_tokens() -> None:
    program = program_of("t5")
    batch = inputs_of(program)
    outputs = program(**batch)
    ids = batch["decoder_input_ids"]
    expected = functional.cross_entropy(
        outputs["logits"][:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    assert float(CE(WholeLogits(outputs["logits"]), batch)) == pytest.approx(float(expected))
    assert CE.size(batch) == ids[:, 1:].numel()
    trained = fit(everything(program), name="t5")
    assert trained.measured[5] < trained.measured[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bert", "logits of this program depend on the tokens after them.*distil=1"),
        ("vit", r"there is no next token.*logits \(1, 2\).*distil=1"),
    ],
)
def test_a_program_that_predicts_no_next_token_is_refused(name: str, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        fit(everything(program_of(name)), name=name)


def test_a_teacher_of_another_vocabulary_is_refused() -> None:
    program = program_of(NAME)
    few = Objective("logits", scaled(program), 0.5)
    batch = {"input_ids": torch.zeros(1, 4, dtype=torch.int64)}
    few.check(everything(program), batch)

    class Fewer(AllWeights):
        def logits(self, batch: Any, output: str, training: bool) -> Logits:
            return WholeLogits(super().logits(batch, output, training).all()[..., :-1])

    with pytest.raises(TrainingError, match=r"gives logits \(1, 4, 61\), this one \(1, 4, 60\)"):
        few.check(Fewer(program, parameters_of(program)), batch)


def test_labels_are_trained_on_where_there_are_any() -> None:
    torch.manual_seed(0)
    images = torch.randn(64, 1, 8, 8)
    labels = (images.mean((1, 2, 3)) > 0).long()
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.Linear(16, 2))
    program = gp.capture(net.eval(), (images[:2],))
    (name,) = (value.name for value in program.inputs)
    data = Calibration.from_batches([{name: images, "labels": labels}])
    recover = gp.Pipeline.parse("recover{method=full steps=30 lr=0.01 batch=16}")
    result = recover.run(program, calibration=data)
    before, after = (
        functional.cross_entropy(p(images)["output"], labels) for p in (program, result.program)
    )
    assert after < 0.7 * before


def test_labels_that_do_not_fit_are_refused() -> None:
    program = gp.capture(torch.nn.Linear(4, 2).eval(), (torch.zeros(2, 4),))
    (name,) = (value.name for value in program.inputs)
    data = Calibration.from_batches([{name: torch.zeros(8, 4), "labels": torch.zeros(8, 3).long()}])
    with pytest.raises(CalibrationError, match="do not fit logits"):
        gp.Pipeline.parse("recover{method=full steps=2}").run(program, calibration=data)
