"""Statistics of activations, taken where a weight is multiplied with them, over calibration data.

One run serves any number of matrices; those with the same inputs share what is measured. All
batches move through the graph together, one segment (the nodes of one numbered layer) after the
other, so that what is changed in a layer is seen by the next one. What the statistics take is known
before, and can be bounded: a layer whose statistics do not fit at once is run several times.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from graphprune import ranks
from graphprune.analysis.matrices import Matrix, Use, contractions
from graphprune.calibration.cache import read_cache, write_cache
from graphprune.calibration.data import Calibration, own_batches
from graphprune.calibration.input_statistics import InputStatistics, Kind, over_ranks
from graphprune.calibration.layerwise import BatchExecution, ChangedWeights, not_run, unpadded
from graphprune.calibration.segments import segments
from graphprune.errors import CalibrationError
from graphprune.io.atomic import staged_file
from graphprune.io.progress import Progress, no_progress
from graphprune.ir.interpreter import Before, Compute, Memory, ancestors, call
from graphprune.ir.program import Program
from graphprune.ir.provenance import layer_of

_WHAT, _AND = "statistics", "\n"


Statistics = dict[str, InputStatistics]
"""Name of a matrix -> the statistics of its inputs; one object where the inputs are the same."""

Edit = Callable[[Sequence[fx.Node], Sequence[Matrix], Statistics], Iterable[Mapping[str, Tensor]]]
"""Given the nodes of a segment, matrices in it and their statistics: new weights by name, a few at
a time, each stored before the next are made. All matrices of a weight come in one call; those of a
segment may come in several."""


@dataclass(frozen=True)
class LayerwiseResult:
    """The weights that `run_layerwise` changed, and the memory that it took.

    Parameters
    ----------
    weights
        The weights that were changed, by name, as they are stored: past the program's limit of
        memory they lie on disk.
    statistics
        Those of every matrix; empty where they were used up on the way.
    peak_bytes
        The most that activations and statistics took together.
    statistics_bytes
        The most that statistics alone took, which was known before.
    """

    weights: Mapping[str, Tensor]
    statistics: Statistics
    peak_bytes: int
    statistics_bytes: int


def observe(
    program: Program,
    matrices: Sequence[Matrix],
    calibration: Calibration,
    kind: Kind = "moments",
    track: Progress = no_progress,
    memory: int | None = None,
) -> Statistics:
    """Statistics of the inputs of `matrices`, on the program as it is.

    Parameters
    ----------
    program
        The program.
    matrices
        From `graphprune.analysis.matrices.contractions`.
    calibration
        Batches to run it on. Padding is cut off first, so no padded token is counted.
    kind
        "moments", or "gram" for the products of all pairs of inputs too (memory: 8 in² bytes each).
    track
        Wraps the loop over segments in a progress bar.
    memory
        The most bytes that all of them may take.

    Returns
    -------
    dict
        `InputStatistics` by the name of the matrix.

    Raises
    ------
    CalibrationError
        As `run_layerwise`.
    """
    return run_layerwise(
        program, matrices, calibration, kind, None, track, memory=memory
    ).statistics


def run_layerwise(
    program: Program,
    matrices: Sequence[Matrix],
    calibration: Calibration,
    kind: Kind = "moments",
    edit: Edit | None = None,
    track: Progress = no_progress,
    *,
    replay: bool = True,
    memory: int | None = None,
    compute: Callable[[], Compute] = lambda: call,
) -> LayerwiseResult:
    """Run all batches through the graph, segment by segment.

    With `edit`, a segment is run to take its statistics, its weights are edited, and it is run
    again with the new ones, so that later segments see what the edit did (the order of Wanda,
    Sun et al. 2306.11695, section 3, and of SparseGPT). Without, one run of each suffices.

    Parameters
    ----------
    program, matrices, calibration, kind, track
        As in `observe`.
    edit
        Makes new weights of a segment's statistics, which are then dropped; without it they are
        all kept.
    replay
        Whether later segments see what the edit did, or the program as it is.
    memory
        The most bytes that statistics may take at once. A segment whose statistics take more is
        run several times, each time for some of its matrices.
    compute
        Gives, for each batch, what makes the values of its nodes.

    Raises
    ------
    CalibrationError
        When the batches do not fit the program, or a statistic is not finite; before anything is
        run, when the statistics of a weight (without `edit`, of all) do not fit into `memory`.
    """
    calibration.check(program)
    looked_at = {use.node for matrix in matrices for use in matrix.uses}
    needed = ancestors([other for node in looked_at for other in node.all_input_nodes])
    parts = segments(program, matrices, needed | looked_at)
    bound = None if edit is None else memory
    shares = [_shares(segment.nodes, matrices, kind, bound) for segment in parts]
    sums = [statistics_bytes(share, kind) for each in shares for share in each]
    most = sum(sums) if edit is None else max(sums, default=0)
    _fit("all matrices together", most, memory)
    account = Memory()
    batches = list(unpadded(calibration))
    own = [batches[at] for at in own_batches(batches)]
    executions = BatchExecution.of_all(
        program,
        own,
        [part.nodes for part in parts],
        memory=account,
        computes=(not_run(looked_at - needed, compute()) for _ in own),
    )
    changed = ChangedWeights(program, [part.nodes for part in parts], account)
    statistics: Statistics = {}
    for segment, divided in track(list(zip(parts, shares, strict=True)), "running layer by layer"):
        again = edit is not None and replay and bool(divided[0])
        new: dict[str, Tensor] = {}
        for share in divided:
            firsts = _firsts(share)
            empty = {
                key: InputStatistics.empty(m, kind, program.device) for key, m in firsts.items()
            }
            found = {m.name: empty[_inputs(m)] for m in share}
            trial = again or share is not divided[-1]
            account.reserve(statistics_bytes(share, kind))
            count = _counting(firsts.values(), found)
            for execution in executions:
                if trial:
                    execution.trial(segment, count).clear()
                else:
                    execution.advance(segment.nodes, count)
            over_ranks(list(empty.values()))
            _check(found)
            if edit is None:
                statistics |= found
                continue
            if share:
                for execution in executions[:1]:
                    execution.weights.of(())  # the old ones go before the new ones come
                new |= changed.store_all(edit(segment.nodes, share, found))
            account.reserve(-statistics_bytes(share, kind))
        for execution in executions if again else ():
            execution.replace(new)
            execution.advance(segment.nodes)
    return LayerwiseResult(changed.weights, statistics, account.peak, most)


def _counting(matrices: Iterable[Matrix], found: Statistics) -> Before:
    """Count the inputs of `matrices` in before each node that they are multiplied by."""
    by_node: dict[fx.Node, list[tuple[Matrix, Use]]] = {}
    for matrix in matrices:
        for use in matrix.uses:
            by_node.setdefault(use.node, []).append((matrix, use))

    def count(node: fx.Node, values: Mapping[fx.Node, Any]) -> None:
        for matrix, use in by_node.get(node, ()):
            for part, rows in use.rows(values):
                found[matrix.name].add(part, rows)

    return count


def _shares(
    nodes: Sequence[fx.Node], matrices: Sequence[Matrix], kind: Kind, memory: int | None
) -> list[list[Matrix]]:
    """Return the matrices that `nodes` use, divided so that the statistics of each share fit.

    Those of one weight stay together. There is one share at least, which may be empty.
    """
    inside = set(nodes)
    by_weight: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        if matrix.uses[0].node in inside:
            by_weight.setdefault(matrix.weight, []).append(matrix)
    shares: list[list[Matrix]] = [[]]
    for weight, held in by_weight.items():
        _fit(weight, statistics_bytes(held, kind), memory)
        if memory is not None and statistics_bytes(shares[-1] + held, kind) > memory:
            shares.append([])
        shares[-1] += held
    return shares


def statistics_bytes(matrices: Sequence[Matrix], kind: Kind) -> int:
    """Return what the statistics of all `matrices` take together."""
    return sum(InputStatistics.needed(matrix, kind) for matrix in _firsts(matrices).values())


def _firsts(matrices: Sequence[Matrix]) -> dict[Hashable, Matrix]:
    """Return the first of the matrices that have the same inputs, such as those of q, k and v."""
    return {_inputs(matrix): matrix for matrix in reversed(matrices)}


def _inputs(matrix: Matrix) -> Hashable:
    """Equal for matrices with the same inputs."""
    if all(use.node.target is torch.ops.aten.linear.default for use in matrix.uses):
        return tuple(use.source for use in matrix.uses)
    return matrix


def _fit(what: str, needed: int, memory: int | None) -> None:
    if memory is not None and needed > memory:
        raise CalibrationError(
            f"{what}: the statistics take {needed / 2**20:.4g} MiB, and {memory / 2**20:.4g} MiB "
            "are allowed"
        )


def _check(statistics: Statistics) -> None:
    for name, each in statistics.items():
        if not bool(torch.isfinite(each.squares).all()):
            raise CalibrationError(f"{name}: its inputs on the calibration data are not finite")


ROWS_PER_INPUT = 8
"""Rows that a least squares fit wants for each of its inputs: the error that it makes by fitting
what is particular to n rows is about inputs / n of what is left, an eighth here."""


def tokens_for_gram(program: Program) -> int:
    """Return the tokens on which products of all pairs of inputs tell of every matrix.

    They are `ROWS_PER_INPUT` for each input of the widest matrix in a numbered layer.
    """
    sizes = (m.shape[2] for m in contractions(program).matrices if layer_of(m.weight))
    return ROWS_PER_INPUT * max(sizes, default=0)


# -- keeping them ----------------------------------------------------------------------------------


def save_statistics(
    statistics: Statistics,
    path: str | PathLike[str],
    program: Program,
    calibration: Calibration | None = None,
) -> None:
    """Write statistics as a safetensors file that knows which program and data they are of.

    Raises
    ------
    OutputError
        When the file exists or cannot be written.
    """
    shared: dict[int, list[str]] = {}
    for name, each in statistics.items():
        shared.setdefault(id(each), []).append(name)
    tensors = {
        f"{_AND.join(names)}:{key}": value
        for names in shared.values()
        for key, value in vars(statistics[names[0]]).items()
        if value is not None
    }
    write_cache(path, _WHAT, tensors, program, calibration)


def load_statistics(
    path: str | PathLike[str], program: Program, calibration: Calibration | None = None
) -> Statistics:
    """Read what `save_statistics` wrote.

    Raises
    ------
    CalibrationError
        When the file is no such file, or is of another program, other weights, or data that are
        not those of `calibration`.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_cache(path, _WHAT, program, calibration).items():
        names, _, part = key.rpartition(":")
        found.setdefault(names, {})[part] = tensor
    statistics: Statistics = {}
    for names, parts in found.items():
        statistics |= dict.fromkeys(names.split(_AND), InputStatistics(**parts))
    _check(statistics)
    return statistics


def load_or_observe(
    path: str | PathLike[str],
    program: Program,
    matrices: Sequence[Matrix],
    calibration: Calibration | None,
    kind: Kind = "moments",
    track: Progress = no_progress,
    memory: int | None = None,
) -> Statistics:
    """Those of the file at `path`, or, where there is none, `observe`, written there.

    Raises
    ------
    CalibrationError
        As `load_statistics` and `observe`; when the file lacks a matrix or the products of pairs;
        when there is neither file nor data.
    OutputError
        When the file cannot be written; asked before anything is run.
    """
    _fit("all matrices together", statistics_bytes(matrices, kind), memory)
    if not ranks.of_first(Path(path).exists):
        if calibration is None:
            raise CalibrationError(f"{path} does not exist, and no calibration data was given")
        with staged_file(path) as staged:  # first, so that a place that is none costs no work
            found = observe(program, matrices, calibration, kind, track)
            save_statistics(found, staged, program, calibration)
        return found
    found = load_statistics(path, program, calibration)
    for matrix in matrices:
        if matrix.name not in found:
            raise CalibrationError(f"{path} lacks the statistics of {matrix.name}")
        if kind == "gram" and found[matrix.name].gram is None:
            raise CalibrationError(
                f"{path} holds no products of pairs of the inputs of {matrix.name}"
            )
    return {matrix.name: found[matrix.name] for matrix in matrices}
