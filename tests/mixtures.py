"""Small mixtures of experts, each of which runs the same experts in another way."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EXPERTS, CHOSEN, WIDTH, INNER = 5, 2, 6, 7


class Mixture(nn.Module):
    """Experts behind a router, whose gates do not sum to one; subclasses say how they are run."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH))
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER))
        self.bias = nn.Parameter(torch.randn(EXPERTS, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        gates, chosen = self.router(x).softmax(-1).topk(CHOSEN, -1)
        return x + self.mixed(x, gates, chosen)

    def mixed(self, x: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        raise NotImplementedError

    def alone(self, expert: int, x: Tensor) -> Tensor:
        return torch.relu(x @ self.up[expert].T) @ self.down[expert].T + self.bias[expert]


class Picked(Mixture):
    """The weights of what was chosen are picked."""

    def mixed(self, x: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        at = chosen.reshape(-1)
        rows = x.repeat_interleave(CHOSEN, 0)[..., None]
        out = (self.down[at] @ torch.relu(self.up[at] @ rows))[..., 0] + self.bias[at]
        return (out * gates.reshape(-1, 1)).view(-1, CHOSEN, WIDTH).sum(1)


class Dense(Mixture):
    """Every expert computes every token, and most of it is multiplied by zero."""

    def mixed(self, x: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        shares = torch.zeros(len(x), EXPERTS).scatter(1, chosen, gates)
        out = torch.bmm(torch.relu(torch.bmm(x.expand(EXPERTS, -1, -1), self.up.mT)), self.down.mT)
        return ((out + self.bias[:, None]) * shares.T[..., None]).sum(0)


class Looped(Mixture):
    """Experts are modules that a loop takes one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, INNER, bias=False), nn.ReLU(), nn.Linear(INNER, WIDTH))
            for _ in range(EXPERTS)
        )
        for at, expert in enumerate(self.experts):
            first, last = expert[0], expert[2]  # type: ignore[index]
            with torch.no_grad():
                first.weight.copy_(self.up[at])
                last.weight.copy_(self.down[at])
                last.bias.copy_(self.bias[at])

    def mixed(self, x: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = nn.functional.one_hot(chosen, EXPERTS).permute(2, 1, 0)
        for at, expert in enumerate(self.experts):
            slot, token = torch.where(mask[at])
            out.index_add_(0, token, expert(x[token]) * gates[token, slot, None])
        return out
