"""Statistics against hooks on the model, and the walk against running the program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from architectures import inputs_of, model_of, program_of
from torch import Tensor, nn

from graphprune.calibration import Calibration
from graphprune.contractions import Matrix, contractions
from graphprune.errors import CalibrationError
from graphprune.statistics import (
    Statistics,
    load_statistics,
    observe,
    save_statistics,
    segments,
    unpadded,
    walk,
)


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
    assert [node for part in parts for node in part] == list(program.graph.nodes)
    assert len(parts) == 4  # what is before, the two layers, and the head


def test_an_edit_is_seen_by_the_layers_after_it_and_not_by_its_own() -> None:
    program = program_of("llama-gqa")
    calibration = calibration_of("llama-gqa")
    matrices = contractions(program).matrices
    dense = observe(program, matrices, calibration)
    met: Statistics = {}

    def edit(_: object, held: Sequence[Matrix], found: Statistics) -> Mapping[str, Tensor]:
        met.update(found)
        names = [m.weight for m in held if "down_proj" in m.weight]
        return {name: torch.zeros_like(program.weights[name]) for name in names}

    walked = walk(program, matrices, calibration, edit=edit)
    changed = program.with_weights(walked.weights)
    after = observe(changed, matrices, calibration)
    assert set(walked.weights) == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}
    for name, each in met.items():
        source = dense if ".layers.0." in name else after
        assert torch.allclose(each.squares, source[name].squares, rtol=1e-6), name
    name = "model.layers.1.self_attn.q_proj.weight"
    assert not torch.allclose(after[name].squares, dense[name].squares, rtol=1e-2)
    assert walked.peak_bytes > 0


@pytest.mark.parametrize("name", ["t5", "resnet", "vit", "mixtral", "opt"])
def test_walking_without_edits_computes_what_running_does(name: str) -> None:
    """In-place operators may not be run twice on one tensor."""
    program = program_of(name)
    calibration = Calibration.from_batches([inputs_of(program)])
    matrices = contractions(program).matrices
    once = observe(program, matrices, calibration)
    seen: Statistics = {}

    def edit(_: object, __: object, found: Statistics) -> Mapping[str, Tensor]:
        seen.update(found)
        return {}

    walk(program, matrices, calibration, edit=edit)
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
    (tmp_path / "text").write_text("no")
    with pytest.raises(CalibrationError, match="holds no statistics"):
        load_statistics(tmp_path / "text", program)


def test_inputs_that_are_not_finite_are_refused() -> None:
    program = program_of("llama-gqa")
    name = "model.layers.0.mlp.up_proj.weight"
    broken = program.with_weights({name: torch.full_like(program.weights[name], torch.nan)})
    with pytest.raises(CalibrationError, match=r"down_proj\.weight: its inputs .* not finite"):
        observe(broken, contractions(broken).matrices, calibration_of("llama-gqa"))
