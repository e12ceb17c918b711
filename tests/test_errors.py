"""Everything that is refused: one line of a class of its own, nothing written, nothing changed.

The two tables hold what people run into, on the command line and in Python. What else each part
refuses stands in its own tests.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from byte_llama import byte_llama, byte_tokenizer, save_checkpoint
from command_line import Run, command_line
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import graphprune as gp
from graphprune import errors
from graphprune.calibration.data import Calibration
from graphprune.errors import (
    CalibrationError,
    CaptureError,
    CheckpointError,
    EvaluationError,
    GraphPruneError,
    MergeError,
    NothingToPrune,
    OutputError,
    PipelineError,
    PlanError,
    SelectionError,
    UsageError,
    VerificationError,
)
from graphprune.ir.program import Program
from graphprune.pipeline.pipeline import Pipeline
from graphprune.plan.plan import Plan
from graphprune.plan.steps import Cut, Step

PRUNE = "prune{target=ffn ratio=0.25 criterion=l1}"
UP = "model.layers.1.mlp.up_proj.weight"


# -- places ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "llama")


@cache
def program() -> Program:
    return gp.capture(byte_llama())


@dataclass
class Place:
    """A folder with a sound checkpoint beside it, and ways to make things go wrong in it."""

    checkpoint: Path
    folder: Path
    monkeypatch: pytest.MonkeyPatch

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def copy(self) -> Path:
        return Path(shutil.copytree(self.checkpoint, self.folder / "broken"))

    def truncated(self) -> Path:
        file = self.copy() / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])
        return file.parent

    def with_nan(self) -> Path:
        file = self.copy() / "model.safetensors"
        weights = load_file(file)
        weights[UP][3, 4] = float("nan")
        save_file(weights, file, metadata={"format": "pt"})
        return file.parent

    def without_config(self) -> Path:
        path = self.copy()
        (path / "config.json").unlink()
        return path

    def unexportable(self) -> Path:
        """A checkpoint whose model looks at values to decide what to do."""
        from transformers.models.llama.modeling_llama import LlamaMLP

        forward = LlamaMLP.forward

        def undecided(module: nn.Module, x: Tensor) -> Tensor:
            return forward(module, x) if x.sum() > 0 else x

        self.monkeypatch.setattr(LlamaMLP, "forward", undecided)
        return self.copy()

    def occupied(self) -> Path:
        self.out.mkdir()
        return self.text("mine", "out/mine.txt").parent

    def unwritable(self) -> Path:
        """A place in which nobody may make anything, root neither."""
        locked, make = self.folder / "locked", Path.mkdir
        locked.mkdir()

        def refuse(path: Path, *args: Any, **options: Any) -> None:
            if locked in path.parents:
                raise PermissionError(13, "Permission denied")
            make(path, *args, **options)

        self.monkeypatch.setattr(Path, "mkdir", refuse)
        return locked / "out"

    def text(self, content: str, name: str = "text.txt") -> Path:
        (self.folder / name).write_text(content)
        return self.folder / name

    def data(self, content: bytes, name: str = "data.txt") -> Path:
        (self.folder / name).write_bytes(content)
        return self.folder / name

    def plan(self, change: Callable[[Any], object] = lambda document: None) -> Path:
        text = Pipeline.parse(PRUNE).run(program()).plan.to_json()
        document = json.loads(text)
        change(document)
        return self.text(json.dumps(document), "plan.json")

    def smaller(self) -> Path:
        """The checkpoint pruned, with its plan."""
        result = Pipeline.parse(PRUNE).run(program())
        result.program.save_pretrained(self.folder / "smaller")
        result.plan.save(self.folder / "smaller" / "plan.json")
        return self.folder / "smaller"


@pytest.fixture
def place(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    program()  # before anything is made to go wrong
    return Place(checkpoint, tmp_path, monkeypatch)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


@contextmanager
def nothing_changes(place: Place) -> Iterator[None]:
    before = contents(place.folder), contents(place.checkpoint)
    weights = {name: weight.clone() for name, weight in program().weights.items()}
    graph = str(program().graph)
    yield
    assert (contents(place.folder), contents(place.checkpoint)) == before
    assert str(program().graph) == graph
    assert all(torch.equal(weight, program().weights[name]) for name, weight in weights.items())


def assert_one_line(error: BaseException, kind: type[GraphPruneError], words: list[str]) -> None:
    assert type(error) is kind
    message = str(error)
    assert message and "\n" not in message and len(message) < 400, message
    for word in words:
        assert word in message


class Case(NamedTuple):
    error: type[GraphPruneError]
    words: list[str]
    prepare: Callable[[Place], Any]


# -- on the command line --------------------------------------------------------------------------


def run(
    directory: str = "checkpoint", passes: str = PRUNE, out: str = "out", text: str | None = None
) -> Callable[[Place], list[object]]:
    """Arguments of ``graphprune run``; a name is a property or method of the place."""

    def arguments(place: Place) -> list[object]:
        given = [
            found() if callable(found := getattr(place, name)) else found
            for name in (directory, out)
        ]
        options = [] if text is None else ["--calibration", place.text(text)]
        return ["run", given[0], "--passes", passes, *options, "-o", given[1]]

    return arguments


def apply(change: Callable[[Any], object]) -> Callable[[Place], list[object]]:
    return lambda place: ["apply", place.checkpoint, place.plan(change), "-o", place.out]


def take_all_units(document: Any) -> None:
    document["steps"][0]["cuts"][0]["units"] = [[[], list(range(48))]]


COMMANDS: dict[str, Case] = {
    "a missing directory": Case(
        CheckpointError,
        ["gone"],
        lambda at: ["run", at.folder / "gone", "--passes", PRUNE, "-o", at.out],
    ),
    "a missing directory to look at": Case(
        CheckpointError, ["gone"], lambda at: ["inspect", at.folder / "gone"]
    ),
    "a directory without a config": Case(
        CheckpointError, ["broken", "config.json"], run("without_config")
    ),
    "a safetensors file cut short": Case(
        CheckpointError, ["model.safetensors", "cut short"], run("truncated")
    ),
    "a weight that holds NaN": Case(CheckpointError, ["broken", UP, "NaN"], run("with_nan")),
    "a model that cannot be exported": Case(
        CaptureError,
        ["torch.export could not capture LlamaForCausalLM", "along_example=True"],
        run("unexportable"),
    ),
    "an unknown pass": Case(
        PipelineError,
        ["column 1", "'prnue'", "did you mean 'prune'?"],
        run(passes="prnue{ratio=0}"),
    ),
    "an unknown option": Case(
        PipelineError,
        ["pass 'prune' has no option 'rato'", "did you mean 'ratio'?"],
        run(passes="prune{target=ffn rato=0.5}"),
    ),
    "an unknown choice": Case(
        PipelineError,
        ["option 'scope'", "'globl'", "did you mean 'global'?"],
        run(passes="prune{target=ffn ratio=0.5 scope=globl}"),
    ),
    "an unknown criterion": Case(
        UsageError,
        ["no criterion 'tailor'", "did you mean 'taylor'?"],
        run(passes="prune{target=ffn ratio=0.5 criterion=tailor}"),
    ),
    "an option that is no number": Case(
        PipelineError, ["ratio", "half"], run(passes="prune{target=ffn ratio=half}")
    ),
    "a multiple that leaves nothing to cut": Case(
        NothingToPrune,
        ["48", "64"],
        run(passes="prune{target=ffn ratio=0.5 criterion=l2 round_to=64}"),
    ),
    "a pipeline of a file that is not there": Case(
        PipelineError, ["absent.yaml"], run(passes="absent.yaml")
    ),
    "a pipeline that breaks off": Case(
        PipelineError, ["column 6", "is not closed"], run(passes="prune{target=ffn")
    ),
    "a ratio of one": Case(
        SelectionError, ["prune: ratio 1 is not in [0, 1)"], run(passes="prune{target=ffn ratio=1}")
    ),
    "a ratio below zero": Case(
        SelectionError,
        ["prune: ratio -0.1 is not in [0, 1)"],
        run(passes="prune{target=ffn ratio=-0.1}"),
    ),
    "a target that matches nothing": Case(
        SelectionError,
        ["pass 1 (prune)", "target 'layers.9.*'", "its groups are ffn"],
        run(passes="prune{target=layers.9.* ratio=0.5 criterion=l1}"),
    ),
    "a pattern to skip that matches nothing": Case(
        SelectionError,
        ["pass 1 (prune)", "skip pattern 'layers.9'"],
        run(passes="prune{target=ffn ratio=0.5 criterion=l1 skip=layers.9}"),
    ),
    "heads to skip that match nothing": Case(
        MergeError,
        ["pass 2 (merge-kv-heads)", "skip pattern 'layers.9'"],
        run(passes=f"{PRUNE},merge-kv-heads{{groups=2 skip=layers.9}}"),
    ),
    "groups that do not divide the heads": Case(
        MergeError,
        ["pass 1 (merge-kv-heads)", "model.layers.0.self_attn:kv-head", "3 groups", "4 KV heads"],
        run(passes="merge-kv-heads{groups=3}"),
    ),
    "a ratio that removes nothing": Case(
        NothingToPrune,
        ["pass 1 (prune)", "nothing to prune", "4 units"],
        run(passes="prune{target=kv-heads ratio=0.1 criterion=l1}"),
    ),
    "a budget that cannot be met": Case(
        SelectionError,
        ["pass 1 (prune)", "0.9 of the parameters cannot go"],
        run(passes="prune{target=ffn params=0.9 criterion=l1}"),
    ),
    "a plan for another model": Case(
        PlanError,
        ["the plan was made for program", "this one is"],
        lambda at: ["apply", smaller := at.smaller(), smaller / "plan.json", "-o", at.out],
    ),
    "a plan that is not there": Case(
        PlanError,
        ["gone.json does not exist"],
        lambda at: ["apply", at.checkpoint, at.folder / "gone.json", "-o", at.out],
    ),
    "a plan that is no JSON": Case(
        PlanError,
        ["text.txt", "not a plan"],
        lambda at: ["apply", at.checkpoint, at.text("no plan"), "-o", at.out],
    ),
    "a plan that is none": Case(
        PlanError,
        ["text.txt", "not a plan"],
        lambda at: ["apply", at.checkpoint, at.text("{}"), "-o", at.out],
    ),
    "a plan of another format": Case(
        PlanError,
        ["plan.json", "format 7 is none of 1 to 3"],
        apply(lambda plan: plan.update(format=7)),
    ),
    "a group cut to nothing": Case(
        PlanError, ["model.layers.0.mlp:ffn", "all of its 48 units"], apply(take_all_units)
    ),
    "a result that is not the masked original": Case(
        VerificationError,
        ["mlp", "shape"],
        lambda at: ["verify", at.checkpoint, unpruned_with_plan(at)],
    ),
    "an output that is not empty": Case(OutputError, ["out", "is not empty"], run(out="occupied")),
    "an output that is a file": Case(
        OutputError,
        ["text.txt", "is a file"],
        lambda at: ["run", at.checkpoint, "--passes", PRUNE, "-o", at.text("mine")],
    ),
    "an output below a file": Case(
        OutputError,
        ["text.txt", "cannot be written"],
        lambda at: ["run", at.checkpoint, "--passes", PRUNE, "-o", at.text("mine") / "out"],
    ),
    "an output that cannot be written": Case(
        OutputError, ["locked", "cannot be written: Permission denied"], run(out="unwritable")
    ),
    "the checkpoint itself as output": Case(
        OutputError, ["llama", "is not empty"], run(out="checkpoint")
    ),
    "calibration that is missing": Case(
        CalibrationError,
        ["pass 1", "needs calibration data", "--calibration", "criterion=l2"],
        run(passes="prune{target=ffn ratio=0.5}"),
    ),
    "calibration that is not there": Case(
        CalibrationError,
        ["gone.txt does not exist"],
        lambda at: [*run()(at), "--calibration", at.folder / "gone.txt"],
    ),
    "calibration that is too short": Case(
        CalibrationError, ["text.txt", "9 tokens", "need 640"], run(text="too short")
    ),
    "calibration that is empty": Case(CalibrationError, ["text.txt is empty"], run(text=" \n")),
    "calibration that is no UTF-8": Case(
        CalibrationError,
        ["data.txt is not UTF-8: byte 3"],
        lambda at: [*run()(at), "--calibration", at.data("caf\xe9".encode("latin-1"))],
    ),
    "JSON lines that break off": Case(
        CalibrationError,
        ["data.jsonl:2 is not JSON", "column 10"],
        lambda at: [
            *run()(at),
            "--calibration",
            at.data(b'{"text": "a"}\n{"text": "b', "data.jsonl"),
        ],
    ),
    "JSON lines without a text": Case(
        CalibrationError,
        ["data.jsonl:1 has no field 'text'", "'messages'"],
        lambda at: [*run()(at), "--calibration", at.data(b'{"body": "a"}', "data.jsonl")],
    ),
    "tensors that are cut short": Case(
        CalibrationError,
        ["data.safetensors is no safetensors file"],
        lambda at: [*run()(at), "--calibration", at.data(b"abc", "data.safetensors")],
    ),
    "scores that are weights": Case(
        CalibrationError,
        ["model.safetensors holds no scores: graphprune did not write it"],
        lambda at: [
            *("plot", at.checkpoint, "--scores", at.checkpoint / "model.safetensors"),
            *("-o", at.folder / "scores.svg"),
        ],
    ),
    "a picture of a plan for another model": Case(
        PlanError,
        ["the plan was made for program"],
        lambda at: [
            *(
                "plot",
                at.checkpoint,
                "--plan",
                at.plan(lambda plan: plan["steps"][0].update(fingerprint="0" * 16)),
            ),
            *("-o", at.folder / "sizes.svg"),
        ],
    ),
    "a page that is a folder": Case(
        OutputError,
        ["out", "is a directory"],
        lambda at: ["page", at.checkpoint, "-o", at.occupied()],
    ),
    "a package that is none": Case(
        CheckpointError,
        ["llama holds no ONNX package", "export-onnx"],
        lambda at: ["verify", at.checkpoint],
    ),
    "a package that is not there": Case(
        CheckpointError,
        ["gone is no folder with an ONNX package"],
        lambda at: ["generate", at.folder / "gone", "--prompt", "a"],
    ),
    "a pipeline that is no YAML": Case(
        PipelineError,
        ["passes.yaml: pipeline is not YAML"],
        lambda at: ["run", at.checkpoint, "--passes", at.text("- {", "passes.yaml"), "-o", at.out],
    ),
    "a plugin that ends everything": Case(
        UsageError,
        ["plugin.py: SystemExit"],
        lambda at: ["passes", "--plugin", at.text("raise SystemExit", "plugin.py")],
    ),
    "a plugin that fails": Case(
        UsageError,
        ["plugin.py", "NameError"],
        lambda at: ["passes", "--plugin", at.text("nothing", "plugin.py")],
    ),
    "a text too short to evaluate": Case(
        EvaluationError,
        ["5 tokens", "64"],
        lambda at: ["evaluate", at.checkpoint, "--text", at.text("short"), "--length", 64],
    ),
    "a weight that does not exist": Case(
        UsageError, ["no weight 'gone'"], lambda at: ["explain", at.checkpoint, "gone", 0]
    ),
}


def unpruned_with_plan(at: Place) -> Path:
    at.plan().rename(at.copy() / "plan.json")
    return at.folder / "broken"


@pytest.fixture
def graphprune(
    place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Run:
    return command_line(monkeypatch, capfd, place.checkpoint)


@pytest.mark.parametrize("case", COMMANDS.values(), ids=COMMANDS)
def test_a_command_is_refused_in_one_line(case: Case, place: Place, graphprune: Run) -> None:
    arguments = case.prepare(place)
    with nothing_changes(place):
        done = graphprune(*arguments)
    assert done.error is not None, done
    assert_one_line(done.error, case.error, case.words)
    assert (done.status, done.out) == (1, "")
    assert done.err == f"graphprune: {' '.join(str(done.error).split())}\n"


def test_a_sound_command_is_not_refused(place: Place, graphprune: Run) -> None:
    done = graphprune(*run()(place))
    assert (done.status, done.err) == (0, ""), done
    assert (place.out / "plan.json").is_file()
    done = graphprune("apply", place.checkpoint, place.plan(), "-o", place.folder / "again")
    assert (done.status, done.err) == (0, ""), done


# -- in Python ------------------------------------------------------------------------------------


class Branch(nn.Module):
    """Looks at values to decide what to do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return x if x.sum() > 0 else -x


def pipeline(text: str, calibration: Calibration | None = None) -> Callable[[Place], object]:
    return lambda place: lambda: Pipeline.parse(text).run(program(), calibration=calibration)


def whole_group() -> Plan:
    group = gp.analyze(program()).group("model.layers.0.mlp:ffn")
    cut = Cut(group.name, 48, group.role, {(): tuple(range(48))}, (), group.members)
    return Plan((Step(program().fingerprint(), (cut,)),))


def other_plan() -> Plan:
    other = gp.capture(byte_llama(num_hidden_layers=1))
    return Pipeline.parse(PRUNE).run(other).plan


CALLS: dict[str, Case] = {
    "a missing directory": Case(
        CheckpointError, ["no directory", "gone"], lambda at: partial(gp.load, f"{at.folder}/gone")
    ),
    "a safetensors file cut short": Case(
        CheckpointError,
        ["model.safetensors", "cut short"],
        lambda at: partial(gp.load, at.truncated()),
    ),
    "a weight that holds NaN": Case(
        CheckpointError, ["broken", UP], lambda at: partial(gp.load, at.with_nan())
    ),
    "a model that cannot be exported": Case(
        CaptureError,
        ["could not capture Branch"],
        lambda at: partial(gp.capture, Branch(), example_inputs=(torch.ones(2, 4),)),
    ),
    "an unknown pass": Case(
        PipelineError, ["did you mean 'prune'?"], pipeline("prne{target=ffn ratio=0.5}")
    ),
    "an unknown option": Case(
        PipelineError,
        ["no option 'critrion'", "did you mean 'criterion'?"],
        pipeline("prune{target=ffn ratio=0.5 critrion=l1}"),
    ),
    "a ratio of one": Case(
        SelectionError, ["ratio 1 is not in [0, 1)"], pipeline("prune{target=ffn ratio=1}")
    ),
    "a target that matches nothing": Case(
        SelectionError,
        ["target 'channels' matches no group"],
        pipeline("prune{target=channels ratio=0.5 criterion=l1}"),
    ),
    "an unknown group": Case(
        UsageError,
        ["no group 'model.layers.0.mlp:fnn'", "did you mean 'model.layers.0.mlp:ffn'?"],
        lambda at: partial(gp.analyze(program()).group, "model.layers.0.mlp:fnn"),
    ),
    "a plan for another model": Case(
        PlanError,
        ["the plan was made for program", "this one is"],
        lambda at: partial(gp.apply, program(), other_plan()),
    ),
    "a plan for another model to verify": Case(
        PlanError,
        ["the plan was made for program", "this one is"],
        lambda at: partial(gp.verify, program(), other_plan(), program()),
    ),
    "a plan that cannot be read": Case(
        PlanError,
        ["gone.json", "cannot be read"],
        lambda at: partial(Plan.load, at.folder / "gone.json"),
    ),
    "a group cut to nothing": Case(
        PlanError,
        ["model.layers.0.mlp:ffn", "all of its 48 units"],
        lambda at: partial(
            gp.analyze(program()).group("model.layers.0.mlp:ffn").cut,
            {(): tuple(range(48))},
        ),
    ),
    "a plan that cuts a group to nothing": Case(
        PlanError,
        ["model.layers.0.mlp:ffn", "all of its 48 units"],
        lambda at: partial(gp.apply, program(), whole_group()),
    ),
    "a directory that is not empty": Case(
        OutputError, ["is not empty"], lambda at: partial(program().save_pretrained, at.occupied())
    ),
    "an archive in a directory that is not empty": Case(
        OutputError, ["is not empty"], lambda at: partial(program().save, at.occupied())
    ),
    "a directory that cannot be written": Case(
        OutputError,
        ["Permission denied"],
        lambda at: partial(program().save_pretrained, at.unwritable()),
    ),
    "an archive that cannot be written": Case(
        OutputError, ["Permission denied"], lambda at: partial(program().save, at.unwritable())
    ),
    "a model that cannot be written": Case(
        OutputError,
        ["Permission denied"],
        lambda at: partial(program().export_onnx, at.unwritable() / "model.onnx"),
    ),
    "a plan that cannot be written": Case(
        OutputError,
        ["Permission denied"],
        lambda at: partial(Plan().save, at.unwritable() / "plan.json"),
    ),
    "calibration that is missing": Case(
        CalibrationError, ["needs calibration data"], pipeline("prune{target=ffn ratio=0.5}")
    ),
    "calibration that is too short": Case(
        CalibrationError,
        ["text.txt", "9 tokens"],
        lambda at: partial(Calibration.from_text, at.text("too short"), byte_tokenizer()),
    ),
    "calibration of another vocabulary": Case(
        CalibrationError,
        ["pass 1 (prune)", "made token 256, the vocabulary has 256"],
        pipeline(
            "prune{target=ffn ratio=0.5}",
            Calibration.from_batches([{"input_ids": torch.full((1, 4), 256)}]),
        ),
    ),
    "an input that is missing": Case(
        UsageError, ["input 'input_ids' is missing"], lambda at: program()
    ),
    "an unknown weight": Case(
        UsageError, ["no weight 'gone'"], lambda at: partial(program().weight, "gone")
    ),
}


@pytest.mark.parametrize("case", CALLS.values(), ids=CALLS)
def test_a_call_is_refused_in_one_line(case: Case, place: Place) -> None:
    call = case.prepare(place)
    with nothing_changes(place), pytest.raises(GraphPruneError) as caught:
        call()
    assert_one_line(caught.value, case.error, case.words)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, plan: gp.analyze(model),
        lambda model, plan: gp.apply(model, plan),
        lambda model, plan: gp.verify(model, plan, program()),
        lambda model, plan: gp.verify(program(), plan, model),
        lambda model, plan: gp.perplexity(model, "a text", "tokenizer"),
        lambda model, plan: gp.Pipeline.parse("verify").run(model),
    ],
)
def test_a_model_that_is_not_captured_is_refused_with_what_to_do(call: Any) -> None:
    with pytest.raises(
        UsageError, match=r"a Linear is no [Pp]rogram: .*capture\(model\)"
    ) as caught:
        call(torch.nn.Linear(2, 2), Plan())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda: gp.capture(3),
        lambda: gp.apply(program(), "plan.json"),
        lambda: gp.sensitivity(program(), []),
    ],
)
def test_a_thing_of_another_type_is_refused_with_what_to_do(call: Any) -> None:
    with pytest.raises(UsageError, match=r" is no (Module|Plan|Coupling): \w+"):
        call()


# -- the classes ----------------------------------------------------------------------------------


def test_every_error_is_one_that_catching_the_base_catches() -> None:
    members = [found for _, found in inspect.getmembers(errors, inspect.isclass)]
    classes = [found for found in members if found.__module__ == errors.__name__]
    assert errors.UsageError in classes
    assert all(issubclass(found, GraphPruneError) for found in classes)
    assert all(found.__doc__ for found in classes)
    assert not issubclass(GraphPruneError, ValueError)
