"""A program's dependency graph as one page: what it is made of, what is coupled, what a plan takes.

The page is a template with a document inside, and needs nothing else: no network, no build step.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from typing import TYPE_CHECKING, Any, get_args

from torch import fx

from graphprune.analysis.axes import Atom, Axis, Product, Sum
from graphprune.analysis.coupling import Coupling
from graphprune.analysis.groups import Group
from graphprune.analysis.roles import LABELS
from graphprune.ir.aten import printed_name
from graphprune.ir.provenance import module_path, source_line, whereabouts
from graphprune.plan.plan import Plan
from graphprune.report.coupling_paths import CouplingPaths
from graphprune.report.overview import notes_of
from graphprune.selection.cost import TOKENS, Cost, Costs
from graphprune.transforms.apply import apply_plan

if TYPE_CHECKING:
    from graphprune.backends.huggingface.save import CheckpointForm
    from graphprune.ir.program import Program

MARK = "__DOCUMENT__"

SCRIPTS = ("document.js", "strips.js", "graph.js", "details.js", "start.js")
"""Parts of the page's script, in the order in which they run."""


def page(
    coupling: Coupling,
    title: str = "program",
    plan: Plan | None = None,
    checkpoint_form: Callable[[Program], CheckpointForm] | None = None,
) -> str:
    """Return the analysis of a program as one self-contained HTML page.

    Parameters
    ----------
    coupling
        The analysis.
    title
        What to call the program.
    plan
        What goes is shown, if this is given.
    checkpoint_form
        Says how the result can be written for transformers, such as
        `graphprune.backends.huggingface.save.checkpoint_form`, which builds models to know it.

    Raises
    ------
    PlanError
        When the plan was made for another program.
    """
    return _filled(document(coupling, title, plan, checkpoint_form))


def bare_page(title: str, shapes: Mapping[str, tuple[int, ...]], problem: str) -> str:
    """Return a page of the weights of a checkpoint that cannot be captured, and why."""
    weights = [
        {"n": name, "s": list(shape), "k": "parameter", "t": list(shape), "x": ""}
        for name, shape in shapes.items()
    ]
    return _filled({"title": title, "problem": problem, "weights": weights})


def _filled(data: Mapping[str, Any]) -> str:
    parts = files("graphprune") / "data" / "page"
    page, style, *scripts = (
        (parts / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", *SCRIPTS)
    )
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    for mark, value in (
        ("__STYLE__", style),
        ("__SCRIPT__", "".join(scripts)),
        ("__TITLE__", html.escape(str(data["title"]))),
        (MARK, text.replace("</", "<\\/")),  # a script ends at the first "</", wherever it stands
    ):
        page = page.replace(mark, value)
    return page


def document(
    coupling: Coupling,
    title: str = "program",
    plan: Plan | None = None,
    checkpoint_form: Callable[[Program], CheckpointForm] | None = None,
) -> dict[str, Any]:
    """Return what the page shows, as JSON can hold it.

    Keys are short, as there is one for every weight of every layer: see the comments in
    ``data/page/document.js``, which reads them.
    """
    return _Document(coupling, plan, checkpoint_form).whole(title)


@dataclass(eq=False)
class _Document:
    coupling: Coupling
    plan: Plan | None
    checkpoint_form: Callable[[Program], CheckpointForm] | None
    reasons: dict[tuple[str, str], int] = field(default_factory=dict)
    operators: dict[fx.Node, int] = field(default_factory=dict)

    def whole(self, title: str) -> dict[str, Any]:
        program = self.coupling.program
        weights = [self._weight(name) for name in program.weights]
        groups = [self._group(group) for group in self.coupling.groups]
        costs = {cost: self.costs.after(cost, {}) for cost in get_args(Cost)}
        source = program.source
        return {
            "title": title,
            "class": source.model_class.__name__ if source else "",
            "costs": costs,
            "tokens": TOKENS if any(v.name.endswith("input_ids") for v in program.inputs) else 0,
            "notes": notes_of(program),
            "weights": weights,
            "groups": groups,
            "reasons": [{"w": why, "a": where} for why, where in self.reasons],
            "operators": [_operator(node) for node in self.operators],
            "plan": self._planned() if self.plan is not None else None,
        }

    @cached_property
    def costs(self) -> Costs:
        return Costs(self.coupling)

    @cached_property
    def paths(self) -> CouplingPaths:
        return CouplingPaths(self.coupling)

    @cached_property
    def numbers(self) -> dict[str, int]:
        return {group.name: number for number, group in enumerate(self.coupling.groups)}

    @cached_property
    def numbers_of_weights(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.coupling.program.weights)}

    # -- weights --------------------------------------------------------------------------------

    def _weight(self, name: str) -> dict[str, Any]:
        program, type_ = self.coupling.program, self.coupling.type_of(name)
        found = {
            "n": name,
            "s": list(program.weights[name].shape),
            "k": program.kinds[name],
            "t": [self._axis(axis) for axis in type_.axes],
            "x": str(type_),
        }
        tied = [alias for alias, held in program.aliases.items() if held == name]
        return {**found, "tied": tied} if tied else found

    def _axis(self, axis: Axis) -> Any:
        """Return a size (fixed), or what an axis is made of: its kind and its parts."""
        axis = self.coupling.types.axes.head(axis)
        if isinstance(axis, Product):
            if not axis.factors:
                return 1
            return {"p": [self._axis(factor) for factor in axis.factors]}
        if isinstance(axis, Sum):
            return {"+": [self._axis(term) for term in axis.terms]}
        assert isinstance(axis, Atom)
        group = self.coupling.group_of(axis)
        if group is not None:
            return {"g": self.numbers[group.name]}
        reason = self.coupling.types.frozen.get(axis)
        key = (
            ("no parameter holds it", "")
            if reason is None
            else (reason.why, "" if reason.node.op == "placeholder" else whereabouts(reason.node))
        )
        return {"f": self.reasons.setdefault(key, len(self.reasons)), "s": axis.size}

    # -- groups ---------------------------------------------------------------------------------

    def _group(self, group: Group) -> dict[str, Any]:
        found: dict[str, Any] = {
            "n": group.name,
            "b": LABELS[group.role],
            "s": group.size,
            "r": group.role,
            "x": group.exactness,
            "m": [
                [
                    self.numbers_of_weights[m.weight],
                    m.dim,
                    m.offset,
                    m.width,
                    [
                        [size, stride, self.numbers[name] if name is not None else -1]
                        for (size, stride), name in zip(m.outer, m.outer_groups, strict=True)
                    ],
                    -1 if m.owner is None else m.owner,
                ]
                for m in group.members
            ],
            "c": self._shares(group),
            "t": self._tree(group),
        }
        if group.why:
            found["w"] = group.why
        if group.parents:
            found["p"] = [self.numbers[name] for name in group.parents]
        if group.min_units > 1:
            found["l"] = group.min_units
        return found

    def _shares(self, group: Group) -> list[int]:
        """Return what one unit saves: parameters, multiply-accumulates, bytes of KV cache."""
        return [self.costs.unit(cost, group.name) for cost in get_args(Cost)]

    def _tree(self, group: Group) -> list[list[int]]:
        """Return the paths from the first member: (value, operator, value before), by numbers.

        Values are numbered in this list; the first are the weights of the group in order.
        """
        nodes = dict(self.coupling.program.weight_nodes())
        members = group.weights()
        tree = self.paths.tree(group.name, members[0])
        values = {nodes[name]: number for number, name in enumerate(members)}
        steps: dict[int, list[int]] = {}
        queue = list(values)
        while queue:
            value = queue.pop()
            step = tree.get(value)
            if step is None or values[value] in steps:
                continue
            if step.value not in values:
                values[step.value] = len(values)
            queue.append(step.value)
            operator = self.operators.setdefault(step.operator, len(self.operators))
            steps[values[value]] = [values[value], operator, values[step.value]]
        return list(steps.values())

    # -- a plan ---------------------------------------------------------------------------------

    def _planned(self) -> dict[str, Any]:
        assert self.plan is not None
        program = self.coupling.program
        self.plan.check(program)
        after = apply_plan(program, self.plan.without_edits())
        shapes = {name: list(weight.shape) for name, weight in after.weights.items()}
        changed = {
            self.numbers_of_weights[name]: shape
            for name, shape in shapes.items()
            if name in self.numbers_of_weights and shape != list(program.weights[name].shape)
        }
        for name in self.plan.steps[0].whole if self.plan.steps else ():
            changed[self.numbers_of_weights[name]] = [0]
        return {
            "shapes": changed,
            "units": self._units_that_go(),
            "merged": {
                self.numbers[merge.group]: merge.groups
                for step in self.plan.steps
                for merge in step.merges
                if merge.group in self.numbers
            },
            "gone": {
                self.numbers_of_weights[weight]: {dim: _runs(lost) for dim, lost in dims.items()}
                for weight, dims in self.plan.removed.items()
            },
            "costs": {
                "params": after.parameter_count(),
                "kv_bytes": after.kv_bytes_per_token(),
            },
            "loads": self._loads(after),
        }

    def _units_that_go(self) -> dict[int, int]:
        """Return how many units of each group go (under each parent)."""
        assert self.plan is not None
        names, found = self.coupling.current_names, dict[int, int]()
        for cut in (cut for step in self.plan.steps for cut in step.cuts if cut.group in names):
            number = self.numbers[names[cut.group]]
            found[number] = found.get(number, 0) + cut.count
        return found

    def _loads(self, after: Program) -> dict[str, str] | None:
        """Return how the result can be written for transformers, where that is asked."""
        if after.source is None:
            return {"kind": "none", "why": "it was not captured from a transformers model"}
        if self.checkpoint_form is None:
            return None
        found = self.checkpoint_form(after)
        return {"kind": found.kind, "why": found.reason}


def _runs(indices: list[int]) -> list[int]:
    """Return sorted indices as starts and lengths of runs, one after the other."""
    runs: list[int] = []
    for index in indices:
        if runs and index == runs[-2] + runs[-1]:
            runs[-1] += 1
        else:
            runs += [index, 1]
    return runs


def _operator(node: fx.Node) -> list[str]:
    return [printed_name(node.target), module_path(node), source_line(node)]
