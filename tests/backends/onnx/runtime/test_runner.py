"""Text from ONNX packages: each row as it is alone, buffers that stay, and what is refused."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from byte_llama import byte_llama, byte_tokenizer

import graphprune as gp
from graphprune.backends.onnx.package import write_package
from graphprune.backends.onnx.runtime import runner as runtime
from graphprune.backends.onnx.runtime.decoder import CUDA, Batch, layout_of
from graphprune.backends.onnx.runtime.limits import limits_of
from graphprune.backends.onnx.runtime.runner import OnnxRunner
from graphprune.cli import console
from graphprune.cli import main as cli
from graphprune.errors import BackendError, CheckpointError, UsageError
from graphprune.frontend.capture import capture
from graphprune.ir.program import Program

PROMPTS = [[72, 101, 108, 108, 111], [7, 250, 31, 0, 5, 9, 77, 77, 140], [199]]
TEXT = "two words"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Packages of one model, by what matters of them here; each is made when it is asked for."""
    folder = tmp_path_factory.mktemp("packages")
    byte_llama(num_hidden_layers=1).save_pretrained(folder / "checkpoint")
    byte_tokenizer().save_pretrained(folder / "checkpoint")
    program = gp.load(folder / "checkpoint")

    @cache
    def package(name: str) -> Path:
        made = folder / name
        if name == "apart":
            shutil.copytree(package("shared"), made)
            says_that_it_keeps_them_apart(made)
        else:
            targets = {"shared": "cpu", "portable": "portable", "plain": None}
            write_package(program, made, target=targets[name], check=False)
        return made

    return package


def says_that_it_keeps_them_apart(package: Path) -> None:
    """Let a package say that its past and present need buffers of their own."""
    record = json.loads((package / "parity.json").read_text())
    (package / "parity.json").write_text(json.dumps({**record, "shares_buffers": False}))


@pytest.fixture(scope="module")
def program(packages: Callable[[str], Path]) -> Program:
    return gp.load(packages("shared"))


@pytest.fixture
def runner(packages: Callable[[str], Path]) -> OnnxRunner:
    return OnnxRunner(packages("shared"))


def alone(program: Program, prompt: Sequence[int], count: int) -> tuple[int, ...]:
    """The likeliest tokens after `prompt`, each chosen on all that is before it."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(program(input_ids=torch.tensor([ids]))["logits"][0, -1].argmax()))
    return tuple(ids[len(prompt) :])


# -- tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "static"),
    [
        ("shared", False),
        ("shared", True),
        ("apart", False),
        ("plain", False),
        pytest.param("portable", False, marks=pytest.mark.slow),
    ],
)
def test_each_row_gets_the_tokens_that_it_gets_alone(
    packages: Callable[[str], Path], program: Program, name: str, static: bool
) -> None:
    runner = OnnxRunner(packages(name), static=static)
    assert runner.package.padding == ("right" if name in ("shared", "apart") else "both")
    runner.ends = frozenset()
    expected = [alone(program, prompt, 24) for prompt in PROMPTS]
    assert len({token for tokens in expected for token in tokens}) > 12
    seen: list[tuple[int, int]] = []
    found = runner.generate(
        PROMPTS, max_new_tokens=24, on_token=lambda row, token: seen.append((row, token))
    )
    assert [each.tokens for each in found] == expected
    assert seen == [(row, expected[row][step]) for step in range(24) for row in range(3)]
    assert [(each.reason, each.prompt_tokens) for each in found] == [
        ("length", 5),
        ("length", 9),
        ("length", 1),
    ]
    assert all(each.prompt_seconds > 0 < each.decode_seconds for each in found)


@pytest.mark.slow
def test_half_precision_runs_where_it_is_asked_to(tmp_path: Path) -> None:
    half = capture(byte_llama(num_key_value_heads=2, num_hidden_layers=1).half())
    write_package(half, tmp_path / "out", target="cuda", check=False)
    found = {}
    for static in (False, True):
        runner = OnnxRunner(tmp_path / "out", provider="cpu", static=static)
        assert runner.provider == "CPUExecutionProvider"
        runner.ends = frozenset()
        found[static] = runner.generate(PROMPTS, max_new_tokens=6)
    tokens = [each.tokens for each in found[False]]
    assert tokens == [each.tokens for each in found[True]]
    assert tokens == [alone(half, prompt, 6) for prompt in PROMPTS]
    assert found[False][0].text is None
    with pytest.raises(CheckpointError, match="holds no tokenizer: give token ids"):
        runner.generate(TEXT)
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        runner.stream([1, 2])


def test_a_row_that_ends_does_not_stop_the_others(
    runner: OnnxRunner, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()  # a clock that goes on by one whenever it is looked at
    monkeypatch.setattr(runtime, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    expected = [alone(program, prompt, 12) for prompt in PROMPTS]
    at = next(
        at
        for at in range(2, 9)
        if expected[1][at] not in expected[1][:at] + expected[0] + expected[2]
    )
    end = expected[1][at]
    for options in ({}, {"stop": [end]}):
        runner.ends = frozenset() if options else frozenset({end})
        found = runner.generate(PROMPTS, max_new_tokens=12, **options)
        assert found[1].tokens == expected[1][: at + 1]
        assert [each.reason for each in found] == ["length", "stop", "length"]
        assert [found[0].tokens, found[2].tokens] == [expected[0], expected[2]]
        assert found[1].decode_seconds < found[0].decode_seconds


def test_where_texts_end_is_in_the_configs(tmp_path: Path) -> None:
    def say(name: str, **fields: Any) -> None:
        (tmp_path / f"{name}.json").write_text(json.dumps(fields))

    assert limits_of(tmp_path) == (None, frozenset())
    say("config", n_positions=64, eos_token_id=3, text_config=None)
    assert limits_of(tmp_path) == (64, {3})
    say("config", text_config={"max_position_embeddings": 32, "eos_token_id": 4})
    assert limits_of(tmp_path) == (32, {4})
    say("generation_config", eos_token_id=[9, 8])
    assert limits_of(tmp_path) == (32, {9, 8})
    say("genai_config", model={"context_length": 16, "eos_token_id": 0})
    assert limits_of(tmp_path) == (16, {0})
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json is damaged"):
        limits_of(tmp_path)


def test_draws_are_those_of_the_seed_and_the_row(runner: OnnxRunner) -> None:
    def drawn(prompts: list[list[int]], seed: int) -> list[tuple[int, ...]]:
        found = runner.generate(prompts, max_new_tokens=10, temperature=1.0, seed=seed)
        return [each.tokens for each in found]

    assert drawn(PROMPTS, 5) == drawn(PROMPTS, 5)
    assert drawn(PROMPTS, 5) != drawn(PROMPTS, 6)
    assert drawn(PROMPTS[:1], 5) == drawn(PROMPTS, 5)[:1]
    greedy = [each.tokens for each in runner.generate(PROMPTS, max_new_tokens=10)]
    for options in ({"top_k": 1}, {"top_p": 1e-6}):
        found = runner.generate(PROMPTS, max_new_tokens=10, temperature=3.0, **options)
        assert [each.tokens for each in found] == greedy


# -- text -----------------------------------------------------------------------------------------


def test_pieces_join_to_the_text(runner: OnnxRunner) -> None:
    runner.ends = frozenset()
    whole = runner.generate(TEXT, max_new_tokens=40)[0]
    assert list(TEXT.encode()) != list(whole.tokens)
    assert whole.text == runner.tokenizer.decode(whole.tokens)
    streamed = list(runner.stream(TEXT, max_new_tokens=40))
    assert "" not in streamed
    assert len(streamed) > 3
    assert "".join(streamed) == whole.text
    pieces: list[tuple[int, str]] = []
    both = runner.generate(
        [TEXT, "other"], max_new_tokens=40, on_text=lambda row, piece: pieces.append((row, piece))
    )
    for row, each in enumerate(both):
        assert each.text == "".join(piece for of, piece in pieces if of == row)
    assert both[0].text == whole.text


def test_a_stop_string_cuts_the_text(runner: OnnxRunner) -> None:
    runner.ends = frozenset()
    whole = runner.generate(TEXT, max_new_tokens=40)[0]
    assert whole.text is not None
    middle = next(at for at in range(5, 40) if whole.text[at : at + 2].isascii())
    stop = whole.text[middle : middle + 2]
    cut = whole.text.index(stop)
    found = runner.generate(TEXT, max_new_tokens=40, stop=stop)[0]
    assert (found.text, found.reason) == (whole.text[:cut], "stop")
    assert len(found.tokens) < 40
    assert "".join(runner.stream(TEXT, max_new_tokens=40, stop=[stop])) == whole.text[:cut]


# -- buffers --------------------------------------------------------------------------------------


def given_caches(batch: Batch) -> list[Any]:
    """The caches that the last run gave."""
    return [value for value in batch.binding.get_outputs() if len(value.shape()) == 4]


def test_past_and_present_stay_one_buffer(runner: OnnxRunner) -> None:
    for static in (False, True):
        batch = Batch(runner.session, runner.layout, 3, 16, shares=True, left=False, static=static)
        logits = batch.prompt(PROMPTS)
        places = [value.data_ptr() for value in batch.caches.values]
        for _ in range(7):
            logits = batch.step(logits.argmax(-1).tolist())
            caches = given_caches(batch)
            assert [cache.data_ptr() for cache in caches] == places
            assert {tuple(cache.shape()) for cache in caches} == {(3, 4, 16, 8)}


def test_two_sets_of_caches_swap_and_no_third_comes(packages: Callable[[str], Path]) -> None:
    runner = OnnxRunner(packages("plain"))
    batch = Batch(runner.session, runner.layout, 3, 16, shares=False, left=True)
    logits = batch.prompt(PROMPTS)
    seen = []
    for step in range(7):
        logits = batch.step(logits.argmax(-1).tolist())
        caches = given_caches(batch)
        assert {tuple(cache.shape()) for cache in caches} == {(3, 4, 10 + step, 8)}
        seen.append(tuple(cache.data_ptr() for cache in caches))
    assert len(set(seen)) == 2
    assert seen == [*seen[:2]] * 3 + seen[:1]


def test_buffers_of_constant_shape_are_kept_for_the_next_call(
    packages: Callable[[str], Path], program: Program
) -> None:
    runner = OnnxRunner(packages("shared"), static=True)
    runner.ends = frozenset()
    runner.generate(PROMPTS, max_new_tokens=20)
    kept = runner._idle
    assert kept is not None
    assert kept.capacity == 32
    found = runner.generate(PROMPTS[::-1], max_new_tokens=12)
    assert runner._idle is kept
    assert [each.tokens for each in found] == [alone(program, p, 12) for p in PROMPTS[::-1]]
    runner.generate(PROMPTS, max_new_tokens=119)
    assert runner._idle is not kept
    assert runner._idle.capacity == 128


def test_texts_under_way_at_once_have_buffers_of_their_own(packages: Callable[[str], Path]) -> None:
    runner = OnnxRunner(packages("shared"), static=True)
    runner.ends = frozenset()
    texts = [TEXT, "123456789"]
    expected = [runner.generate(text, max_new_tokens=20)[0].text for text in texts]
    streams = [runner.stream(text, max_new_tokens=20) for text in texts]
    found = ["", ""]
    for _ in range(20):
        for index, stream in enumerate(streams):
            found[index] += next(stream, "")
    assert found == expected


def test_logits_come_from_a_device_that_torch_has_not(
    runner: OnnxRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    batch = Batch(runner.session, runner.layout, 3, 10, shares=True, left=False)
    expected = batch.step(batch.prompt(PROMPTS).argmax(-1).tolist())
    batch.device = "elsewhere"
    assert torch.equal(batch._read(batch.next_logits, np.zeros(3, int)), expected)


# -- CUDA graphs, as far as there is a way to see them without CUDA --------------------------------


def test_a_prompt_is_captured_by_no_graph_and_steps_by_their_own(runner: OnnxRunner) -> None:
    batch = Batch(
        runner.session, runner.layout, 1, 8, shares=True, left=False, static=True, graph=7
    )
    entries = [options.get_run_config_entry("gpu_graph_id") for options in batch.options]
    assert entries == ["-1", "7"]


def test_graphs_are_asked_of_cuda_where_shapes_are_static(
    packages: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def open_session(path: Path, provider: str, *rest: Any) -> Any:
        asked.append((provider, *rest))
        raise BackendError("no GPU")

    monkeypatch.setattr(runtime, "open_session", open_session)
    for static in (False, True):
        with pytest.raises(BackendError, match="no GPU"):
            OnnxRunner(packages("shared"), provider="cuda", static=static)
    assert asked == [(CUDA, None, None), (CUDA, None, {"enable_cuda_graph": "1"})]


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "options", "why"),
    [
        ([], {}, "there are no prompts"),
        ([[1], []], {}, "prompt 1 has no tokens"),
        ("", {}, "prompt 0 has no tokens"),
        ([1, 2], {}, "prompt 0 is neither a text nor a list of token ids"),
        ([[1.5]], {}, "prompt 0 is neither a text nor a list of token ids"),
        ([[1], [2, 256]], {}, "prompt 1 has token 256, and the model's vocabulary has 256"),
        ([[-1]], {}, "prompt 0 has token -1"),
        ([[1], [2] * 100], {"max_new_tokens": 29}, "100 tokens and 29 new ones are more than the "),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 1 or more, not 0"),
        ([[1]], {"stop": [""]}, "a stop string is empty"),
        ([[1]], {"temperature": -0.5}, "a temperature is 0 or more"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_runs(
    runner: OnnxRunner, prompts: Any, options: dict[str, Any], why: str
) -> None:
    runner.session = None  # whatever runs now fails in another way
    with pytest.raises(UsageError, match=why):
        runner.generate(prompts, **options)


def test_a_wrong_option_is_refused_before_the_first_piece(runner: OnnxRunner) -> None:
    with pytest.raises(UsageError, match="top_k is 1 or more"):
        runner.stream(TEXT, top_k=0)


def test_a_text_may_be_as_long_as_the_model_allows(runner: OnnxRunner, program: Program) -> None:
    assert (runner.context, runner.ends) == (128, {2})
    runner.ends = frozenset()
    prompt = (PROMPTS[1] * 14)[:124]
    assert runner.generate([prompt], max_new_tokens=4)[0].tokens == alone(program, prompt, 4)


def test_rows_that_the_operator_cannot_pad_give_no_tokens(runner: OnnxRunner) -> None:
    batch = Batch(runner.session, runner.layout, 2, 8, shares=True, left=True)
    with pytest.raises(BackendError, match="logits are not numbers"):
        batch.prompt([[1, 2, 3], [4]])


def test_static_shapes_need_one_buffer(packages: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="static shapes take past and present in one buffer"):
        OnnxRunner(packages("plain"), static=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the provider runs here")
def test_a_provider_that_would_not_run_is_refused(packages: Callable[[str], Path]) -> None:
    with pytest.raises(BackendError, match="CUDAExecutionProvider does not run here|built without"):
        OnnxRunner(packages("shared"), provider="cuda")


def test_what_is_no_package_is_refused(packages: Callable[[str], Path]) -> None:
    with pytest.raises(CheckpointError, match="holds no ONNX package"):
        OnnxRunner(packages("shared").parent)


def test_a_checkpoint_is_refused_with_what_makes_a_package_of_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="it is a checkpoint, of which the pass export-onnx"):
        OnnxRunner(tmp_path)


def named(**shapes: Sequence[int | str]) -> list[Any]:
    return [
        SimpleNamespace(name=name.replace("__", "."), shape=shape, type="tensor(float)")
        for name, shape in shapes.items()
    ]


IDS = {"input_ids": ["batch", "length"], "attention_mask": ["batch", "total"]}
LOGITS = {"logits": ["batch", "length", 9]}
PAST = {"past_key_values__0__key": ["batch", 2, "past", 8]}


@pytest.mark.parametrize(
    ("inputs", "outputs", "why"),
    [
        (IDS, LOGITS, "this model takes input_ids, attention_mask and no cache"),
        ({**IDS, "pixels": [1], **PAST}, LOGITS, "attention_mask, pixels and caches"),
        ({**IDS, **PAST}, {"present__0__key": [1]}, "gives no logits"),
        ({**IDS, **PAST}, {"hidden": [1, 2]}, "gives no logits"),
        ({**IDS, **PAST}, LOGITS, r"past_key_values.0.key is no cache"),
        (
            {**IDS, "past_key_values__0__state": ["batch", 3]},
            {**LOGITS, "present__0__state": ["batch", 3]},
            r"past_key_values.0.state is no cache",
        ),
    ],
)
def test_what_is_no_decoder_is_refused(
    inputs: dict[str, Any], outputs: dict[str, Any], why: str
) -> None:
    session = SimpleNamespace(
        get_inputs=lambda: named(**inputs), get_outputs=lambda: named(**outputs)
    )
    with pytest.raises(BackendError, match=why):
        layout_of(session)


# -- the command line -----------------------------------------------------------------------------


def invoke(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["graphprune", "generate", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


def test_prompts_are_continued_on_the_command_line(
    packages: Callable[[str], Path],
    runner: OnnxRunner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, two = (each.text for each in runner.generate([TEXT, "b"], max_new_tokens=9))
    short = ["--max-new-tokens", 9]
    assert invoke(monkeypatch, packages("shared"), "--prompt", TEXT, *short) == 0
    out, err = capsys.readouterr()
    assert out == f"{one}\n"
    assert [line.partition(" tokens, ")[0] for line in err.splitlines()] == ["prompt: 9", "new: 8"]
    (tmp_path / "b.txt").write_text("b")
    given = ["--prompt", TEXT, "--prompt-file", tmp_path / "b.txt"]
    assert invoke(monkeypatch, packages("shared"), *given, *short, "--quiet") == 0
    parts = f"--- 1 of 2: {TEXT}\n{one}\n--- 2 of 2: b\n{two}\n"
    assert capsys.readouterr() == (parts, "")
    assert invoke(monkeypatch, packages("shared"), *given, *short, "--json", "-q") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["prompt"], row["text"]) for row in rows] == [(TEXT, one), ("b", two)]


def test_options_of_the_command_line_reach_the_runner(
    packages: Callable[[str], Path],
    runner: OnnxRunner,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "seed": 4, "max_new_tokens": 20}
    whole = runner.generate(TEXT, **options)[0].text
    assert whole is not None
    given = [each for k, v in options.items() for each in (f"--{k.replace('_', '-')}", v)]
    given += ["--stop", whole[3:5], "--provider", "cpu", "--threads", 1, "-q"]
    assert invoke(monkeypatch, packages("shared"), "--prompt", TEXT, *given) == 0
    assert capsys.readouterr().out == whole[: whole.index(whole[3:5])] + "\n"


@pytest.mark.parametrize(
    ("arguments", "status", "why"),
    [
        ([], 2, "--prompt-file"),
        (["--prompt", ""], 1, "prompt 0 has no tokens"),
        (["--prompt-file", "nowhere.txt"], 1, "nowhere.txt does not exist"),
        (["--prompt", "a", "--top-p", "2"], 1, "top_p is above 0"),
        (["--prompt", "a", "--provider", "Other"], 1, "was built without Other"),
    ],
)
def test_the_command_line_refuses_in_one_line(
    packages: Callable[[str], Path],
    arguments: list[str],
    status: int,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(console.TRACEBACK, "")
    assert invoke(monkeypatch, packages("shared"), *arguments) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert why in err
    assert status == 2 or err.count("\n") == 1
