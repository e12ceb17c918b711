"""Verbs that compare: `verify` a result with its original, `diff` two plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from graphprune.cli.console import show
from graphprune.cli.inputs import read_plan
from graphprune.cli.options import AsJson, Checkpoint, LoadOptions
from graphprune.cli.session import Session, verb
from graphprune.errors import VerificationError


@verb("graphprune verify DIR OUT")
def verify(
    session: Session,
    directory: Checkpoint,
    output: Annotated[
        Path | None,
        typer.Argument(
            metavar="OUT",
            help="What 'run', 'apply' or 'export-onnx' wrote, with its plan.json.",
            show_default=False,
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="The largest relative error; the verifier's own if left out."),
    ] = None,
    provider: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="What runs an ONNX package: a provider of ONNX Runtime, as 'cuda'."
        ),
    ] = "cpu",
    *,
    loading: LoadOptions,
    as_json: AsJson = False,
) -> None:
    """Prove that OUT equals DIR with the removed units set to zero.

    Without OUT, DIR is an ONNX package: its model must give what its program gives.
    """
    from graphprune.backends.huggingface.shorter_lists import counted_as_before
    from graphprune.verification.verify import verify

    if output is None:
        _check_parity(session, directory, provider, as_json)
        return
    plan = read_plan(output)
    original = session.load(directory, loading)
    smaller = session.load(str(output), loading)
    gone = {name for step in plan.steps for name in step.whole}
    smaller = counted_as_before(smaller, original.weights, gone)
    with session.working("verifying"):
        report = verify(original, plan, smaller, tolerance=tolerance)
    if as_json:
        print(json.dumps({"verified": True, **report.to_dict()}))
    elif not session.quiet:
        print(f"verified: max relative error {report.max_relative_error:.2e}")
        for remark in report.remarks():
            print(remark)


@verb("graphprune diff OUT_A OUT_B")
def diff(
    session: Session,
    first: Annotated[
        Path, typer.Argument(metavar="PLAN_A", help="A plan.json, or the directory that it is in.")
    ],
    second: Annotated[
        Path, typer.Argument(metavar="PLAN_B", help="Another one, for the same model.")
    ],
    as_json: AsJson = False,
) -> None:
    """Compare two plans: what goes of each weight, merged heads, and values that passes edited."""
    from graphprune.plan.drawn import drawn_text
    from graphprune.report.plan_diff import difference, difference_json

    plans = read_plan(first), read_plan(second)
    if as_json:
        print(json.dumps(difference_json(*plans), indent=1))
    else:
        shown = difference(*plans, "A", "B")
        print(f"A: {first}\nB: {second}")
        for name, plan in zip("AB", plans, strict=True):
            if plan.calibration:
                print(f"{name} is calibrated with {drawn_text(plan.calibration)}")
        show(shown)


def _check_parity(session: Session, directory: str, provider: str, as_json: bool) -> None:
    """Run the model of an ONNX package beside its program, and print a line for each check."""
    from graphprune.backends.onnx.package import verify_package
    from graphprune.backends.onnx.session import provider_name

    with session.working(f"running {directory}"):
        ran = verify_package(directory, provider=provider_name(provider))
    worst = max(ran.errors.values(), default=None)
    if as_json:
        verdict = {"verified": worst is not None, "errors": dict(ran.errors)}
        print(json.dumps({**verdict, "notes": list(ran.notes)}))
    elif not session.quiet:
        for check, error in ran.errors.items():
            print(f"{check}: max relative error {error:.2e}")
        for remark in ran.notes:
            print(remark)
        if worst is not None:
            print(f"verified: {directory} gives what its program gives, within {worst:.2e}")
    if worst is None:
        raise VerificationError(f"{directory}: nothing could be compared")
