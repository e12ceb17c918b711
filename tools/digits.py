"""A small convolutional network with batch norms, trained on scikit-learn's digits in seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, fx, nn
from torch.nn import functional

import graphprune as gp
from graphprune.frontend.capture import capture
from graphprune.ir.interpreter import Hooks, call, run_program
from graphprune.transforms.batch_norms import BATCH_NORM, reestimate

CLASSES = 10
BATCH = 64


class DigitsNet(nn.Module):
    """Three convolutions, each before a batch norm; 8 x 8 gray images in, class logits out."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        sizes = (1, *widths)
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1, bias=False)
            for before, after in zip(sizes, widths, strict=False)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.head = nn.Linear(widths[-1], CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """``[batch, 1, 8, 8]`` to ``[batch, classes]``."""
        x = images
        for at, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = functional.relu(norm(conv(x)))
            x = functional.max_pool2d(x, 2) if at else x
        return self.head(x.mean((2, 3)))


@dataclass(frozen=True)
class Digits:
    """Images ``[n, 1, 8, 8]`` of mean 0 and variance 1, with their labels ``[n]``."""

    images: Tensor
    labels: Tensor

    @classmethod
    def split(cls, seed: int, held_out: int = 600) -> tuple[Digits, Digits]:
        """Draw the 1,797 digits apart into those to train on and those held out."""
        found = load_digits()
        images = torch.tensor(found.images, dtype=torch.float32)[:, None]
        labels = torch.tensor(found.target)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        train, test = order[held_out:], order[:held_out]
        scale = images[train].std()
        images = (images - images[train].mean()) / scale
        return cls(images[train], labels[train]), cls(images[test], labels[test])

    def __len__(self) -> int:
        return len(self.images)

    def epoch(self, generator: torch.Generator) -> Iterator[Digits]:
        """All of them once, in random order and batches."""
        for chosen in torch.randperm(len(self), generator=generator).split(BATCH):
            yield Digits(self.images[chosen], self.labels[chosen])

    def calibration(self) -> gp.Calibration:
        """Return all of them, as labeled batches."""
        pairs = zip(self.images.split(BATCH), self.labels.split(BATCH), strict=True)
        return gp.Calibration.from_batches([{"images": x, "labels": y} for x, y in pairs])


def trained(digits: Digits, seed: int, *, widths: tuple[int, ...] = (16, 32, 64)) -> DigitsNet:
    """Train a network of about 99 % accuracy on held-out digits."""
    torch.manual_seed(seed)
    net = DigitsNet(*widths)
    _train(net, list(net.parameters()), digits, epochs=5, rate=0.05, seed=seed)
    return net.eval()


def captured(net: DigitsNet) -> gp.Program:
    """Capture a network, for any number of images."""
    return capture(net, example_inputs=(torch.zeros(2, 1, 8, 8),))


def tuned(program: gp.Program, digits: Digits, seed: int, *, epochs: int) -> gp.Program:
    """`program` with its parameters trained further, and then its batch norms' statistics anew."""
    weights = {name: weight.detach().clone() for name, weight in program.weights.items()}
    names = [name for name, kind in program.kinds.items() if kind == "parameter"]
    parameters = [weights[name].requires_grad_() for name in names]
    hooks = Hooks(compute=_in_training)

    def run(images: Tensor) -> Tensor:
        return run_program(program, {program.inputs[0].name: images}, hooks, weights)["output"]

    _train(run, parameters, digits, epochs=epochs, rate=0.02, seed=seed)
    left = program.with_weights({name: weights[name].detach() for name in names})
    return left.with_weights(reestimate(left, digits.calibration()))


def _in_training(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what a node makes where batch norms use the statistics of the batch."""
    if node.target is not BATCH_NORM:
        return call(node, args, kwargs)
    x, weight, bias, _, _, _, _, eps, _ = args
    return functional.batch_norm(x, None, None, weight, bias, training=True, eps=eps)


def accuracy(program: gp.Program, digits: Digits) -> float:
    """Return the part of the digits, in percent, whose label has the highest logit."""
    logits = program(images=digits.images)["output"]
    return 100 * (logits.argmax(1) == digits.labels).float().mean().item()


def _train(
    run: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    digits: Digits,
    *,
    epochs: int,
    rate: float,
    seed: int,
) -> None:
    """Descend along the cross entropy, with momentum and a rate that falls to nothing."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(parameters, lr=rate, momentum=0.9, nesterov=True, weight_decay=1e-4)
    steps = epochs * -(-len(digits) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for batch in digits.epoch(generator):
            optimizer.zero_grad()
            functional.cross_entropy(run(batch.images), batch.labels).backward()
            optimizer.step()
            schedule.step()
