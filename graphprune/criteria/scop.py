"""SCOP: features beside those of a knockoff input, told apart by factors that are learned."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from graphprune import ranks
from graphprune.analysis.coupling import Coupling
from graphprune.analysis.groups import Group
from graphprune.analysis.index_maps import units_along
from graphprune.calibration.data import Calibration, inputs_of, own_batches
from graphprune.calibration.layerwise import unpadded
from graphprune.calibration.logits import Logits, run_to_logits, saves_memory
from graphprune.calibration.losses import check_task
from graphprune.criteria.base import Criterion, Scores, ScoringContext
from graphprune.criteria.gradients import finite_loss
from graphprune.criteria.knockoffs import permuted
from graphprune.errors import SelectionError
from graphprune.ir.interpreter import Hooks
from graphprune.ir.nodes import arguments_of
from graphprune.ir.program import Program
from graphprune.ir.provenance import operator_of
from graphprune.transforms.batch_norms import BATCH_NORM


class Scop(Criterion):
    """The scale of a unit times what its real features have over knockoff ones.

    SCOP (Tang et al. 2010.10732) mixes the features of every unit with those that the same network
    has on a knockoff input, ``beta A + (1 - beta) A~``, before the batch norm, and trains all beta
    at once on the `task_loss` with the weights frozen, by Adam at the paper's moments (0.5, 0.9)
    over `epochs` runs through the data. A unit whose real features are worth no more than those of
    the control keeps a beta of a half. Its score is ``|gamma| (2 beta - 1)`` with the batch norm's
    weight gamma, summed over the channels of the unit. What is trained is the argument of a sigmoid
    that gives beta, where the published code clamps beta itself.

    Departures: the knockoff is another sample's input (`knockoffs.permuted`), where the
    paper trains a generator; batch norms keep their statistics, so that beta = 1 gives the
    program's own outputs and nothing real comes into the knockoff features.

    An adaptation, where no batch norm is on the group: the features are mixed where the unit's
    activations come into what sums over them (as gates stand), and gamma is replaced by the
    standard deviation of the activations on the calibration data, which is what |gamma| is behind
    a batch norm.
    """

    name = "scop"
    requires_calibration = True
    epochs: ClassVar[int] = 20
    rate: ClassVar[float] = 0.02
    """Adam's learning rate for the argument of the sigmoid."""

    def scores(self, context: ScoringContext) -> Scores:
        """Return gamma times the difference of the factors.

        Raises
        ------
        SelectionError
            When nothing sums over a group, or where its units are depends on the data.
        CalibrationError
            As `loss_gradients` does, or when a sample has no other of its shapes.
        """
        sites = find_sites(context, self.name)
        beta = self.factors(context, sites)
        gamma = scales(context, sites)
        return {name: gamma[name] * (2 * each - 1) for name, each in beta.items()}

    @staticmethod
    def controls(calibration: Calibration, generator: torch.Generator) -> list[dict[str, Tensor]]:
        """Return the knockoff inputs of an epoch, of the shapes of the batches."""
        return permuted(calibration, generator)

    def factors(self, context: ScoringContext, sites: Sequence[FeatureSite]) -> Scores:
        """Train beta of every unit, in (0, 1).

        Steps follow each other: of several processes each does all of them, to the same end.
        """
        data, program = context.data(), context.program
        sizes = {group.name: context.sizes(group) for group in context.groups}
        device = program.device
        inner = {name: torch.zeros(math.prod(size), device=device) for name, size in sizes.items()}
        optimizer = torch.optim.Adam(
            [each.requires_grad_() for each in inner.values()], lr=self.rate, betas=(0.5, 0.9)
        )
        generator = torch.Generator().manual_seed(context.seed)
        batches = list(data.labeled())
        check_task(program, batches[0])
        for _ in context.track(range(self.epochs), "learning what is real"):
            knockoffs = self.controls(data, generator)
            for at in torch.randperm(len(batches), generator=generator).tolist():
                controls = features(program, sites, knockoffs[at])
                with torch.enable_grad():
                    beta = {name: each.sigmoid() for name, each in inner.items()}
                    logits = mixed(program, sites, batches[at], beta, controls)
                    loss = finite_loss(logits, batches[at])
                    optimizer.zero_grad()
                    loss.backward()
                optimizer.step()
        return {
            n: each.detach().sigmoid().double().view(sizes[n]).cpu() for n, each in inner.items()
        }


class ScopGamma(Scop):
    """The scale of a unit alone, ``|gamma|``: a control for `Scop` (network slimming's score).

    Calibration data is needed where no batch norm is on a group.
    """

    name = "scop-gamma"
    requires_calibration = False

    def scores(self, context: ScoringContext) -> Scores:
        """Return gamma of every unit.

        Raises
        ------
        SelectionError, CalibrationError
            As `Scop.scores` does.
        """
        return scales(context, find_sites(context, self.name))


class ScopBeta(Scop):
    """The advantage of real features over knockoff ones alone, ``2 beta - 1``: a control."""

    name = "scop-beta"

    def scores(self, context: ScoringContext) -> Scores:
        """Return the difference of the factors of every unit.

        Raises
        ------
        SelectionError, CalibrationError
            As `Scop.scores` does.
        """
        beta = self.factors(context, find_sites(context, self.name))
        return {name: 2 * each - 1 for name, each in beta.items()}


# -- where features are mixed ----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FeatureSite:
    """A node where the features of a group's units are read, and mixed.

    Parameters
    ----------
    group
        The group's name.
    node
        The operator that reads them.
    source
        The node whose value they are.
    units
        The unit (counted over all parents) that each element of the value belongs to, or -1; of a
        shape that broadcasts to the value's.
    gamma
        The batch norm's weight, of a shape that broadcasts so too; None where there is none.
    """

    group: str
    node: fx.Node
    source: fx.Node
    units: Tensor
    gamma: Tensor | None = None

    def total(self, values: Tensor, count: int) -> Tensor:
        """Sum `values`, of the shape of `units`, over the elements of each unit: ``[count]``."""
        at = torch.where(self.units < 0, count, self.units).flatten()
        found = torch.zeros(count + 1, dtype=torch.float64)
        return found.index_add_(0, at, values.double().cpu().flatten())[:count]


def find_sites(context: ScoringContext, criterion: str) -> list[FeatureSite]:
    """Find where each group's features are mixed: at its batch norms, else at what sums over it.

    Raises
    ------
    SelectionError
        When nothing sums over a group, or where its units are depends on the data.
    """
    program, found, rest = context.program, list[FeatureSite](), list[Group]()
    names = {node: name for name, node in program.weight_nodes()}
    norms = program.graph.find_nodes(op="call_function", target=BATCH_NORM)
    for group in context.groups:
        here = []
        for node in norms:
            args = arguments_of(node)
            units = units_at(context.coupling, group, args["input"])
            if units is None or units.shape[0] != units.numel():  # it is not over the channels
                continue
            gamma = torch.ones(units.shape)
            if args["weight"] is not None:
                gamma = context.weight(names[args["weight"]]).view(units.shape)
            here.append(FeatureSite(group.name, node, args["input"], units, gamma))
        found += here
        if not here:
            rest.append(group)
    held = dataclasses.replace(context, groups=rest).consumers(criterion)
    for group in rest:
        uses = [(use.node, use.source) for matrix, _ in held[group.name] for use in matrix.uses]
        for node, source in dict.fromkeys(uses):
            units = units_at(context.coupling, group, source)
            if units is None:
                raise SelectionError(
                    f"{group.name}: {criterion} needs to know which unit is which element of what "
                    f"{operator_of(node)} sums over, and that depends on the data"
                )
            found.append(FeatureSite(group.name, node, source, units))
    return found


def units_at(coupling: Coupling, group: Group, node: fx.Node) -> Tensor | None:
    """Return the unit of `group` that each element of a value belongs to; broadcasts to the value.

    Units are counted over all parents; -1 is no unit. None where the value has no axis of the group
    or of a parent, or more than one.
    """
    types, type_ = coupling.types, coupling.types.axes_of[node]
    numbers: Tensor | None = None
    for atom in map(coupling.atom, (*group.parents, group.name)):
        held = [dim for dim, axis in enumerate(type_) if atom in types.axes.atoms(axis)]
        if len(held) != 1:
            return None
        (dim,) = held
        line = units_along(types, type_[dim], atom).view(-1, *(1 for _ in type_[dim + 1 :]))
        if numbers is None:
            numbers = line
        else:
            numbers = torch.where((numbers < 0) | (line < 0), -1, numbers * atom.size + line)
    return numbers


# -- reading them ----------------------------------------------------------------------------------


def features(
    program: Program, sites: Sequence[FeatureSite], batch: Mapping[str, Tensor]
) -> dict[FeatureSite, Tensor]:
    """Return what is read at each site when the program runs on a batch, without gradients."""
    found: dict[FeatureSite, Tensor] = {}

    def keep(site: FeatureSite, value: Tensor) -> Tensor:
        found[site] = value.clone()
        return value

    with torch.no_grad():
        _run(program, sites, keep, batch)
    return found


def mixed(
    program: Program,
    sites: Sequence[FeatureSite],
    batch: Mapping[str, Tensor],
    beta: Mapping[str, Tensor],
    controls: Mapping[FeatureSite, Tensor],
) -> Logits:
    """Return the first output on a batch, with features mixed with the `controls`.

    `beta` is ``[units]`` by the name of the group; what belongs to no unit stays as it is.
    """
    units_of = {site: site.units.to(program.device) for site in sites}

    def mix(site: FeatureSite, value: Tensor) -> Tensor:
        control = controls[site]
        if control.shape != value.shape:
            raise SelectionError(
                f"{site.group}: its activations at {operator_of(site.node)} are "
                f"{tuple(value.shape)} on the data and {tuple(control.shape)} on its knockoff: "
                "they cannot be mixed"
            )
        units = units_of[site]
        part = beta[site.group][units.clamp(min=0)].masked_fill(units < 0, 1)
        return torch.lerp(control, value, part.to(value.dtype))

    return _run(program, sites, mix, batch)


def _run(
    program: Program,
    sites: Sequence[FeatureSite],
    read: Callable[[FeatureSite, Tensor], Tensor],
    batch: Mapping[str, Tensor],
) -> Logits:
    """Return the first output where what is read at each site is what `read` gives for it."""
    at = {site.node: [each for each in sites if each.node is site.node] for site in sites}

    def before(node: fx.Node, values: Mapping[fx.Node, Any]) -> Mapping[fx.Node, Any]:
        seen: dict[fx.Node, Tensor] = {}
        for site in at.get(node, ()):
            value = seen[site.source] if site.source in seen else values[site.source]
            seen[site.source] = read(site, value)
        return seen

    weights = {name: weight.detach() for name, weight in program.operands.items()}
    return run_to_logits(
        program,
        inputs_of(batch),
        weights=weights,
        hooks=Hooks(before),
        hooked=at,
        again=saves_memory(program),
    )


def scales(context: ScoringContext, sites: Sequence[FeatureSite]) -> Scores:
    """Return ``|gamma|`` of every unit, summed over its sites; the deviation where there is none.

    Raises
    ------
    CalibrationError
        Where data is needed, and there is none or it does not fit the program.
    """
    rest = [site for site in sites if site.gamma is None]
    deviation = _deviations(context, rest) if rest else {}
    found: Scores = {}
    for group in context.groups:
        sizes = context.sizes(group)
        count = math.prod(sizes)
        here = (site for site in sites if site.group == group.name)
        values = (p.total(deviation[p] if p.gamma is None else p.gamma.abs(), count) for p in here)
        found[group.name] = torch.stack(list(values)).sum(0).view(sizes)
    return found


def _deviations(context: ScoringContext, sites: Sequence[FeatureSite]) -> dict[FeatureSite, Tensor]:
    """Return the standard deviation of what is read at each site, over all other dimensions."""
    total = {site: torch.zeros(site.units.shape, dtype=torch.float64) for site in sites}
    squares = {site: torch.zeros_like(each) for site, each in total.items()}
    count = {site: torch.zeros((), dtype=torch.int64) for site in sites}
    batches = list(unpadded(context.data()))
    for at in context.track(own_batches(batches), "measuring activations"):
        for site, value in features(context.program, sites, batches[at]).items():
            wide = value.double().cpu()
            total[site] += wide.sum_to_size(site.units.shape)
            squares[site] += wide.square().sum_to_size(site.units.shape)
            count[site] += value.numel() // site.units.numel()
    ranks.sum_of([*total.values(), *squares.values(), *count.values()])
    return {
        site: (squares[site] / n - (total[site] / n).square()).clamp(min=0).sqrt()
        for site, n in count.items()
    }
