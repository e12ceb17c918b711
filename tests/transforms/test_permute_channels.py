"""Orders of channels against a search over all of them, and programs that give what they gave."""

from __future__ import annotations

import itertools

import pytest
import torch
from architectures import coupling_of, inputs_of, program_of
from torch import Tensor

from graphprune.analysis.matrices import contractions
from graphprune.ir.program import PRESENT
from graphprune.transforms.heads.deinterleave import permute_weights
from graphprune.transforms.permute_channels import best_order, free_axes, kept, reordered
from graphprune.transforms.sparsity import Pattern

TWO_OF_FOUR = Pattern.parse("2:4")


def drawn(rows: int, channels: int, seed: int = 0) -> Tensor:
    """Scores, those of some channels much larger than others, neighbors alike."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(1, -1, channels)
    return torch.rand(rows, channels, generator=generator) * sizes


def kept_by_hand(rows: Tensor, order: Tensor) -> float:
    """The sum of the two largest of every four, in plain Python."""
    scores = rows[:, order].tolist()
    return sum(sum(sorted(row[at : at + 4])[2:]) for row in scores for at in range(0, len(row), 4))


def test_what_is_kept_is_the_largest_of_every_block() -> None:
    rows, order = drawn(5, 12), torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert kept(rows, order, TWO_OF_FOUR) == pytest.approx(kept_by_hand(rows, order))


@pytest.mark.parametrize("seed", range(4))
def test_no_order_of_eight_channels_keeps_much_more(seed: int) -> None:
    rows = drawn(6, 8, seed)
    blocks = [
        torch.tensor([*first, *(at for at in range(8) if at not in first)])
        for first in itertools.combinations(range(8), 4)
    ]
    best = max(kept_by_hand(rows, order) for order in blocks)
    start = kept_by_hand(rows, torch.arange(8))
    found = kept_by_hand(rows, best_order(rows, TWO_OF_FOUR))
    assert start < found
    assert found - start >= 0.8 * (best - start)


def test_many_rows_are_stood_for_by_some_of_each_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    found = contractions(program_of("llama-gqa")).matrices
    (axis,) = (
        each
        for each in free_axes(coupling_of("llama-gqa"), found, TWO_OF_FOUR)
        if each.name == "residual"
    )
    every = axis.rows(lambda matrix: torch.ones(matrix.shape), TWO_OF_FOUR)
    assert len(every) == sum(matrix.shape[1] for matrix in axis.matrices)
    assert float(every.sum()) == pytest.approx(len(axis.matrices))
    monkeypatch.setattr(
        "graphprune.transforms.permute_channels._AT_MOST",
        len(every) * (axis.atom.size // 4) ** 2 // 4,
    )
    some = axis.rows(lambda matrix: torch.ones(matrix.shape), TWO_OF_FOUR)
    assert len(axis.matrices) <= len(some) < len(every) / 3
    assert float(some.sum()) == pytest.approx(len(axis.matrices))


def test_channels_that_cannot_be_ordered_better_stay() -> None:
    assert best_order(torch.ones(3, 8), TWO_OF_FOUR).tolist() == list(range(8))


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "mixtral", "resnet"])
def test_any_order_of_the_free_channels_gives_what_the_program_gave(name: str) -> None:
    program, coupling = program_of(name), coupling_of(name)
    axes = free_axes(coupling, contractions(program).matrices, TWO_OF_FOUR)
    assert axes
    generator, permuted = torch.Generator().manual_seed(0), []
    for axis in axes:
        order = torch.randperm(axis.atom.size, generator=generator)
        permuted += reordered(coupling, axis, order)
    other = program.with_weights(permute_weights(program.weights, permuted))
    inputs = inputs_of(program, batch=2, length=9)
    ours, theirs = other(**inputs), program(**inputs)
    for value, _ in program.output_nodes():
        if not value.name.startswith(PRESENT):  # a cache holds its own order
            torch.testing.assert_close(ours[value.name], theirs[value.name])


def test_the_axes_of_a_llama_are_its_stream_its_widths_and_its_values() -> None:
    matrices = contractions(program_of("llama-gqa")).matrices
    axes = free_axes(coupling_of("llama-gqa"), matrices, TWO_OF_FOUR)
    of_layer = {"self_attn:head-dim", "mlp:ffn"}
    layers = {f"model.layers.{layer}.{each}" for layer in range(2) for each in of_layer}
    assert {axis.name for axis in axes} == layers | {"residual"}
