"""What `run` and `apply` write, and what they say of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from graphprune.cli.console import note
from graphprune.cli.inputs import resolve
from graphprune.cli.options import Form, LoadOptions
from graphprune.cli.session import Session
from graphprune.errors import BackendError, OutputError
from graphprune.plan.edits import edits_beside

if TYPE_CHECKING:
    from graphprune.backends.huggingface.save import CheckpointForm
    from graphprune.ir.program import Program
    from graphprune.pipeline.report import Report
    from graphprune.plan.plan import Plan

PLAN, REPORT = "plan.json", "report.json"

KINDS = {
    "plain": "a Hugging Face checkpoint",
    "remote-code": "a Hugging Face checkpoint that needs trust_remote_code=True",
    "none": "an archive that graphprune.load reads, since no Hugging Face checkpoint can hold it",
}
"""How the result of a pipeline is written, by `CheckpointForm.kind`."""


@contextmanager
def destination(
    output: Path | None, directory: str, *, overwrite: bool, key: str = "", replaces: str = PLAN
) -> Iterator[Path]:
    """Name a directory to write into, which becomes `output`; it is dropped where that is None.

    What a killed process left of the same work, by its `key`, is in it. What may be overwritten is
    a directory with a file `replaces`, which this program wrote.
    """
    from graphprune.io.atomic import staged_directory

    if output is None:
        with TemporaryDirectory() as folder:
            yield Path(folder)
        return
    if overwrite and output.exists() and output.resolve() == Path(resolve(directory)).resolve():
        raise OutputError(f"{output} is what is read: give another place")
    with staged_directory(output, replaces=replaces if overwrite else None, key=key) as folder:
        yield folder


def form_of(session: Session, program: Program, wanted: Form) -> CheckpointForm:
    """Find the kind of checkpoint that can hold `program`, and say why if it is not a plain one.

    Raises
    ------
    BackendError
        When a plain one is `wanted` and none can hold it.
    """
    from graphprune.backends.huggingface.save import checkpoint_form

    with session.working("looking for a config"):
        found = checkpoint_form(program)
    if found.kind != "plain":
        if wanted is Form.plain:
            raise BackendError(
                f"the result is not a plain Hugging Face checkpoint, but {KINDS[found.kind]}: "
                f"{found.reason}; --form any writes it"
            )
        note(f"the result becomes {KINDS[found.kind]}: {found.reason}")
    return found


def writable(
    session: Session,
    program: Program,
    smaller: Program,
    directory: str,
    loading: LoadOptions,
    plan: Plan,
) -> tuple[Program, Program]:
    """Return a program and what `plan` makes of it, such as can be written.

    A graph that is not to be run takes a fraction of the time and memory, and shows for most
    models that a config gives the result. Where it does not, the program is loaded to be run.
    """
    from graphprune.backends.huggingface.save import checkpoint_form
    from graphprune.transforms.apply import apply_plan

    if not program.stand_ins:
        return program, smaller
    with session.working("looking for a config"):
        kind = checkpoint_form(smaller).kind
    if kind != "none":
        return program, smaller
    program = session.load(directory, loading)
    with session.working("applying the plan"):
        return program, apply_plan(program, plan)


def write(
    session: Session,
    program: Program,
    plan: Plan,
    folder: Path,
    form: CheckpointForm,
    dtype: str | None = None,
    shard_size: str | None = None,
) -> list[str]:
    """Write checkpoint and plan into `folder`; return the names of the checkpoint's files.

    `dtype` is the element type to store, where it is not that of the checkpoint that was read.
    """
    from graphprune.backends.huggingface.save import write_into
    from graphprune.weights.writing import SHARD_SIZE

    # In a directory of its own first, since passes may have written into `folder` already.
    inner = folder / ".checkpoint"
    if form.kind == "none":
        with session.working("writing the archive"):
            program.save(inner)
            if dtype is not None:
                note("--dtype is for Hugging Face checkpoints: an archive keeps the types it has")
    else:
        inner.mkdir(exist_ok=True)
        size = shard_size or SHARD_SIZE
        write_into(program, inner, dtype=dtype, shard_size=size, track=session.writing)
    names = sorted(path.name for path in inner.iterdir())
    for name in names:
        (inner / name).rename(folder / name)
    inner.rmdir()
    plan.save(folder / PLAN)
    return names


def plan_files(folder: Path) -> list[str]:
    """Return the names of the plan in `folder`, and of the values that it brings along, if any."""
    return [PLAN, *(path.name for path in [edits_beside(folder / PLAN)] if path.exists())]


def note_other_sizes(report: Report) -> None:
    """Say where a plain checkpoint asked for other sizes than the passes did."""
    from graphprune.report.overview import collapse_names

    for record in report.passes:
        found = record.details.get("left with, for a plain checkpoint", {})
        alike: dict[str, list[str]] = {}
        for name, told in (found if isinstance(found, dict) else {record.name: found}).items():
            alike.setdefault(told, []).append(name)
        for told, names in alike.items():
            note(f"{collapse_names(names)}: left with {told}")


def note_large_edits(folder: Path, plan: Plan) -> None:
    """Say what the values beside the plan are for, where they are about as large as all weights."""
    edits = edits_beside(folder / PLAN)
    if plan.edits is None or not edits.exists():
        return
    size = edits.stat().st_size
    if 2 * size > sum(path.stat().st_size for path in folder.glob("*.safetensors")):
        note(
            f"{edits.name} ({size / 1e6:,.1f} MB) holds the values that {plan.edits.passes} gave "
            f"to {len(plan.edits.weights)} weights, for 'apply' and 'verify'; the checkpoint loads "
            "without it"
        )
