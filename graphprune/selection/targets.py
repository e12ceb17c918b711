"""The groups that a pruning target names, and those in protected layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase

from graphprune.analysis.coupling import Coupling
from graphprune.analysis.groups import Group
from graphprune.analysis.roles import LABELS, Role
from graphprune.errors import SelectionError, nearest
from graphprune.ir.provenance import layer_of

TARGETS: dict[str, tuple[Role, ...]] = {
    "ffn": ("ffn", "expert-unit"),
    "experts": ("expert",),
    "kv-heads": ("kv-head",),
    "query-heads": ("query-slot",),
    "head-dim": ("head-dim",),
    "rope-dim": ("rope-pair",),
    "hidden": ("residual",),
    "channels": ("channel",),
}
"""Name of a pruning target -> the roles that it means."""

_NAMES: dict[str, tuple[Role, ...]] = {
    **{name: (role,) for role in LABELS for name in (role, f"{role}s")},
    **{name.removesuffix("s"): roles for name, roles in TARGETS.items()},
    **TARGETS,
    "rope-dims": ("rope-pair",),
}


def roles_of(target: str) -> tuple[Role, ...]:
    """Return the roles that a target means, by its name or by a role, in singular or plural.

    Examples
    --------
    >>> roles_of("kv-heads"), roles_of("kv-head"), roles_of("residual"), roles_of("*.mlp:ffn")
    (('kv-head',), ('kv-head',), ('residual',), ())
    """
    return _NAMES.get(target, ())


def target_groups(coupling: Coupling, target: str, skip: Iterable[str] = ()) -> list[Group]:
    """Return the groups that `target` means, without those that match a `skip` pattern.

    Parameters
    ----------
    coupling
        The analysis.
    target
        What `roles_of` knows, "all" (every group whose removal equals zeroing its weight slices,
        but the residual stream), or a glob over group names.
    skip
        Globs over names of groups or of weights.

    Raises
    ------
    SelectionError
        When nothing matches, naming what there is; also for a `skip` pattern that matches nothing.
    """
    if roles := roles_of(target):
        found = _innermost([group for group in coupling.groups if group.role in roles])
    elif target == "all":
        found = [
            group
            for group in coupling.groups
            if group.role not in ("residual", "expert") and group.exactness != "approximate"
        ]
    else:
        names = {coupling.current_names.get(target, ""), target}
        found = [g for g in coupling.groups if any(fnmatchcase(g.name, name) for name in names)]
    if not found:
        kinds = sorted({group.role for group in coupling.groups})
        has = (
            f"its groups are {', '.join(kinds)}" if kinds else "it has no group that can be pruned"
        )
        known = () if roles else (*TARGETS, "all", *coupling.current_names)
        hint = nearest(target, known)
        raise SelectionError(f"target {target!r} matches no group of this program{hint}; {has}")
    for pattern in skip:
        matched = {group.name for group in coupling.groups if _matches(group, pattern)}
        if not matched:
            raise SelectionError(f"skip pattern {pattern!r} matches no group and no weight")
        found = [group for group in found if group.name not in matched]
    if not found:
        raise SelectionError(f"every group of target {target!r} is skipped")
    return found


def _innermost(groups: list[Group]) -> list[Group]:
    """Return `groups` without those whose units are all units of another one of them.

    Where a router picks groups of experts first, that is a choice of groups beside one of experts.
    """
    outer = {parent for group in groups for parent in group.parents}
    return [group for group in groups if group.name not in outer]


def _matches(group: Group, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in (group.name, *group.weights()))


def outer_layers(coupling: Coupling, first: int, last: int) -> set[str]:
    """Return the weights of the `first` and the `last` numbered layers of every stack of layers.

    LLM-Pruner keeps the outer layers whole (Ma et al. 2305.11627, section 4.1): the first four and
    the last two of 32.

    Raises
    ------
    SelectionError
        When the program has no numbered layers.
    """
    stacks = _stacks(coupling)
    if not stacks:
        raise SelectionError("the program has no numbered layers to protect")
    return {name for layers in stacks for name in _outer(layers, first, last)}


def _stacks(coupling: Coupling) -> list[dict[int, list[str]]]:
    """Return the weights of every stack of numbered layers, by the number of the layer."""
    stacks: dict[str, dict[int, list[str]]] = {}
    for name in coupling.program.weights:
        stack, _, number = layer_of(name.rpartition(".")[0]).rpartition(".")
        if number:
            stacks.setdefault(stack, {}).setdefault(int(number), []).append(name)
    return list(stacks.values())


def _outer(layers: Mapping[int, list[str]], first: int, last: int) -> Iterator[str]:
    for at, number in enumerate(sorted(layers)):
        if at < first or at >= len(layers) - last:
            yield from layers[number]
