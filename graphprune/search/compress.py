"""Make a program smaller by the recipe that measures best on data that nothing was fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from graphprune import ranks
from graphprune.analysis.coupling import Coupling, analyze
from graphprune.backends.onnx.kernel_times import KernelTimes
from graphprune.calibration.data import Calibration
from graphprune.criteria import criterion
from graphprune.errors import PROGRAMS, ProcessError, SelectionError, UsageError, refuse_other
from graphprune.io.progress import DisplayFactory
from graphprune.ir.program import Program
from graphprune.passes.evolve import Evolve
from graphprune.passes.verify import Verify
from graphprune.pipeline.pipeline import Pipeline
from graphprune.search.bench import Bench, Tried, ranked
from graphprune.search.candidates import (
    DATA_FREE,
    Budgets,
    Candidate,
    candidates,
    scores_all,
    too_slow,
)
from graphprune.search.choice import choose
from graphprune.search.draws import divide
from graphprune.search.latency import Latency
from graphprune.search.result import Compressed
from graphprune.selection.cost import Cost, Costs
from graphprune.selection.targets import target_groups

CRITERIA = ("taylor", "obs", "wanda", DATA_FREE, "reap")
"""The criteria that are tried, each on what it can score."""

SECONDS = 1800.0
"""How long a search may take, where nobody says."""

_GENERATIONS = (30, 10, 4)
"""Lengths of a search over levels that are tried: the first one that there is time for."""

_REFITTED = 3
"""Criteria whose best recipe is tried with a refit."""


def compress(
    program: Program,
    *,
    calibration: Calibration | None = None,
    params: float | None = None,
    macs: float | None = None,
    kv_bytes: float | None = None,
    latency: float | None = None,
    provider: str = "cpu",
    targets: Sequence[str] = (),
    criteria: Sequence[str] = CRITERIA,
    seconds: float | None = SECONDS,
    folder: str | PathLike[str] | None = None,
    plain: bool = False,
    seed: int = 0,
    progress: DisplayFactory | None = None,
) -> Compressed:
    """Make `program` smaller by the recipe that measures best.

    What is pruned, by which criterion, whether all layers lose the same, and whether what stays is
    refitted or trained: all of it is tried, and measured on data that nothing was fitted to. Many
    recipes are measured on few samples first, and those that do best there, refitted, on all. Where
    there is time, an evolutionary search looks for what each group loses best (`Evolve`), and the
    best of all is trained.

    Parameters
    ----------
    program
        What to start from; it is not changed.
    calibration
        Data to fit to and to choose by. Without it nothing can be measured, and units are scored by
        their weights alone.
    params, macs, kv_bytes
        The part that is to go, in [0, 1): of the parameters, of the multiply-accumulates of a
        prompt, of the KV cache. All that are given are met.
    latency
        The part of the time that the matrix products and attentions of a prompt take, as `Evolve`
        has it: each is measured in ONNX Runtime, once, in float32. Uniform recipes lose the fewest
        32nds of their units that meet it; what turns out to be too slow is left out, and said.
    provider
        Of latency: what the result is to run on, such as cpu or cuda; it is measured here.
    targets
        What may be pruned, as in `Prune`; left out, FFN units, experts, channels and heads.
    criteria
        What units may be scored by, each where it can: "reap" scores experts alone.
    seconds
        How long it may take, looked at between candidates; None for any time. When it is over, the
        best so far is taken. One recipe is always measured.
    folder
        Where what is measured is kept, so that a search that was interrupted goes on: a directory
        that is empty, absent or of a search. None: nothing is kept, nor are the times of kernels,
        without which a search over levels by latency is not the same again.
    plain
        Whether all layers are to stay alike, in sizes that the config accepts.
    seed
        Of whatever is random. Given enough time, equal seeds give equal results.
    progress
        Makes a progress display.

    Raises
    ------
    SelectionError
        Before any work: when nothing meets the budgets, or a target matches nothing. Later where
        all that was tried came out too slow.
    CalibrationError
        Before any work: when there is too little data to hold some of it out, or it does not fit.
    UsageError
        For a budget outside of [0, 1), a time that is none, or an unknown criterion.
    OutputError
        When `folder` holds something else, or cannot be written.
    BackendError
        With a latency: when ONNX Runtime is not installed or lacks the provider.
    ProcessError
        When several processes divide the work.
    """
    refuse_other(program, than=Program, how=PROGRAMS)
    if ranks.size() > 1:  # their clocks differ, and with them what they would leave out
        raise ProcessError("compress works in one process: start it without torchrun")
    budgets = _budgets(params=params, macs=macs, kv_bytes=kv_bytes)
    if seconds is not None and not seconds > 0:
        raise UsageError(f"seconds {seconds:g} is no time to search in")
    if not criteria:
        raise UsageError("there is no criterion to score units by")
    for name in criteria:
        criterion(name)  # refuses one that there is not
    _budgets(latency=latency)
    coupling = analyze(program)
    with nullcontext(folder) if folder is not None else TemporaryDirectory() as kept:
        timed = _latency(coupling, latency, provider, Path(kept))
        starts = candidates(coupling, budgets, targets, plain=plain, latency=timed)
        if not any(scores_all(name, coupling, one.targets) for name in criteria for one in starts):
            raise SelectionError(f"{', '.join(criteria)} cannot score what is to be pruned")
        if calibration is None:
            return _unmeasured(program, starts, seed, timed)
        calibration = calibration.for_program(program)
        calibration.check(program)
        draw = divide(calibration, program)
        pruned = dict.fromkeys(target for each in starts for target in each.targets)
        bench = Bench(
            coupling,
            list(pruned),
            draw,
            Path(kept),
            seed=seed,
            latency=timed,
            limit=seconds,
            progress=progress,
        )
        if timed is not None:
            timed.times.keep()
        _search(bench, starts, criteria, budgets, plain=plain)
        slow = too_slow(coupling, targets, timed) if timed is not None else []
        return _chosen(bench, seed, slow)


def _latency(coupling: Coupling, part: float | None, provider: str, folder: Path) -> Latency | None:
    """Return the budget of time; None where none is asked for."""
    if part is None:
        if provider != "cpu":
            raise UsageError("provider is of a latency, and none is asked for")
        return None
    return Latency.of(Costs(coupling), part, KernelTimes(provider, folder / "times.json"))


def _budgets(**given: float | None) -> Budgets:
    """Return the budgets that are given."""
    found: dict[Cost, float] = {}
    for name, part in given.items():
        if part is None:
            continue
        if not 0 < part < 1:
            percent = f"; {part:g} % is {part / 100:g}" if 1 < part < 100 else ""
            raise UsageError(f"{name} {part:g} is not in (0, 1){percent}")
        found[cast(Cost, name)] = part
    return found


def _search(
    bench: Bench,
    starts: Sequence[Candidate],
    names: Sequence[str],
    budgets: Budgets,
    *,
    plain: bool,
) -> None:
    """Measure more and more of what is promising, on more and more samples."""
    few, samples = max(bench.draw.samples // 4, 1), bench.draw.samples
    # Those that prune once share the scores of a criterion; the others take scores of their own.
    single = [each for each in starts if each.prunings < 2] or list(starts)
    screened = bench.measure(_scored(bench, single, names), few, "trying criteria and targets")
    contenders = _contenders([each.candidate for each in screened])
    best = [each.candidate for each in screened[:1]]
    by_turn = [each.criterion for each in contenders]
    several = (_scored(bench, [each], by_turn) for each in starts if each not in single)
    rest = [found[0] for found in several if found]
    refitted = bench.measure(
        [*best, *(each.refitted() for each in (*contenders, *rest))], samples, "refitting"
    )
    shared: list[Tried] = []
    if not plain:
        shared = bench.measure(_elsewhere(bench, refitted), samples, "sharing out over layers")
        shared += bench.measure(
            _searched(bench, [*refitted, *shared], budgets), samples, "searching over levels"
        )
    bench.measure(_trained(bench, [*refitted, *shared]), samples, "training branches")


def _scored(bench: Bench, starts: Sequence[Candidate], names: Sequence[str]) -> list[Candidate]:
    """Return candidates by each of the criteria that can score what they prune."""
    return [
        each.by(name)
        for name in names
        for each in starts
        if scores_all(name, bench.coupling, each.targets)
    ]


def _searched(bench: Bench, tried: Sequence[Tried], budgets: Budgets) -> list[Candidate]:
    """Return the search for what each group loses, as long as there is time for.

    Units go in the order of the best criterion so far.
    """
    targets = [
        name
        for name in bench.targets
        if all(group.is_zeroing for group in target_groups(bench.coupling, name))
    ]
    criteria = (each.candidate.criterion for each in ranked(tried))
    able = (name for name in criteria if name and scores_all(name, bench.coupling, targets))
    best = next(able, None)
    if not targets or best is None:
        return []
    for generations in _GENERATIONS:
        given = Evolve(
            tuple(targets),
            criterion=best,
            generations=generations,
            params=budgets.get("params"),
            macs=budgets.get("macs"),
            kv_bytes=budgets.get("kv_bytes"),
            **_of_latency(bench.latency),
        )
        # It is measured, and made once more when it is chosen.
        if 2 * bench.seconds_by_search(given) <= bench.left:
            return [Candidate(None, None, search=given)]
    bench.left_out.append(Candidate(None, None, search=given))
    return []


def _of_latency(latency: Latency | None) -> dict[str, Any]:
    """Return the options of a search for a latency, by the times that are known here."""
    if latency is None:
        return {}
    times = latency.times
    return {"latency": latency.part, "provider": times.provider, "times": str(times.path)}


def _trained(bench: Bench, tried: Sequence[Tried]) -> list[Candidate]:
    """Return the best, and the best whose layers stay alike, with their branches trained."""
    best = [each.candidate for each in ranked(tried)]
    alike = [each for each in best if each.alike]
    found = list(dict.fromkeys(each.trained() for each in (*best[:1], *alike[:1])))
    # It is trained to be measured, and once more when it is chosen.
    if 2 * bench.seconds_by_training <= bench.left:
        return found
    bench.left_out.extend(found)
    return []


def _contenders(screened: Sequence[Candidate]) -> list[Candidate]:
    """Return the best of each criterion, of the first few, and the runner-up of the best one.

    A refit changes which criterion is best: so it is tried with several.
    """
    firsts: dict[str, Candidate] = {}
    for each in screened:
        firsts.setdefault(each.criterion, each)
    of_best = [each for each in screened if each.criterion == screened[0].criterion]
    return [*list(firsts.values())[:_REFITTED], *of_best[1:2]]


def _elsewhere(bench: Bench, refitted: Sequence[Tried]) -> list[Candidate]:
    """Return what takes units from wherever they are missed least.

    By the scores themselves, where they say the same of every group, and by the loss.
    """
    able = [each.candidate for each in refitted]
    able = [each for each in able if each.widths is not None and each.heads is None]
    able = [each for each in able if scores_all(each.criterion, bench.coupling, bench.targets)]
    comparable = [each for each in able if criterion(each.criterion).comparable][:1]
    found = [each.everywhere("none", names) for each in comparable for names in ((), bench.targets)]
    for each in able[:1]:
        if 2 * bench.seconds_by_loss <= bench.left:
            found.append(each.everywhere("loss", bench.targets))
        else:
            bench.left_out.append(each.everywhere("loss", bench.targets))
    return found


def _chosen(bench: Bench, seed: int, slow: Sequence[str] = ()) -> Compressed:
    """Return what the best candidate gives, made anew, as its text alone makes it."""
    tried = list(bench.tried.values())
    full = [each for each in ranked(tried) if len(_values(each)) == bench.draw.samples]
    pool = full or ranked(tried)
    if not pool:
        raise SelectionError(f"no recipe could be measured: {tried[0].reason}")
    whole = bench.whole(len(_values(pool[0])))
    pool = [each for each in pool if len(_values(each)) == len(whole.values)]
    alike = bench.program.source is not None
    choice = choose(whole, pool, bench.measure_name, prefer_alike=alike)
    pipeline = Pipeline([*choice.tried.candidate.passes, Verify()])
    result = pipeline.run(
        bench.program, calibration=bench.draw.fitted, seed=seed, quiet=bench.progress is None
    )
    notes = []
    if not bench.draw.apart:
        notes.append("what is reported was measured on the samples that the choice was made on")
    if slow:
        notes.append(f"not fast enough by themselves, whatever they lose: {', '.join(slow)}")
    if bench.left_out:
        notes.append(f"there was no time for {len(bench.left_out)} recipes more")
    return Compressed(
        result,
        pipeline,
        choice.why,
        bench.draw.fitted,
        bench.measure_name,
        whole,
        (*pool, *(each for each in tried if each not in pool)),
        tuple(notes),
        _times(bench.latency, result.program),
    )


def _times(latency: Latency | None, program: Program) -> tuple[float, float] | None:
    return None if latency is None else (latency.whole, latency.seconds(program))


def _unmeasured(
    program: Program, starts: Sequence[Candidate], seed: int, latency: Latency | None
) -> Compressed:
    """Return what can be done without data: the first that comes out fast enough."""
    refusal = ""
    for start in starts:
        pipeline = Pipeline([*start.passes, Verify()])
        result = pipeline.run(program, seed=seed)
        times = _times(latency, result.program)
        refusal = latency.refusal(times[1]) if latency and times else ""
        if not refusal:
            why = (
                f"no calibration data was given, so nothing could be measured: {start}, with units "
                f"scored by the size of their weights ({DATA_FREE})"
            )
            return Compressed(result, pipeline, why, latency=times)
    raise SelectionError(f"{starts[-1]}: {refusal}")


def _values(tried: Tried) -> Sequence[float]:
    return tried.figures.values if tried.figures else ()
