"""A plan as JSON data, written and read.

The names in the file are those of the first release; "places" are the sources of a permutation,
"orders" deinterleave and "moves" reorder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from graphprune.errors import PlanError
from graphprune.plan.checks import check_change
from graphprune.plan.edits import Edit, Edits
from graphprune.plan.index_map import IndexMap
from graphprune.plan.steps import Branch, Cut, Merge, Permutation, Step

_FORMAT, _WITH_EDITS, _WITH_BRANCHES = 1, 2, 3
"""A plan is of the first format that holds it, so that as many releases as can read it do."""

_MEMBERS = [
    {
        "weight": str,
        "dim": int,
        "offset": int,
        "width": int,
        "extent": int,
        "outer": [[int]],
        "outer_groups": [str | None],
        "owner": int | None,
    }
]
_CUT = {
    "group": str,
    "size": int,
    "role": str,
    "parents": [str],
    "units": [[[int]]],
    "members": _MEMBERS,
}
_PERMUTATIONS = [{"weight": str, "dim": int, "places": [int]}]
_MERGE = {
    "group": str,
    "size": int,
    "groups": int,
    "members": _MEMBERS,
    "orders": _PERMUTATIONS,
    "moves": _PERMUTATIONS,
}
_BRANCHES = [{"name": str, "weights": [{"name": str, "shape": [int]}], "caches": [str]}]
_STEPS = [{"fingerprint": str, "cuts": [_CUT], "merges": [_MERGE], "branches": _BRANCHES}]
_ABSENT: dict[str, Any] = {"owner": None, "branches": []}
_EDITS = [{"pass": str, "weights": [str], "patterns": [[str]], "graph": bool}]

_UNTOLD: dict[str, Any] = {
    "source": "",
    "samples": None,
    "length": None,
    "first tokens": [],
    "tokenizer": "",
    "sha256": "",
}
_CALIBRATION = {
    "source": str,
    "samples": int | None,
    "length": int | None,
    "first tokens": [int],
    "tokenizer": str,
    "sha256": str,
}
"""What is read of how calibration data was drawn; there may be more."""


def to_data(
    steps: Iterable[Step],
    edits: Edits | None = None,
    calibration: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what a plan holds, but for the values of weights, as JSON data."""
    steps = tuple(steps)
    told = _WITH_BRANCHES if any(step.branches for step in steps) else _FORMAT
    data: dict[str, Any] = {
        "format": told if edits is None else max(told, _WITH_EDITS),
        "steps": [_step_to_data(step) for step in steps],
    }
    if edits is not None:
        data["edits"] = [_edit_to_data(edit) for edit in edits.made]
        data["values"] = edits.digest
    if calibration is not None:
        data["calibration"] = dict(calibration)
    return data


def from_data(data: Any) -> tuple[tuple[Step, ...], Edits | None, dict[str, Any] | None]:
    """Return the steps, edits and calibration that `to_data` made `data` of.

    Raises
    ------
    PlanError
        When the data is no plan.
    """
    if not isinstance(data, dict):
        raise PlanError(f"not a plan: it holds {type(data).__name__}, and a plan is an object")
    try:
        if data["format"] not in (_FORMAT, _WITH_EDITS, _WITH_BRANCHES):
            raise PlanError(
                f"plan format {data['format']} is none of {_FORMAT} to {_WITH_BRANCHES}"
            )
        _conform(data["steps"], _STEPS, "steps")
        steps = tuple(map(_step_from_data, data["steps"]))
        edited = data["format"] == _WITH_EDITS or "edits" in data
        edits = _edits_from_data(data) if edited else None
        calibration = data.get("calibration")
        if calibration is not None:
            _conform({**_UNTOLD, **calibration}, _CALIBRATION, "calibration")
    except KeyError as error:
        raise PlanError(f"not a plan: it has no {error}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise PlanError(f"not a plan: {error}") from error
    for step in steps:
        changes: tuple[Cut | Merge, ...] = (*step.cuts, *step.merges)
        for change in changes:
            check_change(change)
    return steps, edits, calibration


def _conform(data: Any, form: Any, where: str) -> None:
    """Refuse JSON data that is not of a form: a dict of forms, a list of one, or a type."""
    if isinstance(form, dict):
        if not isinstance(data, dict):
            raise TypeError(f"{where} is no object")
        for key, inner in form.items():
            # Plans of earlier releases name no owners and no branches.
            held = data.get(key, _ABSENT[key]) if key in _ABSENT else data[key]
            _conform(held, inner, f"{where}.{key}")
    elif isinstance(form, list):
        if type(data) is not list:
            raise TypeError(f"{where} is no list")
        for index, item in enumerate(data):
            _conform(item, form[0], f"{where}[{index}]")
    elif form is bool and isinstance(data, bool):
        return
    elif not isinstance(data, form) or isinstance(data, bool) or (type(data) is int and data < 0):
        raise TypeError(f"{where} is {data!r}")


def _step_to_data(step: Step) -> dict[str, Any]:
    data: dict[str, Any] = {
        "fingerprint": step.fingerprint,
        "cuts": [_cut_to_data(cut) for cut in step.cuts],
        "merges": [_merge_to_data(merge) for merge in step.merges],
    }
    if step.branches:
        data["branches"] = [_branch_to_data(branch) for branch in step.branches]
    return data


def _branch_to_data(branch: Branch) -> dict[str, Any]:
    weights = [{"name": name, "shape": list(shape)} for name, shape in branch.weights.items()]
    return {"name": branch.name, "weights": weights, "caches": list(branch.caches)}


def _cut_to_data(cut: Cut) -> dict[str, Any]:
    return {
        "group": cut.group,
        "size": cut.size,
        "role": cut.role,
        "parents": list(cut.parents),
        "units": [[list(parents), list(units)] for parents, units in cut.units.items()],
        "members": [dataclasses.asdict(member) for member in cut.members],
    }


def _merge_to_data(merge: Merge) -> dict[str, Any]:
    return {
        "group": merge.group,
        "size": merge.size,
        "groups": merge.groups,
        "members": [dataclasses.asdict(member) for member in merge.members],
        "orders": [_permutation_to_data(each) for each in merge.deinterleaving],
        "moves": [_permutation_to_data(each) for each in merge.reordering],
    }


def _permutation_to_data(permutation: Permutation) -> dict[str, Any]:
    return {
        "weight": permutation.weight,
        "dim": permutation.dim,
        "places": list(permutation.sources),
    }


def _edit_to_data(edit: Edit) -> dict[str, Any]:
    return {
        "pass": edit.by,
        "weights": list(edit.weights),
        "patterns": [list(pair) for pair in edit.patterns.items()],
        "graph": edit.graph,
    }


def _edits_from_data(data: dict[str, Any]) -> Edits:
    _conform(data["edits"], _EDITS, "edits")
    _conform(data["values"], str, "values")
    made = (
        Edit(each["pass"], tuple(each["weights"]), dict(each["patterns"]), each["graph"])
        for each in data["edits"]
    )
    return Edits(tuple(made), data["values"])


def _step_from_data(data: dict[str, Any]) -> Step:
    return Step(
        data["fingerprint"],
        tuple(map(_cut_from_data, data["cuts"])),
        tuple(map(_merge_from_data, data["merges"])),
        tuple(map(_branch_from_data, data.get("branches", ()))),
    )


def _branch_from_data(data: dict[str, Any]) -> Branch:
    weights = {each["name"]: tuple(each["shape"]) for each in data["weights"]}
    return Branch(data["name"], weights, tuple(data["caches"]))


def _cut_from_data(data: dict[str, Any]) -> Cut:
    return Cut(
        data["group"],
        data["size"],
        data["role"],
        {tuple(parents): tuple(units) for parents, units in data["units"]},
        tuple(data["parents"]),
        tuple(map(_member_from_data, data["members"])),
    )


def _merge_from_data(data: dict[str, Any]) -> Merge:
    return Merge(
        data["group"],
        data["size"],
        data["groups"],
        tuple(map(_member_from_data, data["members"])),
        tuple(map(_permutation_from_data, data["orders"])),
        tuple(map(_permutation_from_data, data["moves"])),
    )


def _member_from_data(data: dict[str, Any]) -> IndexMap:
    return IndexMap(
        data["weight"],
        data["dim"],
        data["offset"],
        data["width"],
        data["extent"],
        tuple((size, stride) for size, stride in data["outer"]),
        tuple(data["outer_groups"]),
        data.get("owner"),
    )


def _permutation_from_data(data: dict[str, Any]) -> Permutation:
    return Permutation(data["weight"], data["dim"], tuple(data["places"]))
