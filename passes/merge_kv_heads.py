"""Merge KV heads: multi-head attention to grouped-query to multi-query."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, ClassVar

from graphprune.errors import MergeError
from graphprune.pass_base import Context, Outcome, Pass

if TYPE_CHECKING:
    from graphprune.merge import Heads
    from graphprune.program import Program


@dataclass(frozen=True)
class MergeKvHeads(Pass):
    """Pool neighbouring key and value heads into their mean.

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
    skip
        Globs over names of KV-head groups or of weights whose attention stays as it is.

    Requires
    --------
    Attention whose key and value heads have an axis of their own, or are interleaved with those of
    the queries in one projection, whose rows are then laid out part by part.

    Preserves
    ---------
    Nothing.

    Refuses
    -------
    Heads that `groups` does not divide, heads that more than attention ties to those of the
    queries, a `skip` pattern that matches nothing, and a program in which nothing would be merged
    (`MergeError`).

    Reference
    ---------
    Ainslie et al., GQA, 2305.13245, section 2.1 (mean pooling); Shazeer, 1911.02150 (multi-query).

    Example
    -------
    >>> str(MergeKvHeads(groups=2))
    'merge-kv-heads{groups=2}'
    """

    name: ClassVar[str] = "merge-kv-heads"

    groups: int
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups < 1:
            raise MergeError(f"merge-kv-heads: groups {self.groups} is not positive")

    def run(self, program: Program, context: Context) -> Outcome:
        """Find the KV heads of every attention and pool them."""
        from graphprune.merge import find_heads, merge_of
        from graphprune.plan import Plan, Step
        from graphprune.rewrite import carry_out

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
        merges = tuple(merge_of(heads, self.groups) for heads in chosen)
        step = Step(program.fingerprint(), (), merges)
        with context.bar("merging KV heads"):
            merged = carry_out(program, step)
        details = {"merged": {m.group: f"{m.size} into {m.groups}" for m in merges}}
        return Outcome(merged, Plan((step,)), details=details)

    def _skips(self, heads: Heads) -> bool:
        return any(_matches(heads, pattern) for pattern in self.skip)


def _matches(heads: Heads, pattern: str) -> bool:
    names = (heads.name, *(member.weight for member in heads.members))
    return any(fnmatchcase(name, pattern) for name in names)
