"""Train the reference model that ships with graphprune.

A small Llama with full multi-head attention learns the text of Python's own standard library,
which every machine that can run this script already has. It is small enough to ship (4 MB at most),
good enough that removing the wrong part of it hurts, and its key/value heads are all its own, so
that there is something to merge.

    python tools/train_reference.py                  # about 35 minutes on one core
    python tools/train_reference.py --steps 20 --output out

Everything is seeded and every list is sorted, so the same Python, the same torch and the same
number of threads give the same weights. Another Python has another standard library, and gives a
model that is similar, not equal.
"""

from __future__ import annotations

import hashlib
import math
import platform
import sysconfig
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

DATA = Path(__file__).resolve().parent.parent / "graphprune" / "data"

SKIPPED = frozenset(
    {"site-packages", "test", "tests", "idle_test", "pydoc_data", "encodings", "__phello__"}
)
"""Folders that are left out: tests, tables of code points, and what is not the standard library."""

BUILD_RECORDS = ("config-", "_sysconfigdata")
"""Names that begin so say how this one interpreter was built."""

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"

HELDOUT_BYTES = 80_000
CALIBRATION_BYTES = 60_000
SIZE_LIMIT = 4_000_000

VOCABULARY = 2048
POSITIONS = 1024
WINDOW = 256
TOKENS_PER_STEP = 2048


@dataclass(frozen=True)
class Stage:
    """Some steps under one schedule of the learning rate."""

    name: str
    steps: int
    rate: float
    """Peak learning rate of both optimizers."""

    def window(self, step: int) -> int:
        """Tokens per row at `step`.

        Learning goes by short windows, which cost least, and ends in long ones, to which settling
        gets used: it takes the two in turn.
        """
        if self.name == "learning":
            return POSITIONS if step >= 0.9 * self.steps else WINDOW
        return POSITIONS if step % 2 else WINDOW


def stages(steps: int) -> list[Stage]:
    """Divide the training into stages; `steps` is the length of the first."""
    return [Stage("learning", steps, 7e-3), Stage("settling", max(1, steps // 5), 2e-3)]


@dataclass(frozen=True)
class Corpus:
    """Source files by role; the names are relative to the standard library and sorted."""

    train: dict[str, str]
    heldout: dict[str, str]

    @staticmethod
    def of_standard_library() -> Corpus:
        """Read the standard library and set whole files aside, by the hash of their names."""
        root = Path(sysconfig.get_paths()["stdlib"])
        texts: dict[str, str] = {}
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).parts
            if SKIPPED.intersection(parts) or any(part.startswith(BUILD_RECORDS) for part in parts):
                continue
            text = path.read_text(encoding="utf-8", errors="ignore")
            if text.strip():
                texts["/".join(parts)] = text
        heldout: dict[str, str] = {}
        for name in sorted(texts, key=digest):
            size = len(texts[name].encode())
            if 4_000 <= size <= 24_000:
                heldout[name] = texts[name]
            if sum(len(text.encode()) for text in heldout.values()) >= HELDOUT_BYTES:
                break
        return Corpus(
            train={name: text for name, text in texts.items() if name not in heldout},
            heldout=dict(sorted(heldout.items())),
        )

    def calibration(self) -> dict[str, str]:
        """Choose training files, as many as fill `CALIBRATION_BYTES`."""
        chosen: dict[str, str] = {}
        size = 0
        for name in sorted(self.train, key=digest):
            length = len(self.train[name].encode())
            if 4_000 <= length <= 16_000 and size + length <= CALIBRATION_BYTES:
                chosen[name] = self.train[name]
                size += length
        return dict(sorted(chosen.items()))


def digest(name: str) -> str:
    """Return what files are ordered by: as good as random, and the same everywhere."""
    return hashlib.sha256(name.encode()).hexdigest()


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which puts the beginning token before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[BOS, EOS, PAD],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Encode texts into one row of ids, each text between its beginning and its end token."""
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
    return torch.tensor(ids)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the untrained model.

    The head size of 16 is the smallest that ONNX Runtime's rotary grouped-query attention accepts.
    """
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=448,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=8,
            head_dim=16,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def loss_of(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, in nats per token, of `rows`, an integer tensor `[batch, tokens]`."""
    logits = model(input_ids=rows, use_cache=False).logits.float()
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, ids: torch.Tensor, window: int) -> float:
    """Mean loss over `ids` in windows that do not overlap; a shorter rest is left out."""
    rows = ids[: len(ids) // window * window].view(-1, window)
    batch = max(1, TOKENS_PER_STEP // window)
    losses = [float(loss_of(model, part)) * len(part) for part in rows.split(batch)]
    return sum(losses) / len(rows)


class Optimizer:
    """Muon for the matrices in the layers, AdamW for embedding and norms, one schedule for both."""

    def __init__(self, model: LlamaForCausalLM, stage: Stage) -> None:
        matrices = [
            p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name
        ]
        others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
        self.parts = [
            torch.optim.Muon(
                matrices, lr=stage.rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, lr=stage.rate, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        warmup = max(1, min(100, stage.steps // 10))

        def factor(step: int) -> float:
            """Rise in a line, then fall along a cosine to a twentieth."""
            if step < warmup:
                return (step + 1) / warmup
            done = (step - warmup) / max(1, stage.steps - warmup)
            return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))

        self.schedules = [torch.optim.lr_scheduler.LambdaLR(part, factor) for part in self.parts]

    def step(self) -> None:
        """Apply the gradients, forget them and go on in the schedule."""
        for part, schedule in zip(self.parts, self.schedules, strict=True):
            part.step()
            part.zero_grad()
            schedule.step()


def train(model: LlamaForCausalLM, ids: torch.Tensor, stage: Stage, seed: int) -> Iterator[float]:
    """Take the steps of `stage` on windows of `ids` and yield the loss of each.

    The weights end as they are stored, rounded to float16, but in float32.
    """
    optimizer = Optimizer(model, stage)
    chooser = torch.Generator().manual_seed(seed)
    for step in range(stage.steps):
        window = stage.window(step)
        starts = torch.randint(len(ids) - window, (TOKENS_PER_STEP // window,), generator=chooser)
        loss = loss_of(model, torch.stack([ids[start : start + window] for start in starts]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield loss.item()
    model.half().float()


CARD = """\
# Reference model

A Llama of {parameters:,} parameters that continues Python source code. It exists to be pruned: by
the tests, by the demonstration and in the examples of graphprune, without a download. It is no use
as an assistant.

| | |
|---|---|
| layers | {layers}, hidden {hidden}, intermediate {intermediate}, tied embedding |
| attention | {heads} query heads and {kv_heads} key/value heads of {head_dim} |
| tokenizer | byte-level BPE of {vocabulary} tokens, trained on the training files |
| data | {files} files of the standard library of CPython {python}, without tests and tables |
| data, tokens | {train_tokens:,} |
| training | {steps} steps of {tokens_per_step} tokens, seed {seed}, torch {torch} |
| training time | {minutes:.0f} minutes, CPU threads: {threads} |
| training loss | {train_loss:.4f} nats per token, mean of the last 100 steps |
| **held-out loss** | **{loss:.4f}** nats per token in windows of {window} |
| **held-out perplexity** | **{perplexity:.2f}** |
| held-out loss, long | {long_loss:.4f} nats per token in windows of {positions} |
| held-out perplexity, long | {long_perplexity:.2f} |
| weights | float16 |

Measured on `../heldout.txt` ({heldout_tokens:,} tokens, {heldout_bytes:,} bytes) with the weights
as they are stored, computed in float32, in windows that do not overlap. The text is these files,
whole and in this order, and none of them was trained on:

{heldout_names}

`../calibration.txt` is these files, which were trained on:

{calibration_names}

`tools/train_reference.py` makes all of this again.

## Licence

The two texts are parts of the standard library of CPython, and the weights were trained on it:
Copyright (c) Python Software Foundation, all rights reserved, used under the licence whose full
text is in `../PYTHON-LICENSE.txt`.
"""


def _listed(names: dict[str, str]) -> str:
    return "\n".join(f"- `{name}`" for name in names)


def main(
    output: Annotated[
        Path, typer.Option(help="Folder that receives reference/ and the two texts.")
    ] = DATA,
    steps: Annotated[
        int, typer.Option(min=1, help="Steps of the first stage; the second takes a fifth.")
    ] = 3200,
    seed: Annotated[
        int, typer.Option(help="Seed of the weights and of the order of the data.")
    ] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
) -> None:
    """Train the reference model and write it with its held-out and calibration texts."""
    console = Console()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)

    corpus = Corpus.of_standard_library()
    tokenizer = train_tokenizer(list(corpus.train.values()))
    train_ids = encode(tokenizer, list(corpus.train.values()))
    heldout_text = "".join(corpus.heldout.values())
    heldout_ids = torch.tensor(tokenizer(heldout_text, verbose=False)["input_ids"])
    console.print(f"{len(train_ids):,} tokens to train on, {len(heldout_ids):,} held out")

    model = build_model(tokenizer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"{parameters:,} parameters, {TOKENS_PER_STEP} tokens per step")

    recent: deque[float] = deque(maxlen=100)
    began = time.monotonic()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for number, stage in enumerate(stages(steps)):
            task = progress.add_task(stage.name, total=stage.steps, loss=math.nan)
            for loss in train(model, train_ids, stage, seed + number):
                recent.append(loss)
                progress.update(task, advance=1, loss=sum(recent) / len(recent))
            heldout = evaluate(model, heldout_ids, WINDOW)
            progress.print(f"held-out loss after {stage.name}: {heldout:.4f}")
    minutes = (time.monotonic() - began) / 60

    short, long = evaluate(model, heldout_ids, WINDOW), evaluate(model, heldout_ids, POSITIONS)
    console.print(
        f"held-out loss {short:.4f}, perplexity {math.exp(short):.2f} in windows of {WINDOW}"
    )

    folder = output / "reference"
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    (output / "heldout.txt").write_text(heldout_text, encoding="utf-8", newline="\n")
    calibration = corpus.calibration()
    (output / "calibration.txt").write_text(
        "".join(calibration.values()), encoding="utf-8", newline="\n"
    )
    config = model.config
    (folder / "README.md").write_text(
        CARD.format(
            parameters=parameters,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_attention_heads,
            head_dim=config.head_dim,
            kv_heads=config.num_key_value_heads,
            vocabulary=VOCABULARY,
            files=len(corpus.train),
            python=platform.python_version(),
            train_tokens=len(train_ids),
            steps=" + ".join(str(stage.steps) for stage in stages(steps)),
            tokens_per_step=TOKENS_PER_STEP,
            seed=seed,
            torch=torch.__version__.split("+")[0],
            minutes=minutes,
            threads=threads,
            train_loss=sum(recent) / len(recent),
            loss=short,
            window=WINDOW,
            perplexity=math.exp(short),
            long_loss=long,
            positions=POSITIONS,
            long_perplexity=math.exp(long),
            heldout_tokens=len(heldout_ids),
            heldout_bytes=len(heldout_text.encode()),
            heldout_names=_listed(corpus.heldout),
            calibration_names=_listed(calibration),
        ),
        encoding="utf-8",
        newline="\n",
    )
    size = sum(path.stat().st_size for path in folder.iterdir())
    console.print(f"{folder}: {size:,} bytes")
    if size > SIZE_LIMIT:
        raise typer.Exit(code=1)


if __name__ == "__main__":
    typer.run(main)
