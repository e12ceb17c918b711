from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build, inputs_of, program_of
from byte_llama import save_checkpoint

import graphprune as gp
from graphprune.calibration.data import Calibration
from graphprune.calibration.losses import next_token_loss
from graphprune.errors import CalibrationError, SelectionError, TrainingError, UsageError
from graphprune.ir.program import Program
from graphprune.passes.merge_kv_heads import MergeKvHeads
from graphprune.passes.prune import Prune
from graphprune.passes.recover import Recover
from graphprune.passes.save_pretrained import SavePretrained
from graphprune.passes.sparsify import Sparsify
from graphprune.passes.verify import Verify
from graphprune.pipeline.pass_manager import Result
from graphprune.pipeline.pipeline import Pipeline

PRUNE = Prune("ffn", 0.25, "l2")
QUICK: dict[str, Any] = {"steps": 4, "lr": 1e-2, "batch": 8, "micro": 8}
UP = "model.layers.0.mlp.up_proj.weight"


def calibration_of(name: str, batch: int = 10) -> Calibration:
    return Calibration.from_batches([inputs_of(program_of(name), batch=batch, length=12)])


def run(name: str, *passes: Any, **options: Any) -> Result:
    options = {"calibration": calibration_of(name), **options}
    return Pipeline(passes).run(program_of(name), **options)


def told(result: Result) -> dict[str, Any]:
    return dict(result.report.passes[-1].details)


def shapes(program: Program) -> dict[str, Any]:
    return {name: weight.shape for name, weight in program.weights.items()}


# -- what it does ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "mixtral"])
def test_what_was_pruned_is_trained_at_its_sizes(name: str, method: Any) -> None:
    bare = run(name, PRUNE).program
    result = run(name, PRUNE, Recover(method, **QUICK), Verify())
    assert shapes(result.program) == shapes(bare)
    details = dict(result.report.passes[1].details)
    calibration = calibration_of(name)
    (batch,) = calibration
    losses = [float(next_token_loss(p(**batch)["logits"], batch))
              for p in (bare, result.program)]  # fmt: skip
    assert losses[1] < losses[0]
    assert details["steps"] == 4
    assert details["loss"] == "next-token loss"
    assert details["measured on"] == "1 held-out samples"
    changed = {n for n, w in bare.weights.items() if not torch.equal(w, result.program.weights[n])}
    assert details["trained weights"] == len(changed)
    everything = {n for n, kind in bare.kinds.items() if kind == "parameter"}
    assert changed | details["untouched"].keys() >= everything - {
        n for n in everything if bare.weights[n].ndim < 2
    }
    if method == "full":
        assert changed == everything
        assert details["trainable"] == bare.parameter_count()
    else:
        assert details["trainable"] < bare.parameter_count()
        ranks = [torch.linalg.matrix_rank(result.program.weights[n] - bare.weights[n], atol=1e-5)
                 for n in changed if bare.weights[n].ndim == 2]  # fmt: skip
        assert max(map(int, ranks)) <= 8


@pytest.mark.parametrize("method", ["lora", "full"])
def test_neither_the_model_nor_the_program_before_is_trained(method: Any) -> None:
    """What a pass leaves is shared down to the user's own model, which must not move."""
    model = build("llama-gqa")
    program = gp.capture(model)
    batch = inputs_of(program, batch=4, length=12)
    before = model(**batch).logits
    pruned = Pipeline([PRUNE]).run(program).program
    left = {name: weight.clone() for name, weight in pruned.weights.items()}
    data = Calibration.from_batches([batch])
    result = Pipeline([Recover(method, **QUICK)]).run(pruned, calibration=data)
    assert any(not torch.equal(w, left[n]) for n, w in result.program.weights.items())
    assert all(torch.equal(w, left[n]) for n, w in pruned.weights.items())
    assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("name", ["llama-mha", "gpt2"])
def test_merged_heads_are_uptrained_for_a_share_of_the_steps(name: str) -> None:
    """GPT-2's class has no grouped heads: what is trained is the graph that has."""
    uptrain = Recover(
        "full", steps=80, share=0.05, lr=1e-2, batch=8, schedule="constant", held_out=0.0
    )
    result = run(name, MergeKvHeads(2), uptrain, Verify())
    details = dict(result.report.passes[1].details)
    assert details["steps"] == 4
    assert details["loss after"] < details["loss before"]
    assert details["trained weights"] == sum(
        kind == "parameter" for kind in result.program.kinds.values()
    )
    assert result.program.kv_bytes_per_token() * 2 == program_of(name).kv_bytes_per_token()


def test_the_papers_settings_are_the_defaults() -> None:
    default = Recover()
    assert (default.rank, default.alpha, default.dropout) == (8, 16.0, 0.05)
    assert (default.batch, default.length, default.distil) == (64, 256, 0.0)
    calibration = calibration_of("llama-gqa", 130)
    result = run("llama-gqa", Recover(micro=64), calibration=calibration)
    assert told(result)["samples"] == 117
    assert told(result)["steps"] == 4  # two epochs of two batches of 64
    assert told(result)["learning rate"] == 1e-4
    assert "lm_head.weight" in told(result)["untouched"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_zeros_of_sparsify_stay_unless_told_otherwise(method: Any) -> None:
    sparse = Sparsify("2:4", criterion="magnitude")
    kept = run("llama-gqa", sparse, Recover(method, **QUICK))
    found = kept.program.weights[UP]
    assert (found.view(48, 8, 4) != 0).sum(-1).eq(2).all()
    assert not torch.equal(found, run("llama-gqa", sparse).program.weights[UP])
    assert told(kept)["zeros kept"] >= found.numel() / 2
    free = run("llama-gqa", sparse, Recover(method, keep_zeros=False, **QUICK))
    assert (free.program.weights[UP] != 0).all()
    assert told(free)["zeros kept"] == 0


@pytest.mark.parametrize("name", ["llama-gqa", "bert", "resnet"])
def test_distilling_needs_no_tokens(name: str) -> None:
    target = "channels" if name == "resnet" else "ffn"
    recover = Recover(distil=1.0, target="all", held_out=0.0, **{**QUICK, "lr": 1e-3})
    result = run(name, Prune(target, 0.5, "l2"), recover)
    details = told(result)
    assert details["loss"] == "divergence from the unpruned program"
    assert details["measured on"] == "what is trained on"
    assert details["loss after"] < details["loss before"]


def test_a_weight_of_the_teacher_changes_what_is_learned() -> None:
    losses = {d: run("llama-gqa", PRUNE, Recover(distil=d, **QUICK)) for d in (0.0, 0.5)}
    first, second = (each.program.weights[UP] for each in losses.values())
    assert not torch.equal(first, second)


def test_a_glob_trains_what_it_names() -> None:
    result = run("llama-gqa", Recover("full", target="*.layers.0.*norm*", **QUICK))
    bare = program_of("llama-gqa")
    changed = {n for n, w in bare.weights.items() if not torch.equal(w, result.program.weights[n])}
    layer = "model.layers.0."
    assert changed == {f"{layer}input_layernorm.weight", f"{layer}post_attention_layernorm.weight"}
    assert told(result)["untouched"][UP] == "it is no target"


# -- texts and directories -------------------------------------------------------------------------


@cache
def saved(folder: Path) -> Path:
    return save_checkpoint(folder / "llama")


def test_a_text_is_cut_into_windows_and_what_it_made_can_be_saved(tmp_path: Path) -> None:
    program = gp.load(saved(tmp_path))
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh " * 40)
    recover = Recover(text=str(text), length=32, steps=3, batch=4, lr=1e-2)
    result = Pipeline([PRUNE, recover, SavePretrained("out")]).run(program, output=tmp_path)
    details = dict(result.report.passes[1].details)
    assert details["samples"] == 10  # of 360 bytes, one of 11 windows being held out
    assert details["loss after"] < details["loss before"]
    again = gp.load(tmp_path / "out")
    ids = torch.arange(20)[None]
    assert torch.allclose(again(ids)["logits"], result.program(ids)["logits"], atol=1e-5)
    with pytest.raises(TrainingError, match="has 360 tokens; one window takes 400"):
        Pipeline([Recover(text=str(text), length=400)]).run(program)
    with pytest.raises(TrainingError, match="came from none: give calibration data"):
        Pipeline([Recover(text=str(text), length=32)]).run(program_of("llama-gqa"))
    with pytest.raises(CalibrationError, match="no.txt does not exist or is no file"):
        Pipeline([Recover(text=str(tmp_path / "no.txt"))]).run(program)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_it_goes_on_from_a_checkpoint_of_the_same_training_only(
    method: Any, tmp_path: Path
) -> None:
    """The loop's own tests cut it off; here it is found, and found to be another's."""
    recover = Recover(method, checkpoint="state", **QUICK)
    first = run("llama-gqa", PRUNE, recover, output=tmp_path)
    assert (tmp_path / "state" / "checkpoint.pt").is_file()
    assert "resumed at step" not in told(first)
    second = run("llama-gqa", PRUNE, recover, output=tmp_path)
    assert told(second) == {**told(first), "resumed at step": 4}
    for name, weight in first.program.weights.items():
        assert torch.equal(weight, second.program.weights[name])
    other = Recover(method, checkpoint="state", **{**QUICK, "lr": 0.5})
    with pytest.raises(TrainingError, match="was written with lr 0.01, not 0.5"):
        run("llama-gqa", PRUNE, other, output=tmp_path)
    for options, what in (
        ({"seed": 1}, "seed"),
        ({"calibration": calibration_of("llama-gqa", 11)}, "data"),
    ):
        with pytest.raises(TrainingError, match=f"was written with {what} "):
            run("llama-gqa", PRUNE, recover, output=tmp_path, **options)
    with pytest.raises(TrainingError, match="was written with program "):
        run("llama-gqa", Prune("ffn", 0.5, "l2"), recover, output=tmp_path)


# -- nothing is silent -----------------------------------------------------------------------------


def test_where_no_step_was_better_the_program_stays_and_it_says_so() -> None:
    bad = Recover("full", steps=9, lr=5.0, warmup=0, batch=8, every=1, patience=3)
    result = run("llama-gqa", bad)
    assert result.program is program_of("llama-gqa")
    details = told(result)
    assert details["note"] == "no weight has changed: no step lowered the loss"
    assert details["stopped"] == "the loss went down no more"
    assert (details["steps"], details["best step"]) == (3, 0)
    assert details["loss after"] == details["loss before"]
    assert list(details["losses"]) == ["0", "1", "2", "3"]


def test_a_loss_that_rose_is_noted() -> None:
    result = run("llama-gqa", Recover("full", steps=2, lr=5.0, batch=8))
    assert told(result)["note"] == "the loss has not gone down"
    assert result.program is not program_of("llama-gqa")


def test_steps_too_small_to_change_anything_are_noted() -> None:
    result = run("llama-gqa", Recover("full", steps=1, lr=1e-20, batch=8))
    assert told(result)["note"] == "no weight has changed: the steps were too small"
    assert result.program is program_of("llama-gqa")


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank 0 is not at least 1"),
        ({"alpha": 0.0}, "alpha 0 is not positive"),
        ({"dropout": 1.0}, r"dropout 1 is not in \[0, 1\)"),
        ({"lr": -1.0}, "lr -1 is not positive"),
        ({"epochs": 0}, "epochs 0 is not at least 1"),
        ({"steps": 0}, "steps 0 is not at least 1"),
        ({"share": 0.0}, r"share 0 is not in \(0, 1\]"),
        ({"batch": 0}, "batch 0 is not at least 1"),
        ({"micro": 0}, "micro 0 is not at least 1"),
        ({"warmup": -1}, "warmup -1 is not at least 0"),
        ({"weight_decay": -0.1}, "weight_decay -0.1 is not at least 0"),
        ({"clip": -1.0}, "clip -1 is not at least 0"),
        ({"distil": 1.5}, r"distil 1.5 is not in \[0, 1\]"),
        ({"length": 1}, "length 1 is not at least 2"),
        ({"held_out": 1.0}, r"held_out 1 is not in \[0, 1\)"),
        ({"every": 0}, "every 0 is not at least 1"),
        ({"patience": 0}, "patience 0 is not at least 1"),
        ({"steps": 3, "epochs": 3}, "give steps or epochs, not both"),
        ({"patience": 1, "held_out": 0.0}, "held_out must not be 0"),
        ({"method": "full", "rank": 4}, "rank is of lora; method=full has no adapters"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recover(**options)


@pytest.mark.parametrize(
    ("name", "recover", "error", "message"),
    [
        ("llama-gqa", Recover(target="x*"), SelectionError, r"target 'x\*' matches no matrix"),
        (
            "llama-gqa",
            Recover("full", target="x"),
            SelectionError,
            "target 'x' matches no floating-point parameter",
        ),
        ("llama-gqa", Recover(distil=0.5), TrainingError, "which is its own teacher"),
        ("llama-gqa", Recover(warmup=5, steps=5), TrainingError, "leave none of 5 to train"),
        ("bert", Recover(), TrainingError, "depend on the tokens after them"),
        ("vit", Recover(), TrainingError, "there is no next token"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    name: str, recover: Recover, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(name, recover)


def test_it_needs_data() -> None:
    with pytest.raises(CalibrationError, match="needs calibration data"):
        run("llama-gqa", Recover(), calibration=None)


def test_without_peft_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "graphprune.passes.recover.find_spec",
        lambda name: None if name == "peft" else find(name),
    )
    with pytest.raises(TrainingError, match=r"needs peft: pip install 'graphprune\[recover\]'"):
        Recover()
    assert Recover("full").method == "full"


def test_parameters_that_are_no_floating_point_numbers_are_left_and_named() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(6, 4)
            held = torch.tensor([1, 2, 3, 4], dtype=torch.int8)
            self.scale = torch.nn.Parameter(held, requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * self.scale

    torch.manual_seed(0)
    program = gp.capture(Model(), example_inputs=(torch.randn(3, 6),))
    calibration = Calibration.from_batches([{program.inputs[0].name: torch.randn(8, 6)}])
    half = Sparsify("0.5", criterion="magnitude", target="all")
    recover = Recover("full", distil=1.0, keep_zeros=False, steps=3, lr=0.01)
    result = Pipeline([half, recover]).run(program, calibration=calibration)
    details = told(result)
    assert details["untouched"] == {"scale": "its elements are torch.int8"}
    assert details["loss after"] < details["loss before"]
