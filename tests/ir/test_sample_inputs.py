"""Random inputs: within tables, masks that leave something to compute, sizes that come out even."""

from __future__ import annotations

import pytest
import torch
from architectures import program_of
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

import graphprune as gp
from graphprune.ir.sample_inputs import random_inputs, sample_sizes, sizes_near_example


def test_random_inputs_stay_within_the_vocabulary() -> None:
    program = program_of("llama-gqa")
    inputs = random_inputs(program, batch=50, length=9, complete=True)
    vocabulary = program.outputs[0].shape[-1]
    assert inputs["input_ids"].shape == (50, 9)
    assert 0.9 * vocabulary < int(inputs["input_ids"].max()) < vocabulary
    assert inputs["attention_mask"].eq(1).all()


def test_what_fills_itself_in_is_left_out() -> None:
    assert list(random_inputs(program_of("llama-gqa"))) == ["input_ids"]


class Offset(nn.Module):
    """Tokens of which all but one kind are looked up further on in their table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)

    def forward(self, codes: Tensor) -> Tensor:
        found: Tensor = self.table(torch.where(codes == 8, codes, codes + 5))
        return found


def test_random_inputs_stay_within_a_table_that_is_read_at_an_offset() -> None:
    program = gp.capture(Offset(), (torch.zeros(2, 3, dtype=torch.int64),))
    inputs = random_inputs(program, batch=50)
    assert program(**inputs)["output"].shape == (50, inputs["codes"].shape[1], 4)


# -- masks ----------------------------------------------------------------------------------------


class Padded(nn.Module):
    """Attention with a mask of padding, which is true where there is nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        found: Tensor = self.attention(x, x, x, key_padding_mask=hidden)[0]
        return found


class Allowed(nn.Module):
    """Attention with a mask that is true where it may look, beside a causal one."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        y = self.project(x)
        mask = seen[:, None] & causal
        return functional.scaled_dot_product_attention(y, y, y, attn_mask=mask)


class Filled(nn.Module):
    """Scores that are filled where a mask, turned round on the way, is false."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        y = self.project(x)
        scores = (y @ y.mT).masked_fill((~seen)[:, None], -torch.inf)
        return scores.softmax(-1) @ y


@pytest.mark.parametrize("module", [Padded(), Allowed(), Filled()], ids=["padded", "sdpa", "fill"])
@pytest.mark.parametrize("seed", range(3))
def test_masks_hide_some_and_never_all(module: nn.Module, seed: int) -> None:
    torch.manual_seed(0)
    mask = torch.zeros(2, 6, dtype=torch.bool) ^ (not isinstance(module, Padded))
    program = gp.capture(module.eval(), (torch.randn(2, 6, 8), mask))
    inputs = random_inputs(program, seed=seed)
    drawn = inputs[program.inputs[1].name]
    assert all(0 < int(row.sum()) < len(row) for row in drawn)
    (found,) = program(**inputs).values()
    assert bool(torch.isfinite(found).all())
    # The mask is at work: without it the result is another.
    without = mask[:, :1].expand_as(drawn)
    (other,) = program(**{**inputs, program.inputs[1].name: without}).values()
    assert not torch.allclose(found, other)


# -- sizes ----------------------------------------------------------------------------------------


class Levels(nn.Module):
    """A U-Net of two levels: sizes must be even twice, or what is joined does not fit."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, 2, 1)
        self.deeper = nn.Conv2d(8, 8, 3, 2, 1)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.out = nn.ConvTranspose2d(16, 3, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        down = self.down(x)
        up = self.up(self.deeper(down))
        found: Tensor = self.out(torch.cat([up, down], 1))
        return found


def levels(height: object, width: object) -> gp.Program:
    image = torch.randn(2, 3, 32, 24)
    shapes = ({0: Dim("rows"), 2: height, 3: width},)
    return gp.capture(Levels().eval(), (image,), dynamic_shapes=shapes)


def test_images_are_near_the_example_and_come_out_even() -> None:
    program = levels(Dim.AUTO, Dim.AUTO)
    (image,) = random_inputs(program).values()
    assert image.shape == (2, 3, 36, 28)
    assert program(**random_inputs(program))["output"].shape == image.shape


def test_a_size_that_is_declared_a_multiple_is_one() -> None:
    program = levels(4 * Dim("high", min=1, max=64), Dim.AUTO)
    (image,) = random_inputs(program).values()
    assert image.shape[2] % 4 == 0
    assert image.shape[2] != 32
    assert program(**random_inputs(program))["output"].shape == image.shape


def test_the_range_of_a_size_is_kept_to() -> None:
    program = levels(4 * Dim("high", min=2, max=8), Dim.AUTO)
    assert next(iter(random_inputs(program).values())).shape[2] == 28


def test_lengths_are_what_is_asked_for() -> None:
    program = program_of("llama-gqa")
    rows, columns = (str(size) for size in program.inputs[0].shape)
    sizes = sample_sizes(program, batch=3, length=11)
    assert (sizes[rows], sizes[columns]) == (3, 11)


def test_only_sizes_of_numbers_are_near_the_example() -> None:
    assert sizes_near_example(program_of("llama-gqa")) == {}
    program = levels(Dim.AUTO, Dim.AUTO)
    assert sorted(sizes_near_example(program).values()) == [28, 36]


@pytest.mark.parametrize("pieces", [2, 3])
def test_a_batch_that_is_taken_in_pieces_is_a_multiple(pieces: int) -> None:
    class Pieces(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if pieces == 3:
                one, two, three = x.chunk(3)
                return one * two - three
            return x.reshape(x.shape[0] // 2, 2, 5).prod(1)

    program = gp.capture(Pieces(), (torch.randn(4 * pieces, 5),))
    assert not isinstance(program.inputs[0].shape[0], int)
    for batch in (1, pieces + 1):
        x = random_inputs(program, batch=batch)["x"]
        assert len(x) % pieces == 0 and len(x) >= batch
        assert len(program(x)["output"]) == len(x) // pieces


def test_numbers_that_become_ids_stay_within_their_table() -> None:
    class Ids(Offset):
        def forward(self, codes: Tensor) -> Tensor:
            found: Tensor = self.table(codes.long())
            return found

    program = gp.capture(Ids(), (torch.zeros(2, 3),))
    (codes,) = random_inputs(program, batch=50).values()
    assert codes.dtype == torch.float32
    assert {0.0, 8.0} <= set(codes.flatten().tolist()) <= set(map(float, range(9)))
