"""What a pipeline did, pass by pass: for people as a table, for programs as JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

from graphprune.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from graphprune.ir.program import Program

FORMAT = 1
"""Version of the JSON; one that is read must be the same."""


@dataclass(frozen=True)
class ProgramSize:
    """The size of a program.

    Parameters
    ----------
    parameters
        Number of parameters.
    kv_bytes_per_token
        Bytes of KV cache for each token, 0 where there is no cache.
    """

    parameters: int
    kv_bytes_per_token: int

    @classmethod
    def of(cls, program: Program) -> ProgramSize:
        """Return the size of `program`."""
        return cls(program.parameter_count(), program.kv_bytes_per_token())


@dataclass(frozen=True)
class PassRecord:
    """One pass that ran.

    Parameters
    ----------
    name, text
        The pass, without and with its options.
    seconds
        Wall-clock time.
    before, after
        Sizes around it.
    details
        What it reports.
    changed
        Whether it made another program.
    verified
        The largest relative error that it found of its program, or None where it verified nothing.
    """

    name: str
    text: str
    seconds: float
    before: ProgramSize
    after: ProgramSize
    details: Mapping[str, Any] = field(default_factory=dict)
    changed: bool = False
    verified: float | None = None


@dataclass(frozen=True, repr=False)
class Report:
    """The report of a run: what each pass did, how long it took, and sizes before and after.

    Parameters
    ----------
    pipeline
        The pipeline as text.
    before, after
        Sizes of the first and the last program.
    passes
        The passes that ran, in order.
    skipped
        Texts of the passes beyond the bisect limit.
    seed
        Seed of the run.
    calibration
        What `Calibration.describe` says, or None.
    versions
        Versions of graphprune and of what it stands on.
    summary
        What `graphprune.evaluation.summary` says of the result, where it was asked.
    """

    pipeline: str
    before: ProgramSize
    after: ProgramSize
    passes: tuple[PassRecord, ...] = ()
    skipped: tuple[str, ...] = ()
    seed: int = 0
    calibration: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=lambda: versions())
    summary: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of all passes together."""
        return sum(record.seconds for record in self.passes)

    def to_json(self) -> str:
        """Return the report as JSON text, the same for equal reports."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read the report that `to_json` wrote.

        Raises
        ------
        UsageError
            When `text` is not such a report.
        """
        try:
            data = json.loads(text)
            if data.pop("format") != FORMAT:
                raise ValueError("another version of the format")
            records = tuple(PassRecord(**_sized(record)) for record in data.pop("passes"))
            skipped = tuple(data.pop("skipped"))
            return cls(passes=records, skipped=skipped, **_sized(data))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"not a report of graphprune: {error}") from error

    def __rich__(self) -> Table:
        """Return the report as a table of rich."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(f"graphprune {self.versions.get('graphprune', '')}".rstrip()))
        (first, *others), (*rows, total) = self.rows()
        table.add_column(first, overflow="fold")
        for title in others:
            table.add_column(title, justify="right")
        for row in rows:
            table.add_row(*map(Text, row))
        table.add_section()
        table.add_row(*map(Text, total))
        return table

    def rows(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Return the titles and rows of the table; the last row is the total."""
        rows: list[tuple[str, ...]] = [("(input)", "", *_cells(self.before))]
        for record in self.passes:
            sizes = _cells(record.after, record.before)
            rows.append((record.text, f"{record.seconds:.2f}", *sizes))
        rows += [(text, "skipped", "", "") for text in self.skipped]
        rows.append(("total", f"{self.seconds:.2f}", *_cells(self.after, self.before)))
        return ("pass", "seconds", "parameters", "KV bytes/token"), rows

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        """Return the table as plain text."""
        from rich.console import Console

        page = io.StringIO()
        Console(file=page, width=100, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in page.getvalue().splitlines())


def versions() -> dict[str, str]:
    """Return the versions of graphprune and of what decides its results."""
    from graphprune.io.version import __version__

    return {"graphprune": __version__} | {
        name: metadata.version(name) for name in ("torch", "transformers")
    }


def _cells(size: ProgramSize, before: ProgramSize | None = None) -> tuple[str, str]:
    old = before or size
    return (
        change_text(size.parameters, old.parameters),
        change_text(size.kv_bytes_per_token, old.kv_bytes_per_token),
    )


def change_text(count: int, before: int) -> str:
    """Write `count`, with its change in percent where it has changed."""
    if count == before or not before:
        return f"{count:,}"
    return f"{count:,} ({100 * (count - before) / before:+.1f}%)"


def _sized(data: Mapping[str, Any]) -> dict[str, Any]:
    return {**data, "before": ProgramSize(**data["before"]), "after": ProgramSize(**data["after"])}
