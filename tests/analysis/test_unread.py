"""What no operator reads, such as rows of a table past a fixed length, is no group to prune."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp

ROWS, LENGTH, WIDTH = 40, 11, 8


class Positions(nn.Module):
    """Adds rows of a table: as many as the example is long, as it is captured at that length."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.first = nn.Linear(5, WIDTH)
        self.table = nn.Embedding(ROWS, WIDTH)
        self.out = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "slice":
            rows = self.table.weight[:LENGTH]
        elif self.way == "slice of a view":
            rows = self.table.weight.unsqueeze(0).transpose(0, 1)[3 : LENGTH + 3].squeeze(1)
        elif self.way == "split":
            rows = self.table.weight.split([LENGTH, ROWS - LENGTH])[0]
        else:
            rows = self.table(torch.arange(LENGTH))
        return self.out((self.first(x) + rows).relu())


@pytest.mark.parametrize("way", ["slice", "slice of a view", "split", "lookup"])
def test_rows_that_nothing_reads_are_frozen(way: str) -> None:
    program = gp.capture(Positions(way).eval(), (torch.randn(2, LENGTH, 5),))
    coupling = gp.analyze(program)
    (group,) = coupling.groups
    assert {m.weight: m.dim for m in group.members}["table.weight"] == 1
    assert "frozen: " in coupling.explain("table.weight", 0)


def test_a_slice_says_that_nothing_reads_the_rest() -> None:
    program = gp.capture(Positions("slice").eval(), (torch.randn(2, LENGTH, 5),))
    explained = gp.analyze(program).explain("table.weight", 0)
    assert f"{ROWS - LENGTH} frozen: nothing of it is read, at aten.slice.Tensor" in explained


def test_what_two_weights_are_multiplied_over_is_read() -> None:
    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4, 5))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.left @ self.right)

    coupling = gp.analyze(gp.capture(LowRank().eval(), (torch.randn(2, 6),)))
    assert [group.size for group in coupling.groups] == [4]
