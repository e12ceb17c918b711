"""Summary of a run: size, memory, disk and predictions before and after, and what was proven."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphprune.evaluation.comparison import Comparison
from graphprune.ir.program import Program
from graphprune.pipeline.report import PassRecord, change_text

if TYPE_CHECKING:
    from rich.table import Table

_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class Footprint:
    """The room that a program takes.

    Parameters
    ----------
    parameters
        Number of parameters.
    zeros
        How many of them are zero.
    kv_bytes_per_token
        Bytes of KV cache for each token.
    memory_bytes
        Bytes of all weights, in the type that they are computed in.
    disk_bytes
        Bytes of the files that hold the weights; None where there are none.
    """

    parameters: int
    zeros: int
    kv_bytes_per_token: int
    memory_bytes: int
    disk_bytes: int | None

    @classmethod
    def of(cls, program: Program, directory: Path | None) -> Footprint:
        """Measure `program`, whose weights lie in `directory`."""
        weights, types = [*program.weights.values()], program.compute_types
        files = [] if directory is None else _weight_files(directory)
        return cls(
            program.parameter_count(),
            sum(weight.numel() - int(weight.count_nonzero()) for weight in weights),
            program.kv_bytes_per_token(),
            sum(w.numel() * types[name].itemsize for name, w in program.weights.items()),
            sum(file.stat().st_size for file in files) if files else None,
        )


@dataclass(frozen=True)
class Summary:
    """The outcome of a run in figures.

    Parameters
    ----------
    before, after
        What the original and the result take.
    predictions
        Both compared on data that nothing was fitted to, or None.
    why_not_compared
        Why there is no comparison; empty where there is one.
    verified
        The largest relative error that the last pass `verify` found, or None where the result was
        not verified.
    calibration_tokens
        Tokens that were calibrated with; 0 where samples were of something else.
    calibration_samples
        Samples that were calibrated with.
    form
        The kind of checkpoint: ``plain``, ``remote-code`` or ``none`` (an archive).
    reason
        Why it is not plain; empty where it is.
    written
        The files that were written, by what they are.
    """

    before: Footprint
    after: Footprint
    predictions: Comparison | None
    why_not_compared: str
    verified: float | None
    calibration_tokens: int
    calibration_samples: int
    form: str
    reason: str
    written: Mapping[str, Sequence[str]]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, as plain data."""
        return asdict(self)

    def __rich__(self) -> Table:
        """Return what changed as a table of rich."""
        from rich.table import Table

        table = Table()
        table.add_column("")
        table.add_column("before", justify="right")
        table.add_column("after", justify="right")
        old, new = self.before, self.after
        for name, before, after in (
            ("parameters", old.parameters, new.parameters),
            ("of them zero", old.zeros, new.zeros),
            ("KV bytes/token", old.kv_bytes_per_token, new.kv_bytes_per_token),
            ("bytes in memory", old.memory_bytes, new.memory_bytes),
            ("bytes on disk", old.disk_bytes, new.disk_bytes),
        ):
            if before is not None and after is not None and (before or after):
                table.add_row(name, f"{before:,}", change_text(after, before))
        for row in () if self.predictions is None else self.predictions.measures():
            table.add_row(*row)
        return table

    def lines(self) -> list[str]:
        """Return what the table does not say, in sentences."""
        found = self.predictions
        compared = (
            f"compared on {found.counted} that nothing was fitted to"
            if found is not None
            else f"not compared with the original: {self.why_not_compared}"
        )
        proven = (
            f"verified: max relative error {self.verified:.1e}"
            if self.verified is not None
            else "not verified: end the passes with ',verify'"
        )
        calibrated = (
            f"calibrated with {self.calibration_tokens:,} tokens"
            if self.calibration_tokens
            else f"calibrated with {self.calibration_samples:,} samples"
            if self.calibration_samples
            else "no calibration data were used"
        )
        return [compared, proven, calibrated]


def verified_error(passes: Sequence[PassRecord]) -> float | None:
    """Return the error that `verify` found of the last program; None if it was not verified.

    What came after must have changed nothing, as what writes does.
    """
    for record in reversed(passes):
        if record.verified is not None:
            return record.verified
        if record.changed:
            return None
    return None


def _weight_files(directory: Path) -> list[Path]:
    return [file for pattern in _WEIGHT_FILES for file in sorted(directory.glob(pattern))]
