"""What quantizing costs, measured: quantized weights give other outputs, so parity is no question.

A causal language model is judged by its loss on text, and what there are labels for by its loss on
them, before pruning, after it, and quantized; anything else by how far its first output turns
(1 - cosine), and where that scores tokens or classes, by how often the likeliest one stays. What it
was measured on stays with the package, so that it can be measured again where the model is to run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from graphprune.backends.onnx.session import CPU, Pair, open_session
from graphprune.calibration.data import LABELS, inputs_of
from graphprune.calibration.layerwise import logits_of_all
from graphprune.calibration.logits import Logits
from graphprune.calibration.losses import task_loss, why_no_scores
from graphprune.errors import ParityError
from graphprune.ir.program import Program
from graphprune.weights.files import TensorFile
from graphprune.weights.writing import write_file

Batch = Mapping[str, Tensor]

Run = Callable[[Batch], Tensor]
"""Gives the first output of a quantized model on a sample."""

KEPT = "quality.safetensors"
"""In a package: what its quality was measured on."""

_ROWS = 32
"""Samples that are measured, at most."""

_WORSE = 0.02
"""The part by which a measure may grow on another machine, whose kernels round otherwise."""


@dataclass(frozen=True)
class Quality:
    """What a quantized model gives on samples, and what it came from gives.

    Parameters
    ----------
    measure
        "loss", the mean negative log-likelihood of a next token or of labels in nats, or
        "distance", 1 - cosine to the first output before weights were quantized.
    samples
        How many samples were measured.
    quantized
        Of the model.
    pruned
        Of the program whose weights were quantized; None where distances are measured.
    original
        Of the program before pruning; None where it was not, or distances are measured.
    agreement
        Where distances are measured, the part of all scores whose likeliest token or class is that
        from before weights were quantized; None where the first output is no scores.
    """

    measure: Literal["loss", "distance"]
    samples: int
    quantized: float
    pruned: float | None = None
    original: float | None = None
    agreement: float | None = None

    def __str__(self) -> str:
        if self.measure == "distance":
            agreeing = (
                f", and {self.agreement:.1%} of the likeliest stay"
                if self.agreement is not None
                else ""
            )
            return (
                f"quantizing turns the first output by {self.quantized:.2e} (1 - cosine){agreeing}"
            )
        before = f"{self.original:.4f} before pruning, " if self.original is not None else ""
        return (
            f"loss on {self.samples} samples: {before}{self.pruned:.4f} before quantizing, "
            f"{self.quantized:.4f} quantized"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return dataclasses.asdict(self)


def model_run(program: Program, path: Path, provider: str = CPU) -> Run:
    """Return what runs the model at `path`, made of `program`; it is loaded when it is run."""
    pair, first = cache(lambda: Pair(program, open_session(path, provider))), program.outputs[0]
    return lambda inputs: pair().theirs(inputs)[first.name]


def measure(
    program: Program, run: Run, batches: Sequence[Batch], original: Program | None = None
) -> tuple[Quality, tuple[Batch, ...]] | None:
    """Measure a quantized model on samples of `batches`; returns them as well.

    Parameters
    ----------
    program
        The program whose weights were quantized.
    run
        Runs the model.
    batches
        Inputs of the program by name, with labels where there are any.
    original
        The program before pruning.

    Returns
    -------
    tuple or None
        None where there is nothing to measure: no samples, or logits of the last token alone.
    """
    names = {value.name for value in program.inputs} | {LABELS}
    rows = [
        {name: tensor[row : row + 1] for name, tensor in batch.items() if name in names}
        for batch in batches
        for row in range(len(next(iter(batch.values()))))
    ]
    samples = tuple(islice(rows, _ROWS))
    if not samples:
        return None
    scores = not why_no_scores(program, program.outputs[0].name)
    if not (LABELS in samples[0] or (program.is_decoder and scores)):
        distance, agreement = _distance(program, run, samples)
        found = agreement if scores and program.source is not None else None
        return Quality("distance", len(samples), distance, agreement=found), samples
    if program.is_decoder and program.outputs[0].shape[1] == 1:
        return None
    before = None if original is None or original is program else _loss(original, samples)
    quantized = _mean_loss(_found(program, run, samples), samples)
    return Quality("loss", len(samples), quantized, _loss(program, samples), before), samples


def distances_said(distances: Mapping[str, float]) -> str:
    """Say how far quantized weights are from what they were."""
    worst = max(distances, key=distances.__getitem__)
    return (
        f"{len(distances)} weights are quantized: relative to its length, {worst} was changed the "
        f"most, by {distances[worst]:.1e}"
    )


def keep(samples: Sequence[Batch], folder: Path) -> None:
    """Write what was measured on into a package."""
    named = {f"{at}.{name}": t for at, batch in enumerate(samples) for name, t in batch.items()}
    write_file(named, folder / KEPT)


def check_quality(record: Mapping[str, Any], program: Program, run: Run, folder: Path) -> str:
    """Measure the model of a package again, and say what came out.

    Parameters
    ----------
    record
        What its record says of its quality.
    program
        The package's program, whose weights are the quantized ones.
    run
        Runs the model.
    folder
        The package.

    Raises
    ------
    ParityError
        When it is worse than the record says, by more than 2 per cent.
    """
    samples: dict[str, dict[str, Tensor]] = {}
    for name, tensor in TensorFile(folder / KEPT).tensors().items():
        at, _, own = name.partition(".")
        samples.setdefault(at, {})[own] = tensor + 0
    batches = list(samples.values())
    recorded = float(record["quantized"])
    if record["measure"] == "loss":
        found = _mean_loss(_found(program, run, batches), batches)
        if not found <= recorded * (1 + _WORSE):
            raise ParityError(
                f"the loss is {found:.4f} here, and was {recorded:.4f} as the model was written"
            )
        return f"loss on {len(batches)} samples: {found:.4f}, {recorded:.4f} as it was written"
    # Activations alone are rounded otherwise than in the package's program.
    found, _ = _distance(program, run, batches)
    if not found <= max(recorded * (1 + _WORSE), 1e-5):
        raise ParityError(
            f"the first output turns by {found:.1e} where activations are rounded; quantizing "
            f"turned it by {recorded:.1e} in all as it was written"
        )
    return f"rounded activations turn the first output by {found:.1e} (1 - cosine)"


def _loss(program: Program, samples: Sequence[Batch]) -> float:
    return _mean_loss(logits_of_all(program, [inputs_of(s) for s in samples]), samples)


def _found(program: Program, run: Run, samples: Sequence[Batch]) -> Iterator[Tensor]:
    return (run(program.fill(inputs_of(sample))).float() for sample in samples)


@torch.no_grad()
def _mean_loss(found: Iterable[Logits | Tensor], samples: Sequence[Batch]) -> float:
    losses = [task_loss(each, s) for each, s in zip(found, samples, strict=True)]
    return float(torch.stack(losses).mean())


def _distance(program: Program, run: Run, samples: Sequence[Batch]) -> tuple[float, float]:
    """Return 1 - cosine of the first output, and how often its largest number stays, both means."""
    first, turned, stayed = program.outputs[0].name, list[float](), list[float]()
    for sample, theirs in zip(samples, _found(program, run, samples), strict=True):
        inputs = program.fill(sample)
        given = {name: tensor.to(program.device) for name, tensor in inputs.items()}
        ours = program(**given)[first].cpu().float()
        cosine = functional.cosine_similarity(ours.flatten(), theirs.flatten(), 0)
        turned.append(1 - float(cosine))
        stayed.append(float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()))
    return sum(turned) / len(turned), sum(stayed) / len(stayed)
