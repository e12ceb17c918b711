"""Applying a plan: every step becomes a new program.

The user's module is never edited. Every weight keeps the indices that stay; every literal of the
graph that depends on a size follows from the axis types, as the rule of its operator said; means
keep their divisor. Sizes of all nodes are then derived again, by running the graph on tensors
without data, and compared with the types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from graphprune.analysis.axes import Axis
from graphprune.analysis.axis_cuts import AxisCut
from graphprune.analysis.coupling import Coupling, analyze
from graphprune.analysis.groups import Group
from graphprune.analysis.residual.branches import Branches
from graphprune.errors import PROGRAMS, PlanError, refuse_other
from graphprune.ir.program import Program
from graphprune.plan.checks import check_change
from graphprune.plan.plan import Plan
from graphprune.plan.steps import Cut, Step
from graphprune.transforms.branches import remove_branches
from graphprune.transforms.heads.merge import merge_heads
from graphprune.transforms.resize import Resize


def apply_step(program: Program, step: Step, coupling: Coupling | None = None) -> Program:
    """Return the program that `step` makes of `program`, which is left as it is.

    Parameters
    ----------
    program, step
        The program, and a step of a plan that was made for it.
    coupling
        The analysis of `program`, where it is at hand.

    Raises
    ------
    PlanError
        When the step was made for another program.
    RewriteError
        When the graph cannot follow; nothing is returned then.
    """
    if step.fingerprint != (found := program.fingerprint()):
        raise PlanError(f"the plan was made for program {step.fingerprint}, this one is {found}")
    if step.cuts:
        program = _remove(program, step.cuts, coupling or analyze(program))
    if step.merges:
        program = merge_heads(program, step.merges)
    if step.branches:
        types = (coupling or analyze(program)).types
        program = remove_branches(program, step.branches, Branches(types))
    return program


def apply_plan(program: Program, plan: Plan) -> Program:
    """Apply `plan` to `program`, which is left as it is.

    Weights that passes gave other values get those that the plan brings along.

    Raises
    ------
    PlanError
        When the plan was made for another program, or the values of edited weights are not at hand
        or do not fit: the result would be another model.
    RewriteError
        When the graph cannot follow; nothing is returned then.
    UsageError
        When one of them is something else.
    """
    refuse_other(program, than=Program, how=PROGRAMS)
    refuse_other(plan, than=Plan, how="read one with graphprune.Plan.load(path)")
    values = plan.edits.read() if plan.edits else {}
    for step in plan.steps:
        program = apply_step(program, step)
    return _edited(program, values)


def _edited(program: Program, values: Mapping[str, Tensor]) -> Program:
    """Return `program` with `values` of weights that passes edited."""
    fitting = {}
    for name, value in values.items():
        weight = program.weights.get(name)
        if weight is None or weight.shape != value.shape:
            found = "missing" if weight is None else f"of shape {tuple(weight.shape)}"
            wanted = tuple(value.shape)
            raise PlanError(f"the plan edits {name}, which is {found}, not of shape {wanted}")
        fitting[name] = value.to(weight)
    return program.with_weights(fitting) if fitting else program


def _remove(program: Program, cuts: tuple[Cut, ...], coupling: Coupling) -> Program:
    resize = Resize(coupling.types, _by_atom(cuts, coupling))
    resize.keep_divisors()
    return resize.program(resize.gathered(program.weights))


def _renamed(cut: Cut, coupling: Coupling) -> tuple[Cut, Group | None]:
    """Return `cut` by the names that groups have now, and its group, None where there is none."""
    names = coupling.current_names
    members = (
        replace(m, outer_groups=tuple(names.get(each or "", each) for each in m.outer_groups))
        for m in cut.members
    )
    parents = tuple(names.get(parent, parent) for parent in cut.parents)
    name = names.get(cut.group, cut.group)
    group = coupling.group(name) if name in names else None
    return replace(cut, group=name, parents=parents, members=tuple(members)), group


def _by_atom(cuts: tuple[Cut, ...], coupling: Coupling) -> dict[Axis, AxisCut]:
    found: dict[Axis, AxisCut] = {}
    for cut in cuts:
        cut, group = _renamed(cut, coupling)
        if group is None or group.size != cut.size or group.members != cut.members:
            raise PlanError(f"{cut.group}: the plan's group and the program's differ")
        if cut.parents not in ((), group.parents):
            raise PlanError(f"{cut.group}: units cannot be chosen per {', '.join(cut.parents)}")
        check_change(cut)
        if coupling.atom(cut.group) in found:
            raise PlanError(f"{cut.group}: it is cut twice in one step")
        if not cut.count:
            continue
        if cut.parents:
            parents = tuple(map(coupling.atom, cut.parents))
            found[coupling.atom(cut.group)] = AxisCut(parents=parents, per_parent=dict(cut.units))
        else:
            found[coupling.atom(cut.group)] = AxisCut(removed=cut.units[()])
    return found
