"""Statistics against hooks on the model, and layer-wise execution against running the program."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import inputs_of, model_of, program_of
from torch import Tensor, nn

from graphprune.analysis.matrices import Matrix, contractions
from graphprune.calibration.data import Calibration
from graphprune.calibration.input_statistics import InputStatistics
from graphprune.calibration.layerwise import unpadded
from graphprune.calibration.segments import segments
from graphprune.calibration.statistics import (
    Statistics,
    load_or_observe,
    load_statistics,
    observe,
    run_layerwise,
    save_statistics,
    statistics_bytes,
)
from graphprune.errors import CalibrationError, OutputError
from graphprune.ir.interpreter import Interpreter


def calibration_of(name: str, batches: int = 2) -> Calibration:
    program = program_of(name)
    made = [inputs_of(program, batch=2 + i, length=7 + i, seed=i) for i in range(batches)]
    keep = ("input_ids", "attention_mask")
    return Calibration.from_batches([{k: v for k, v in b.items() if k in keep} for b in made])


def by_hooks(name: str, calibration: Calibration) -> dict[str, list[Tensor]]:
    """The inputs of every linear of the model itself."""
    seen: dict[str, list[Tensor]] = {}
    hooks = []
    for path, module in model_of(name).named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":

            def hook(_: nn.Module, args: tuple[Tensor, ...], path: str = path) -> None:
                seen.setdefault(f"{path}.weight", []).append(args[0].flatten(0, -2))

            hooks.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        for batch in calibration:
            model_of(name)(**batch)
    for handle in hooks:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "bert"])
def test_they_are_what_hooks_on_the_model_see(name: str) -> None:
    calibration, program = calibration_of(name), program_of(name)
    matrices = contractions(program).matrices
    found = observe(program, matrices, calibration, "gram")
    seen = by_hooks(name, calibration)
    assert len(found) >= 8
    for path, each in found.items():
        if path not in seen:  # an output that is tied to the embedding
            continue
        rows = torch.cat(seen[path]).double()
        assert each.count.tolist() == [len(rows)]
        assert torch.allclose(each.norm[0], rows.norm(dim=0), rtol=1e-4)
        assert torch.allclose(each.mean[0], rows.mean(0), atol=1e-5)
        assert torch.allclose(each.variance[0], rows.var(0, correction=0), atol=1e-5)
        assert each.gram is not None
        assert torch.allclose(each.gram[0], rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_they_do_not_depend_on_how_samples_are_batched() -> None:
    program = program_of("llama-gqa")
    ids = inputs_of(program, batch=4, length=8)["input_ids"]
    matrices = contractions(program).matrices
    one = observe(program, matrices, Calibration.from_batches([{"input_ids": ids}]))
    apart = Calibration.from_batches([{"input_ids": row[None]} for row in ids])
    for name, each in observe(program, matrices, apart).items():
        assert torch.allclose(each.squares, one[name].squares, rtol=1e-5)
        assert torch.equal(each.count, one[name].count)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_counted(side: str) -> None:
    program = program_of("llama-gqa")
    ids = inputs_of(program, batch=2, length=8)["input_ids"]
    mask = torch.ones_like(ids)
    cut = slice(0, 3) if side == "left" else slice(5, 8)
    mask[1, cut] = 0
    kept = ids[1:2, 3:] if side == "left" else ids[1:2, :5]
    padded = Calibration.from_batches([{"input_ids": ids, "attention_mask": mask}])
    bare = Calibration.from_batches([{"input_ids": ids[:1]}, {"input_ids": kept}])
    matrices = contractions(program).matrices
    expected = observe(program, matrices, bare)
    for name, each in observe(program, matrices, padded).items():
        assert each.count.tolist() == [13]
        assert torch.allclose(each.squares, expected[name].squares, rtol=1e-5)


def test_padding_between_tokens_is_refused() -> None:
    ids = torch.ones(1, 4, dtype=torch.int64)
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1, 0, 1, 1]])}
    with pytest.raises(CalibrationError, match="batch 0: padding must be at the ends"):
        list(unpadded(Calibration.from_batches([batch])))


def test_an_expert_counts_only_the_tokens_routed_to_it() -> None:
    program = program_of("mixtral")
    (batch,) = calibration_of("mixtral", 1)
    found = observe(program, contractions(program).matrices, Calibration.from_batches([batch]))
    experts = [each for name, each in found.items() if ".experts." in name]
    assert experts
    tokens = batch["input_ids"].numel()
    for each in experts:
        assert len(each.count) == 4
        assert int(each.count.sum()) == 2 * tokens  # two experts for each token
        assert bool(((each.count > 0) == (each.squares.sum(1) > 0)).all())


def test_a_segment_for_each_layer_in_the_order_of_the_graph() -> None:
    program = program_of("llama-gqa")
    parts = segments(program, contractions(program).matrices)
    computed = [n for n in program.graph.nodes if n.op not in ("placeholder", "output")]
    assert [node for part in parts for node in part.nodes] == computed
    assert len(parts) == 4  # what is before, the two layers, and the head


def test_an_edit_is_seen_by_the_layers_after_it_and_not_by_its_own() -> None:
    program = program_of("llama-gqa")
    calibration = calibration_of("llama-gqa")
    matrices = contractions(program).matrices
    dense = observe(program, matrices, calibration)
    met: Statistics = {}

    def edit(_: object, held: Sequence[Matrix], found: Statistics) -> Iterator[dict[str, Tensor]]:
        met.update(found)
        names = [m.weight for m in held if "down_proj" in m.weight]
        yield {name: torch.zeros_like(program.weights[name]) for name in names}

    found = run_layerwise(program, matrices, calibration, edit=edit)
    changed = program.with_weights(found.weights)
    after = observe(changed, matrices, calibration)
    assert set(found.weights) == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}
    for name, each in met.items():
        source = dense if ".layers.0." in name else after
        assert torch.allclose(each.squares, source[name].squares, rtol=1e-6), name
    name = "model.layers.1.self_attn.q_proj.weight"
    assert not torch.allclose(after[name].squares, dense[name].squares, rtol=1e-2)
    assert found.peak_bytes > 0


@pytest.mark.parametrize("name", ["t5", "resnet", "vit", "mixtral", "opt"])
def test_layerwise_execution_without_edits_computes_what_running_does(name: str) -> None:
    """In-place operators may not be run twice on one tensor."""
    program = program_of(name)
    calibration = Calibration.from_batches([inputs_of(program)])
    matrices = contractions(program).matrices
    once = observe(program, matrices, calibration)
    seen: Statistics = {}

    def edit(_: object, __: object, found: Statistics) -> dict[str, Tensor]:
        seen.update(found)
        return {}

    run_layerwise(program, matrices, calibration, edit=edit)
    assert seen.keys() == once.keys()
    for key, each in seen.items():
        assert torch.equal(each.squares, once[key].squares)


def test_they_can_be_kept(tmp_path: Path) -> None:
    program = program_of("gpt2")
    matrices = contractions(program).matrices
    found = observe(program, matrices, calibration_of("gpt2"), "gram")
    save_statistics(found, tmp_path / "kept.safetensors", program)
    again = load_statistics(tmp_path / "kept.safetensors", program)
    assert again.keys() == found.keys()
    for name, each in again.items():
        assert torch.equal(each.squares, found[name].squares)
        assert each.gram is not None
    with pytest.raises(CalibrationError, match="of another program"):
        load_statistics(tmp_path / "kept.safetensors", program_of("bert"))


def test_kept_ones_are_measured_once(tmp_path: Path) -> None:
    program, data = program_of("llama-gqa"), calibration_of("llama-gqa")
    matrices = contractions(program).matrices
    path = tmp_path / "kept.safetensors"
    with pytest.raises(CalibrationError, match=r"kept\.safetensors does not exist, and no calib"):
        load_or_observe(path, program, matrices, None)
    first = load_or_observe(path, program, matrices[:3], data)
    assert path.is_file()
    again = load_or_observe(path, program, matrices[1:3], None)
    assert again.keys() == {matrix.name for matrix in matrices[1:3]}
    assert all(torch.equal(each.squares, first[name].squares) for name, each in again.items())
    with pytest.raises(CalibrationError, match=f"lacks the statistics of {matrices[3].name}"):
        load_or_observe(path, program, matrices, data)
    with pytest.raises(CalibrationError, match=f"no products of pairs .* {matrices[0].name}"):
        load_or_observe(path, program, matrices[:3], data, "gram")
    with pytest.raises(CalibrationError, match="on other calibration data"):
        load_or_observe(path, program, matrices[:3], calibration_of("llama-gqa", 1))


def test_a_place_that_cannot_be_written_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = program_of("llama-gqa")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(Interpreter, "step", lambda *_: pytest.fail("something ran"))
    given = program, contractions(program).matrices, calibration_of("llama-gqa")
    with pytest.raises(OutputError, match="cannot be written"):
        load_or_observe(tmp_path / "file" / "kept", *given)


def test_kept_ones_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    program = program_of("gpt2")
    matrix = contractions(program).matrices[0]
    broken = InputStatistics.empty(matrix, "moments")
    broken.squares[0, 2] = torch.nan
    save_statistics({matrix.name: broken}, tmp_path / "kept", program)
    with pytest.raises(CalibrationError, match=f"{matrix.name}: its inputs .* not finite"):
        load_statistics(tmp_path / "kept", program)


def test_inputs_that_are_not_finite_are_refused() -> None:
    program = program_of("llama-gqa")
    name = "model.layers.0.mlp.up_proj.weight"
    broken = program.with_weights({name: torch.full_like(program.weights[name], torch.nan)})
    with pytest.raises(CalibrationError, match=r"down_proj\.weight: its inputs .* not finite"):
        observe(broken, contractions(broken).matrices, calibration_of("llama-gqa"))


# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["moments", "gram"])
@pytest.mark.parametrize("name", ["llama-gqa", "mixtral", "resnet"])
def test_what_they_take_is_known_before(name: str, kind: Any) -> None:
    program = program_of(name)
    for matrix in contractions(program).matrices:
        made = InputStatistics.empty(matrix, kind)
        held = [tensor.nbytes for tensor in vars(made).values() if tensor is not None]
        assert sum(held) == InputStatistics.needed(matrix, kind)


def test_matrices_with_the_same_inputs_share_them(tmp_path: Path) -> None:
    program = program_of("llama-gqa")
    matrices = contractions(program).matrices
    found = observe(program, matrices, calibration_of("llama-gqa"), "gram")
    save_statistics(found, tmp_path / "kept", program)
    for each in (found, load_statistics(tmp_path / "kept", program)):
        at = {m.name.removeprefix("model.layers.0."): each[m.name] for m in matrices}
        query, gate = at["self_attn.q_proj.weight"], at["mlp.gate_proj.weight"]
        assert query is at["self_attn.k_proj.weight"] is at["self_attn.v_proj.weight"]
        assert gate is at["mlp.up_proj.weight"]
        assert len({id(value) for value in each.values()}) == 9  # four in two layers, and the head
    alone = sum(InputStatistics.needed(matrix, "gram") for matrix in matrices)
    assert statistics_bytes(matrices, "gram") < 0.7 * alone
    assert (tmp_path / "kept").stat().st_size < 0.7 * alone + 20_000


def recording(program: Any, scale: float, calls: list[list[str]], seen: Statistics) -> Any:
    """An edit that scales every weight and notes what it was given."""

    def edit(_: object, held: Sequence[Matrix], found: Statistics) -> Iterator[dict[str, Tensor]]:
        calls.append([matrix.name for matrix in held])
        seen.update(found)
        for m in held:
            yield {m.weight: program.weights[m.weight] * scale}

    return edit


@pytest.mark.parametrize("replay", [True, False])
@pytest.mark.parametrize("name", ["llama-gqa", "mixtral", "gpt2"])
def test_with_less_memory_the_same_is_seen_in_more_runs(name: str, replay: bool) -> None:
    program, data = program_of(name), calibration_of(name)
    matrices = contractions(program).matrices
    weights = {matrix.weight for matrix in matrices}
    most = max(statistics_bytes([m for m in matrices if m.weight == w], "gram") for w in weights)
    calls: list[list[list[str]]] = [[], []]
    seen: list[Statistics] = [{}, {}]
    given = program, matrices, data, "gram"
    edits = [recording(program, 0.5, calls[at], seen[at]) for at in (0, 1)]
    free = run_layerwise(*given, edits[0], replay=replay)
    bound = run_layerwise(*given, edits[1], replay=replay, memory=most)
    assert len(calls[1]) > len(calls[0])
    assert sum(calls[1], []) == sum(calls[0], [])
    assert bound.statistics_bytes <= most < free.statistics_bytes
    assert bound.peak_bytes < free.peak_bytes
    for key, each in seen[1].items():
        assert torch.equal(each.squares, seen[0][key].squares), key
    assert all(torch.equal(bound.weights[key], weight) for key, weight in free.weights.items())


def test_without_replay_an_edit_is_not_seen() -> None:
    program, data = program_of("llama-gqa"), calibration_of("llama-gqa")
    matrices = contractions(program).matrices
    seen: Statistics = {}
    run_layerwise(program, matrices, data, edit=recording(program, 0.0, [], seen), replay=False)
    for name, each in observe(program, matrices, data).items():
        assert torch.equal(each.squares, seen[name].squares)


def test_a_bound_that_nothing_fits_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program, data = program_of("llama-gqa"), calibration_of("llama-gqa")
    matrices = contractions(program).matrices
    monkeypatch.setattr(Interpreter, "step", lambda *_: pytest.fail("something ran"))
    down = "model.layers.0.mlp.down_proj.weight"
    needed = statistics_bytes([m for m in matrices if m.name == down], "gram")
    with pytest.raises(CalibrationError, match=rf"{down}: the statistics take 0\.\d+ MiB, and"):
        run_layerwise(program, matrices, data, "gram", lambda *_: {}, memory=needed - 1)
    total = statistics_bytes(matrices, "gram")
    with pytest.raises(CalibrationError, match="all matrices together: the statistics take"):
        observe(program, matrices, data, "gram", memory=total - 1)


def test_of_all_batches_only_one_holds_the_inside_of_a_layer() -> None:
    """What lies between layers is held for every batch; what a layer makes on the way is not."""
    program = program_of("llama-gqa")
    matrices = contractions(program).matrices
    batch = inputs_of(program, batch=2, length=8)
    one, four = (
        run_layerwise(program, matrices, Calibration.from_batches([batch] * n), edit=lambda *_: {})
        for n in (1, 4)
    )
    assert four.peak_bytes < 2 * one.peak_bytes
