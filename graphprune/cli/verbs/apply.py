"""`apply`: a plan applied to a fresh copy of its model, a tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from graphprune.cli.inputs import read_plan, resolve
from graphprune.cli.options import (
    AsJson,
    Checkpoint,
    Form,
    LoadToWriteOptions,
    Output,
    Overwrite,
    PlainForm,
    PlanFile,
    ShardSize,
    StoredType,
)
from graphprune.cli.session import Session, verb
from graphprune.cli.writing import KINDS, destination, form_of, plan_files, writable, write

if TYPE_CHECKING:
    from graphprune.plan.plan import Plan


@verb("graphprune apply DIR OUT/plan.json -o COPY")
def apply(
    session: Session,
    directory: Checkpoint,
    plan: PlanFile,
    output: Output,
    overwrite: Overwrite = False,
    form: PlainForm = Form.any,
    dtype: StoredType = None,
    shard_size: ShardSize = None,
    *,
    loading: LoadToWriteOptions,
    as_json: AsJson = False,
) -> None:
    """Apply a plan to a fresh copy of the model that it was made for.

    Weights are read, cut and written one at a time. After a kill the same command goes on where it
    ended.
    """
    from graphprune.plan.drawn import drawn_text
    from graphprune.transforms.apply import apply_plan

    chosen = read_plan(plan)
    key = _work_key(directory, chosen, dtype, shard_size)
    with destination(output, directory, overwrite=overwrite, key=key) as folder:
        program = session.load_to_write(directory, loading, runs=False)
        with session.working("applying the plan"):
            smaller = apply_plan(program, chosen)
        program, smaller = writable(session, program, smaller, directory, loading, chosen)
        found = form_of(session, smaller, form)
        written = write(session, smaller, chosen, folder, found, dtype, shard_size)
        files = [*written, *plan_files(folder)]
    if session.quiet:
        return
    counts = program.parameter_count(), smaller.parameter_count()
    if as_json:
        parameters = dict(zip(("before", "after"), counts, strict=True))
        data = {"parameters": parameters, "form": found.kind, "written": files}
        print(json.dumps({**data, "calibration": chosen.calibration}))
        return
    if chosen.calibration:
        print(f"planned on {drawn_text(chosen.calibration)}")
    print(f"parameters {counts[0]:,} -> {counts[1]:,}")
    print(f"{output}: {KINDS[found.kind]}: {', '.join(files)}")


def _work_key(directory: str, plan: Plan, *options: object) -> str:
    """Return what tells one piece of work from another, by the files that it reads."""
    import hashlib

    files = sorted(Path(resolve(directory)).glob("*.safetensors"))
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((stats, plan.to_json(), options)).encode()).hexdigest()[:12]
