"""Time and memory of capture and analysis, beside Torch-Pruning's graph building.

    python tools/bench_analysis.py             # Llama-70B's config on the meta device, and scaling
    python tools/bench_analysis.py --peer      # beside Torch-Pruning (pip install torch-pruning)

Every figure of the first part is taken in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

REPEATS = 5
LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def main() -> None:
    """Run what was asked for and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", action="store_true", help="compare with Torch-Pruning")
    parser.add_argument("--layers", type=int, help="measure one depth in this process (internal)")
    given = parser.parse_args()
    if given.layers:
        print(json.dumps(measure(given.layers)))
    elif given.peer:
        compare_with_peer()
    else:
        scale()


def scale() -> None:
    """Capture and analyze Llama-70B's config with 8 and with 80 layers."""
    from rich.console import Console
    from rich.table import Table

    table = Table("layers", "nodes", "capture s", "analyze s", "µs/node", "peak GB", "groups")
    per_node = {}
    for layers in (8, 80):
        command = [sys.executable, __file__, "--layers", str(layers)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        per_node[layers] = found["analyze"] / found["nodes"] * 1e6
        table.add_row(
            str(layers),
            str(found["nodes"]),
            f"{found['capture']:.1f} (CPU {found['capture_cpu']:.1f})",
            f"{found['analyze']:.3f}",
            f"{per_node[layers]:.1f}",
            f"{found['peak_gb']:.2f}",
            str(found["groups"]),
        )
    console = Console()
    console.print(table)
    console.print(f"time per node at 80 layers / at 8: {per_node[80] / per_node[8]:.2f}")


def measure(layers: int) -> dict[str, float]:
    """One depth: seconds of capture, median seconds of analysis, peak memory of the process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import graphprune

    torch.set_num_threads(1)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **LLAMA_70B))
    start, start_cpu = time.perf_counter(), time.process_time()
    program = graphprune.frontend.capture(model)
    capture, capture_cpu = time.perf_counter() - start, time.process_time() - start_cpu
    groups = len(graphprune.analyze(program).groups)
    return {
        "capture": capture,
        "capture_cpu": capture_cpu,
        "nodes": len(program.graph.nodes),
        "analyze": median_seconds(lambda: graphprune.analyze(program).groups),
        "groups": groups,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def median_seconds(call: Callable[[], object]) -> float:
    """Median process time of `call` over a few runs."""
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def compare_with_peer() -> None:
    """Build the dependencies of BERT-base and of OPT with both, in turn, in this process."""
    import torch
    import transformers
    from rich.console import Console
    from rich.table import Table

    import graphprune

    try:
        import torch_pruning
    except ImportError:
        sys.exit("Torch-Pruning is not installed: pip install torch-pruning")
    torch.set_num_threads(1)
    columns = ("ours: capture s", "ours: analyze s", "Torch-Pruning s", "/ analyze", "/ both")
    table = Table("model", *columns)
    ids = torch.zeros((2, 8), dtype=torch.int64)
    models = {
        "BERT-base": transformers.BertForMaskedLM(transformers.BertConfig()),
        "OPT-125M": transformers.OPTForCausalLM(transformers.OPTConfig()),
    }
    for name, model in models.items():
        model.eval()
        ours, captures, theirs = [], [], []
        for _ in range(REPEATS):
            start = time.process_time()
            program = graphprune.frontend.capture(model)
            captures.append(time.process_time() - start)
            start = time.process_time()
            graphprune.analyze(program).groups  # noqa: B018 - computed when it is looked at
            ours.append(time.process_time() - start)
            start = time.process_time()
            graph = torch_pruning.DependencyGraph()
            graph.build_dependency(
                model, {"input_ids": ids}, output_transform=lambda output: output["logits"]
            )
            list(graph.get_all_groups())
            theirs.append(time.process_time() - start)
        row = [f"{statistics.median(values):.2f}" for values in (captures, ours, theirs)]
        both = [capture + analysis for capture, analysis in zip(captures, ours, strict=True)]
        for base in (ours, both):
            ratio = statistics.median(t / b for t, b in zip(theirs, base, strict=True))
            row.append(f"{ratio:.1f} x")
        table.add_row(name, *row)
    Console(width=100).print(table)
    print("Torch-Pruning: its dependency graph and all groups; ratios are medians of pairs")


if __name__ == "__main__":
    main()
