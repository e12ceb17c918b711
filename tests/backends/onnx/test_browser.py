"""Packages in headless Chromium by transformers.js: the tokens of ONNX Runtime.

GRAPHPRUNE_NODE_MODULES names a folder ``node_modules`` that holds @huggingface/transformers (``npm
install @huggingface/transformers``). Without it, this is left out.
"""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from chromium import started

import graphprune as gp
from graphprune import reference
from graphprune.backends.onnx.package import read_package, write_package
from graphprune.backends.onnx.weights.quantize import Quantization
from graphprune.errors import BackendError, OutputError
from graphprune.frontend.capture import capture

MODULES = os.environ.get("GRAPHPRUNE_NODE_MODULES", "")
PAGE = Path(__file__).parents[3] / "tools" / "browser.html"
NEW = 8


class _Handler(http.server.SimpleHTTPRequestHandler):
    extensions_map = http.server.SimpleHTTPRequestHandler.extensions_map | {
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder with the page and the library, and where it is served."""
    if not MODULES:
        pytest.skip("GRAPHPRUNE_NODE_MODULES names no folder")
    folder = tmp_path_factory.mktemp("site")
    shutil.copy(PAGE, folder / PAGE.name)
    (folder / "node_modules").symlink_to(Path(MODULES).resolve())
    handler = functools.partial(_Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}/{PAGE.name}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from started("--disable-dev-shm-usage")


@pytest.mark.slow
@pytest.mark.browser
def test_dense_and_pruned_give_the_tokens_of_onnx_runtime(
    site: tuple[Path, str], browser: Any
) -> None:
    folder, address = site
    program = gp.load(reference.checkpoint_dir())
    passes = "prune{target=ffn ratio=0.25 criterion=l2},merge-kv-heads{groups=4}"
    pruned = gp.Pipeline.parse(passes).run(program, quiet=True).program
    for dtype, chosen in (("fp32", None), ("q4", Quantization("int4", block=16, head="float"))):
        expected = []
        for name, each in (("dense", program), ("pruned", pruned)):
            written = folder / f"{name}-{dtype}"
            write_package(
                each, written, target="cpu", check=False, layout="browser", quantization=chosen
            )
            runner = gp.OnnxRunner(written)
            expected.append(list(runner.generate("def main(", max_new_tokens=NEW)[0].tokens))
        models = f"dense-{dtype},pruned-{dtype}"
        browser.get(f"{address}?models={models}&dtype={dtype}&tokens={NEW}&prompt=def%20main(")
        deadline = time.monotonic() + 120
        while browser.title not in ("done", "failed") and time.monotonic() < deadline:
            time.sleep(0.2)
        assert browser.title == "done", browser.find_element("tag name", "body").text
        articles = browser.find_elements("tag name", "article")
        assert [json.loads(a.get_attribute("data-tokens")) for a in articles] == expected


def test_a_browser_finds_the_model_by_its_place_and_sizes(tmp_path: Path) -> None:
    program = capture(_tiny())
    write_package(program, tmp_path / "out", target="cpu", check=False, layout="browser")
    assert read_package(tmp_path / "out").model == tmp_path / "out" / "onnx" / "model.onnx"
    model = onnx.load(tmp_path / "out" / "onnx" / "model.onnx")
    past = next(v for v in model.graph.input if v.name == "past_key_values.0.key")
    names = [size.dim_param for size in past.type.tensor_type.shape.dim]
    assert (names[0], names[2]) == ("batch_size", "past_sequence")
    assert not (tmp_path / "out" / "model.onnx").exists()
    assert len(gp.load(tmp_path / "out").weights) == len(program.weights)


def test_what_a_browser_cannot_run_is_refused_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphprune.backends.onnx.package.export", lambda *_, **__: pytest.fail())
    program, chosen = capture(_tiny()), Quantization("int4", block=16, embedding="int4")
    write = functools.partial(write_package, program, target="cpu", layout="browser")
    with pytest.raises(BackendError, match=r"picks no rows of .*embed_tokens\.weight: give embed"):
        write(tmp_path / "out", quantization=chosen)
    assert not (tmp_path / "out").exists()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty"):
        write(tmp_path / "used")
    assert [path.name for path in tmp_path.rglob("*")] == ["used", "mine.txt"]


def _tiny() -> Any:
    from byte_llama import byte_llama

    return byte_llama(num_hidden_layers=1)
