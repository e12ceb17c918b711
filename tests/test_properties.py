"""Random small networks, random plans: what is pruned must equal what is zeroed, always."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import random_cuts
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.analysis.axes import Axes
from graphprune.analysis.coupling import Coupling
from graphprune.ir.program import Program
from graphprune.plan.plan import Plan
from graphprune.plan.steps import Step

Move = tuple[str, int, int, int]
"""A step's name, how far back its operand was made, and two choices that the step reads freely."""


class Network(nn.Module):
    """Steps over a (batch, 4, 8) tensor; the last two results come out.

    Weights are made as a first run asks for them, and given out in that order in later runs. A step
    that does not fit the shapes that it meets is left out.
    """

    def __init__(self, moves: list[Move]) -> None:
        super().__init__()
        self.weights, self.ends = nn.ParameterList(), nn.ParameterList()
        self.moves: list[Move] = []
        self.random = torch.Generator().manual_seed(0)
        self.taken = 0
        self.values = [self.normal(2, 4, 6)]
        for move in [("linear", 0, 0, 1), *moves]:
            before = len(self.weights)
            try:
                made = self.step(move)
                fits = 2 <= made.ndim <= 5 and made.numel() <= 4096 and len(made) == 2
            except (RuntimeError, IndexError, ValueError, TypeError, ZeroDivisionError):
                fits = False
            if fits and bool(made.isfinite().all()) and made[0].numel() > 1:
                self.moves.append(move)
                self.values.append(made.detach())
            else:
                self.weights = self.weights[:before]
                self.taken = before
        for value in self.values[-2:]:
            size = value[0].numel()
            self.ends.append(self.normal(3, size) / math.sqrt(size))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random, dtype=torch.float64)

    def weight(self, *shape: int) -> Tensor:
        if self.taken == len(self.weights):
            self.weights.append(self.normal(*shape) / math.sqrt(shape[-1]) + 0.1)
        self.taken += 1
        return self.weights[self.taken - 1]

    def linear(self, x: Tensor, width: int, bias: bool = False) -> Tensor:
        weight = self.weight(width, x.shape[-1])
        return F.linear(x, weight, self.weight(width) if bias else None)

    def other(self, x: Tensor, back: int) -> Tensor:
        """A value that broadcasts to the shape of `x`."""
        found = [
            v
            for v in self.values[::-1]
            if v.ndim == x.ndim
            and all(s in (1, t) for s, t in zip(v.shape[1:], x.shape[1:], strict=True))
        ]
        return found[back % len(found)]

    def step(self, move: Move) -> Tensor:
        name, back, a, b = move
        return STEPS[name](self, self.values[-1 - back % min(len(self.values), 4)], a, b)

    def forward(self, x: Tensor) -> list[Tensor]:
        self.values, self.taken = [x], 0
        for move in self.moves:
            self.values.append(self.step(move))
        ends = zip(self.ends, self.values[-2:], strict=True)
        results = [F.linear(value.flatten(1), end) for end, value in ends]
        self.values = []
        return results


# -- steps --------------------------------------------------------------------------------------


def dim(x: Tensor, choice: int) -> int:
    """Any dimension but that of the batch."""
    return 1 + choice % (x.ndim - 1)


def divisor(size: int, choice: int) -> int:
    found = [d for d in range(2, size) if size % d == 0] or [1]
    return found[choice % len(found)]


def at(x: Tensor, d: int, place: slice | list[int]) -> Tensor:
    return x[(slice(None),) * d + (place,)]


def reshape(net: Network, x: Tensor, a: int, b: int) -> Tensor:
    size = x[0].numel()
    first = divisor(size, a)
    second = divisor(size // first, b)
    return x.reshape(x.shape[0], first, second, size // first // second)


def affine(net: Network, x: Tensor, a: int, b: int) -> Tensor:
    d = dim(x, a)
    shape = [size if i >= d and (i == d or b % 3 == 0) else 1 for i, size in enumerate(x.shape)]
    weight = net.weight(*shape[d:])
    return x * weight if b % 2 else x + weight


def pieces(net: Network, x: Tensor, a: int, b: int) -> Tensor:
    d = dim(x, a)
    cut = 1 + b % (x.shape[d] - 1)
    first, second = x.split([cut, x.shape[d] - cut], d)
    return torch.cat([-second, first], d)


def cut(net: Network, x: Tensor, a: int, b: int) -> Tensor:
    d = dim(x, a)
    size = x.shape[d]
    low = b % (size - 1)
    return at(x, d, [slice(low, None), slice(None, low + 1), slice(-low - 1, -1)][(a + b) % 3])


def rms_norm(net: Network, x: Tensor, a: int, b: int) -> Tensor:
    d = dim(x, a)
    scaled = x * torch.rsqrt(x.pow(2).mean(d, keepdim=True) + 1e-3)
    return scaled * net.weight(x.shape[-1]) if b % 2 else scaled


def layer_norm(net: Network, x: Tensor, a: int, b: int) -> Tensor:
    shape = x.shape[-1 - a % 2 :] if x.ndim > 2 else x.shape[-1:]
    gain, bias = (net.weight(*shape), net.weight(*shape)) if b % 3 else (None, None)
    return F.layer_norm(x, shape, gain, bias if b % 3 == 1 else None, 1e-3)


def attention(net: Network, x: Tensor, a: int, b: int) -> Tensor:
    heads, groups = [(2, 2), (4, 2), (4, 4)][a % 3]
    q, k, v = (
        net.linear(x, n * w).unflatten(-1, (n, w)).transpose(1, 2)
        for n, w in ((heads, 4), (groups, 4), (groups, 3))
    )
    if b % 3 == 0 or groups == heads:
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=heads != groups)
    else:
        k, v = (t[:, :, None].expand(-1, -1, heads // groups, -1, -1).flatten(1, 2) for t in (k, v))
        out = (q @ k.mT / 2).softmax(-1) @ v
    return out.transpose(1, 2).flatten(2)


def convolution(net: Network, x: Tensor, a: int, b: int) -> Tensor:
    groups = [1, 2, x.shape[1]][a % 3]
    weight = net.weight((4, 8)[b % 2], x.shape[1] // groups, 1 + 2 * (a % 2))
    return F.conv1d(x, weight, padding=a % 2, groups=groups)


def gather(net: Network, x: Tensor, a: int, b: int) -> Tensor:
    d = dim(x, a)
    if b % 3 == 0:
        return at(x, d, [0, x.shape[d] - 1, 0])
    if b % 3 == 1:
        return x.gather(d, (x > 0).long())
    return x.index_select(d, torch.tensor([(b + i) % x.shape[d] for i in range(8)]))


def spread(net: Network, x: Tensor, a: int, b: int) -> Tensor:
    d = dim(x, a)
    wide = x.unsqueeze(d)
    wide = wide.expand(*x.shape[:d], 2 + b % 3, *x.shape[d:])
    return wide.flatten(d, d + 1) if b % 2 else wide


def repeat(net: Network, x: Tensor, a: int, b: int) -> Tensor:
    d = dim(x, a)
    if b % 2:
        return x.repeat_interleave(2, d)
    return x.repeat([2 if i == d else 1 for i in range(x.ndim)])


def outer(net: Network, x: Tensor, a: int, b: int) -> Tensor:
    d = dim(x, a)
    left, right = x.unsqueeze(d), net.other(x, b).unsqueeze(d + 1)
    return left * right if a % 2 else left + right


def stacked(net: Network, x: Tensor, a: int, b: int) -> Tensor:
    if b % 2:
        return torch.stack([x, net.other(x, b).expand_as(x)], dim(x, a))
    return torch.cat(x.unbind(dim(x, a)), -1)


def written(net: Network, x: Tensor, a: int, b: int) -> Tensor:
    x = x.clone()
    part = at(x, dim(x, a), slice(b % 3, None))
    other = at(x, dim(x, a), slice(0, 2))
    (part if a % 2 else x).add_(0.5) if b % 2 else part.mul_(2)
    return [x, part, other][(a + b) % 3]


def merged_batch(net: Network, x: Tensor, a: int, b: int) -> Tensor:
    flat = x.flatten(0, 1) if b % 2 else x.reshape(-1, *x.shape[2:])
    return net.linear(flat, 8).unflatten(0, (-1, x.shape[1]))


def einsum(net: Network, x: Tensor, a: int, b: int) -> Tensor:
    if b % 3 == 0:
        return torch.einsum("bij,jk->bki", x, net.weight(x.shape[-1], 4))
    return torch.einsum(["bij,bkj->bik", "bij,bik->bjk"][a % 2], x, net.other(x, b))


def route(net: Network, x: Tensor, a: int, b: int) -> Tensor:
    """Experts of which the best are chosen, and other uses of what was chosen."""
    logits = net.linear(x, 4, b % 2 == 1)
    experts = net.weight(4, 5, x.shape[-1])
    scores, places = (logits.softmax(-1) if b % 3 else logits.sigmoid()).topk(1 + b % 2, -1)
    made = (experts[places] @ x[..., None, :, None]).squeeze(-1)
    made = (made * scores[..., None]).sum(-2)
    uses: list[Callable[[], Tensor]] = [
        lambda: made,
        lambda: made + F.one_hot(places, 4).to(x.dtype).sum(-2) @ net.weight(4, 5),
        lambda: made * logits.gather(-1, places).sum(-1, keepdim=True),
        lambda: made + torch.zeros_like(logits).scatter(-1, places, scores) @ net.weight(4, 5),
        lambda: made + logits.softmax(-1) @ net.weight(4, 5),
        lambda: made * (places == 1).any(-1, keepdim=True),
        lambda: made + places.to(x.dtype).sum(-1, keepdim=True),
        lambda: made + experts[places // 2, :, 0].sum(-2),
        lambda: made + (logits.mT @ logits).softmax(b % 2 + 1).sum((1, 2), keepdim=True),
        lambda: made + logits.relu().sum(-1, keepdim=True),
        lambda: made + logits.exp().sum(-1, keepdim=True),
        lambda: made + experts[torch.cat([places, places], -1), :, 0].sum(-2),
    ]
    return uses[a % len(uses)]()


def constant(net: Network, x: Tensor, a: int, b: int) -> Tensor:
    d = dim(x, a)
    counts = torch.arange(x.shape[d], dtype=x.dtype).view(-1, *[1] * (x.ndim - 1 - d))
    return [x * counts, x + counts, torch.where(counts > 1, x, -x), x.clamp(counts)][b % 4]


def picked(net: Network, x: Tensor, a: int, b: int) -> Tensor:
    d = dim(x, a)
    return x.select(d, b % x.shape[d] - (x.shape[d] if a % 2 else 0))


REDUCTIONS: list[Callable[..., Tensor]] = [torch.mean, torch.sum, torch.amax, torch.norm]
FUNCTIONS: list[Callable[[Tensor], Tensor]] = [
    F.relu,
    F.silu,
    torch.sigmoid,
    torch.tanh,
    F.softplus,
    torch.cos,
    torch.square,
    lambda x: x / (1 + x.abs()),
    lambda x: x.clamp(-1, 1),
    lambda x: 1 - x,
    lambda x: torch.where(x > 0, x, 0.1),
]

STEPS: dict[str, Callable[[Network, Tensor, int, int], Tensor]] = {
    "linear": lambda net, x, a, b: net.linear(x, [8, 4, 12, x.shape[-1]][a % 4], b % 2 == 1),
    "residual": lambda net, x, a, b: x + net.linear(F.silu(net.linear(x, 6)), x.shape[-1]),
    "gated": lambda net, x, a, b: F.silu(net.linear(x, 8)) * net.linear(x, 8),
    "function": lambda net, x, a, b: FUNCTIONS[a % len(FUNCTIONS)](x),
    "affine": affine,
    "add": lambda net, x, a, b: x + net.other(x, a),
    "multiply": lambda net, x, a, b: x * net.other(x, a),
    "maximum": lambda net, x, a, b: torch.maximum(x, net.other(x, a)),
    "heads": lambda net, x, a, b: x.unflatten(dim(x, b), (divisor(x.shape[dim(x, b)], a), -1)),
    "merge": lambda net, x, a, b: x.flatten(dim(x, a), dim(x, a) + 1),
    "transpose": lambda net, x, a, b: x.transpose(dim(x, a), dim(x, b)),
    "reshape": reshape,
    "cat": lambda net, x, a, b: torch.cat([x, net.other(x, a).expand_as(x)], dim(x, b)),
    "pieces": pieces,
    "halves": lambda net, x, a, b: torch.mul(*x.chunk(2, dim(x, a))),
    "glu": lambda net, x, a, b: F.glu(x, dim(x, a)),
    "cut": cut,
    "stride": lambda net, x, a, b: at(x, dim(x, a), slice(b % 2, None, 2)),
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "square": lambda net, x, a, b: x @ x.mT if a % 2 else x.mT @ x,
    "matmul": lambda net, x, a, b: x @ net.values[-1 - a % len(net.values)],
    "matmul_t": lambda net, x, a, b: x @ net.values[-1 - a % len(net.values)].mT,
    "attention": attention,
    "constant": constant,
    "convolution": convolution,
    "route": route,
    "softmax": lambda net, x, a, b: x.softmax(dim(x, a)),
    "cumsum": lambda net, x, a, b: x.cumsum(dim(x, a)),
    "reduce": lambda net, x, a, b: REDUCTIONS[b % 4](x, dim=dim(x, a), keepdim=b % 3 > 0),
    "scaled": lambda net, x, a, b: x * REDUCTIONS[b % 2](x, dim=dim(x, a), keepdim=True),
    "select": picked,
    "gather": gather,
    "spread": spread,
    "repeat": repeat,
    "outer": outer,
    "stacked": stacked,
    "pad": lambda net, x, a, b: F.pad(x, (a % 2, 1 + b % 2)),
    "flip": lambda net, x, a, b: x.flip(dim(x, a)),
    "written": written,
    "merged_batch": merged_batch,
    "einsum": einsum,
}

MOVES = st.lists(
    st.tuples(
        st.sampled_from(sorted(STEPS)), st.integers(0, 3), st.integers(0, 11), st.integers(0, 11)
    ),
    min_size=1,
    max_size=8,
)


# -- properties ---------------------------------------------------------------------------------


def plan_of(coupling: Coupling, seed: int) -> Plan:
    """Random units of all groups, and for odd seeds of a few of them."""
    cuts = random_cuts(coupling, ratio=None, seed=seed)
    chosen = random.Random(seed)
    if seed % 2:
        cuts = tuple(cut for cut in cuts if chosen.random() < 0.4) or cuts[:1]
    return Plan((Step(coupling.program.fingerprint(), cuts),))


def captured(module: nn.Module, dynamic_shapes: Any = None) -> Program:
    example = torch.zeros(2, 4, 6, dtype=torch.float64)
    return gp.capture(module, example_inputs=(example,), dynamic_shapes=dynamic_shapes)


def check(module: nn.Module, plans: int = 2, dynamic_shapes: Any = None) -> Coupling:
    """Prune `module` by several plans, and what the last of them leaves once more."""
    program = captured(module, dynamic_shapes)
    coupling = gp.analyze(program)
    for seed in range(plans):
        first = plan_of(coupling, seed)
        middle = gp.apply(program, first)
        gp.verify(program, first, middle)
    second = plan_of(gp.analyze(middle), plans)
    last = gp.apply(middle, second)
    gp.verify(middle, second, last)
    gp.verify(program, first + second, last)
    return coupling


MOVES = st.lists(
    st.tuples(
        st.sampled_from(sorted(STEPS)), st.integers(0, 3), st.integers(0, 11), st.integers(0, 11)
    ),
    min_size=3,
    max_size=8,
)


@given(MOVES)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_pruned_networks_equal_masked_ones(moves: list[Move]) -> None:
    check(Network(moves))


def test_networks_are_pruned_at_all() -> None:
    chosen = random.Random(0)
    names = ["linear", "heads", "residual", "attention", "convolution", "pieces", "rms_norm"]
    moves = [(name, 0, chosen.randrange(12), chosen.randrange(12)) for name in names]
    network = Network(moves)
    assert len(network.moves) > len(names) // 2
    assert len(check(network).groups) > 3


# -- what the search found ----------------------------------------------------------------------


class Between(nn.Module):
    """Any function of a (batch, 4, 8) tensor between two linear layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.a = nn.Linear(6, 8)
        self.b = nn.Linear(function(torch.zeros(2, 4, 8)).flatten(1).shape[1], 5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self.a(x)).flatten(1))


def centered(h: Tensor) -> Tensor:
    return h - h.mean(1, keepdim=True)


def written_after(h: Tensor) -> Tensor:
    h = h.clone()
    part = h[..., :3]
    h.add_(1.0)
    return h * part.sum(-1, keepdim=True)


def masked(h: Tensor) -> Tensor:
    left, right = h.chunk(2, -1)
    return h.sum(-1, keepdim=True) * left[right.sin() > 0].sum()


def reindexed(h: Tensor) -> Tensor:
    index = torch.tensor([0, 3, 0, 2])
    added = torch.zeros_like(h).index_add(1, index, h)
    return torch.cat([h[:, index].flatten(1), added.flatten(1)], 1)


def looked_through(h: Tensor) -> Tensor:
    whole = (h * 4).to(torch.int64)
    return h * torch.isin(whole[:, :2], whole[:, 2:]).repeat(1, 2, 1)


def scores(h: Tensor) -> Tensor:
    square = torch.cat([h, h.sin()], 1)
    return (square @ square).softmax(-1) @ square


@pytest.mark.parametrize(
    "moves",
    [
        pytest.param([("gather", 0, 0, 0), ("rms_norm", 0, 0, 0)], id="mean of picks"),
        pytest.param([("attention", 0, 0, 0), ("square", 0, 0, 0)], id="covariance of heads"),
        pytest.param([("outer", 0, 3, 0), ("reshape", 0, 10, 0)], id="pairs"),
        pytest.param([("route", 0, 5, 1)], id="experts compared with a number"),
        pytest.param([("route", 0, 6, 1)], id="experts as numbers"),
        pytest.param([("route", 0, 8, 1)], id="a softmax of experts by experts"),
        pytest.param(
            [("einsum", 0, 11, 5), ("gather", 0, 0, 0), ("repeat", 1, 7, 9), ("written", 0, 0, 0)],
            id="copies of pairs",
        ),
    ],
)
def test_networks_that_once_failed(moves: list[Move]) -> None:
    check(Network(moves), plans=6)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda h: centered(h[:, [0, 3, 0]]), id="a mean of picks"),
        pytest.param(
            lambda h: centered(h.index_select(1, torch.tensor([0, 3, 0]))),
            id="a mean of a selection",
        ),
        pytest.param(
            lambda h: h * (h @ (h.mT @ h).sigmoid()).sum(-1, keepdim=True),
            id="summed over and brought back by the other operand",
        ),
        pytest.param(written_after, id="written through its base"),
        pytest.param(masked, id="picked by a mask"),
        pytest.param(reindexed, id="written by an index that picks too"),
        pytest.param(
            lambda h: h * (h + h.shape[0]).sum(-1, keepdim=True), id="a sum with a dynamic size"
        ),
        pytest.param(
            lambda h: h * (h + h.sum().item()).sum(-1, keepdim=True), id="a sum with an item"
        ),
        pytest.param(looked_through, id="equal to any of another axis"),
        pytest.param(scores, id="attention of one tensor"),
        pytest.param(
            lambda h: torch.einsum("bij->bji", h).softmax(-1) @ h, id="attention of no product"
        ),
        pytest.param(
            lambda h: h.unflatten(2, (4, 2)).softmax(2), id="units of heads that are frozen"
        ),
    ],
)
def test_functions_that_once_failed(function: Callable[[Tensor], Tensor]) -> None:
    check(Between(function), plans=6)


def test_a_sum_over_what_does_not_vanish_is_frozen() -> None:
    coupling = check(Between(lambda h: h * (h @ (h.mT @ h).sigmoid()).sum(-1, keepdim=True)))
    assert "do not vanish" in coupling.explain("a.weight", 0)


BOTH_DYNAMIC = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)


class PerToken(Between):
    """As before, with the length of the sequence dynamic."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self.a(x)))


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda h: F.layer_norm(h, h.shape[1:]), id="a norm over it"),
        pytest.param(
            lambda h: torch.cat(h.split([1, h.shape[1] - 1], 1)[::-1], 1) * h, id="rotated"
        ),
        pytest.param(lambda h: torch.cat([h[:, 1:], h[:, :1]], 1) * h, id="rotated by slices"),
    ],
)
def test_functions_of_a_dynamic_axis_that_once_failed(
    function: Callable[[Tensor], Tensor],
) -> None:
    module = PerToken(function)
    module.b = nn.Linear(8, 5, dtype=torch.float64)
    assert check(module, plans=4, dynamic_shapes=BOTH_DYNAMIC).groups


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda h: h.flatten(1) / h.flatten(1).shape[1], id="a divisor"),
        pytest.param(
            lambda h: h.flatten(1) * torch.arange(h.flatten(1).shape[1]).sum(), id="counted"
        ),
    ],
)
def test_a_size_that_turned_out_to_be_fixed_is_a_number(
    function: Callable[[Tensor], Tensor],
) -> None:
    assert check(Between(function), plans=4, dynamic_shapes=BOTH_DYNAMIC).groups


@pytest.mark.parametrize("width", [64, 512, 2048])
def test_a_wide_axis_added_to_itself_shifted_by_one_is_fixed(width: int) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, width), nn.Linear(width, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(h + torch.cat([h[..., 1:], h[..., :1]], -1))

    coupling = gp.analyze(gp.capture(Shifted(), example_inputs=(torch.zeros(2, 6),)))
    assert not coupling.groups


def test_an_axis_may_be_cut_at_every_place() -> None:
    axes, size = Axes(), 1200
    one, other = axes.atom(size), axes.atom(size)
    axes.unify(one, other)
    for at in range(size - 1):
        axes.split(one, [piece for piece in (at, 1, size - 1 - at) if piece])
    assert axes.show(other, {}) == f"[{' + '.join(['1'] * size)}]"


def all_but_one(coupling: Coupling) -> Plan:
    (group,) = coupling.groups
    cut = group.cut({(): tuple(range(1, group.size))})
    return Plan((Step(coupling.program.fingerprint(), (cut,)),))


@pytest.mark.parametrize(
    "squeeze",
    [
        pytest.param(lambda h: h.squeeze(2), id="one"),
        pytest.param(lambda h: h[:, :1].squeeze((1, 2)), id="some"),
        pytest.param(lambda h: h[:, :1].squeeze(), id="all"),
    ],
)
def test_what_is_squeezed_stays_so(squeeze: Callable[[Tensor], Tensor]) -> None:
    program = captured(Between(squeeze))
    plan = all_but_one(gp.analyze(program))
    gp.verify(program, plan, gp.apply(program, plan))


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda h: h / torch.arange(1, 9), id="a constant"),
        pytest.param(lambda h: h / h.norm(dim=1, keepdim=True), id="its own norm"),
    ],
)
def test_a_removed_unit_may_be_divided_by_itself(function: Callable[[Tensor], Tensor]) -> None:
    check(Between(function))
