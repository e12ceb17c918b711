"""How far a program is from another one: padding does not count; what has no measure says so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from graphprune.calibration.logits import WholeLogits
from graphprune.calibration.losses import departure_of
from graphprune.errors import CalibrationError


def program(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return SimpleNamespace(outputs=[SimpleNamespace(name=name, dtype=dtype)])


@pytest.mark.parametrize("name", ["logits", "last_hidden_state"])
def test_padding_does_not_count(name: str) -> None:
    whole, found = torch.randn(2, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    batch = {"input_ids": torch.zeros(2, 5, dtype=torch.int64), "attention_mask": mask}
    measure = departure_of(program(name))[2]
    both = WholeLogits(found), WholeLogits(whole)
    short = WholeLogits(found[:1, :3]), WholeLogits(whole[:1, :3])
    first, second = measure(*both, batch)
    torch.testing.assert_close(first, measure(*short, {})[0])
    torch.testing.assert_close(second, measure(*both, {})[1])
    # The mask of an encoder says nothing of a decoder's tokens.
    decoder = {**batch, "decoder_input_ids": batch["input_ids"]}
    torch.testing.assert_close(measure(*both, decoder), measure(*both, {}))


def test_a_program_without_numbers_to_compare_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"no output is of floating-point numbers \(best\)"):
        departure_of(program("best", torch.int64))
