"""The command line: what it writes and prints. What it refuses stands in `tests/test_errors.py`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import networkx
import pytest
from byte_llama import byte_tokenizer
from command_line import PRUNE, Run, assert_refused
from safetensors.torch import load_file, save_file

from graphprune.cli import console
from graphprune.pipeline.pipeline import Pipeline

VERBS = ["inspect", "explain", "run", "apply", "verify", "evaluate", "sensitivity", "sweep"]
VERBS += ["page", "plot", "diff", "passes", "operators", "generate"]


# -- starting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--help"], ["run", "--help"], ["--version"]])
def test_nothing_heavy_is_imported_before_it_is_needed(arguments: list[str]) -> None:
    code = (
        "import sys, graphprune.cli.main as cli\n"
        "try:\n    cli.main()\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'networkx', 'onnx', 'scipy', 'yaml'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)\n"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_module_runs_as_the_command_does() -> None:
    command = [sys.executable, "-m", "graphprune", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("graphprune ")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(graphprune: Run, verb: str) -> None:
    done = graphprune(verb, "--help")
    assert done.status == 0
    assert f"Example: graphprune {verb} " in done.out
    assert done.err == ""


def test_help_names_every_verb(graphprune: Run) -> None:
    out = graphprune("--help").out
    assert all(verb in out for verb in VERBS)


def test_a_plugin_is_known_to_every_verb(graphprune: Run, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("raise ValueError('here')")
    assert_refused(graphprune("passes", "--plugin", str(file)), "mine.py: ValueError: here")


@pytest.mark.parametrize(
    "arguments",
    [
        ["prune"],
        ["run"],
        ["run", "somewhere", "--passes", "verify"],
        ["run", "somewhere", "--passes", "verify", "-o", "x", "--samples", "0"],
        ["inspect"],
        ["inspect", "somewhere", "--format", "xml"],
        ["inspect", "somewhere", "--nonsense"],
        ["explain", "somewhere", "weight", "first"],
        ["verify"],
        ["sensitivity", "somewhere", "--blocks", "1"],
        ["sweep", "somewhere", "--passes", "prune{target=ffn ratio={ratio}}"],
        ["sweep", "somewhere", "-o", "x"],
    ],
)
def test_a_command_line_that_makes_no_sense_exits_with_2(
    graphprune: Run, arguments: list[str]
) -> None:
    done = graphprune(*arguments)
    assert done.status == 2
    assert "Usage" in done.err
    assert "Traceback" not in done.err


# -- looking ------------------------------------------------------------------------------------


def test_inspect_folds_the_layers(graphprune: Run, checkpoint: Path) -> None:
    done = graphprune("inspect", checkpoint)
    assert done.status == 0, done
    assert "LlamaForCausalLM" in done.out
    assert "bytes of KV cache per token" in done.out
    assert "model.layers.{0-1}" in done.out
    assert "model.layers.0.mlp" not in done.out
    assert all(len(line) <= 100 for line in done.out.splitlines())
    assert done.err == ""


def test_inspect_prints_json(graphprune: Run, checkpoint: Path) -> None:
    done = graphprune("inspect", checkpoint, "--format", "json")
    assert done.status == 0, done
    assert "speed_hints" in json.loads(done.out)
    assert graphprune("inspect", checkpoint, "--json").out == done.out


def test_inspect_prints_dot(graphprune: Run, checkpoint: Path) -> None:
    done = graphprune("inspect", checkpoint, "--format", "dot")
    assert done.status == 0, done
    assert "graph" in done.out.split("{")[0]


@pytest.mark.parametrize("dim", ["1", "-1"])
def test_explain_says_what_a_dimension_is(graphprune: Run, checkpoint: Path, dim: str) -> None:
    done = graphprune("explain", checkpoint, "model.layers.0.mlp.down_proj.weight", dim)
    assert done.status == 0, done
    assert "model.layers.0.mlp.up_proj.weight" in done.out


def test_inspect_prints_graphml_that_networkx_reads(graphprune: Run, checkpoint: Path) -> None:
    done = graphprune("inspect", checkpoint, "--format", "graphml")
    found = networkx.parse_graphml(done.out)
    assert "model.layers.0.mlp:ffn" in found["model.layers.0.mlp.up_proj.weight"]


def test_inspect_prints_one_group_one_weight_or_a_tree(graphprune: Run, checkpoint: Path) -> None:
    group = graphprune("inspect", checkpoint, "--group", "model.layers.0.mlp:ffn").out
    assert group.startswith("model.layers.0.mlp:ffn: ")
    weight = graphprune("inspect", checkpoint, "--weight", "model.norm.weight").out
    assert weight.startswith("model.norm.weight, dimension 0: hidden")
    tree = graphprune("inspect", checkpoint, "--tree").out
    assert "self_attn" in tree and "q_proj" in tree
    assert_refused(
        graphprune("inspect", checkpoint, "--group", "model.mlp"), "no group 'model.mlp'"
    )
    near = "did you mean 'model.layers.0.mlp:ffn'?"
    assert_refused(graphprune("inspect", checkpoint, "--group", "ffn"), near)


def test_parts_of_what_inspect_prints_are_data_too(graphprune: Run, checkpoint: Path) -> None:
    def printed(*options: str) -> Any:
        return json.loads(graphprune("inspect", checkpoint, "--json", *options).out)

    group = printed("--group", "model.layers.0.mlp:ffn")
    assert group in printed()["groups"]
    weight = printed("--weight", "model.layers.0.mlp.up_proj.weight")
    assert [each["groups"][0]["name"] for each in weight] == [group["name"], "residual"]
    for odd in (["--json", "--tree"], ["--group", "x", "--weight", "y"]):
        assert graphprune("inspect", checkpoint, *odd).status == 2


def test_columns_say_how_wide_tables_are(
    graphprune: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def widest() -> int:
        return max(map(len, graphprune("inspect", checkpoint).out.splitlines()))

    assert 80 < widest() <= 100
    monkeypatch.setenv("COLUMNS", "70")
    assert widest() <= 70


def test_inspect_writes_a_page_and_never_over_a_file(
    graphprune: Run, checkpoint: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    assert graphprune("inspect", checkpoint, "--html", page).status == 0
    assert page.read_text().startswith("<!doctype html>")
    assert_refused(graphprune("inspect", checkpoint, "--html", page), str(page), "exists")


def test_what_cannot_be_captured_has_a_page_of_its_weights_and_the_reason(
    graphprune: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphprune.backends import load as loading
    from graphprune.errors import CaptureError

    def refuse(directory: str) -> Any:
        raise CaptureError("model.layers.0: it branches on data (modeling.py:7)")

    monkeypatch.setattr(loading, "load", refuse)
    monkeypatch.setattr(loading, "look", lambda directory, cache: refuse(directory))
    page = tmp_path / "page.html"
    done = graphprune("inspect", checkpoint, "--html", page)
    assert done.status == 0
    assert "it branches on data" in done.err
    assert '"problem":"model.layers.0: it branches on data (modeling.py:7)"' in page.read_text()
    assert '"model.norm.weight"' in page.read_text()
    assert_refused(graphprune("inspect", checkpoint), "it branches on data")


def test_inspect_shows_a_plan_on_the_page(
    graphprune: Run, checkpoint: Path, smaller: Path, tmp_path: Path
) -> None:
    page, plan = tmp_path / "page.html", smaller / "plan.json"
    assert graphprune("inspect", checkpoint, "--html", page, "--plan", plan).status == 0
    assert '"plan":{"shapes"' in page.read_text()
    other = tmp_path / "other.html"
    refused = graphprune("inspect", smaller, "--html", other, "--plan", plan)
    assert_refused(refused, "the plan was made for program")
    assert not other.exists()


def test_inspect_draws_layers_around_a_plan_and_scores_of_groups(
    graphprune: Run, checkpoint: Path, smaller: Path, tmp_path: Path
) -> None:
    sizes, plan = tmp_path / "sizes.svg", smaller / "plan.json"
    assert graphprune("inspect", checkpoint, "--plan", plan, "--picture", sizes).status == 0
    drawn = sizes.read_text()
    assert all(f"<!-- {text} -->" in drawn for text in ("model.layers.0", "before", "parameters"))
    scores, picture = tmp_path / "scores.safetensors", tmp_path / "scores.svg"
    passes = f"prune{{target=ffn ratio=0.125 criterion=magnitude scores={scores}}}"
    assert graphprune("run", checkpoint, "--passes", passes, "-o", tmp_path / "out").status == 0
    assert graphprune("inspect", checkpoint, "--scores", scores, "--picture", picture).status == 0
    assert "<!-- model.layers.1.mlp:ffn -->" in picture.read_text()
    odd = graphprune("inspect", checkpoint, "--plan", plan, "--picture", tmp_path / "sizes.txt")
    assert_refused(odd, "sizes.txt", ".png")
    assert graphprune("inspect", checkpoint, "--picture", sizes).status == 2


def test_page_and_plot_write_what_inspect_wrote(
    graphprune: Run, checkpoint: Path, smaller: Path, tmp_path: Path
) -> None:
    plan = ["--plan", smaller / "plan.json"]
    old, new = (tmp_path / f"{name}.html" for name in ("old", "new"))
    assert graphprune("inspect", checkpoint, "--html", old, *plan).status == 0
    assert graphprune("page", checkpoint, "-o", new, *plan).status == 0
    assert new.read_bytes() == old.read_bytes()
    assert graphprune("plot", checkpoint, "-o", tmp_path / "new.svg", *plan).status == 0
    assert "<!-- model.layers.0 -->" in (tmp_path / "new.svg").read_text()
    neither = graphprune("plot", checkpoint, "-o", tmp_path / "none.svg")
    assert (neither.status, "--plan" in neither.err) == (2, True)


def test_explain_names_the_operators_that_couple(graphprune: Run, checkpoint: Path) -> None:
    out = graphprune("explain", checkpoint, "model.layers.0.mlp.up_proj.weight", "0").out
    assert "aten.mul.Tensor in model.layers.0.mlp" in out


def test_an_explanation_is_there_as_data_too(graphprune: Run, checkpoint: Path) -> None:
    weight = "model.layers.0.mlp.up_proj.weight"
    data = json.loads(graphprune("explain", checkpoint, weight, "-2", "--json").out)
    assert (data["weight"], data["dimension"], data["frozen"]) == (weight, 0, [])
    (group,) = data["groups"]
    assert (group["name"], group["size"]) == ("model.layers.0.mlp:ffn", 48)
    assert [weight, 0] in group["members"]
    assert group["with"] == "model.layers.0.mlp.down_proj.weight"
    assert any(line.startswith("aten.mul.Tensor in model.layers.0.mlp") for line in group["path"])
    frozen = json.loads(graphprune("explain", checkpoint, "lm_head.weight", 0, "--json").out)
    assert frozen["groups"] == [] and frozen["frozen"][0]["why"]


def test_looking_reads_no_weights(
    graphprune: Run, checkpoint: Path, smaller: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from graphprune.backends import load as loading

    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("the weights are loaded"))
    assert graphprune("page", checkpoint, "-o", tmp_path / "page.html").status == 0
    drawn = ["-o", tmp_path / "sizes.svg", "--plan", smaller / "plan.json"]
    assert graphprune("plot", checkpoint, *drawn).status == 0
    assert "note:" not in graphprune("inspect", checkpoint).out
    assert graphprune("explain", checkpoint, "lm_head.weight", 0).status == 0


def test_diff_compares_two_plans(graphprune: Run, smaller: Path, tmp_path: Path) -> None:
    plan = smaller / "plan.json"
    again = Path(shutil.copytree(smaller, tmp_path / "again"))
    done = graphprune("diff", smaller, again)
    assert "mlp.up_proj.weight" in done.out
    assert done.out.startswith(f"A: {smaller}\nB: {again}\n")
    assert graphprune("diff", plan, plan).status == 0
    data = json.loads(graphprune("diff", smaller, again, "--json").out)
    assert data["removed"][0] == {
        "weight": "model.layers.0.mlp.gate_proj.weight",
        "dimension": 0,
        "first": 12,
        "second": 12,
        "both": 12,
    }
    assert_refused(graphprune("diff", plan, tmp_path / "none.json"), "none.json")


def test_explain_refuses_what_is_not_there(graphprune: Run, checkpoint: Path) -> None:
    assert_refused(graphprune("explain", checkpoint, "nonsense", 0), "nonsense")
    assert_refused(graphprune("explain", checkpoint, "lm_head.weight", 7), "7")
    near = "did you mean 'model.layers.0.mlp.up_proj.weight'?"
    wrong = "model.layers.0.mlp.uo_proj.weight"
    assert_refused(graphprune("explain", checkpoint, wrong, 0), wrong, near)
    assert_refused(graphprune("inspect", checkpoint, "--weight", wrong), wrong, near)


def test_evaluate_measures_perplexity(graphprune: Run, checkpoint: Path, text: Path) -> None:
    done = graphprune("evaluate", checkpoint, "--text", text, "--length", 64)
    assert done.status == 0, done
    assert 200 < float(done.out.split()[1]) < 320
    assert "text.txt" in done.out
    options = ["--text", text, "--length", 64, "--json"]
    data = json.loads(graphprune("evaluate", checkpoint, *options).out)
    assert data["perplexity"] == pytest.approx(float(done.out.split()[1]), rel=1e-5)


def test_evaluate_compares_with_the_original(
    graphprune: Run, checkpoint: Path, text: Path, smaller: Path
) -> None:
    options = ["--original", checkpoint, "--text", text, "--length", 64]
    done = graphprune("evaluate", smaller, *options)
    assert done.status == 0, done
    for words in ("loss, nats/token", "agreement with the original", "predictions of text of text"):
        assert words in done.out
    found = json.loads(graphprune("evaluate", smaller, *options, "--json").out)
    alone = json.loads(graphprune("evaluate", smaller, *options[2:], "--json").out)
    assert found["loss_after"] == pytest.approx(alone["loss"], rel=1e-5)


def test_evaluate_refuses_a_short_text(graphprune: Run, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    done = graphprune("evaluate", checkpoint, "--text", tmp_path / "short.txt", "--length", 64)
    assert_refused(done, "5 tokens", "64")


def test_sensitivity_prints_a_table_and_writes_json_and_a_picture(
    graphprune: Run, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    files = ["--json", tmp_path / "heads.json", "--picture", tmp_path / "heads.png"]
    options = ["--text", text, "--length", 64, "--max-tokens", 256]
    done = graphprune("sensitivity", checkpoint, *options, *files)
    assert done.status == 0, done
    assert "model.layers.*.self_attn:kv-head" in done.out
    assert all(len(line) <= 100 for line in done.out.splitlines())
    data = json.loads((tmp_path / "heads.json").read_text())
    assert [len(row["removed"]) for row in data["rows"]] == [4, 4]
    assert data["samples"] == 4
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")
    printed = graphprune("sensitivity", checkpoint, *options, "--json")
    assert json.loads(printed.out) == data


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--picture", "heads.doc"], ["heads.doc", ".png"]),
        (["--json", "text.txt"], ["text.txt exists already"]),
        (["--group", "experts"], ["'experts' matches no group", "ffn"]),
        (["--text", "gone.txt"], ["gone.txt does not exist"]),
        (["--length", "500"], ["500 tokens is longer than the model's 128"]),
    ],
)
def test_sensitivity_refuses_bad_options(
    graphprune: Run,
    checkpoint: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(text.parent)
    done = graphprune("sensitivity", checkpoint, "--text", text, "--length", 64, *options)
    assert_refused(done, *words)
    assert [path.name for path in text.parent.iterdir()] == ["text.txt"]


def test_passes_are_a_list_and_one_is_described(graphprune: Run) -> None:
    done = graphprune("passes")
    assert done.status == 0
    for word in ("prune", "merge-kv-heads", "verify", "Remove the least important units"):
        assert word in done.out
    assert "round_to" not in done.out
    one = graphprune("passes", "prune").out
    for word in ("target", "[needed]", "round_to", "[criterion=taylor]"):
        assert word in one
    example = one.split("--passes '")[1].split("'")[0]
    assert Pipeline.parse(example).passes[0].name == "prune"
    assert_refused(graphprune("passes", "prnue"), "did you mean 'prune'?")
    data = json.loads(graphprune("passes", "verify", "--json").out)
    assert [option["name"] for option in data[0]["options"]] == ["tolerance"]


def test_operators_lists_rules(graphprune: Run) -> None:
    done = graphprune("operators")
    assert done.status == 0
    assert "aten.linear.default" in done.out


# -- writing ------------------------------------------------------------------------------------


def test_run_writes_checkpoint_plan_and_report(smaller: Path) -> None:
    names = {path.name for path in smaller.iterdir()}
    assert {"config.json", "tokenizer.json", "plan.json", "report.json"} <= names
    assert any(name.endswith(".safetensors") for name in names)
    assert not any(name.startswith(".") for name in names)
    assert json.loads((smaller / "config.json").read_text())["intermediate_size"] == 36
    assert [path.name for path in smaller.parent.iterdir() if path.name != "text.txt"] == [
        "smaller"
    ]


def test_what_passes_write_lies_beside_and_the_report_names_no_folder_that_is_gone(
    graphprune: Run, checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    passes = f"{PRUNE},export-onnx{{path=model.onnx}}"
    assert graphprune("run", checkpoint, "--passes", passes, "-o", out).status == 0
    assert (out / "model.onnx").is_file()
    report = json.loads((out / "report.json").read_text())
    assert report["passes"][-1]["details"]["path"] == "model.onnx"
    assert report["summary"]["written"]["by passes"] == ["model.onnx"]
    assert report["seed"] == 0


def test_apply_makes_the_same_checkpoint_again(
    graphprune: Run, checkpoint: Path, smaller: Path, tmp_path: Path
) -> None:
    done = graphprune("apply", checkpoint, smaller / "plan.json", "-o", tmp_path / "again")
    assert done.status == 0, done
    first, second = (load_file(d / "model.safetensors") for d in (smaller, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


def test_verify_proves_it(graphprune: Run, checkpoint: Path, smaller: Path) -> None:
    done = graphprune("verify", checkpoint, smaller)
    assert done.status == 0, done
    assert "max relative error" in done.out
    data = json.loads(graphprune("verify", checkpoint, smaller, "--json").out)
    assert data["verified"] is True
    assert data["max_relative_error"] <= data["tolerance"]


def test_verify_refuses_a_checkpoint_that_was_changed(
    graphprune: Run, checkpoint: Path, smaller: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(smaller, tmp_path / "copy"))
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] *= 1.1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    done = graphprune("verify", checkpoint, copy)
    assert_refused(done, "model.layers.0.mlp.down_proj.weight", "tolerance")


def test_verify_refuses_a_folder_without_a_plan(graphprune: Run, checkpoint: Path) -> None:
    assert_refused(graphprune("verify", checkpoint, checkpoint), "holds no plan.json")


def test_a_quiet_run_says_nothing(graphprune: Run, checkpoint: Path, tmp_path: Path) -> None:
    done = graphprune("run", checkpoint, "--passes", PRUNE, "-o", tmp_path / "out", "--quiet")
    assert (done.status, done.out, done.err) == (0, "", "")
    assert (tmp_path / "out" / "plan.json").is_file()


def test_the_old_name_of_calibration_length_works_with_a_word(
    graphprune: Run, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    sizes = []
    for option in ("--length", "--calibration-length"):
        out = tmp_path / option
        options = ["--passes", PRUNE, "--calibration", text, option, 32, "-o", out]
        done = graphprune("run", checkpoint, *options)
        assert done.status == 0, done
        assert ("--calibration-length" in done.err) is (option == "--length")
        sizes.append(json.loads((out / "report.json").read_text())["calibration"])
    assert sizes[0] == sizes[1]


def test_passes_may_be_a_yaml_file(graphprune: Run, checkpoint: Path, tmp_path: Path) -> None:
    from graphprune.pipeline.pipeline import Pipeline

    path = tmp_path / "pipeline.yaml"
    path.write_text(Pipeline.parse(PRUNE).to_yaml())
    done = graphprune("run", checkpoint, "--passes", path, "-o", tmp_path / "out")
    assert done.status == 0, done
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["pipeline"].startswith("prune{target=ffn")


def test_stop_after_leaves_passes_out(graphprune: Run, checkpoint: Path, tmp_path: Path) -> None:
    options = ["--passes", f"{PRUNE},verify", "--stop-after", 0]
    done = graphprune("run", checkpoint, *options, "-o", tmp_path / "out")
    assert done.status == 0, done
    assert "skipped" in done.out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == 48


def test_print_after_prints_the_graph(graphprune: Run, checkpoint: Path, tmp_path: Path) -> None:
    options = ["--passes", PRUNE, "--verify-each", "--print-after", "prune"]
    done = graphprune("run", checkpoint, *options, "-o", tmp_path / "out")
    assert done.status == 0, done
    assert "after pass 1 (prune)" in done.err


def test_what_no_checkpoint_can_hold_is_archived_with_the_reason(
    graphprune: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_checkpoints(monkeypatch, "layers of a shape nobody knows")
    out = tmp_path / "out"
    done = graphprune("run", checkpoint, "--passes", PRUNE, "-o", out)
    assert done.status == 0, done
    assert "layers of a shape nobody knows" in done.err
    assert "archive" in done.out
    assert graphprune("verify", checkpoint, out).status == 0


def refuse_checkpoints(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    from graphprune.backends.huggingface import save

    none = save.CheckpointForm("none", reason)
    monkeypatch.setattr(save, "checkpoint_form", lambda _: none)


# -- refusing -----------------------------------------------------------------------------------


def test_the_input_is_never_changed(graphprune: Run, checkpoint: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    assert graphprune("run", checkpoint, "--passes", PRUNE, "-o", tmp_path / "out").status == 0
    graphprune("run", checkpoint, "--passes", PRUNE, "-o", checkpoint)
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


def sweeping(checkpoint: Path, text: Path, *recipes: str) -> list[object]:
    options: list[object] = ["sweep", checkpoint, "--text", text, "--length", 64]
    for recipe in recipes:
        options += ["--passes", recipe]
    return options


def test_sweep_writes_points_json_and_a_picture(
    graphprune: Run, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    recipes = [
        "prune{target=ffn ratio={ratio}}",
        "prune{target=kv-heads ratio={ratio} criterion=l1}",
    ]
    options = ["--ratios", "0.25,0.5", "--seeds", 2, "--calibration", text, "--samples", 4]
    done = graphprune(*sweeping(checkpoint, text, *recipes), *options, "-o", tmp_path / "out")
    assert done.status == 0, done
    assert "(unpruned)" in done.out
    assert done.out.count(" ± ") == 4
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "points.jsonl",
        "sweep.json",
        "sweep.png",
    }
    data = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert len(data["points"]) == 8
    assert [row["measured"] for row in data["summary"]] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("recipe", "options", "words"),
    [
        ("prune{target=ffn ratio=0.5}", [], ["has no {ratio}"]),
        (
            "prune{target=ffn ratio={ratio}}",
            [],
            ["needs calibration data", "--calibration", "criterion=l2"],
        ),
        ("prune{target=ffn ratio={ratio}", [], ["recipe 'prune{", "at ratio 0.1"]),
        ("prune{target=ffn ratio={ratio}}", ["--ratios", "0.5..2"], ["1.1 is not in [0, 1)"]),
        ("prune{target=ffn ratio={ratio}}", ["--calibration", "gone"], ["gone does not exist"]),
        (
            "prune{target=ffn ratio={ratio} criterion=l1}",
            ["--max-tokens", "8"],
            ["has 8 tokens"],
        ),
    ],
)
def test_sweep_refuses_bad_options(
    graphprune: Run,
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    recipe: str,
    options: list[str],
    words: list[str],
) -> None:
    done = graphprune(*sweeping(checkpoint, text, recipe), *options, "-o", tmp_path / "out")
    assert_refused(done, *words)
    assert not (tmp_path / "out" / "sweep.json").exists()


def test_a_sweep_of_which_every_point_fails_shows_why_and_fails(
    graphprune: Run, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    recipe = "prune{target=experts ratio={ratio} criterion=l1}"
    done = graphprune(*sweeping(checkpoint, text, recipe), "-o", tmp_path / "out")
    assert_refused(done, "every point failed", "'experts' matches no group")
    assert "failed: prune" in done.out


# -- going wrong --------------------------------------------------------------------------------


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("graphprune.pipeline.pipeline.Pipeline.run", run)


def test_an_interrupt_is_one_line_and_leaves_nothing(
    graphprune: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())
    done = graphprune("run", checkpoint, "--passes", PRUNE, "-o", tmp_path / "out")
    assert done.status == 130
    assert done.err == "graphprune: interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_printed_is_one_line() -> None:
    command = [sys.executable, "-m", "graphprune", "operators"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "graphprune: what it prints cannot be written: No space left on device\n"
    )


def test_what_of_a_directory_is_not_used_is_said(
    graphprune: Run, checkpoint: Path, tmp_path: Path
) -> None:
    shallow = shutil.copytree(checkpoint, tmp_path / "shallow")
    config = json.loads((shallow / "config.json").read_text())
    (shallow / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    recipe = "prune{target=ffn ratio=0.25 criterion=l2}"
    done = graphprune("run", shallow, "--passes", recipe, "-o", tmp_path / "out", "-q")
    assert f"{shallow}: its files hold" in done.err
    assert "weights that its config has no place for" in done.err


def test_an_unforeseen_error_is_one_line_too(
    graphprune: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, ZeroDivisionError("two\nlines"))
    done = graphprune("run", checkpoint, "--passes", PRUNE, "-o", tmp_path / "out")
    assert_refused(done, "ZeroDivisionError: two lines", "--traceback")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["option", "environment"])
def test_a_traceback_is_shown_on_request(
    graphprune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    from graphprune.errors import GraphPruneError

    if how == "environment":
        monkeypatch.setenv(console.TRACEBACK, "1")
    with pytest.raises(GraphPruneError):
        graphprune("inspect", tmp_path / "gone", *(["--traceback"] if how == "option" else []))


def test_a_tokenizer_may_lie_elsewhere(
    graphprune: Run, broken: Path, text: Path, tmp_path: Path
) -> None:
    for path in broken.glob("tokenizer*"):
        path.unlink()
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    done = graphprune("evaluate", broken, "--text", text, "--length", 64)
    assert_refused(done, "holds no tokenizer")
    options = ["--text", text, "--length", 64, "--tokenizer", tmp_path / "tokenizer"]
    assert graphprune("evaluate", broken, *options).status == 0


# -- the packaged checkpoint --------------------------------------------------------------------


def test_reference_is_the_packaged_checkpoint(graphprune: Run, tmp_path: Path) -> None:
    passes = "prune{target=ffn ratio=0.125 criterion=taylor}"
    done = graphprune("run", "reference", "--passes", passes, "-o", tmp_path / "out")
    assert done.status == 0, done
    options = ["--max-tokens", 2000]
    whole = graphprune("evaluate", "reference", *options)
    pruned = graphprune("evaluate", tmp_path / "out", *options)
    assert float(whole.out.split()[1]) < float(pruned.out.split()[1])
