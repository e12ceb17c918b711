"""Coupled groups: axes that can lose units, and every weight slice that goes along."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from graphprune.analysis.axes import Atom, Axis, Occurrence, Product
from graphprune.analysis.inference import Types, infer
from graphprune.analysis.roles import LABELS, Role, find_roles
from graphprune.errors import PlanError, UsageError, nearest
from graphprune.io.extensions import extension
from graphprune.ir.program import Program
from graphprune.ir.provenance import whereabouts
from graphprune.plan.checks import check_change
from graphprune.plan.index_map import IndexMap
from graphprune.plan.steps import Cut

if TYPE_CHECKING:
    import networkx

    from graphprune.analysis.operators.rule import Frozen
    from graphprune.plan.plan import Plan

Exactness = Literal["exact", "rescaled", "approximate"]


@dataclass(frozen=True)
class Group:
    """A coupled group: removing a unit removes its slice of every member.

    Parameters
    ----------
    name
        Stable name: the module that the members share, and what the group is.
    size
        Number of units.
    role
        What the axis does in the graph.
    exactness
        "exact" where removing equals zeroing, "rescaled" where a mean's divisor has to be kept,
        "approximate" where a normalisation's statistics change.
    why
        Why it is not exact ("" when it is).
    members
        Every place of the group in a weight.
    parents
        Groups under each of whose units this one may lose other units (equally many).
    least
        How many units must stay: 1, or as many experts as are chosen at once.
    """

    name: str
    size: int
    role: Role
    exactness: Exactness
    why: str
    members: tuple[IndexMap, ...]
    parents: tuple[str, ...] = ()
    least: int = 1

    @property
    def is_zeroing(self) -> bool:
        """Whether removing units equals zeroing their slices of the weights."""
        return self.exactness == "exact" and self.role != "expert"

    def cut(self, units: Mapping[tuple[int, ...], tuple[int, ...]]) -> Cut:
        """Return the cut that takes `units`; without parents the only key is the empty tuple.

        Raises
        ------
        PlanError
            When a unit does not exist, parents lose unequally many, or nothing would be left.
        """
        ordered = {place: tuple(sorted(set(found))) for place, found in sorted(units.items())}
        parents = self.parents if set(ordered) != {()} else ()
        cut = Cut(self.name, self.size, self.role, ordered, parents, self.members)
        check_change(cut)
        if self.size - cut.count < self.least:
            raise PlanError(
                f"{self.name}: {self.least} of its units are chosen at once and must stay"
            )
        return cut

    def weights(self) -> list[str]:
        """The names of the weights it reaches into, each once."""
        return list(dict.fromkeys(member.weight for member in self.members))

    def owned(self) -> dict[str, int]:
        """Weight that one unit owns -> which of the unit's weights it is, counted from 0.

        Those that are the same one of their units stand in place of one weight of all of them.
        """
        taken: dict[int, int] = defaultdict(int)
        found: dict[str, int] = {}
        for member in self.members:
            if member.owner is not None:
                found[member.weight] = taken[member.owner]
                taken[member.owner] += 1
        return found

    def __str__(self) -> str:
        head = f"{self.name}: {self.size} units, {self.role}, {self.exactness}"
        lines = [head + (f" ({self.why})" if self.why else "")]
        if self.parents:
            lines.append(f"  chosen per unit of {', '.join(self.parents)}")
        for m in self.members:
            if m.owner is not None:
                lines.append(f"  {m.weight}: whole, of unit {m.owner}")
                continue
            loops = "".join(f" + {stride}*[0,{size})" for size, stride in m.outer)
            wide = f" + [0,{m.width})" if m.width > 1 else ""
            lines.append(f"  {m.weight} dim {m.dim}: {m.offset}{loops} + {m.width}*unit{wide}")
        return "\n".join(lines)


@dataclass(frozen=True)
class AxisType:
    """The axes of a weight, printable as ``[(kv q [r + r]), hidden]``."""

    text: tuple[str, ...]
    axes: tuple[Axis, ...]

    def __str__(self) -> str:
        return f"[{', '.join(self.text)}]"


class Coupling:
    """The analysis of a program; see `analyze`."""

    def __init__(self, types: Types) -> None:
        self.types = types
        self.program = types.program

    # -- groups ---------------------------------------------------------------------------------

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """All groups, in the order in which their first member appears."""
        return tuple(self._by_atom.values())

    def group(self, name: str) -> Group:
        """The group called `name`.

        Raises
        ------
        UsageError
            When there is none, with the nearest name.
        """
        if name not in self._by_name:
            hint = nearest(name, self._by_name)
            raise UsageError(f"the program has no group {name!r}{hint}")
        return self._by_name[name]

    def sizes(self, group: Group) -> tuple[int, ...]:
        """The sizes of the parents of `group`, and its own."""
        return (*(self.group(parent).size for parent in group.parents), group.size)

    def atom(self, name: str) -> Atom:
        """The axis behind the group called `name`."""
        group = self.group(name)
        return next(atom for atom, found in self._by_atom.items() if found is group)

    def group_of(self, atom: Atom) -> Group | None:
        """The group of an unbound atom, or None when it is frozen."""
        return self._by_atom.get(atom)

    @cached_property
    def _by_name(self) -> dict[str, Group]:
        return {group.name: group for group in self.groups}

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
    def _places(self) -> dict[Atom, list[tuple[str, int, int, Occurrence]]]:
        """Every atom that can lose units -> (weight, dim, its size, occurrence) of its places."""
        places: dict[Atom, list[tuple[str, int, int, Occurrence]]] = defaultdict(list)
        frozen, axes = self.types.frozen, self.types.axes
        for name, node in self.program.weight_nodes():
            for dim, axis in enumerate(self.types.of[node]):
                for place in axes.occurrences(axis):
                    if place.atom not in frozen:
                        places[place.atom].append((name, dim, axis.size, place))
        kinds = self.program.kinds
        return {
            atom: found
            for atom, found in places.items()
            if any(kinds[weight] == "parameter" for weight, *_ in found)
        }

    @cached_property
    def _by_atom(self) -> dict[Atom, Group]:
        places = self._places
        roles = find_roles(self.types, places.keys())
        names = _names({atom: list(self._reached(atom)) for atom in places}, roles)
        parents = _parents(self.types, places)
        exactness = self._exactness()
        return {
            atom: Group(
                name=names[atom],
                size=atom.size,
                role=roles[atom],
                exactness=exactness.get(atom, ("exact", ""))[0],
                why=exactness.get(atom, ("exact", ""))[1],
                members=(
                    *(
                        IndexMap(
                            weight,
                            dim,
                            place.offset,
                            place.inner,
                            extent,
                            tuple((axis.size, stride) for axis, stride in place.outer),
                            tuple(names.get(axis) for axis, _ in place.outer),
                        )
                        for weight, dim, extent, place in found
                    ),
                    *self._owned(atom),
                ),
                parents=tuple(names[parent] for parent in parents[atom]),
                least=self.types.least.get(atom, 1),
            )
            for atom, found in places.items()
        }

    def _reached(self, atom: Atom) -> Iterator[str]:
        """The weights that an atom reaches into."""
        yield from (weight for weight, *_ in self._places[atom])
        yield from (member.weight for member in self._owned(atom))

    def _owned(self, atom: Atom) -> Iterator[IndexMap]:
        """The weights that one unit of an atom owns, unit by unit."""
        owner = self.types.owners.get(atom)
        for unit, weights in enumerate(owner.weights if owner is not None else ()):
            for weight in weights:
                extent = self.program.weights[weight].shape[0]
                yield IndexMap(weight, 0, 0, extent, extent, owner=unit)

    def _exactness(self) -> dict[Atom, tuple[Exactness, str]]:
        found: dict[Atom, tuple[Exactness, str]] = {}
        facts, axes = self.types.facts, self.types.axes
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
        """The axis type of `weight`, printable.

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
        """What dimension `dim` of `weight` is made of, and why parts of it cannot be pruned.

        Raises
        ------
        UsageError
            When there is no such weight or dimension.
        """
        rank = self.program.weight(weight).ndim
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
            lines.append("  fixed: a dimension of single places")
        return "\n".join(lines)

    def frozen(self) -> Iterator[tuple[str, int, Frozen]]:
        """(weight, dim, reason) of every frozen axis inside a parameter."""
        for name, node in self.program.weight_nodes():
            if self.program.kinds[name] != "parameter":
                continue
            for dim, axis in enumerate(self.types.of[node]):
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
        """Groups, types of weights and reasons to freeze, as JSON text."""
        document = {
            "fingerprint": self.program.fingerprint(),
            "groups": [
                {
                    "name": group.name,
                    "size": group.size,
                    "role": group.role,
                    "exactness": group.exactness,
                    "why": group.why,
                    "parents": list(group.parents),
                    "members": [
                        {
                            "weight": m.weight,
                            "dim": m.dim,
                            "offset": m.offset,
                            "width": m.width,
                            "outer": [list(loop) for loop in m.outer],
                            "owner": m.owner,
                        }
                        for m in group.members
                    ],
                }
                for group in self.groups
            ],
            "weights": {
                name: {"shape": list(weight.shape), "type": str(self.type_of(name))}
                for name, weight in self.program.weights.items()
            },
            "frozen": [
                {"weight": weight, "dim": dim, "why": reason.why, "where": whereabouts(reason.node)}
                for weight, dim, reason in self.frozen()
            ],
        }
        return json.dumps(document, indent=indent)

    def to_dot(self) -> str:
        """The bipartite graph in Graphviz' language."""
        lines = ["graph coupling {", "  rankdir=LR;", "  node [fontname=monospace];"]
        for node, data in self.graph.nodes(data=True):
            if data["kind"] == "weight":
                lines.append(f'  "{node}" [shape=box, label="{node}\\n{data["type"]}"];')
            else:
                label = f"{node}\\n{data['size']} units, {data['role']}, {data['exactness']}"
                lines.append(f'  "{node}" [shape=ellipse, label="{label}"];')
        for weight, group, data in self.graph.edges(data=True):
            dims = ",".join(map(str, data["dims"]))
            lines.append(f'  "{weight}" -- "{group}" [label="{dims}"];')
        return "\n".join([*lines, "}"])

    def to_graphml(self) -> str:
        """The bipartite graph as GraphML, with shapes and dimensions as text."""
        import networkx

        plain = self.graph.copy()
        for _, data in plain.nodes(data=True):
            if "shape" in data:
                data["shape"] = "x".join(map(str, data["shape"]))
        for _, _, data in plain.edges(data=True):
            data["dims"] = ",".join(map(str, data["dims"]))
        return "\n".join(networkx.generate_graphml(plain))

    def to_html(self, title: str = "program", plan: Plan | None = None) -> str:
        """Return one self-contained page to look into; see `graphprune.report.html_page`."""
        return self.render("html", title=title, plan=plan)

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
        """The page in a frame, for notebooks."""
        import html

        return (
            f'<iframe srcdoc="{html.escape(self.to_html())}" '
            'style="width: 100%; height: 45rem; border: 0"></iframe>'
        )

    def __str__(self) -> str:
        return "\n".join(map(str, self.groups))


def analyze(program: Program) -> Coupling:
    """Infer the axis types of `program` and the groups that follow from them.

    Needs no weights: it works on a program captured on the meta device.

    Returns
    -------
    Coupling
        Groups, printable types of weights, reasons to freeze, and the dependency graph.
    """
    return Coupling(infer(program))


def _names(members: Mapping[Atom, list[str]], roles: Mapping[Atom, Role]) -> dict[Axis, str]:
    """A stable name for each group: the module path that its weights share, and its label."""
    names: dict[Axis, str] = {}
    taken: dict[str, int] = defaultdict(int)
    for atom, weights in members.items():
        path = common_path(weights)
        name = f"{path}:{roles[atom]}" if path else str(roles[atom])
        taken[name] += 1
        names[atom] = name if taken[name] == 1 else f"{name}.{taken[name]}"
    return names


def common_path(weights: Iterable[str]) -> str:
    """The dotted path of the module that all `weights` share."""
    common: list[str] | None = None
    for weight in dict.fromkeys(weights):
        parts = weight.split(".")[:-1]
        if common is None:
            common = parts
            continue
        same = itertools.takewhile(
            lambda pair: pair[0] == pair[1], zip(common, parts, strict=False)
        )
        common = [part for part, _ in same]
    return ".".join(common or [])


def _parents(
    types: Types, places: Mapping[Atom, list[tuple[str, int, int, Occurrence]]]
) -> dict[Atom, tuple[Atom, ...]]:
    """Atoms under each of whose units an atom may lose other units.

    That is right for a parent that stands around the atom in every weight (so that the weights can
    be gathered parent by parent), and once beside it in every other tensor and in what an operator
    sums (so that nothing mixes the parent's units while the atom is there). What a normalisation's
    statistics run over keeps the same units everywhere, so that they can be told, and so does what
    owns whole weights.
    """
    candidates: dict[Atom, list[Atom]] = {}
    facts = types.facts
    together = {atom for entry in facts.statistics for atom in types.axes.atoms(entry.axis)}
    for atom, found in places.items():
        loops = [[axis for axis, _ in place.outer] for *_, place in found]
        around = [[a for a in each if isinstance(a, Atom) and a in places] for each in loops]
        candidates[atom] = [a for a in around[0] if all(a in other for other in around)]
        if atom in together or atom in types.owners:
            candidates[atom] = []
    watched = {atom for atom, found in candidates.items() if found}
    if watched:
        for node, type_ in types.of.items():
            if type_ is None or node.op == "placeholder" or watched.isdisjoint(types.held[node]):
                continue
            for one in type_ if isinstance(type_, list) else [type_]:
                _narrow_parents(types, one or (), watched, candidates)
        sums = [(entry.axis, entry.node) for entry in facts.contractions]
        sums += [(entry.axis, entry.node) for entry in facts.statistics]
        for axis, node in sums:
            results = types.of[node] if isinstance(types.of[node], list) else [types.of[node]]
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
        for place in types.axes.occurrences(axis):
            if place.atom not in watched or not candidates[place.atom]:
                continue
            beside = [outer for outer, _ in place.outer]
            beside += itertools.chain(*top[:dim], *top[dim + 1 :])
            candidates[place.atom] = [a for a in candidates[place.atom] if beside.count(a) == 1]
