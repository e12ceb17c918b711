from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES, inputs_of, inputs_to, model_of, program_of

from graphprune.calibration import Calibration
from graphprune.contractions import contractions
from graphprune.errors import CalibrationError, SelectionError
from graphprune.pass_manager import Result
from graphprune.passes.prune import Prune
from graphprune.passes.sparsify import Sparsify
from graphprune.passes.verify import Verify
from graphprune.pipeline import Pipeline

PREFIX = "model.layers.0"


def calibration_of(name: str) -> Calibration:
    program = program_of(name)
    return Calibration.from_batches([inputs_of(program, batch=4, length=12)])


def run(name: str, *passes: Any, **options: Any) -> Result:
    options = {"calibration": calibration_of(name), **options}
    return Pipeline(passes).run(program_of(name), **options)


# -- what it is for -------------------------------------------------------------------------------


def test_wanda_drops_the_lowest_of_each_row_and_changes_nothing_else() -> None:
    result = run("llama-gqa", Sparsify("0.5"))
    (batch,) = calibration_of("llama-gqa")
    model = model_of("llama-gqa")
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        weight = model.get_submodule(f"{PREFIX}.{part}").weight.detach()  # type: ignore[union-attr]
        norm = inputs_to(model, f"{PREFIX}.{part}", batch).norm(dim=0)
        scores = weight.abs() * norm
        expected = weight.clone()
        for row in range(len(weight)):
            expected[row, scores[row].argsort()[: weight.shape[1] // 2]] = 0
        assert torch.equal(result.program.weights[f"{PREFIX}.{part}.weight"], expected)


def test_the_second_layer_is_scored_on_what_the_sparse_first_gives() -> None:
    result = run("llama-gqa", Sparsify("0.5"))
    (batch,) = calibration_of("llama-gqa")
    sparse = tf.LlamaForCausalLM(model_of("llama-gqa").config)  # type: ignore[arg-type]
    state = dict(model_of("llama-gqa").state_dict())
    state |= {n: w for n, w in result.program.weights.items() if n.startswith(PREFIX)}
    sparse.load_state_dict(state)
    path = "model.layers.1.self_attn.k_proj"
    weight = state[f"{path}.weight"]
    scores = weight.abs() * inputs_to(sparse.eval(), path, batch).norm(dim=0)
    expected = weight.clone().scatter_(1, scores.argsort(1)[:, :16], 0)
    assert torch.equal(result.program.weights[f"{path}.weight"], expected)
    at_once = run("llama-gqa", Sparsify("0.5", sequential=False)).program
    assert not torch.equal(at_once.weights[f"{path}.weight"], expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
def test_every_block_of_four_keeps_two_in_every_architecture(name: str, criterion: Any) -> None:
    sparsify = Sparsify("2:4", criterion, target="*[0-9].*")
    program = run(name, sparsify).program
    found = [
        m for m in contractions(program).matrices if any(map(str.isdigit, m.weight.split(".")))
    ]
    assert found
    for matrix in found:
        weight = matrix.read(program.weights[matrix.weight])
        zeros = (weight.reshape(-1, 4) == 0).sum(1)
        assert int(zeros.min()) >= 2, matrix.name
        if criterion == "magnitude":
            assert set(zeros.tolist()) == {2}, matrix.name


def test_routers_embeddings_and_heads_stay_whole() -> None:
    program = program_of("mixtral")
    sparse = run("mixtral", Sparsify("0.5")).program
    for name, weight in program.weights.items():
        inner = ".experts." in name or "_proj.weight" in name
        assert torch.equal(sparse.weights[name], weight) == (not inner), name


def test_an_expert_without_tokens_is_named_and_scored_by_magnitude() -> None:
    program = program_of("mixtral")
    batch = inputs_of(program, batch=1, length=1)
    sparsify = Sparsify("0.5", sequential=False)
    result = run("mixtral", sparsify, calibration=Calibration.from_batches([batch]))
    unseen = result.report.passes[0].details["scored by magnitude"]
    name = f"{PREFIX}.mlp.experts.down_proj"
    parts = [int(each.split("part ")[1]) for each in unseen if each.startswith(name)]
    assert len(parts) == 2  # two of four experts are chosen for the only token
    for part in parts:
        weight = program.weights[name][part]
        kept = weight.abs().argsort(1)[:, weight.shape[1] // 2 :]
        expected = torch.zeros_like(weight).scatter_(1, kept, weight.gather(1, kept))
        assert torch.equal(result.program.weights[name][part], expected)


def test_the_report_counts_what_became_zero() -> None:
    details = run("llama-gqa", Sparsify("2:4")).report.passes[0].details
    assert details["weights"] == 14
    assert details["zeros"] * 2 == details["elements"]
    assert details["sparsity"] == 0.5
    assert details["calibration bytes"] > 0
    assert "9/16" in details["note"]
    assert details["untouched"] == {
        "model.embed_tokens.weight": "it is used by aten.embedding.default"
    }


def test_zeros_survive_a_checkpoint(tmp_path: Path) -> None:
    sparse = run("llama-gqa", Sparsify("2:4")).program
    sparse.save_pretrained(tmp_path / "sparse")
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    for name, weight in model.named_parameters():
        assert torch.equal(weight, sparse.weight(name))


def test_units_can_go_before_and_after_it_and_all_is_verified() -> None:
    result = run(
        "llama-gqa",
        Prune("ffn", 0.25, "l2"),
        Sparsify("0.5"),
        Prune("kv-heads", 0.5, "l1"),
        Verify(),
    )
    assert result.report.passes[-1].details["max_relative_error"] < 1e-5
    up = result.program.weights[f"{PREFIX}.mlp.up_proj.weight"]
    assert up.shape == (36, 32)
    assert int((up == 0).sum()) == up.numel() // 2


def test_random_zeros_follow_the_seed() -> None:
    first, again, other = (
        run("llama-gqa", Sparsify("0.5", "random"), calibration=None, seed=seed).program.weights
        for seed in (1, 1, 2)
    )
    name = f"{PREFIX}.mlp.up_proj.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
    assert int((first[name] == 0).sum()) == first[name].numel() // 2


def test_ratio_zero_changes_nothing_and_says_so() -> None:
    result = run("llama-gqa", Sparsify("0"))
    assert result.program is program_of("llama-gqa")
    assert result.report.passes[0].details["note"] == "ratio 0: nothing becomes zero"


# -- refusing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "1.5"}, "pattern '1.5' is neither"),
        ({"pattern": "0.5", "criterion": "sparsegpt", "scope": "row"}, "sparsegpt has no scope"),
        ({"pattern": "2:4", "scope": "layer"}, "chosen block by block: give no scope"),
        ({"pattern": "2:4", "criterion": "wanda-variant"}, "chosen block by block"),
        ({"pattern": "0.5", "scope": "global"}, "give sequential=false"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        Sparsify(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "5:7"}, "its 32 inputs cannot be divided into blocks of 7"),
        ({"pattern": "0.5", "target": "nothing*"}, r"target 'nothing\*' matches no matrix"),
        ({"pattern": "0.5", "skip": ("nothing*",)}, r"skip pattern 'nothing\*' matches no matrix"),
        ({"pattern": "0.5", "skip": ("*",)}, "target 'layers' matches no matrix"),
    ],
)
def test_what_matches_nothing_or_does_not_divide_is_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SelectionError, match=message):
        run("llama-gqa", Sparsify(**options))


def test_calibration_is_asked_for_before_work() -> None:
    with pytest.raises(CalibrationError, match="needs calibration data"):
        run("llama-gqa", Sparsify("0.5"), calibration=None)
    assert run("llama-gqa", Sparsify("0.5", "magnitude"), calibration=None).program
