"""Merge KV heads: multi-head attention to grouped-query to multi-query."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from graphprune.errors import MergeError
from graphprune.ir.devices import Runtime
from graphprune.pipeline.pass_base import Baseline, Context, Outcome, Pass

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from graphprune.ir.program import Program
    from graphprune.plan.steps import Permutation
    from graphprune.transforms.heads.kv_heads import Heads


@dataclass(frozen=True)
class MergeKvHeads(Pass):
    """Merge key and value heads, so that each serves the queries of several.

    Before
    ------
    ::

        k_proj[(kv d), hidden]  v_proj[(kv d), hidden]  cache[batch, kv, past, d]

    After
    -----
    With ``groups=2`` there are two KV heads, whatever there were; query heads stay::

        k_proj[(2 d), hidden]   v_proj[(2 d), hidden]   cache[batch, 2, past, d]

    Options
    -------
    groups
        KV heads that are left in each attention; 1 is multi-query attention.
    init
        What the new heads are. "mean": the mean of a group's heads, as in the paper; "first", the
        first of them, and "random", drawn anew with the spread of the old, are its ablation.
        "aligned": the head that all can share at the least cost on calibration data, with queries
        and outputs refitted to it. None: "aligned" where there is calibration data, which loses a
        fraction of what "mean" does, else "mean"; the report says which.
    order
        Which heads form a group. "contiguous": neighbors; "similarity": those that cost the least
        to share (with "aligned" on the data, else by distance of their weights), whose queries and
        outputs are reordered with them. None: "similarity" with "aligned", else "contiguous".
    damp
        Of the refit of output projections in "aligned": what is added to the diagonal of its second
        moments, as a part of their mean.
    skip
        Globs over names of KV-head groups or of weights whose attention stays as it is.
    runtime
        What the program is to run on: cpu, cuda, tensorrt, or portable for any of them. The report
        then has attentions of which so many query heads on a KV head leave the fast path ("speed
        hints"); what is merged stays the same.
    form
        What kind of checkpoint the result shall be. plain: where the config refuses so many KV
        heads, or they cannot be merged into so many, the nearest number that will do is taken, as
        in `prune{form=plain}`. any: takes no notice. None: as `run --form` says, else any.

    Requires
    --------
    Attention whose key and value heads have an axis of their own, or are interleaved with those of
    the queries in one projection, whose rows are then permuted part by part. Calibration data, for
    "aligned".

    Preserves
    ---------
    Nothing.

    Refuses
    -------
    Heads that `groups` does not divide, heads that more than attention ties to those of the
    queries, a `skip` pattern that matches nothing, and a program in which nothing would be merged
    (`MergeError`). Where "aligned" or "similarity" can do nothing for an attention (keys with a
    norm of their own, heads that are not alike), the report has the reason, and its heads are
    averaged, or stay in order.

    Reference
    ---------
    Ainslie et al., GQA, 2305.13245, section 2.1 (mean pooling) and figure 4 (first, random);
    Shazeer, 1911.02150 (multi-query). "aligned" is not of the paper: `transforms.heads.sharing` has
    its forms.

    Example
    -------
    >>> str(MergeKvHeads(groups=2, init="aligned"))
    'merge-kv-heads{groups=2 init=aligned}'
    """

    name: ClassVar[str] = "merge-kv-heads"

    groups: int
    init: Literal["mean", "first", "random", "aligned"] | None = None
    order: Literal["contiguous", "similarity"] | None = None
    damp: float = 0.01
    skip: tuple[str, ...] = ()
    runtime: Runtime | None = None
    form: Literal["plain", "any"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups < 1:
            raise MergeError(f"merge-kv-heads: groups {self.groups} is not positive")
        if not self.damp > 0:
            raise MergeError(f"merge-kv-heads: damp {self.damp:g} is not positive")

    @property
    def requires_calibration(self) -> bool:
        """Return whether heads are aligned."""
        return self.init == "aligned"

    @property
    def runs_program(self) -> bool:
        """Return whether heads are aligned on data."""
        return self.requires_calibration

    @property
    def instead_of_calibration(self) -> str:
        """The mean of the heads."""
        return "init=mean"

    def calibration_tokens(self, program: Program) -> int:
        """Return what least squares need, where heads are aligned."""
        from graphprune.calibration.statistics import tokens_for_gram

        return tokens_for_gram(program) if self.init in (None, "aligned") else 0

    def run(self, program: Program, context: Context) -> Outcome:
        """Find the KV heads of every attention, make those of each group equal, and merge them."""
        from graphprune.plan.plan import Plan
        from graphprune.plan.steps import Step
        from graphprune.transforms.apply import apply_step
        from graphprune.transforms.heads.merge import merge_of

        chosen = self._chosen(program, context)
        groups, instead = self._plain_groups(program, chosen)
        for heads in chosen:
            merge_of(heads, groups)  # refuses what cannot be merged before any work
        edited, reordering, details = self._equal(program, context, chosen, groups)
        merges = tuple(merge_of(heads, groups, reordering[heads.name]) for heads in chosen)
        step = Step(edited.fingerprint(), (), merges)
        with context.bar("merging KV heads"):
            merged = apply_step(edited, step)
        details = {"merged": {m.group: f"{m.size} into {m.groups}" for m in merges}} | details
        if instead:
            details["left with, for a plain checkpoint"] = instead
        if hints := self._hints(program, chosen, groups):
            details["speed hints"] = hints
        changed = edited is not program
        baseline = Baseline(edited, len(context.plan_so_far.steps)) if changed else None
        return Outcome(merged, Plan((step,)), details, edited=changed, baseline=baseline)

    def _chosen(self, program: Program, context: Context) -> list[Heads]:
        """Return the KV heads to merge."""
        from graphprune.transforms.heads.kv_heads import find_heads

        with context.bar("finding KV heads"):
            found = find_heads(program)
        if not found:
            raise MergeError("the program has no attention with more than one KV head")
        for pattern in self.skip:
            if not any(_matches(heads, pattern) for heads in found):
                raise MergeError(f"skip pattern {pattern!r} matches no KV heads")
        chosen = [h for h in found if not self._skips(h) and h.size > self.groups]
        if not chosen:
            sizes = ", ".join(sorted({str(heads.size) for heads in found}))
            raise MergeError(
                f"nothing to merge: {sizes} KV heads are at most {self.groups} or skipped"
            )
        return chosen

    def _plain_groups(self, program: Program, chosen: list[Heads]) -> tuple[int, str]:
        """Return the KV heads that are left, and why where these are not as many as asked for."""
        from graphprune.backends.huggingface.config_rules import size_rules
        from graphprune.selection.size_rules import nearest_size, sizes_that_do

        if self.form != "plain":
            return self.groups, ""
        rules = set(size_rules(program, chosen).values())

        def why_not(count: int) -> str:
            for size in sorted({heads.size for heads in chosen}):
                if size % count:
                    return f"{size} KV heads cannot be merged into {count}"
            return next(filter(None, (rule(count) for rule in rules)), "")

        why = why_not(self.groups)
        size = min(heads.size for heads in chosen)
        groups = nearest_size(size, self.groups, why_not)
        if groups == size:
            others = sizes_that_do(size, why_not, near=self.groups)
            raise MergeError(why + (f"; {others} would do" if others else ""))
        return groups, f"{groups} KV heads: {why}" if why else ""

    def _hints(self, program: Program, chosen: list[Heads], left: int) -> list[str]:
        """Return which query groups are off the fast path of `runtime` once heads are merged."""
        from graphprune.report.overview import hint_lines
        from graphprune.selection.kernel_sizes import query_group_hints

        if self.runtime is None:
            return []
        groups = [
            (heads.name.rpartition(":")[0], heads.queries * heads.size // left) for heads in chosen
        ]
        return hint_lines(query_group_hints(program, groups, self.runtime))

    def _skips(self, heads: Heads) -> bool:
        return any(_matches(heads, pattern) for pattern in self.skip)

    def _equal(
        self, program: Program, context: Context, chosen: list[Heads], groups: int
    ) -> tuple[Program, Mapping[str, tuple[Permutation, ...]], dict[str, Any]]:
        """Return `program` with the heads of each group equal, their reordering, and details.

        The mean makes them equal by itself when they are merged.
        """
        from graphprune.transforms.heads.align import align
        from graphprune.transforms.heads.grouping import group_by_weights
        from graphprune.transforms.heads.merge import equal_heads

        init = self.init or ("mean" if context.calibration is None else "aligned")
        aligned = init == "aligned"
        similar = aligned if self.order is None else self.order == "similarity"
        if aligned:
            assert context.calibration is not None, "the pass manager has asked for it"
            made = align(
                program,
                context.coupling(program).types,
                chosen,
                groups,
                context.calibration,
                similar=similar,
                damp=self.damp,
                track=context.track,
            )
            told = {"init": init, "errors": made.errors, "not aligned": made.notes}
            return made.program, made.reordering, told
        choose = _choice(init, context.seed)
        reordering: dict[str, tuple[Permutation, ...]] = {}
        weights = dict(program.weights)
        stay: dict[str, str] = {}
        for heads in chosen:
            types = context.coupling(program).types if similar else None
            way = group_by_weights(program, types, heads, groups)
            reordering[heads.name] = way.reordering
            if way.in_order:
                stay[heads.name] = way.in_order
            if choose is not None:
                weights |= equal_heads(weights, heads, way.groups, choose)
        details: dict[str, Any] = {"init": init}
        if stay:
            details["in order"] = stay
        if choose is None:
            return program, reordering, details
        return program.with_weights(weights), reordering, details


def _choice(init: str, seed: int) -> Callable[[str, Tensor], Tensor] | None:
    """Return what makes one head of ``[heads, ...]``, the slices of a weight; None for the mean."""
    import torch

    from graphprune.transforms.heads.merge import mean_of

    if init == "mean":
        return None
    generator = torch.Generator().manual_seed(seed)

    def random(weight: str, heads: Tensor) -> Tensor:
        if heads.ndim < 3:  # a bias or a gain has no direction to draw
            return mean_of(weight, heads)
        drawn = torch.randn(heads.shape[1:], generator=generator, dtype=torch.float64)
        return drawn.to(heads.device) * heads.double().std()

    return random if init == "random" else lambda weight, heads: heads[0]


def _matches(heads: Heads, pattern: str) -> bool:
    names = (heads.name, *(member.weight for member in heads.members))
    return any(fnmatchcase(name, pattern) for name in names)
