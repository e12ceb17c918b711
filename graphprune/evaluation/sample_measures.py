"""How far every sample of some data is from right: by its loss, or by what the original gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from graphprune.calibration.data import LABELS, inputs_of
from graphprune.calibration.layerwise import logits_of_all
from graphprune.calibration.logits import Logits
from graphprune.calibration.losses import departure_of, sample_losses
from graphprune.evaluation.perplexity import why_not_causal
from graphprune.ir.program import Program

Batch = Mapping[str, Tensor]

Run = Callable[[str], Iterator[Logits]]
"""Given the name of an output: that output for every batch."""

Measure = Callable[[Run], Iterator[Tensor]]
"""A number for every sample, ``[samples]`` for every batch; the lower, the better."""


def measure_of(program: Program, batches: Sequence[Batch]) -> tuple[str, Measure]:
    """Return what can be measured on `batches` of programs made of `program`, and its name.

    The cross entropy of labels, where there are some; the next-token loss of a causal language
    model; else the divergence of the logits from those of `program`, or the relative squared change
    of its first output.
    """
    names = [value.name for value in program.outputs]
    logits = "logits" if "logits" in names else names[0]
    labeled = all(LABELS in batch for batch in batches)
    if labeled or ("decoder_input_ids" not in batches[0] and not why_not_causal(program)):
        name = "cross entropy" if labeled else "next-token loss"
        return name, lambda run: map(sample_losses, run(logits), batches)
    name, output, departure = departure_of(program)
    inputs = [inputs_of(batch) for batch in batches]
    whole = runner(program, inputs)
    return name, lambda run: map(departure, run(output), whole(output), inputs)


def runner(program: Program, inputs: Sequence[Batch]) -> Run:
    """Return what runs `program` on batches without labels, to one of its outputs."""
    return lambda output: logits_of_all(program, inputs, output)


@torch.no_grad()
def measured(run: Run, measure: Measure) -> Tensor:
    """Return the measure of every sample, ``[samples]``, float64."""
    return torch.cat(list(measure(run))).double().cpu()
