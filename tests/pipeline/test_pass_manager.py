from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import (
    Counting,
    FakePlan,
    Look,
    Needy,
    Shrink,
    doing,
    fake_program,
    fake_text,
)

from graphprune.errors import (
    CalibrationError,
    GraphPruneError,
    MergeError,
    PipelineError,
    UsageError,
)
from graphprune.pipeline.instruments import Dump, Instrument, PrintProgram, VerifyEach
from graphprune.pipeline.pass_base import Context, Outcome
from graphprune.pipeline.pass_manager import PassManager, Result
from graphprune.pipeline.pipeline import Pipeline

pytestmark = pytest.mark.unverified

FAKE_CALIBRATION: Any = SimpleNamespace(describe=lambda: {"samples": 2})


@pytest.fixture
def program() -> Any:
    return fake_program()


@pytest.fixture(autouse=True)
def fakes_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphprune.ir.printer.program_text", fake_text)
    monkeypatch.setitem(sys.modules, "graphprune.plan.plan", SimpleNamespace(Plan=FakePlan))


def run(program: Any, *passes: Any, calibration: Any = None, **options: Any) -> Result:
    context = Context(program, FakePlan(), calibration)  # type: ignore[arg-type]
    return PassManager(passes, **options).run(context)


class Events(Instrument):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def before_pass(self, place: Any, program: Any, context: Context) -> None:
        self.seen.append(f"before {place}: {len(context.plan_so_far.steps)} steps")

    def after_pass(self, place: Any, outcome: Outcome, context: Context) -> None:
        self.seen.append(f"after {place}: {len(context.plan_so_far.steps)} steps")

    def on_error(self, place: Any, error: Exception) -> None:
        self.seen.append(f"error {error}")


# -- running ---------------------------------------------------------------------------------------


def test_passes_run_in_order_and_their_plans_add_up(program: Any) -> None:
    result = run(program, Shrink(rows=4), Look(), Shrink(rows=2))
    assert result.program.weights["up"].shape == (10, 8)
    assert result.plan == FakePlan(("up 4", "up 2"))
    assert [record.text for record in result.report.passes] == ["shrink", "look", "shrink{rows=2}"]
    assert result.report.passes[1].details == {"rows": 12}


def test_the_report_has_sizes_around_each_pass(program: Any) -> None:
    report = run(program, Shrink(), Look()).report
    sizes = [(each.before.parameters, each.after.parameters) for each in report.passes]
    assert sizes == [(160, 128), (128, 128)]
    assert (report.before.parameters, report.after.parameters) == (160, 128)
    assert report.before.kv_bytes_per_token == 32


def test_an_empty_pipeline_returns_the_program_itself(program: Any) -> None:
    result = Pipeline([]).run(program)
    assert result.program is program
    assert result.plan == FakePlan()


def test_a_pass_sees_the_original_and_the_plan_so_far(program: Any) -> None:
    seen = []

    def look(current: Any, context: Context) -> Outcome:
        seen.append((context.original is program, current is program, context.plan_so_far.steps))
        return Outcome(current)

    run(program, doing(look), Shrink(), doing(look))
    assert seen == [(True, True, ()), (True, False, ("up 4",))]


def test_the_steps_between_are_not_kept_alive(program: Any) -> None:
    import weakref

    alive: list[Any] = []

    def look(current: Any, context: Context) -> Outcome:
        alive.append(weakref.ref(current))
        context.analysis(Counting().analysis, current)
        return Outcome(current)

    result = run(program, Shrink(), doing(look), Shrink(), doing(look))
    assert alive[0]() is None
    assert alive[1]() is result.program


# -- the bisect limit ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "rows", "skipped"),
    [(0, 16, ("shrink{rows=1}", "shrink{rows=2}")), (1, 15, ("shrink{rows=2}",)), (2, 13, ())],
)
def test_stop_after_counts_optional_passes_and_runs_required_ones(
    program: Any, limit: int, rows: int, skipped: tuple[str, ...]
) -> None:
    passes = Pipeline([Look(), Shrink(rows=1), Look(), Shrink(rows=2), Look()])
    report = passes.run(program, stop_after=limit).report
    assert report.passes[-1].details == {"rows": rows}
    assert report.skipped == skipped
    assert [each.name for each in report.passes].count("look") == 3


def test_stop_after_is_not_negative(program: Any) -> None:
    with pytest.raises(UsageError, match="stop_after is -1"):
        Pipeline([Look()]).run(program, stop_after=-1)


# -- calibration -----------------------------------------------------------------------------------


def test_missing_calibration_is_refused_before_any_pass_runs(program: Any) -> None:
    events = Events()
    with pytest.raises(CalibrationError, match=r"pass 2 \(needy\): needy needs calibration data"):
        run(program, Shrink(), Needy(), instruments=(events,))
    assert events.seen == []


def test_calibration_is_described_in_the_report(program: Any) -> None:
    report = run(program, Needy(), calibration=FAKE_CALIBRATION).report
    assert report.calibration == {"samples": 2}


def test_the_plan_says_what_data_its_passes_looked_at(program: Any) -> None:
    looks = doing(
        lambda program, context: Outcome(program.resized(up=(12, 8)), FakePlan(("up 4",))),
        requires_calibration=True,
    )
    plan = run(program, looks, Shrink(), calibration=FAKE_CALIBRATION).plan
    assert plan.calibration == {"samples": 2}
    assert run(program, Shrink(), calibration=FAKE_CALIBRATION).plan.calibration is None


def test_calibration_is_not_asked_for_when_the_options_do_not_need_it(program: Any) -> None:
    assert run(program, Needy(needs=False)).report.calibration is None


def test_a_pass_beyond_the_limit_needs_no_calibration(program: Any) -> None:
    needy = doing(lambda program, context: Outcome(program), requires_calibration=True)
    assert run(program, needy, stop_after=0).report.skipped == ("do",)


# -- failures --------------------------------------------------------------------------------------


def fail(error: Exception) -> Any:
    def action(program: Any, context: Context) -> Outcome:
        raise error

    return doing(action)


def test_a_refusal_keeps_its_class_and_names_the_pass(program: Any) -> None:
    before = program.fingerprint()
    error = MergeError("4 heads do not make 3 groups")
    with pytest.raises(MergeError) as caught:
        run(program, Shrink(), fail(error))
    assert caught.value is error
    assert str(error) == "pass 2 (do): 4 heads do not make 3 groups"
    assert program.fingerprint() == before


def test_any_other_exception_becomes_a_pipeline_error(program: Any) -> None:
    error = KeyError("up")
    with pytest.raises(PipelineError, match=r"^pass 1 \(do\): KeyError: 'up'$") as caught:
        run(program, fail(error))
    assert caught.value.__cause__ is error


def test_an_interrupt_is_not_touched(program: Any) -> None:
    def action(program: Any, context: Context) -> Outcome:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(program, doing(action))


# -- what a pass claims ----------------------------------------------------------------------------


CLAIMS = {
    "run returned NoneType, not an Outcome": lambda p: None,
    "the new program is a str": lambda p: Outcome("program"),  # type: ignore[arg-type]
    "the details cannot be written as JSON": lambda p: Outcome(p, details={"groups": {1, 2}}),
    "the size of up has changed, but the plan is empty": lambda p: Outcome(p.resized(up=(2, 2))),
    "the size of new has changed": lambda p: Outcome(p.resized(new=(2, 2)), edited=True),
    "the plan is not empty, but no weight has changed": lambda p: Outcome(p, FakePlan(("k 1",))),
    "the program has changed, but there is no plan and edited is not set": lambda p: Outcome(
        dataclasses.replace(p, graph="another")
    ),
    "but there is no plan and edited": lambda p: Outcome(p.resized(up=(16, 8))),
}


@pytest.mark.parametrize("message", CLAIMS)
def test_a_false_claim_is_refused(program: Any, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        run(program, doing(lambda program, context: CLAIMS[message](program)))


@pytest.mark.parametrize("change", [{"graph": "another"}, {"weights": fake_program().weights}])
def test_an_edit_at_the_same_sizes_is_declared(program: Any, change: dict[str, Any]) -> None:
    edited = dataclasses.replace(program, **change)
    assert run(program, doing(lambda p, c: Outcome(edited, edited=True))).program is edited


# -- analyses --------------------------------------------------------------------------------------


def asking(analysis: Any, returned: Any, **members: Any) -> Any:
    """A pass that asks for an analysis twice, then returns `returned(program)`."""

    def action(program: Any, context: Context) -> Outcome:
        assert context.analysis(analysis, program) == context.analysis(analysis, program)
        return Outcome(returned(program), edited=True)

    return doing(action, **members)


def same(program: Any) -> Any:
    return program


def copied(program: Any) -> Any:
    return dataclasses.replace(program)


def regraphed(program: Any) -> Any:
    return dataclasses.replace(program, graph=program.graph + "'")


@pytest.mark.parametrize(
    ("returned", "preserves", "computed"), [(same, False, 1), (copied, False, 2), (copied, True, 1)]
)
def test_an_analysis_is_stale_unless_it_is_preserved(
    program: Any, returned: Any, preserves: bool, computed: int
) -> None:
    counting = Counting()
    kept = frozenset({counting.analysis} if preserves else ())
    first = asking(counting.analysis, returned, preserves=kept)
    run(program, first, asking(counting.analysis, same))
    assert counting.count == computed


def test_an_analysis_of_another_program_is_never_carried_over(program: Any) -> None:
    counting = Counting()

    def look_elsewhere(current: Any, context: Context) -> Outcome:
        assert context.analysis(counting.analysis, regraphed(current)) == "graph'"
        return Outcome(copied(current), edited=True)

    seen: list[str] = []

    def look(current: Any, context: Context) -> Outcome:
        seen.append(context.analysis(counting.analysis, current))
        return Outcome(current)

    run(program, doing(look_elsewhere, preserves=frozenset({counting.analysis})), doing(look))
    assert seen == ["graph"]


def test_an_analysis_of_the_new_program_is_kept(program: Any) -> None:
    counting = Counting()

    def look_ahead(current: Any, context: Context) -> Outcome:
        after = regraphed(current)
        context.analysis(counting.analysis, after)
        return Outcome(after, edited=True)

    run(program, doing(look_ahead), asking(counting.analysis, same))
    assert counting.count == 1


def test_the_audit_finds_a_false_claim_to_preserve(program: Any) -> None:
    kept = frozenset({Counting().analysis})
    liar = doing(lambda p, c: Outcome(regraphed(p), edited=True), preserves=kept)
    run(program, liar)
    with pytest.raises(PipelineError, match=r"pass 1 \(do\): it says that it preserves 'graph'"):
        run(program, liar, audit=True)


def test_the_audit_passes_a_true_claim(program: Any) -> None:
    kept = frozenset({Counting().analysis})
    honest = doing(lambda p, c: Outcome(copied(p), edited=True), preserves=kept)
    assert run(program, honest, audit=True).program is not program


# -- instruments -----------------------------------------------------------------------------------


def test_instruments_are_told_in_order(program: Any) -> None:
    events = Events()
    run(program, Shrink(), Look(), instruments=(events,))
    assert events.seen == [
        "before pass 1 (shrink): 0 steps",
        "after pass 1 (shrink): 1 steps",
        "before pass 2 (look): 1 steps",
        "after pass 2 (look): 1 steps",
    ]


def test_instruments_are_told_of_an_error(program: Any) -> None:
    events = Events()
    with pytest.raises(GraphPruneError):
        run(program, fail(UsageError("no")), instruments=(events,))
    assert events.seen == ["before pass 1 (do): 0 steps", "error pass 1 (do): no"]


def test_verify_each_verifies_after_passes_that_change_sizes(
    program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def verify(original: Any, plan: Any, current: Any, **options: Any) -> None:
        calls.append((original is program, plan.steps, current.weights["up"].shape, options))

    monkeypatch.setitem(
        sys.modules, "graphprune.verification.verify", SimpleNamespace(verify=verify)
    )
    Pipeline([Look(), Shrink(), Look(), Shrink()]).run(program, verify_each=True)
    assert calls == [
        (True, ("up 4",), (12, 8), {"tolerance": None}),
        (True, ("up 4", "up 4"), (8, 8), {"tolerance": None}),
    ]
    run(program, Shrink(), instruments=(VerifyEach(tolerance=0.5),))
    assert calls[-1][-1] == {"tolerance": 0.5}


def test_programs_are_printed_around_the_passes_named(
    program: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    Pipeline([Look(), Shrink()]).run(program, print_before=["shrink"], print_after=["*"])
    printed = capsys.readouterr()
    assert printed.out == ""
    titles = [line for line in printed.err.splitlines() if line.startswith("//")]
    assert titles == [
        "// after pass 1 (look)",
        "// before pass 2 (shrink)",
        "// after pass 2 (shrink)",
    ]
    assert printed.err.endswith("graph\nk: [4, 8]\nup: [12, 8]\n")


def test_a_pass_to_print_around_must_be_in_the_pipeline(program: Any) -> None:
    with pytest.raises(UsageError, match="no pass 'shrnk' to print around; did you mean 'shrink'"):
        Pipeline([Shrink()]).run(program, print_after=["shrnk"])


def test_nothing_is_printed_unless_asked(program: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run(program, Shrink(), instruments=(PrintProgram(),))
    Pipeline([Shrink()]).run(program)
    assert capsys.readouterr() == ("", "")


def test_dump_writes_every_program_and_a_reproducer(program: Any, tmp_path: Any) -> None:
    folder = tmp_path / "new" / "dump"
    with pytest.raises(MergeError):
        run(program, Shrink(), Look(), fail(MergeError("no")), instruments=(Dump(folder),))
    names = ["000_input.txt", "001_shrink.txt", "002_look.txt", "failure.txt"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert (folder / "001_shrink.txt").read_text() == "graph\nk: [4, 8]\nup: [12, 8]\n"
    failure = (folder / "failure.txt").read_text()
    assert failure.startswith("// pass 3 (do)\nshrink,look,do\n\nTraceback")
    assert failure.endswith("MergeError: pass 3 (do): no\n")


def test_pipeline_run_dumps(program: Any, tmp_path: Any) -> None:
    Pipeline([Shrink()]).run(program, dump=tmp_path / "dump")
    assert (tmp_path / "dump" / "001_shrink.txt").exists()


# -- the context -----------------------------------------------------------------------------------


def test_output_paths_are_under_the_output_folder_unless_absolute(tmp_path: Any) -> None:
    context = Context(fake_program(), FakePlan(), output=tmp_path)  # type: ignore[arg-type]
    assert context.path("model.onnx") == tmp_path / "model.onnx"
    assert context.path("/elsewhere/x") == type(tmp_path)("/elsewhere/x")
    relative = dataclasses.replace(context, output=type(tmp_path)())
    assert str(relative.path("a/b")) == "a/b"


@pytest.mark.parametrize("terminal", [True, False])
def test_track_yields_every_item_and_shows_progress_on_a_terminal(
    program: Any, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", str(int(terminal)))
    seen: list[int] = []

    def action(current: Any, context: Context) -> Outcome:
        assert (context.progress is not None) == terminal
        seen.extend(context.track(range(3), "counting"))
        return Outcome(current)

    Pipeline([doing(action)]).run(program, quiet=False)
    assert seen == [0, 1, 2]
