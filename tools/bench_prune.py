"""Time and peak memory of pruning a one-billion-parameter random Llama.

    python tools/bench_prune.py                # magnitude and Taylor, each in a process of its own

Memory is the peak of the process over the bytes of the weights; time stands beside what cannot be
avoided: copying the weights into new memory (magnitude), and one forward and backward pass for each
calibration batch (Taylor).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

BILLION = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "tie_word_embeddings": True,
}
RATIO, SAMPLES, LENGTH = 0.25, 4, 64


def main() -> None:
    """Measure every criterion in its own process and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--criterion", help="measure one criterion in this process (internal)")
    parser.add_argument("--target", default="ffn")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    if given.criterion:
        print(json.dumps(measure(given.criterion, given.target, given.threads)))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "criterion", "target", "parameters", "peak / weights", "seconds", "floor s", "ratio"
    )
    for criterion, target in (("magnitude", "ffn"), ("magnitude", "all"), ("taylor", "ffn")):
        command = [sys.executable, __file__, "--criterion", criterion, "--target", target]
        command += ["--threads", str(given.threads)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        table.add_row(
            criterion,
            target,
            f"{found['before']:,} -> {found['after']:,}",
            f"{found['peak']:.2f}",
            f"{found['seconds']:.1f}",
            f"{found['floor']:.1f} ({found['what']})",
            f"{found['seconds'] / found['floor']:.2f}",
        )
    Console(width=120).print(table)


def measure(criterion: str, target: str, threads: int) -> dict[str, Any]:
    """Prune once; the process's peak memory is read before the floor is timed."""
    import torch

    import graphprune
    from graphprune.frontend.capture import capture
    from graphprune.passes.prune import Prune
    from graphprune.pipeline.pipeline import Pipeline

    torch.set_num_threads(threads)
    warm_up()
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model = random_llama()
    program = capture(model)
    generator = torch.Generator().manual_seed(0)
    batches = [
        {"input_ids": torch.randint(0, BILLION["vocab_size"], (1, LENGTH), generator=generator)}
        for _ in range(SAMPLES)
    ]
    calibration = graphprune.Calibration.from_batches(batches)
    pipeline = Pipeline([Prune(target=(target,), ratio=RATIO, criterion=criterion)])
    start = time.perf_counter()
    result = pipeline.run(program, calibration=calibration)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - base
    weights = sum(w.numel() * w.element_size() for w in program.weights.values())
    before, after = program.parameter_count(), result.program.parameter_count()
    del result
    taylor = criterion == "taylor"
    floor = passes_floor(model, batches) if taylor else copy_floor(program.weights)
    what = "forward and backward" if taylor else "copying the weights"
    return {
        "before": before,
        "after": after,
        "peak": peak / weights,
        "seconds": seconds,
        "floor": floor,
        "what": what,
    }


def warm_up() -> None:
    """Import and run everything once on a tiny model, so that only weights count afterwards."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import graphprune
    from graphprune.frontend.capture import capture

    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    config = LlamaConfig(**tiny, num_attention_heads=2)
    program = capture(LlamaForCausalLM(config))
    graphprune.Pipeline.parse("prune{target=ffn ratio=0.25 criterion=l2}").run(program)


def random_llama() -> Any:
    """Make a Llama whose weights are filled in place, so that it takes no more memory than they."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**BILLION)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    model.tie_weights()
    rotary: Any = type(model.model.rotary_emb)
    model.model.rotary_emb = rotary(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.03, 0.03, generator=generator)
    return model.eval()


def copy_floor(weights: Any) -> float:
    """Seconds to read all weights and write them to new memory, which pruning does too."""
    start = time.perf_counter()
    copies = [weight.detach().clone() for weight in weights.values()]
    seconds = time.perf_counter() - start
    del copies
    return seconds


def passes_floor(model: Any, batches: Any) -> float:
    """Seconds of the forward and backward passes that the gradients of FFN weights take."""
    start = time.perf_counter()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in ffn_parameters(model):
        parameter.requires_grad_(True)
    for batch in batches:
        model(**batch, labels=batch["input_ids"]).loss.backward()
    return time.perf_counter() - start


def ffn_parameters(model: Any) -> Iterator[Any]:
    """Return the weights that the FFN groups reach into."""
    for name, parameter in model.named_parameters():
        if ".mlp." in name:
            yield parameter


if __name__ == "__main__":
    main()
