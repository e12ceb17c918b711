"""Attention in other spellings than batched products: merged, against averaging by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from architectures import relative_error
from tiny_models import perturb
from torch import Tensor, nn

import graphprune as gp
from graphprune.errors import MergeError
from graphprune.ir.program import Program
from graphprune.plan.plan import Plan
from graphprune.plan.steps import Step
from graphprune.transforms.heads.einsum_to_matmul import with_matrix_products
from graphprune.transforms.heads.kv_heads import find_heads
from graphprune.transforms.heads.merge import merge_of

HEADS, WIDTH, HIDDEN, LENGTH, WIDE = 4, 6, 20, 5, 3

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values, each ``[batch, length, head, width]``, to what is attended."""


def lengths_first(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As Funnel: heads lie behind the length in every operand."""
    weights = torch.einsum("bind,bjnd->bnij", query, key).softmax(-1)
    return torch.einsum("bnij,bjnd->bind", weights, value)


def dots(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As LongT5: batch axes are dots."""
    weights = torch.einsum("...qhd,...khd->...hqk", query, key).softmax(-1)
    return torch.einsum("...hqk,...khd->...qhd", weights, value)


def joined(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As Pegasus-X: every block attends to its own tokens and to some that all blocks share."""
    blocks = [part.transpose(1, 2).unflatten(2, (LENGTH, 1)) for part in (query, key, value)]
    own, local = blocks[0], blocks[1:]
    shared = [part[:, :2].transpose(1, 2) for part in (key, value)]
    scores = [
        torch.einsum("bhnkf,bhgf->bhnkg", own, shared[0]),
        torch.einsum("bhnkf,bhnxf->bhnkx", own, local[0]),
    ]
    weights = torch.cat(scores, -1).softmax(-1)
    result = torch.einsum("bhnkg,bhgf->bhnkf", weights[..., :2], shared[1])
    result = result + torch.einsum("bhnkx,bhnxf->bhnkf", weights[..., 2:], local[1])
    return result.flatten(2, 3).transpose(1, 2)


def flattened(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As BART: batch and heads are one axis."""
    batch = query.shape[0]
    flat = [part.transpose(1, 2).reshape(batch * HEADS, -1, WIDTH) for part in (query, key, value)]
    weights = torch.bmm(flat[0], flat[1].transpose(1, 2)).softmax(-1)
    result = torch.bmm(weights, flat[2]).view(batch, HEADS, -1, WIDTH)
    return result.transpose(1, 2)


MIXES: dict[str, Mix] = {
    "lengths first": lengths_first,
    "dots": dots,
    "joined": joined,
    "flattened": flattened,
}


class Attention(nn.Module):
    """An attention whose positions are spread over the batch, as decoders' are."""

    def __init__(self, mix: Mix, groups: int = HEADS) -> None:
        super().__init__()
        self.mix, self.groups = mix, groups
        self.places = nn.Embedding(LENGTH, HIDDEN)
        self.query, self.key, self.value = (nn.Linear(HIDDEN, HEADS * WIDTH) for _ in range(3))
        self.out = nn.Linear(HEADS * WIDTH, HIDDEN)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (
            part(x).unflatten(-1, (HEADS, WIDTH)) for part in (self.query, self.key, self.value)
        )
        if self.groups == HEADS:
            return query, key, value
        each = HEADS // self.groups
        key, value = (
            part.unflatten(2, (self.groups, each)).mean(3).repeat_interleave(each, 2)
            for part in (key, value)
        )
        return query, key, value

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.places(torch.arange(LENGTH).expand(x.shape[0], -1))
        return x + self.out(self.mix(*self.heads(x)).flatten(2))


def sample(batch: int = 2) -> Tensor:
    return torch.randn(batch, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(batch))


def captured(model: nn.Module) -> Program:
    return gp.capture(model.eval(), example_inputs=(sample(),))


@pytest.mark.parametrize("groups", [2, 1])
@pytest.mark.parametrize("name", MIXES)
def test_merging_equals_averaging_the_heads(name: str, groups: int) -> None:
    torch.manual_seed(0)
    model = perturb(Attention(MIXES[name]))
    program = captured(model)
    (heads,) = find_heads(program)
    assert {member.weight for member in heads.members} == {
        f"{part}.{kind}" for part in ("key", "value") for kind in ("weight", "bias")
    }
    plan = Plan((Step(program.fingerprint(), (), (merge_of(heads, groups),)),))
    narrow = gp.apply(program, plan)
    assert narrow.weights["key.weight"].shape == (groups * WIDTH, HIDDEN)
    assert narrow.weights["query.weight"].shape == (HEADS * WIDTH, HIDDEN)
    wide = Attention(MIXES[name], groups)
    wide.load_state_dict(model.state_dict())
    x = sample(WIDE)
    with torch.no_grad():
        assert relative_error(wide(x), next(iter(narrow(x).values()))) <= 1e-5
        assert relative_error(model(x), next(iter(narrow(x).values()))) > 1e-3
    assert gp.verify(program, plan, narrow).max_relative_error <= 1e-5


def test_an_axis_that_no_parameter_holds_is_no_head() -> None:
    class Placed(Attention):
        """Its batch is of one size, and so is the constant of its positions."""

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.places(torch.arange(LENGTH).expand(len(x), -1))
            return x + self.out(self.mix(*self.heads(x)).flatten(2))

    assert [heads.size for heads in find_heads(captured(Placed(dots)))] == [HEADS]


# -- spelling -------------------------------------------------------------------------------------


class Sum(nn.Module):
    def __init__(self, equation: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.equation = equation
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum(self.equation, x, self.weight)


@pytest.mark.parametrize(
    ("equation", "shape", "products"),
    [
        ("bld,dh->blh", (HIDDEN, 3), 1),
        ("bld,hd->bhl", (3, HIDDEN), 1),
        ("bld,ldh->lbh", (LENGTH, HIDDEN, 3), 1),
        ("...ld,hd->...hl", (3, HIDDEN), 1),
        ("bld,ghd->bglh", (3, 2, HIDDEN), 1),
        ("bld,ld->bl", (LENGTH, HIDDEN), 0),
        ("bld,h->blh", (3,), 0),
        ("bld,dl->b", (HIDDEN, LENGTH), 0),
        ("bld,hd->bh", (3, HIDDEN), 0),
    ],
)
def test_a_sum_of_two_over_one_axis_is_a_matrix_product(
    equation: str, shape: tuple[int, ...], products: int
) -> None:
    torch.manual_seed(0)
    model = Sum(equation, shape)
    program = captured(model)
    other = with_matrix_products(program, [n for n in program.graph.nodes if "einsum" in n.name])
    targets = [str(node.target) for node in other.graph.nodes]
    assert targets.count("aten.matmul.default") == products
    assert targets.count("aten.einsum.default") == 1 - products
    x = sample(WIDE)
    with torch.no_grad():
        assert relative_error(model(x), next(iter(other(x).values()))) <= 1e-6


# -- refused --------------------------------------------------------------------------------------


class Convolved(Attention):
    """As Nystromformer: values of a head are also convolved and added to what it attends to."""

    def __init__(self) -> None:
        super().__init__(flattened)
        self.convolution = nn.Conv2d(HEADS, HEADS, (3, 1), padding=(1, 0), groups=HEADS)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        near = self.convolution(value.transpose(1, 2)).transpose(1, 2)
        return x + self.out((self.mix(query, key, value) + near).flatten(2))


def test_heads_that_are_tied_outside_of_attention_are_refused_and_it_is_said_where() -> None:
    (heads,) = find_heads(captured(Convolved()))
    with pytest.raises(MergeError, match=r"one axis outside of attention too at aten\.add"):
        merge_of(heads, 2)
