"""The effect of a unit is that of zeroing its activations in the eager model, by a hook."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import coupling_of, inputs_of, model_of, program_of
from rich.console import Console
from scipy import stats
from torch import Tensor
from torch.nn import functional

from graphprune.errors import EvaluationError, OutputError, SelectionError
from graphprune.evaluation.ablation import _effect, sensitivity, text_batches
from graphprune.evaluation.ablation_result import Effect, GroupEffects, Sensitivity
from graphprune.evaluation.perplexity import text_windows

Measure = Callable[[Any, dict[str, Tensor]], Tensor]


def batches_of(name: str, count: int = 2) -> list[dict[str, Tensor]]:
    return [inputs_of(program_of(name), batch=3, length=8, seed=seed) for seed in range(count)]


def hooked(
    name: str, path: str, columns: Iterable[int], batches: list[dict[str, Tensor]], measure: Measure
) -> Tensor:
    """Losses of the samples, with `columns` of what comes into a linear layer times zero."""
    model = model_of(name)
    gate = torch.ones(model.get_submodule(path).weight.shape[1])
    gate[list(columns)] = 0
    handle = model.get_submodule(path).register_forward_pre_hook(
        lambda _, args: (args[0] * gate, *args[1:])
    )
    try:
        return losses(name, batches, measure)
    finally:
        handle.remove()


@torch.no_grad()
def losses(name: str, batches: list[dict[str, Tensor]], measure: Measure) -> Tensor:
    found = []
    for batch in batches:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        for row in range(len(next(iter(batch.values())))):
            one = {key: value[row : row + 1] for key, value in inputs.items()}
            found.append(
                measure(
                    model_of(name)(**one), {k: v[row : row + 1] for k, v in batch.items()}
                ).double()
            )
    return torch.stack(found)


def next_token(outputs: Any, batch: dict[str, Tensor]) -> Tensor:
    return functional.cross_entropy(outputs.logits[0, :-1], batch["input_ids"][0, 1:])


def labeled(outputs: Any, batch: dict[str, Tensor]) -> Tensor:
    logits = outputs.logits.reshape(-1, outputs.logits.shape[-1])
    return functional.cross_entropy(logits, batch["labels"].flatten())


def head(index: int, width: int = 8) -> range:
    return range(index * width, (index + 1) * width)


def others(units: range, total: int) -> list[int]:
    return [column for column in range(total) if column not in units]


# -- heads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa"])
def test_a_head_s_effect_is_that_of_its_output_times_zero(name: str) -> None:
    batches = batches_of(name)
    found = sensitivity(coupling_of(name), batches)
    whole = losses(name, batches, next_token)
    assert found.loss == pytest.approx(float(whole.mean()), abs=1e-6)
    assert found.measure == "next-token loss"
    assert [len(row.removed) for row in found.rows] == [4, 4]
    for layer, row in enumerate(found.rows):
        path = f"model.layers.{layer}.self_attn.o_proj"
        for at, effect in enumerate(row.removed):
            differences = hooked(name, path, head(at), batches, next_token) - whole
            assert effect.units == (at, at + 1)
            assert effect.difference == pytest.approx(float(differences.mean()), abs=1e-6)


def test_the_best_head_is_chosen_on_half_of_the_samples_and_measured_on_the_other() -> None:
    name, batches = "llama-gqa", batches_of("llama-gqa")
    whole = losses(name, batches, next_token)
    for layer, row in enumerate(sensitivity(coupling_of(name), batches).rows):
        path = f"model.layers.{layer}.self_attn.o_proj"
        alone = [
            hooked(name, path, others(head(at), 32), batches, next_token) - whole for at in range(4)
        ]
        best = min(range(4), key=lambda at: float(alone[at][::2].mean()))
        assert row.kept is not None
        assert row.kept.units == (best, best + 1)
        assert row.kept.difference == pytest.approx(float(alone[best][1::2].mean()), abs=1e-6)


def test_a_kv_head_goes_with_its_query_heads() -> None:
    name, batches = "llama-gqa", batches_of("llama-gqa")
    whole = losses(name, batches, next_token)
    row = sensitivity(coupling_of(name), batches, "kv-heads", keep_one=False).rows[0]
    assert row.kept is None
    for at, effect in enumerate(row.removed):
        path, pair = "model.layers.0.self_attn.o_proj", head(at, 16)
        differences = hooked(name, path, pair, batches, next_token) - whole
        assert effect.difference == pytest.approx(float(differences.mean()), abs=1e-6)


def test_heads_are_those_of_encoder_decoder_and_cross_attention() -> None:
    name, batches = "t5", batches_of("t5")
    for seed, batch in enumerate(batches):
        generator = torch.Generator().manual_seed(seed)
        shape = batch["decoder_input_ids"].shape
        batch["labels"] = torch.randint(3, 61, shape, generator=generator)
        batch["labels"][:, 0] = -100
    found = sensitivity(coupling_of(name), batches, keep_one=False)
    assert found.measure == "cross entropy"
    whole = losses(name, batches, labeled)
    assert found.loss == pytest.approx(float(whole.mean()), abs=1e-6)
    rows = {row.group: row for row in found.rows}
    assert len(rows) == 6
    for stack, layer, attention in (
        ("encoder", 0, "SelfAttention"),
        ("decoder", 0, "SelfAttention"),
        ("decoder", 1, "EncDecAttention"),
    ):
        path = f"{stack}.block.1.layer.{layer}.{attention}"
        (row,) = (row for group, row in rows.items() if group.startswith(path))
        for at, effect in enumerate(row.removed):
            differences = hooked(name, f"{path}.o", head(at), batches, labeled) - whole
            assert effect.difference == pytest.approx(float(differences.mean()), abs=1e-6)


def test_an_encoder_without_labels_is_measured_by_how_far_its_output_moves() -> None:
    name, batches = "bert", batches_of("bert", 1)
    found = sensitivity(coupling_of(name), batches, keep_one=False)
    assert (found.measure, found.loss) == ("divergence", 0.0)
    with torch.no_grad():
        whole = model_of(name)(**batches[0]).logits.log_softmax(-1)

    def divergence(outputs: Any, batch: dict[str, Tensor]) -> Tensor:
        (at,) = (
            i for i, ids in enumerate(batches[0]["input_ids"]) if ids.equal(*batch["input_ids"])
        )
        after = outputs.logits[0].log_softmax(-1)
        return functional.kl_div(after, whole[at], log_target=True, reduction="batchmean")

    path = "bert.encoder.layer.1.attention.output.dense"
    for at, effect in enumerate(found.rows[1].removed):
        expected = hooked(name, path, head(at), batches, divergence).mean()
        assert effect.difference > 0
        assert effect.difference == pytest.approx(float(expected), rel=1e-3)


# -- other groups -------------------------------------------------------------------------------


def test_blocks_are_runs_of_neighbors() -> None:
    name, batches = "llama-mha", batches_of("llama-mha")
    found = sensitivity(coupling_of(name), batches, "ffn", blocks=5)
    whole = losses(name, batches, next_token)
    row = found.rows[1]
    assert [effect.units for effect in row.removed] == [
        (0, 9),
        (9, 19),
        (19, 28),
        (28, 38),
        (38, 48),
    ]
    for effect in row.removed:
        columns = range(*effect.units)
        path = "model.layers.1.mlp.down_proj"
        differences = hooked(name, path, columns, batches, next_token) - whole
        assert effect.difference == pytest.approx(float(differences.mean()), abs=1e-6)


def test_a_large_group_goes_in_so_many_runs_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphprune.evaluation.ablation.SINGLES", 20)
    coupling, batches = coupling_of("llama-gqa"), batches_of("llama-gqa", 1)
    found = {
        blocks: sensitivity(coupling, batches, "*.0.mlp:ffn", blocks=blocks, keep_one=False)
        for blocks in (None, 99)
    }
    assert [len(found[blocks].rows[0].removed) for blocks in (None, 99)] == [20, 48]


def test_units_are_counted_over_all_parents() -> None:
    name, batches = "llama-mha", batches_of("llama-mha")
    row = sensitivity(coupling_of(name), batches, "*.1.self_attn:head-dim", keep_one=False).rows[0]
    assert row.shape == (4, 8)
    whole = losses(name, batches, next_token)
    for at in (0, 13, 31):
        path = "model.layers.1.self_attn.o_proj"
        differences = hooked(name, path, [at], batches, next_token) - whole
        assert row.removed[at].difference == pytest.approx(float(differences.mean()), abs=1e-6)


def test_an_expert_s_effect_is_that_of_its_never_being_chosen() -> None:
    name, batches = "mixtral", batches_of("mixtral")
    found = sensitivity(coupling_of(name), batches, "experts")
    whole = losses(name, batches, next_token)
    gate = model_of(name).get_submodule("model.layers.0.mlp.gate")
    for at, effect in enumerate(found.rows[0].removed):
        rows = torch.arange(4) == at

        def without(_: Any, args: tuple[Tensor, ...], output: Any, rows: Tensor = rows) -> Any:
            hidden = args[0].reshape(-1, args[0].shape[-1])
            logits = functional.linear(hidden, gate.weight).masked_fill(rows, -math.inf)
            values, chosen = logits.softmax(-1).topk(2)
            return logits, values / values.sum(-1, keepdim=True), chosen

        handle = gate.register_forward_hook(without)
        differences = losses(name, batches, next_token) - whole
        handle.remove()
        assert effect.difference == pytest.approx(float(differences.mean()), abs=1e-5)
    assert found.rows[0].kept is None  # two are chosen at once


# -- spread -------------------------------------------------------------------------------------


def test_spread_is_that_of_paired_differences() -> None:
    name, batches = "llama-mha", batches_of("llama-mha")
    effect = sensitivity(coupling_of(name), batches, keep_one=False).rows[0].removed[2]
    before = losses(name, batches, next_token)
    after = hooked(name, "model.layers.0.self_attn.o_proj", head(2), batches, next_token)
    assert effect.error == pytest.approx(stats.sem(after - before), rel=1e-3)
    assert effect.p == pytest.approx(stats.ttest_rel(after, before).pvalue, rel=1e-2)


def test_one_sample_has_no_spread() -> None:
    batch = {key: value[:1] for key, value in batches_of("llama-mha", 1)[0].items()}
    effect = sensitivity(coupling_of("llama-mha"), [batch], keep_one=False).rows[0].removed[0]
    assert (effect.error, effect.p, effect.significant) == (None, None, False)


# -- printing -----------------------------------------------------------------------------------


def small(columns: int = 2) -> Sensitivity:
    removed = tuple(
        Effect((at, at + 1), 0.5 - at, 0.1, 0.001 if at == 0 else 0.5, 0.7 - at)
        for at in range(columns)
    )
    kept = Effect((1, 2), math.inf, None, None)
    rows = tuple(
        GroupEffects(f"layers.{n}.attn:head", "kv-head", (columns,), removed, kept)
        for n in range(2)
    )
    return Sensitivity("next-token loss", 2.5, 3, rows)


def printed(found: Sensitivity, width: int = 100) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(found)
    return console.export_text()


def test_the_table_says_what_is_significant_and_what_is_free() -> None:
    text = printed(small())
    assert "layers.*.attn:head" in text
    assert "+0.500*" in text
    assert "-0.500*" not in text
    assert "1: +inf" in text
    line = next(line for line in text.splitlines() if line.strip().startswith("1 "))
    assert line.split()[1:5] == ["+0.500*", "-0.500", "1", "0"]  # one is free, none unclear


def test_what_the_samples_do_not_tell_is_not_called_free() -> None:
    effects = {
        "free": Effect((0, 1), 0.001, 0.002, 0.6, 0.008),
        "free, though it is significant": Effect((0, 1), 0.005, 0.001, 0.001, 0.008),
        "better": Effect((0, 1), -0.5, 0.01, 0.001, -0.4),
        "worse": Effect((0, 1), 0.5, 0.01, 0.001, 0.6),
        "unclear": Effect((0, 1), 0.001, 0.2, 0.9, 0.5),
        "unclear, though it got better": Effect((0, 1), -0.1, 0.2, 0.6, 0.4),
        "one sample": Effect((0, 1), -0.1, None, None),
    }
    row = GroupEffects("group", "ffn", (7,), tuple(effects.values()), None)
    assert Sensitivity("loss", 2.0, 3, (row,)).verdicts(row) == (3, 3)


def test_two_samples_leave_most_unclear_and_many_do_not() -> None:
    noise = torch.tensor([0.01, -0.01], dtype=torch.float64).repeat(200)
    for count, verdicts in ((2, (0, 1)), (400, (1, 0))):
        row = GroupEffects("group", "ffn", (1,), (_effect((0, 1), noise[:count]),), None)
        assert Sensitivity("loss", 1.0, count, (row,)).verdicts(row) == verdicts


@pytest.mark.parametrize("columns", [2, 8, 12])
def test_every_row_keeps_its_label_at_80_columns(columns: int) -> None:
    found = small(columns)
    rows = [
        replace(row, group=f"{part}.attn.proj:head")
        for row, part in zip(found.rows, ("encoder.layers.10", "decoder.layers.11"), strict=True)
    ]
    lines = printed(replace(found, rows=tuple(rows)), 80).splitlines()
    assert all(len(line) <= 80 for line in lines)
    for at in (10, 11):
        assert any(f"layers.{at}" in line and "+0.500*" in line for line in lines)


def test_a_wide_table_shows_least_median_and_most() -> None:
    line = next(line for line in printed(small(12)).splitlines() if line.strip().startswith("1 "))
    assert line.split()[1:7] == ["12", "11:", "-10.500", "-5.000", "0:", "+0.500*"]


def test_json_holds_every_effect_and_null_for_what_is_not_finite() -> None:
    data = json.loads(small().to_json())
    assert data["format"] == 1
    assert data["rows"][1]["removed"][0]["difference"] == 0.5
    assert data["rows"][1]["kept"] == {
        "units": [1, 2],
        "difference": None,
        "error": None,
        "p": None,
        "most": None,
    }


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
@pytest.mark.parametrize("columns", [2, 40])
def test_a_picture_is_drawn(tmp_path: Path, suffix: str, start: bytes, columns: int) -> None:
    path = tmp_path / f"heads{suffix}"
    small(columns).picture(path)
    assert path.read_bytes().startswith(start)


def test_rows_of_a_picture_may_differ_in_length(tmp_path: Path) -> None:
    found = small(3)
    shorter = replace(found.rows[0], removed=found.rows[0].removed[:1], kept=None)
    replace(found, rows=(shorter, found.rows[1])).picture(tmp_path / "heads.svg")
    text = (tmp_path / "heads.svg").read_text()
    assert "<!-- layers.0.attn:head -->" in text
    assert "<!-- layers.1.attn:head -->" in text
    assert text.count("<!-- 0.500 -->") == 2
    assert text.count("<!-- −1.500 -->") + text.count("<!-- -1.500 -->") == 1


def test_a_picture_of_no_known_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"heads\.txt.*\.png, \.svg, \.pdf"):
        small().picture(tmp_path / "heads.txt")


# -- refusals -----------------------------------------------------------------------------------


def test_a_program_without_heads_is_refused() -> None:
    batches = batches_of("resnet", 1)
    with pytest.raises(SelectionError, match=r"no heads.*channel"):
        sensitivity(coupling_of("resnet"), batches)


def test_a_target_that_matches_nothing_is_refused() -> None:
    with pytest.raises(SelectionError, match="'experts' matches no group"):
        sensitivity(coupling_of("llama-mha"), batches_of("llama-mha", 1), "experts")


def test_blocks_that_leave_too_few_units_are_refused() -> None:
    for name, target in (("mixtral", "experts"), ("llama-mha", "ffn")):
        for blocks in (0, 1):
            with pytest.raises(SelectionError, match="must stay, and 1 blocks leave 0"):
                sensitivity(coupling_of(name), batches_of(name, 1), target, blocks=blocks)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    batch = batches_of("t5", 1)[0]
    batch["labels"] = torch.full_like(batch["decoder_input_ids"], -100)
    with pytest.raises(EvaluationError, match="not finite"):
        sensitivity(coupling_of("t5"), [batch])
    with pytest.raises(EvaluationError, match="no batches"):
        sensitivity(coupling_of("t5"), [])


def test_text_is_for_encoder_and_decoder_and_for_nothing_else() -> None:
    windows = torch.arange(24).view(3, 8)
    found = text_batches(program_of("t5"), windows, 2)
    assert [{name: len(ids) for name, ids in batch.items()} for batch in found] == [
        {"input_ids": n, "decoder_input_ids": n} for n in (2, 1)
    ]
    with pytest.raises(EvaluationError, match="pixel_values"):
        text_batches(program_of("vit"), windows, 2)


def test_windows_are_checked_against_the_model() -> None:
    with pytest.raises(EvaluationError, match="longer than the model"):
        text_windows(program_of("llama-mha"), "some text", "nowhere", length=65)
