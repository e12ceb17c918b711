"""`compress` on the command line: what it writes and says, and what it refuses."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path

import pytest
from command_line import Run, assert_refused
from safetensors.torch import load_file

from graphprune.backends.onnx.kernel_times import KernelTimes
from graphprune.cli.verbs.compress import SEARCH

ONLY = ("--target", "ffn", "--criterion", "wanda", "--params", 0.1)


def test_compress_writes_what_its_command_writes_again(
    graphprune: Run, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = [
        "--calibration",
        text,
        "--samples",
        8,
        "--calibration-length",
        32,
        "-o",
        out,
        "--form",
        "plain",
    ]
    done = graphprune("compress", checkpoint, *ONLY, *options)
    assert done.status == 0, done
    for words in ("added to the next-token loss", "that nothing was fitted to", "agreement", "KL"):
        assert words in done.out
    told = json.loads((out / SEARCH).read_text())
    assert told["pipeline"] in done.out and told["tried"][0]["parameters"] < 40_000
    assert json.loads((out / "report.json").read_text())["pipeline"] == told["pipeline"]
    again = shlex.split(told["command"].replace("-o OUT", f"-o {tmp_path / 'again'}"))
    assert graphprune(*again[1:]).status == 0
    whole, other = (load_file(each / "model.safetensors") for each in (out, tmp_path / "again"))
    assert all(bool((whole[name] == other[name]).all()) for name in whole)
    assert whole.keys() == other.keys()


def test_compress_without_text_says_by_what_it_scored(
    graphprune: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KernelTimes, "_measured", lambda _, kernel: 1e-9 * math.prod(kernel.sizes))
    budgets = ("--params", 0.1, "--latency", 0.01)
    done = graphprune("compress", checkpoint, *budgets, "-o", tmp_path / "out")
    assert done.status == 0, done
    assert re.search(r"kernels of a prompt of 512 tokens: [\d.]+ ms, now [\d.]+ ms \(-", done.out)
    assert "no calibration data was given" in done.out and "(l2)" in done.out
    assert not (tmp_path / "out.search").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--params", 0.1, "--time", "soon"), ("'soon' is no time",)),
        (("--params", 0.1, "--time", "0m"), ("'0m' is no time",)),
        (("--params", 0.1, "--target", "fnn"), ("did you mean 'ffn'?",)),
        (("--params", 0.99), ("nothing meets params 0.99",)),
        ((), ("no budget",)),
    ],
)
def test_what_compress_cannot_do_is_said_in_a_line(
    graphprune: Run, checkpoint: Path, tmp_path: Path, options: tuple[object, ...], words: tuple
) -> None:
    done = graphprune("compress", checkpoint, *options, "-o", tmp_path / "out")
    assert_refused(done, *words)
    assert list(tmp_path.iterdir()) == []


def test_compress_refuses_a_place_that_is_in_use_before_it_loads(
    graphprune: Run, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    done = graphprune("compress", "no-such-model", "--params", 0.1, "-o", tmp_path)
    assert_refused(done, "is not empty")
