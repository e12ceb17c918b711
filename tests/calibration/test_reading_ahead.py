"""While one segment is computed, a thread makes the weights of the next."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from architectures import inputs_of, program_of
from torch import Tensor

from graphprune.analysis.matrices import contractions
from graphprune.calibration.backward import BackwardWalk
from graphprune.calibration.data import Calibration
from graphprune.calibration.layerwise import SegmentWeights
from graphprune.calibration.logits import Logits
from graphprune.calibration.segments import segments
from graphprune.calibration.statistics import run_layerwise
from graphprune.errors import CheckpointError
from graphprune.ir.program import Program
from graphprune.weights.deferred import Deferred
from graphprune.weights.placement import Placement

Made = list[tuple[str, bool]]


def stored(made: Made, broken: str = "") -> Program:
    """Return a program whose weights are noted when they are made, and whether by a thread."""
    whole = program_of("llama-gqa")

    def later(name: str, weight: Tensor) -> Tensor:
        def make() -> Tensor:
            made.append((name, threading.current_thread() is not threading.main_thread()))
            if name == broken:
                raise CheckpointError(f"{name} has changed since it was opened")
            return weight

        return Deferred(make, weight.shape, weight.dtype)

    return dataclasses.replace(whole, weights={n: later(n, w) for n, w in whole.weights.items()})


def data() -> Calibration:
    program = program_of("llama-gqa")
    return Calibration.from_batches([inputs_of(program, 2, 8, seed=at) for at in range(3)])


def squares(logits: Logits, _: int) -> Tensor:
    rows = torch.arange(logits.all().shape[:-1].numel())
    return logits.summed(rows, lambda piece, _: piece.square().mean(-1))


def halved(program: Program) -> Mapping[str, Tensor]:
    """Halve every matrix, segment by segment."""

    def edit(_: object, held: Any, __: object) -> Iterator[dict[str, Tensor]]:
        yield {m.weight: program.weights[m.weight] / 2 for m in held}

    matrices = contractions(program).matrices
    return run_layerwise(program, matrices, data(), edit=edit).weights


def test_each_weight_is_made_once_by_a_thread_but_those_of_the_first_segment() -> None:
    made: Made = []
    program = stored(made)
    matrices = contractions(program).matrices
    run_layerwise(program, matrices, data())
    parts = segments(program, matrices)
    first = {SegmentWeights(program).names.get(n) for p in parts[:1] for n in p.inputs}
    assert len(made) == len(dict(made)) > len(first)
    assert {name for name, by_thread in made if not by_thread} == first - {None}


def test_the_way_back_is_read_ahead_too() -> None:
    made: Made = []
    program = stored(made)
    walk = BackwardWalk(program, list(data()), squares, program.weights)
    found = dict(walk.run())
    whole = program_of("llama-gqa")
    alone = BackwardWalk(whole, list(data()), walk.loss, whole.weights)
    assert all(torch.equal(found[name], gradient) for name, gradient in alone.run())
    by_thread = Counter(name for name, by_thread in made if by_thread)
    assert by_thread["model.layers.0.mlp.up_proj.weight"] == 2
    assert sum(by_thread.values()) > len(made) * 3 / 4


def test_what_is_edited_is_what_later_segments_see() -> None:
    made: Made = []
    expected = halved(program_of("llama-gqa"))
    found = halved(stored(made))
    assert any(by_thread for _, by_thread in made)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_a_file_that_changes_under_the_thread_is_the_error_of_the_walk() -> None:
    program = stored([], broken="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.up_proj.weight has changed since"):
        run_layerwise(program, contractions(program).matrices, data())


def test_little_memory_holds_the_weights_of_one_segment_alone() -> None:
    made: Made = []
    program = stored(made)
    size = sum(weight.nbytes for weight in program.weights.values())
    placed = dataclasses.replace(program, placement=Placement(memory=size))
    run_layerwise(placed, contractions(program).matrices, data())
    assert made and not any(by_thread for _, by_thread in made)


def test_what_was_replaced_meanwhile_is_not_taken_from_the_thread() -> None:
    program = stored([])
    parts = [part.nodes for part in segments(program)]
    held = SegmentWeights(program, parts=parts)
    held.of(parts[0])
    name = next(held.names[n] for n in parts[1] for n in n.all_input_nodes if n in held.names)
    held.replace({name: torch.zeros(program.weights[name].shape)})
    found = {held.names[node]: weight for node, weight in held.of(parts[1]).items()}
    assert not found[name].any()
