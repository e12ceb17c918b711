"""Coupled groups: axes that can lose units, and every weight slice that goes along."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from graphprune.analysis.axes import Atom, Axis, Occurrence, Product
from graphprune.analysis.groups import Exactness, Group, earlier_names, group_names
from graphprune.analysis.index_maps import index_map, weight_occurrences
from graphprune.analysis.inference import infer
from graphprune.analysis.roles import LABELS, Role, find_roles
from graphprune.analysis.types import Types
from graphprune.errors import PROGRAMS, UsageError, nearest, refuse_other
from graphprune.io.extensions import extension
from graphprune.ir.program import Program
from graphprune.ir.provenance import whereabouts
from graphprune.plan.index_map import IndexMap

if TYPE_CHECKING:
    import networkx

    from graphprune.analysis.operators.facts import Frozen
    from graphprune.plan.plan import Plan

Occurrences = dict[Atom, list[tuple[str, int, int, Occurrence]]]
"""Atom -> (weight, dim, its size, occurrence) for each time that it occurs in a weight."""


@dataclass(frozen=True)
class AxisType:
    """The axes of a weight, printable as ``[(kv q [r + r]), hidden]``."""

    text: tuple[str, ...]
    axes: tuple[Axis, ...]

    def __str__(self) -> str:
        return f"[{', '.join(self.text)}]"


class Coupling:
    """The coupled groups of a program and the axis types behind them; `analyze` makes it."""

    def __init__(self, types: Types) -> None:
        self.types = types
        self.program = types.program

    # -- groups ---------------------------------------------------------------------------------

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """All groups, in the order in which their first member appears."""
        return tuple(self._by_atom.values())

    def group(self, name: str) -> Group:
        """Return the group called `name`, now or in an earlier release.

        Raises
        ------
        UsageError
            When there is none, with the nearest name.
        """
        if name not in self._by_name:
            one_of_each = {group.role: group.name for group in reversed(self.groups)}.values()
            hint = nearest(name, self._by_name) or f"; there are such as {', '.join(one_of_each)}"
            raise UsageError(f"the program has no group {name!r}{hint if self.groups else ''}")
        return self._by_name[name]

    @cached_property
    def current_names(self) -> dict[str, str]:
        """Every name that a group has, or had in an earlier release -> its name now."""
        return {name: group.name for name, group in self._by_name.items()}

    def sizes(self, group: Group) -> tuple[int, ...]:
        """Return the sizes of the parents of `group`, and its own."""
        return (*(self.group(parent).size for parent in group.parents), group.size)

    def atom(self, name: str) -> Atom:
        """Return the axis behind the group called `name`."""
        group = self.group(name)
        return next(atom for atom, found in self._by_atom.items() if found is group)

    def group_of(self, atom: Atom) -> Group | None:
        """Return the group of an unbound atom, or None when it is frozen."""
        return self._by_atom.get(atom)

    @cached_property
    def _by_name(self) -> dict[str, Group]:
        """Groups by name; by the names of earlier releases, too."""
        earlier = earlier_names(self._weights_of, self._roles)
        found = {earlier[atom]: group for atom, group in self._by_atom.items()}
        return found | {group.name: group for group in self.groups}

    @cached_property
    def _owners(self) -> dict[str, list[tuple[Group, int]]]:
        """Weight that a unit owns -> the groups of such units, and which unit it is."""
        found: dict[str, list[tuple[Group, int]]] = defaultdict(list)
        for group in self.groups:
            for member in group.members:
                if member.owner is not None:
                    found[member.weight].append((group, member.owner))
        return found

    @cached_property
    def _occurrences(self) -> Occurrences:
        """Every atom that can lose units -> where it occurs in weights."""
        found: Occurrences = defaultdict(list)
        for entry in weight_occurrences(self.types):
            if entry[-1].atom not in self.types.frozen:
                found[entry[-1].atom].append(entry)
        kinds = self.program.kinds
        return {
            atom: entries
            for atom, entries in found.items()
            if any(kinds[weight] == "parameter" for weight, *_ in entries)
        }

    @cached_property
    def _by_atom(self) -> dict[Atom, Group]:
        occurrences, roles = self._occurrences, self._roles
        names = group_names(self._weights_of, roles)
        parents = _parents(self.types, occurrences)
        exactness = self._exactness()
        return {
            atom: Group(
                name=names[atom],
                size=atom.size,
                role=roles[atom],
                exactness=exactness.get(atom, ("exact", ""))[0],
                why=exactness.get(atom, ("exact", ""))[1],
                members=(*(index_map(*entry, names) for entry in found), *self._owned(atom)),
                parents=tuple(names[parent] for parent in parents[atom]),
                min_units=self.types.min_units.get(atom, 1),
            )
            for atom, found in occurrences.items()
        }

    @cached_property
    def _roles(self) -> dict[Atom, Role]:
        return find_roles(self.types, self._occurrences.keys())

    @cached_property
    def _weights_of(self) -> dict[Atom, list[str]]:
        """The weights that each atom reaches into."""
        return {
            atom: [*(weight for weight, *_ in found), *(m.weight for m in self._owned(atom))]
            for atom, found in self._occurrences.items()
        }

    def _owned(self, atom: Atom) -> Iterator[IndexMap]:
        """Return the weights that one unit of an atom owns, unit by unit."""
        owner = self.types.owners.get(atom)
        for unit, weights in enumerate(owner.weights if owner is not None else ()):
            for weight in weights:
                extent = self.program.weights[weight].shape[0]
                yield IndexMap(weight, 0, 0, extent, extent, owner=unit)

    def _exactness(self) -> dict[Atom, tuple[Exactness, str]]:
        found: dict[Atom, tuple[Exactness, str]] = {}
        facts, axes = self.types.facts, self.types.axes
        for each in self.types.normalized_weights:
            for atom in () if each.foldable else each.atoms:
                why = f"a norm of {each.name} runs over it, at {whereabouts(each.result)}"
                found.setdefault(atom, ("approximate", why))
        for entry in facts.statistics:
            for atom in axes.atoms(entry.axis):
                why = f"mean and variance over it at {whereabouts(entry.node)}"
                found.setdefault(atom, ("approximate", why))
        for mean in facts.means:
            for atom in axes.atoms(mean.axis):
                found.setdefault(atom, ("rescaled", f"mean over it at {whereabouts(mean.node)}"))
        return found

    # -- weights --------------------------------------------------------------------------------

    def type_of(self, weight: str) -> AxisType:
        """Return the axis type of `weight`, printable.

        Raises
        ------
        UsageError
            When the program has no such weight.
        """
        self.program.weight(weight)
        type_ = self.types.weight(weight)
        names: dict[Axis, str] = {}
        taken: dict[str, int] = defaultdict(int)
        for atom in itertools.chain.from_iterable(map(self.types.axes.atoms, type_)):
            group = self._by_atom.get(atom)
            if group is None or atom in names:
                continue
            label = LABELS[group.role]
            taken[label] += 1
            names[atom] = label if taken[label] == 1 else f"{label}{taken[label]}"
        text = tuple(self.types.axes.show(axis, names) for axis in type_)
        return AxisType(text, tuple(map(self.types.axes.resolve, type_)))

    def explain(self, weight: str, dim: int) -> str:
        """Return what dimension `dim` of `weight` is made of, and why parts of it cannot be pruned.

        Raises
        ------
        UsageError
            When there is no such weight or dimension.
        """
        rank = self.program.weight(weight).ndim
        if type(dim) is not int:
            raise UsageError(f"dimension {dim!r} of {weight}: give its number, such as 0")
        if not -rank <= dim < rank:
            raise UsageError(f"{weight} has {rank} dimensions, there is no dimension {dim}")
        dim %= rank
        lines = [f"{weight}, dimension {dim}: {self.type_of(weight).text[dim]}"]
        for atom in dict.fromkeys(self.types.axes.atoms(self.types.weight(weight)[dim])):
            group = self._by_atom.get(atom)
            reason = self.types.frozen.get(atom)
            if group is not None:
                lines.append(
                    f"  {group.size} units of group {group.name} ({group.role}, {group.exactness})"
                )
                if group.why:
                    lines.append(f"    {group.why}")
            elif reason is not None:
                lines.append(f"  {atom.size} frozen: {reason.why}, at {whereabouts(reason.node)}")
            else:
                lines.append(f"  {atom.size} frozen: no parameter holds it")
        for group, owner in self._owners.get(self.program.aliases.get(weight, weight), ()):
            lines.append(f"  all of it goes with unit {owner} of group {group.name}")
        if len(lines) == 1:
            lines.append("  fixed: a dimension of single positions")
        return "\n".join(lines)

    def frozen(self) -> Iterator[tuple[str, int, Frozen]]:
        """(weight, dim, reason) of every frozen axis inside a parameter."""
        for name, node in self.program.weight_nodes():
            if self.program.kinds[name] != "parameter":
                continue
            for dim, axis in enumerate(self.types.axes_of[node]):
                for atom in dict.fromkeys(self.types.axes.atoms(axis)):
                    if atom in self.types.frozen:
                        yield name, dim, self.types.frozen[atom]

    # -- as data --------------------------------------------------------------------------------

    @cached_property
    def graph(self) -> networkx.Graph:
        """Weights and groups as an undirected bipartite graph.

        Nodes have ``kind`` "weight" (with ``shape`` and ``type``) or "group" (with ``size``,
        ``role`` and ``exactness``); an edge's ``dims`` are the dimensions of the weight that the
        group reaches into. So everything coupled with a weight is
        ``networkx.node_connected_component(graph, weight)``, and its own groups are
        ``graph[weight]``.
        """
        import networkx

        graph: networkx.Graph = networkx.Graph()
        for name, weight in self.program.weights.items():
            text = str(self.type_of(name))
            graph.add_node(name, kind="weight", shape=tuple(weight.shape), type=text)
        for group in self.groups:
            graph.add_node(
                group.name,
                kind="group",
                size=group.size,
                role=group.role,
                exactness=group.exactness,
            )
            dims: dict[str, list[int]] = defaultdict(list)
            for member in group.members:
                if member.dim not in dims[member.weight]:
                    dims[member.weight].append(member.dim)
            for weight_name, found in dims.items():
                graph.add_edge(weight_name, group.name, dims=found)
        return graph

    def to_json(self, indent: int | None = 1) -> str:
        """Return groups, types of weights and reasons to freeze as JSON text."""
        return self.render("json", indent=indent)

    def to_dot(self) -> str:
        """Return the bipartite graph in Graphviz' language."""
        return self.render("dot")

    def to_graphml(self) -> str:
        """Return the bipartite graph as GraphML, with shapes and dimensions as text."""
        return self.render("graphml")

    def to_html(self, title: str = "program", plan: Plan | None = None, **options: Any) -> str:
        """Return one self-contained page to look into; see `graphprune.report.html_page.page`."""
        return self.render("html", title=title, plan=plan, **options)

    def render(self, form: str, **options: Any) -> Any:
        """Return the analysis in a `form` that is installed, such as "html".

        Parameters
        ----------
        form
            A name in the entry-point group ``graphprune.renderers``.
        options
            As the renderer takes them beside the coupling.

        Raises
        ------
        UsageError
            When no such renderer is installed, with the nearest name.
        """
        return extension("graphprune.renderers", form)(self, **options)

    def _repr_html_(self) -> str:
        """Return the page in a frame, for notebooks."""
        import html

        return (
            f'<iframe srcdoc="{html.escape(self.to_html())}" '
            'style="width: 100%; height: 45rem; border: 0"></iframe>'
        )

    def __str__(self) -> str:
        return "\n".join(map(str, self.groups))

    def __repr__(self) -> str:
        source, weights = self.program.source, len(self.program.weights)
        name = source.model_class.__name__ if source else "a program"
        kinds: dict[str, int] = defaultdict(int)
        for group in self.groups:
            kinds[f"{group.role} of {group.size} units, {group.exactness}"] += 1
        lines = (f"  {count} {kind}" for kind, count in kinds.items())
        head = f"<Coupling of {name}: {len(self.groups)} groups in {weights} weights>"
        return "\n".join([head, *lines])


def analyze(program: Program) -> Coupling:
    """Infer the axis types of `program` and the groups that follow from them.

    Needs no weights: it works on a program captured on the meta device.

    Returns
    -------
    Coupling
        Groups, printable types of weights, reasons to freeze, and the dependency graph.

    Raises
    ------
    UsageError
        When `program` is a model that is not captured.
    """
    refuse_other(program, than=Program, how=PROGRAMS)
    return Coupling(infer(program))


def _parents(types: Types, occurrences: Occurrences) -> dict[Atom, tuple[Atom, ...]]:
    """Atoms under each of whose units an atom may lose other units.

    That is right for a parent that stands around the atom in every weight (so that the weights can
    be gathered parent by parent), and once beside it in every other tensor and in what an operator
    sums (so that nothing mixes the parent's units while the atom is there). What a normalization's
    statistics run over keeps the same units everywhere, so that they can be told, and so does what
    owns whole weights.
    """
    candidates: dict[Atom, list[Atom]] = {}
    facts = types.facts
    together = {atom for entry in facts.statistics for atom in types.axes.atoms(entry.axis)}
    for atom, found in occurrences.items():
        loops = [[axis for axis, _ in occurrence.outer] for *_, occurrence in found]
        around = [[a for a in each if isinstance(a, Atom) and a in occurrences] for each in loops]
        candidates[atom] = [a for a in around[0] if all(a in other for other in around)]
        if atom in together or atom in types.owners:
            candidates[atom] = []
    watched = {atom for atom, found in candidates.items() if found}
    if watched:
        for node, type_ in types.axes_of.items():
            if (
                type_ is None
                or node.op == "placeholder"
                or watched.isdisjoint(types.atoms_of[node])
            ):
                continue
            for one in type_ if isinstance(type_, list) else [type_]:
                _narrow_parents(types, one or (), watched, candidates)
        sums = [(entry.axis, entry.node) for entry in facts.contractions]
        sums += [(entry.axis, entry.node) for entry in facts.statistics]
        for axis, node in sums:
            results = (
                types.axes_of[node]
                if isinstance(types.axes_of[node], list)
                else [types.axes_of[node]]
            )
            for result in results:
                _narrow_parents(types, (axis, *result), watched, candidates)
    return {atom: tuple(found) for atom, found in candidates.items()}


def _narrow_parents(
    types: Types, type_: tuple[Axis, ...], watched: set[Atom], candidates: dict[Atom, list[Atom]]
) -> None:
    """Keep only candidates that stand once beside their atom everywhere in a tensor of `type_`."""
    top: list[tuple[Axis, ...]] = []
    for axis in type_:
        axis = types.axes.head(axis)
        top.append(axis.factors if isinstance(axis, Product) else (axis,))
    for dim, axis in enumerate(type_):
        for occurrence in types.axes.occurrences(axis):
            atom = occurrence.atom
            if atom not in watched or not candidates[atom]:
                continue
            beside = [outer for outer, _ in occurrence.outer]
            beside += itertools.chain(*top[:dim], *top[dim + 1 :])
            candidates[atom] = [a for a in candidates[atom] if beside.count(a) == 1]
