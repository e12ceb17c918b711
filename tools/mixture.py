"""A small mixture of experts with grouped queries and q/k norms, whose tokens are bytes.

It learns the text of Python's own standard library, as `train_reference.py` divides it, in some
minutes on one core.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from train_reference import Corpus

import graphprune as gp
from graphprune.calibration.tokens import token_batch

WINDOW = 128
BATCH = 16
STEPS = 600
RATE = 4e-3
BALANCE = 0.05


SAMPLES, HELD_OUT = 32, 256
"""Windows to calibrate with, and to measure on."""


@dataclass(frozen=True)
class Mixture:
    """A trained mixture, a draw of what it was trained on, and held-out text.

    Parameters
    ----------
    program
        The mixture.
    draw
        Windows of the training text.
    rows
        Windows of the held-out text, ``[HELD_OUT, WINDOW]``.
    dense
        Its loss on these, in nats per byte.
    """

    program: gp.Program
    draw: gp.Calibration
    rows: Tensor
    dense: float

    @classmethod
    def trained(cls, folder: Path, seed: int) -> Mixture:
        """Read the mixture of `seed` from a folder, trained and written there where it is not."""
        from transformers import Qwen3MoeForCausalLM

        corpus = Corpus.of_standard_library()
        ids, held = bytes_of(corpus.train), bytes_of(corpus.heldout)
        if not folder.exists():
            model = build_mixture(seed)
            for _ in train(model, ids, seed):
                pass
            model.save_pretrained(folder)
        model = Qwen3MoeForCausalLM.from_pretrained(folder).eval()
        rows = held[: len(held) // WINDOW * WINDOW].view(-1, WINDOW)[::2][:HELD_OUT]
        chooser = torch.Generator().manual_seed(100 + seed)
        drawn = [token_batch(part) for part in windows(ids, SAMPLES, chooser).split(8)]
        calibration = gp.Calibration.from_batches(drawn)
        return cls(gp.capture(model), calibration, rows, loss_of(model, rows))

    def loss(self, model: Any) -> float:
        """Return the loss of a model on the held-out text, in nats per byte."""
        return loss_of(model, self.rows)


@torch.no_grad()
def loss_of(model: Any, rows: Tensor) -> float:
    """Return the mean loss of predicting the bytes of `rows`, in nats."""
    model.set_experts_implementation("grouped_mm")
    total = 0.0
    for part in rows.split(32):
        logits = model(input_ids=part, use_cache=False).logits[:, :-1]
        total += functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()).item() * len(
            part
        )
    return total / len(rows)


def bytes_of(texts: dict[str, str]) -> Tensor:
    """Return the bytes of files, one after the other."""
    joined = "\n".join(texts.values()).encode()
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8).long()


def build_mixture(seed: int, *, experts: int = 8, chosen: int = 2) -> Any:
    """Return a mixture that is not trained: 3 layers, 2 KV heads for 4 query heads, q/k norms."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=96,
        intermediate_size=96,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        num_experts=experts,
        num_experts_per_tok=chosen,
        norm_topk_prob=True,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    return Qwen3MoeForCausalLM(config)


def train(model: Any, ids: Tensor, seed: int, steps: int = STEPS) -> Iterator[float]:
    """Take the steps and yield the loss of each, in nats per byte."""
    chooser = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95))
    warmup = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.05 + 0.475 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    for _ in range(steps):
        rows = windows(ids, BATCH, chooser)
        out = model(input_ids=rows, use_cache=False, output_router_logits=True)
        loss = functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
        (loss + BALANCE * imbalance(out.router_logits, model.config)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield loss.item()
    model.eval()


def imbalance(router_logits: tuple[Tensor, ...], config: Any) -> Tensor:
    """Return the load balancing loss, of each layer by itself: all experts of each are in use."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    sizes = config.num_experts, config.num_experts_per_tok
    losses = [load_balancing_loss_func((logits,), *sizes) for logits in router_logits]
    return torch.stack(losses).mean()


def windows(ids: Tensor, count: int, chooser: torch.Generator) -> Tensor:
    """Draw windows that begin anywhere: ``[count, WINDOW]``."""
    starts = torch.randint(len(ids) - WINDOW, (count,), generator=chooser)
    return torch.stack([ids[start : start + WINDOW] for start in starts])
