"""Verbs that compare: `verify` a result with its original, `diff` two plans."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphprune.cli.console import show
from graphprune.cli.inputs import read_plan
from graphprune.cli.options import Checkpoint
from graphprune.cli.session import Session, verb


@verb
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
) -> None:
    """Prove that OUT equals DIR with the removed units set to zero.

    Without OUT, DIR is an ONNX package: its model must give what its program gives.
    """
    from graphprune.verification.verify import verify

    if output is None:
        _check_parity(session, directory, provider)
        return
    plan = read_plan(output / "plan.json")
    original, smaller = session.load(directory), session.load(str(output))
    with session.working("verifying"):
        report = verify(original, plan, smaller, tolerance=tolerance)
    if not session.quiet:
        print(f"verified: max relative error {report.max_relative_error:.2e}")
        for remark in report.remarks():
            print(remark)


@verb
def diff(
    session: Session,
    first: Annotated[Path, typer.Argument(metavar="PLAN_A", help="A plan.json.")],
    second: Annotated[Path, typer.Argument(metavar="PLAN_B", help="Another for the same model.")],
) -> None:
    """Compare two plans: how many units of each group go, and how many of them in both."""
    from graphprune.report.plan_diff import difference

    show(difference(read_plan(first), read_plan(second), first.name, second.name))


def _check_parity(session: Session, directory: str, provider: str) -> None:
    """Run the model of an ONNX package beside its program, and print a line for each check."""
    from graphprune.backends.onnx.package import verify_package
    from graphprune.backends.onnx.session import provider_name

    with session.working(f"running {directory}"):
        ran = verify_package(directory, provider=provider_name(provider))
    if not session.quiet:
        for check, error in ran.errors.items():
            print(f"{check}: max relative error {error:.2e}")
        for remark in ran.notes:
            print(remark)
