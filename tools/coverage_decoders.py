"""Which decoders are fused, and which run in onnxruntime-genai, on tiny models with real features.

    python tools/coverage_decoders.py --genai PYTHON         # resumed where it was left
    python tools/coverage_decoders.py --genai PYTHON --only gemma3_text,qwen3 --again

Each type is written as a package for the CPU, whose parity protocol is run, and generates by
onnxruntime-genai, of which PYTHON is an environment that has it; greedy tokens are compared with
those of transformers. What its own builder makes of the model takes turns with the package's, one
token at a time. The table goes to ``tools/COVERAGE_DECODERS.md``. Features that the defaults
of a small config leave out, such as windows of some layers or scaled rotation, stand in `FEATURES`.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers as tf
import typer
from onnx_routes import build, session
from tiny_models import FIELDS, VOCABULARY, perturb, tiny_config
from transformers.models.auto import modeling_auto

import graphprune as gp
from graphprune.backends.onnx.package import read_package, write_package
from graphprune.errors import first_line
from graphprune.io import reference

RESULTS = Path("out/decoders")
TABLE = Path(__file__).with_name("COVERAGE_DECODERS.md")
NEW = 12
PAST, TURNS, AT_ONCE = 48, 20, 25
"""Tokens in the cache, and how often a token is timed: turns, and runs in a turn."""

_MIXED = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "partial_rotary_factor": 0.5,
}
_OF_STATES = {"hidden_size": 32}
FEATURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {**_MIXED, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_MIXED, "query_pre_attn_scalar": 16},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {},
    "phi3": {
        "rope_parameters": _LONG,
        "original_max_position_embeddings": 64,
        "max_position_embeddings": 128,
        "hidden_size": 128,
    },
    "llama4_text": {"attention_chunk_size": 8, "no_rope_layers": [1, 0]},
    "gpt_oss": _MIXED,
    "deepseek_v3": {"head_dim": 8},
    "mixtral": {},
    "mistral": {},
    "olmo2": {},
    "granite": {"attention_multiplier": 0.1, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "smollm3": {"no_rope_layers": [1, 0]},
    "cohere2": _MIXED,
    "glm4": {},
    "gpt2": {},
    "gpt_neox": {},
    "mamba2": _OF_STATES,
    "bamba": _OF_STATES,
    "jamba": _OF_STATES,
    "falcon_h1": _OF_STATES,
    "granitemoehybrid": _OF_STATES,
    "qwen3_next": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}
"""Type -> fields of its config, beside those of every tiny model."""

_SCRIPT = """
import json, sys
import numpy as np
import onnxruntime_genai as og
folder, prompt, new = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = og.Model(folder)
params = og.GeneratorParams(model)
params.set_search_options(max_length=len(prompt) + new, batch_size=1, do_sample=False)
generator = og.Generator(model, params)
generator.append_tokens(np.array([prompt], dtype=np.int32))
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps([int(token) for token in generator.get_sequence(0)][len(prompt):]))
"""


def main(
    genai: Annotated[Path, typer.Option(help="Python of an environment with onnxruntime-genai.")],
    only: Annotated[str, typer.Option(help="Only these types, joined by commas.")] = "",
    again: Annotated[bool, typer.Option("--again", help="Measure what is measured.")] = False,
) -> None:
    """Measure every type that was not measured yet, and write the table."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for kind in only.split(",") if only else FEATURES:
        path = RESULTS / f"{kind}.json"
        row = {} if again or not path.is_file() else json.loads(path.read_text(encoding="utf-8"))
        if not row or ("genai" in row and "builder" not in row):
            row = measured(kind, genai.absolute()) if not row else with_builder(row, genai)
            path.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(row), flush=True)
    rows = [json.loads((RESULTS / f"{k}.json").read_text()) for k in FEATURES if done(k)]
    TABLE.write_text(table(rows), encoding="utf-8")


def done(kind: str) -> bool:
    """Return whether a type was measured."""
    return (RESULTS / f"{kind}.json").is_file()


def measured(kind: str, genai: Path) -> dict[str, Any]:
    """Return what came of a type."""
    row: dict[str, Any] = {"type": kind}
    try:
        model = decoder(kind)
        program = gp.capture(model)
        with tempfile.TemporaryDirectory() as folder:
            package = Path(folder) / "package"
            report = write_package(program, package, target="cpu")
            row["attention"] = dict(read_package(package).attention)
            row["error"] = report.max_relative_error
            row["notes"] = list(report.notes)
            if (package / "genai_config.json").is_file():
                row["genai"] = _compared(model, package, genai)
                row["builder"] = _timed(model, package, genai)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the row's reason
        row["failed"] = first_line(error, typed=True)
    return row


def with_builder(row: dict[str, Any], genai: Path) -> dict[str, Any]:
    """Return a row of an earlier run with what the builder makes of its type."""
    model = decoder(row["type"])
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "package"
        write_package(gp.capture(model), package, target="cpu", check=False)
        return row | {"builder": _timed(model, package, genai.absolute())}


def decoder(kind: str) -> Any:
    """Make a tiny decoder with heads that rotate within the fused operator."""
    wide = {"head_dim": 16, "hidden_size": 64, "sliding_window": 8, "eos_token_id": None}
    known = vars(tf.CONFIG_MAPPING[kind]())
    fields = {k: v for k, v in wide.items() if k in known} | FIELDS.get(kind, {}) | FEATURES[kind]
    torch.manual_seed(0)
    name = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    model: Any = perturb(getattr(tf, name)(tiny_config(kind, fields))).eval()
    with torch.no_grad():  # so that tokens differ from one to the next
        model.get_output_embeddings().weight.mul_(8).add_(torch.randn(1))
    model.generation_config.eos_token_id = VOCABULARY - 1
    model.generation_config.pad_token_id = 0
    return model


def _compared(model: Any, package: Path, genai: Path) -> str:
    """Return "same", or what onnxruntime-genai gives in place of the tokens of transformers."""
    prompt = [int(token) for token in torch.randint(3, VOCABULARY - 1, (17,))]
    ids = torch.tensor([prompt])
    with torch.no_grad():
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW
        )
    wanted = found[0, len(prompt) :].tolist()
    given = [str(genai), "-c", _SCRIPT, str(package), json.dumps(prompt), str(NEW)]
    ran = subprocess.run(given, check=False, capture_output=True, text=True)
    if ran.returncode:
        lines = ran.stderr.strip().splitlines() or [f"it ends with {ran.returncode}"]
        return f"fails: {lines[-1][:200]}"
    tokens = json.loads(ran.stdout.strip().splitlines()[-1])
    return "same" if tokens == wanted else f"{tokens} in place of {wanted}"


def _timed(model: Any, package: Path, genai: Path) -> str:
    """Return how many times as long a token takes as in what the builder makes, or why not."""
    checkpoint, built = package.with_name("checkpoint"), package.with_name("built")
    model.save_pretrained(checkpoint)
    for source in reference.checkpoint_dir().glob("tokenizer*"):
        shutil.copy(source, checkpoint)
    try:
        build(genai, checkpoint, built, "fp32")
    except RuntimeError as error:
        return str(error).replace(f"{checkpoint.parent}/", "")
    ours, theirs = (session(folder / "model.onnx", 1) for folder in (package, built))
    caches = {
        value.name: np.zeros((1, value.shape[1], PAST, value.shape[3]), np.float32)
        for value in ours.get_inputs()
        if value.name.startswith("past_key_values")
    }
    own = {"input_ids": np.ones((1, 1), np.int64), "position_ids": np.full((1, 1), PAST)}
    own["attention_mask"] = np.ones((1, PAST + 1), np.int64)
    taken: dict[Any, list[float]] = {ours: [], theirs: []}
    for turn in range(TURNS + 1):
        for each in sorted(taken, key=lambda one: (one is ours) == turn % 2):
            feeds = {v.name: (own | caches)[v.name] for v in each.get_inputs()}
            start = time.process_time()
            for _ in range(AT_ONCE):
                each.run(None, feeds)
            if turn:
                taken[each].append(time.process_time() - start)
    ratios = [one / two for one, two in zip(taken[ours], taken[theirs], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def table(rows: list[dict[str, Any]]) -> str:
    """Everything that was measured, as Markdown."""
    lines = [
        "# Decoders in ONNX Runtime",
        "",
        "Made by `tools/coverage_decoders.py`: a tiny random model of each type with the features",
        "of the real ones, as a package for the CPU that passed the parity protocol. Fused: how",
        "many of its attentions are one operator, with the rotation inside or not; onnxruntime-",
        f"genai: whether {NEW} greedy tokens after 17 are those of transformers. Its builder's:",
        "how many times as long a token takes as in what its builder makes of the model",
        f"({PAST} tokens in the cache, process time of one thread), or why it makes nothing;",
        "empty where that was not measured. Models this small show little but what calling",
        "operators costs, such as the handful by which ours looks for padding on the left; real",
        "ones are in `ONNX_BENCH.md` and `ONNX_QUANTIZED.md`.",
        "",
        "| type | attention fused | as | error | onnxruntime-genai | its builder's |",
        "|---|---|---|---|---|---|",
    ]
    reasons = []
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['type']} | {row['failed']} | | | | |")
            continue
        forms = Counter(_form(said) for said in row["attention"].values())
        fused = sum(n for form, n in forms.items() if form != "decomposed")
        as_ = ", ".join(sorted(form for form in forms if form != "decomposed"))
        why = [note for note in row["notes"] if note.startswith("no genai_config.json")]
        ran = row.get("genai") or "not for it: " + why[0].partition(": ")[2]
        count = f"{fused} of {forms.total()}" if forms else "it has none"
        cells = [row["type"], count, as_, f"{row['error']:.0e}", ran, row.get("builder", "")]
        lines.append(f"| {' | '.join(cells)} |")
        reasons += [
            f"- `{row['type']}`, {module}: {said.partition(': ')[2]}"
            for module, said in row["attention"].items()
            if said.startswith("decomposed")
        ]
        reasons += [f"- `{row['type']}`: {n}" for n in row["notes"] if "not fused" in n]
    return (
        "\n".join([*lines, "", "What is not fused, and why:", "", *(reasons or ["- nothing"])])
        + "\n"
    )


def _form(said: str) -> str:
    form = said.partition(":")[0]
    return f"{form}, rotary inside" if re.search("rotary inside", said) else form


if __name__ == "__main__":
    typer.run(main)
