"""Knockoff inputs: controls that are like the real inputs and know nothing of their labels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from graphprune.calibration.data import Calibration
from graphprune.errors import CalibrationError


def permuted(calibration: Calibration, generator: torch.Generator) -> list[dict[str, Tensor]]:
    """Return for each batch one of the same shapes, every sample of it another's input.

    Who stands in for whom is drawn anew from `generator`, never a sample for itself; whatever the
    inputs are (images, tokens with their mask), the controls are as real as they. As a whole, a
    sample and its control are exchangeable and the control is independent of the sample's label;
    of single pixels that cannot be said (nor of what the unconditional generator of SCOP, Tang et
    al. 2010.10732, makes in its published code).

    Parameters
    ----------
    calibration
        The data.
    generator
        The source of randomness.

    Returns
    -------
    list
        Batches without labels, in the order of those of `calibration`.

    Raises
    ------
    CalibrationError
        When a sample has no other of the same shapes.

    Examples
    --------
    >>> data = Calibration.from_batches([{"x": torch.tensor([1, 2])}])
    >>> permuted(data, torch.Generator())
    [{'x': tensor([2, 1])}]
    """
    batches = list(calibration)
    alike: dict[object, list[int]] = {}
    for at, batch in enumerate(batches):
        alike.setdefault(_shapes(batch), []).append(at)
    found = batches.copy()
    for same in alike.values():
        counts = [len(next(iter(batches[at].values()))) for at in same]
        if sum(counts) < 2:
            raise CalibrationError(
                f"calibration batch {same[0]}: no other sample has the shapes of its one, which "
                "needs another as its control"
            )
        cycle = torch.randperm(sum(counts), generator=generator)
        other = torch.empty_like(cycle)
        other[cycle] = cycle.roll(1)
        for name in batches[same[0]]:
            rows = torch.cat([batches[at][name] for at in same])[other]
            for at, part in zip(same, rows.split(counts), strict=True):
                found[at] = {**found[at], name: part}
    return found


def _shapes(batch: Mapping[str, Tensor]) -> tuple[object, ...]:
    return tuple((name, *tensor.shape[1:], tensor.dtype) for name, tensor in sorted(batch.items()))
