"""What is needed again later lies on disk past a limit, and comes back bit by bit as it was."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import inputs_of, program_of
from limits import least_memory
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import graphprune as gp
from graphprune.analysis.matrices import Matrix, contractions
from graphprune.calibration.data import Calibration
from graphprune.calibration.kept import Kept
from graphprune.calibration.layerwise import ChangedWeights, SegmentWeights, logits_of_all
from graphprune.calibration.segments import segments
from graphprune.calibration.statistics import observe, run_layerwise
from graphprune.errors import CalibrationError, OutputError
from graphprune.evaluation.ablation import sensitivity
from graphprune.ir.program import Program
from graphprune.weights.deferred import deferred
from graphprune.weights.placement import Placement
from graphprune.weights.scratch import FOLDER, ScratchFile


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(3, 4, 5).transpose(0, 2),
        torch.randn(3, 1, 5).expand(3, 4, 5),
        torch.randn(6).bfloat16(),
        torch.tensor(True),
        torch.arange(12).view(3, 4)[:, 1],
        torch.empty(2, 0),
    ],
)
def test_a_tensor_comes_back_as_it_was_and_lies_as_it_did(value: Tensor) -> None:
    kept: Kept[str] = Kept(0)
    kept["a"] = value
    assert kept.memory.bytes == 0
    assert kept["a"].dtype is value.dtype and torch.equal(kept["a"], value)
    if value._is_view() and value.numel() > 4:
        assert kept["a"].stride() == value.stride()


def test_room_on_disk_is_used_again(tmp_path: Path) -> None:
    file = ScratchFile()
    kept: Kept[int] = Kept(0, file=file)
    for number in range(100):
        kept[number % 3] = torch.full((10,), number)
    assert file._end <= 4 * 80
    assert [int(kept[at][0]) for at in range(3)] == [99, 97, 98]


def test_only_what_does_not_fit_goes_to_disk() -> None:
    kept: Kept[str] = Kept(100)
    kept["a"], kept["b"], kept["c"] = torch.ones(10), torch.ones(10), 3
    assert kept.memory.bytes == 80
    kept["d"] = torch.ones(10)
    assert kept.memory.bytes == 80 and kept["a"] is not kept["a"] and kept["b"] is kept["b"]
    del kept["b"], kept["d"]
    assert kept.memory.bytes == 0 and dict(kept).keys() == {"a", "c"}


# -- walks of data --------------------------------------------------------------------------------


def data_of(name: str) -> Calibration:
    program = program_of(name)
    made = [inputs_of(program, batch=2, length=7 + at, seed=at) for at in range(3)]
    return Calibration.from_batches(made)


def gram(program: Program) -> Any:
    found = observe(program, contractions(program).matrices, data_of("llama-gqa"), "gram")
    return {name: each.gram for name, each in found.items()}


def edited(program: Program) -> Any:
    def halve(_: Any, held: Any, __: Any) -> Iterator[dict[str, Tensor]]:
        for m in held:
            yield {m.weight: program.weights[m.weight] / 2}

    matrices = contractions(program).matrices
    return run_layerwise(program, matrices, data_of("t5"), edit=halve).weights


def aligned(program: Program) -> Any:
    pipeline = gp.Pipeline.parse("merge-kv-heads{groups=1 init=aligned}")
    return pipeline.run(program, calibration=data_of("llama-gqa"), quiet=True).program.weights


def norms(program: Program) -> Any:
    pipeline = gp.Pipeline.parse("reestimate-norms")
    return pipeline.run(program, calibration=data_of("resnet"), quiet=True).program.weights


def logits(program: Program) -> Any:
    weights = {name: deferred(weight) for name, weight in program.weights.items()}
    batches = list(data_of("llama-gqa"))
    found = logits_of_all(program, batches, weights=weights)
    return {str(at): each.all() for at, each in enumerate(found)}


def effects(program: Program) -> Any:
    batches = list(data_of("llama-gqa"))
    found = sensitivity(gp.analyze(program), batches, "ffn", blocks=2, keep_one=False)
    rows = [[effect.difference for effect in row.removed] for row in found.rows]
    return {"effects": torch.tensor(rows, dtype=torch.float64)}


@pytest.mark.parametrize(
    ("name", "work"),
    [
        ("llama-gqa", gram),
        ("t5", edited),
        ("llama-gqa", aligned),
        ("resnet", norms),
        ("llama-gqa", logits),
        ("llama-gqa", effects),
    ],
)
def test_a_limit_that_leaves_no_room_for_activations_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    work: Callable[[Program], Mapping[str, Tensor]],
) -> None:
    free = work(program_of(name))
    written: list[Tensor] = []
    write = ScratchFile.write
    monkeypatch.setattr(SegmentWeights, "room", property(lambda _: 0))
    monkeypatch.setattr(
        ScratchFile, "write", lambda file, each: (written.append(each), write(file, each))[1]
    )
    tight = work(program_of(name))
    assert written
    assert tight.keys() == free.keys()
    for key, expected in free.items():
        assert torch.equal(tight[key], expected), key


def limited(program: Program, beside: int) -> Program:
    """Return the program with a limit that leaves so many bytes beside a segment's weights."""
    parts = [part.nodes for part in segments(program, contractions(program).matrices)]
    needed = least_memory(program, lambda roomy: SegmentWeights(roomy, parts=parts).room)
    return dataclasses.replace(program, placement=Placement(memory=needed + beside))


def test_activations_between_layers_take_no_memory_past_the_limit() -> None:
    program = program_of("llama-gqa")
    matrices = contractions(program).matrices
    batches = [inputs_of(program, batch=2, length=16, seed=at) for at in range(12)]
    data = Calibration.from_batches(batches)
    free = run_layerwise(program, matrices, data, edit=lambda *_: {})
    tight = run_layerwise(limited(program, 1), matrices, data, edit=lambda *_: {})
    one = Calibration.from_batches(batches[:1])
    least = run_layerwise(program, matrices, one, edit=lambda *_: {})
    assert tight.peak_bytes <= least.peak_bytes < free.peak_bytes


@pytest.mark.parametrize(
    "passes",
    [
        "sparsify{pattern=0.5 criterion=wanda}",
        "sparsify{pattern=0.5 criterion=sparsegpt}",
        "sparsify{pattern=0.5 criterion=magnitude}",
        "merge-kv-heads{groups=1 init=aligned}",
        "prune{target=ffn ratio=0.5 criterion=l2},reconstruct",
    ],
)
def test_past_the_limit_no_layer_that_was_changed_is_held_while_the_next_one_is(
    monkeypatch: pytest.MonkeyPatch, passes: str
) -> None:
    whole = program_of("llama-gqa")
    short = {name: weight.bfloat16() for name, weight in whole.weights.items()}
    free = dataclasses.replace(whole, weights=short)
    changed: list[weakref.ref[Tensor]] = []
    held: list[int] = []
    store = ChangedWeights.store

    def watched(weights: ChangedWeights, new: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        held.append(sum(each() is not None for each in changed))
        stored = store(weights, new)
        changed.extend(weakref.ref(each) for each in new.values())
        changed.extend(weakref.ref(each) for each in stored.values() if type(each) is Tensor)
        return stored

    pipeline, data = gp.Pipeline.parse(passes), data_of("llama-gqa")
    expected = pipeline.run(free, calibration=data, quiet=True).program.weights
    monkeypatch.setattr(SegmentWeights, "room", property(lambda _: 0))
    monkeypatch.setattr(ChangedWeights, "store", watched)
    found = pipeline.run(free, calibration=data, quiet=True).program.weights
    assert len(changed) > 3 and sum(held) == 0
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def test_a_limit_below_one_segment_says_what_is_needed() -> None:
    program = limited(program_of("llama-gqa"), 0)
    with pytest.raises(CalibrationError, match=r"one layer take \S+ MiB, and \S+ MiB are allowed"):
        observe(program, contractions(program).matrices, data_of("llama-gqa"))


def test_a_full_disk_under_a_walk_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    program = limited(program_of("llama-gqa"), 1)
    monkeypatch.setenv(FOLDER, "/dev/full")
    with pytest.raises(OutputError, match="the scratch folder /dev/full cannot be written"):
        observe(program, contractions(program).matrices, data_of("llama-gqa"))


def test_the_weights_that_a_layer_was_tried_with_go_before_others_come() -> None:
    whole = program_of("llama-gqa")
    short = {name: weight.bfloat16() for name, weight in whole.weights.items()}
    program = dataclasses.replace(whole, weights=short)
    tried: list[StorageWeakRef] = []
    of = SegmentWeights.of

    def edit(_: object, held: Sequence[Matrix], __: object) -> Iterator[dict[str, Tensor]]:
        assert tried and all(each.expired() for each in tried)
        yield {m.weight: program.weights[m.weight] / 2 for m in held}

    with pytest.MonkeyPatch.context() as patch:

        def watched(weights: SegmentWeights, nodes: Any) -> Any:
            found = of(weights, nodes)
            tried[:] = [
                StorageWeakRef(tensor.untyped_storage())
                for node, tensor in found.items()
                if short.get(weights.names[node]) is not tensor
            ] or tried
            return found

        patch.setattr(SegmentWeights, "of", watched)
        run_layerwise(program, contractions(program).matrices, data_of("llama-gqa"), edit=edit)
