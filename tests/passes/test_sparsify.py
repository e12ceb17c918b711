from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES, inputs_of, inputs_to, model_of, program_of
from torch import nn

from graphprune import capture, load
from graphprune.analysis.matrices import contractions
from graphprune.calibration.data import Calibration
from graphprune.errors import CalibrationError, SelectionError
from graphprune.passes.prune import Prune
from graphprune.passes.sparsify import Sparsify
from graphprune.passes.verify import Verify
from graphprune.pipeline.pass_manager import Result
from graphprune.pipeline.pipeline import Pipeline

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


def test_ria_compares_a_whole_matrix_where_wanda_compares_rows() -> None:
    path = "model.layers.0.mlp.down_proj.weight"
    rows = {
        name: (run("llama-gqa", Sparsify("0.5", name)).program.weights[path] == 0).sum(1)
        for name in ("wanda", "ria")
    }
    assert len(set(rows["wanda"].tolist())) == 1 < len(set(rows["ria"].tolist()))
    assert rows["wanda"].sum() == rows["ria"].sum()


def test_alps_loses_less_than_sparsegpt_and_that_less_than_wanda() -> None:
    path = f"{PREFIX}.mlp.down_proj"
    (batch,) = calibration_of("llama-gqa")
    inputs = inputs_to(model_of("llama-gqa"), path, batch).double()
    weight = program_of("llama-gqa").weights[f"{path}.weight"]

    def lost(criterion: Any) -> float:
        new = run("llama-gqa", Sparsify("2:4", criterion, sequential=False)).program.weights
        return float((inputs @ (new[f"{path}.weight"] - weight).double().mT).square().sum())

    assert lost("alps") < lost("sparsegpt") < lost("wanda")


def test_permuted_channels_keep_more_and_change_nothing_by_themselves() -> None:
    program = program_of("llama-gqa")
    result = run("llama-gqa", Sparsify("2:4", permute=True), Verify())
    (details,) = (each.details for each in result.report.passes if each.name == "sparsify")
    told = details["score kept, in order and permuted"]
    assert set(told) >= {"residual", f"{PREFIX}.mlp:ffn"}
    assert all(before <= after for before, after in told.values())
    before, after = told[f"{PREFIX}.mlp:ffn"]
    assert before < after
    down = result.program.weights[f"{PREFIX}.mlp.down_proj.weight"]
    assert ((down.reshape(-1, 4) == 0).sum(1) == 2).all()
    # What stays are the original's elements, each column in another place.
    assert set(down[down != 0].tolist()) <= set(
        program.weights[f"{PREFIX}.mlp.down_proj.weight"].flatten().tolist()
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pattern": "0.5"}, "permute is of n:m"),
        ({"pattern": "2:4", "criterion": "random"}, "not with criterion=random"),
        (
            {"pattern": "2:4", "statistics": "kept.safetensors", "sequential": False},
            "not with a file of statistics",
        ),
    ],
)
def test_permuting_where_nothing_can_be_compared_is_refused(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(SelectionError, match=said):
        Sparsify(permute=True, **options)


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
    assert 0 < details["statistics bytes"] < details["calibration bytes"]
    assert details["untouched"] == {
        "model.embed_tokens.weight": "it is used by aten.embedding.default"
    }


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "mixtral"])
def test_zeros_survive_a_checkpoint_and_an_archive(tmp_path: Path, name: str) -> None:
    sparse = run(name, Sparsify("2:4")).program
    sparse.save_pretrained(tmp_path / "checkpoint")
    sparse.save(tmp_path / "archive")
    for kind in ("checkpoint", "archive"):
        again = load(tmp_path / kind)
        assert again.weights.keys() == sparse.weights.keys()
        for key, weight in again.weights.items():
            assert torch.equal(weight, sparse.weights[key]), (kind, key)


def test_the_report_says_what_hardware_would_gain() -> None:
    details = run("mixtral", Sparsify("2:4")).report.passes[0].details["hardware"]
    others = details["others"]
    assert others[f"{PREFIX}.mlp.experts.down_proj"] == "it is not the weight of a linear layer"
    assert "no multiples of 32x64" in others[f"{PREFIX}.self_attn.k_proj.weight"]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 64))
    wide = capture(model, (torch.ones(2, 64),))
    sparse = Pipeline([Sparsify("2:4", "magnitude")]).run(wide)
    found = sparse.report.passes[0].details["hardware"]
    assert found["semi-structured"] == "1 of 2 matrices, in 16 bits"
    assert found["semi-structured bytes"] / found["dense bytes"] == 9 / 16
    assert list(found["others"]) == ["2.weight"]
    for pattern in ("4:8", "3:4", "0.5"):  # no core multiplies these faster
        result = Pipeline([Sparsify(pattern, "magnitude")]).run(wide)
        assert "hardware" not in result.report.passes[0].details


def test_kept_statistics_serve_another_pattern_without_data(tmp_path: Path) -> None:
    path = str(tmp_path / "kept.safetensors")
    kept = {"sequential": False, "statistics": path}
    assert Sparsify("0.5", **kept).requires_calibration
    written = run("llama-gqa", Sparsify("0.5", **kept))
    assert written.report.passes[0].details["statistics"] == f"written to {path}"
    assert not Sparsify("0.5", **kept).requires_calibration
    for sparsify in (
        Sparsify("2:4", **kept),
        Sparsify("0.3", "wanda-variant", **kept),
        Sparsify("0.4", scope="global", **kept),
    ):
        again = run("llama-gqa", sparsify, calibration=None)
        assert again.report.passes[0].details["statistics"] == f"read from {path}"
        fresh = run("llama-gqa", dataclasses.replace(sparsify, statistics=None)).program
        for name, weight in fresh.weights.items():
            assert torch.equal(weight, again.program.weights[name]), name


def test_kept_statistics_of_something_else_are_refused(tmp_path: Path) -> None:
    kept = {"sequential": False, "statistics": str(tmp_path / "kept")}
    run("llama-gqa", Sparsify("0.5", **kept))
    with pytest.raises(CalibrationError, match="statistics of this program with other weights"):
        run("llama-gqa", Sparsify("0.5", "magnitude"), Sparsify("0.6", **kept))
    with pytest.raises(CalibrationError, match="no products of pairs"):
        run("llama-gqa", Sparsify("0.5", "sparsegpt", **kept))
    with pytest.raises(CalibrationError, match="lacks the statistics of lm_head"):
        run("llama-gqa", Sparsify("0.5", target="all", **kept))
    other = Calibration.from_batches([inputs_of(program_of("llama-gqa"), seed=1)])
    with pytest.raises(CalibrationError, match="statistics on other calibration data"):
        run("llama-gqa", Sparsify("0.5", **kept), calibration=other)


@pytest.mark.parametrize("sequential", [True, False])
def test_with_less_memory_the_result_is_the_same(sequential: bool) -> None:
    sparsify = Sparsify("0.5", "sparsegpt", sequential=sequential)
    free = run("llama-gqa", sparsify)
    bound = run("llama-gqa", dataclasses.replace(sparsify, memory=0.031))
    details = [each.report.passes[0].details for each in (free, bound)]
    assert details[1]["statistics bytes"] <= 0.031 * 2**20 < details[0]["statistics bytes"]
    for name, weight in free.program.weights.items():
        assert torch.equal(weight, bound.program.weights[name])
    with pytest.raises(CalibrationError, match=r"down_proj\.weight: the statistics take 0.03004"):
        run("llama-gqa", dataclasses.replace(sparsify, memory=0.02))


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
        ({"pattern": "0.5", "statistics": "kept"}, "not of what sparse layers give: give seq"),
        (
            {"pattern": "0.5", "criterion": "magnitude", "memory": 1.0},
            "magnitude measures nothing: give neither",
        ),
        ({"pattern": "0.5", "memory": 0.0}, "memory 0 is not positive"),
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


def test_weights_that_are_not_finite_are_named_before_work() -> None:
    program = program_of("llama-gqa")
    name = f"{PREFIX}.mlp.up_proj.weight"
    broken = program.with_weights({name: torch.full_like(program.weights[name], torch.nan)})
    with pytest.raises(SelectionError, match=rf"{name}: it has values that are not finite"):
        Pipeline([Sparsify("0.5", "magnitude")]).run(broken)
