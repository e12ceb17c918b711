"""`generate`: texts continued by an ONNX package."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphprune.cli.options import AsJson, Seed
from graphprune.cli.session import Session, verb
from graphprune.errors import UsageError

if TYPE_CHECKING:
    from graphprune.backends.onnx.runtime.runner import Generation

_SAMPLING = "Choice of tokens"
_RUNTIME = "ONNX Runtime"


@verb("graphprune generate PACKAGE --prompt 'Once upon a time'")
def generate(
    session: Session,
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="An ONNX package, as 'export-onnx' writes it.")
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="A text to continue; may be repeated."),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A file that is one prompt, or JSON lines with a prompt each."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens of a text.", min=1)] = 64,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="A string that ends a text; may be repeated."),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(
            help="0 chooses the likeliest token; else one is drawn.",
            min=0,
            rich_help_panel=_SAMPLING,
        ),
    ] = 0.0,
    top_k: Annotated[
        int | None,
        typer.Option(
            help="Draw from so many of the likeliest tokens.", min=1, rich_help_panel=_SAMPLING
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Draw from the likeliest tokens of this probability.", rich_help_panel=_SAMPLING
        ),
    ] = None,
    seed: Seed = 0,
    beams: Annotated[
        int,
        typer.Option(
            help="Beams of an encoder-decoder; 1 chooses the likeliest token.",
            min=1,
            rich_help_panel=_SAMPLING,
        ),
    ] = 1,
    provider: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A provider of ONNX Runtime, as 'cuda'; the package's own if left out.",
            rich_help_panel=_RUNTIME,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(help="Threads of the CPU.", min=1, rich_help_panel=_RUNTIME),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Continue prompts by the model of an ONNX package; one prompt alone is shown as it grows.

    For an encoder-decoder, a prompt is what it answers.
    """
    from graphprune.backends.onnx.encoder_decoder.runner import EncoderDecoderRunner
    from graphprune.backends.onnx.package import read_package
    from graphprune.backends.onnx.runtime.runner import OnnxRunner
    from graphprune.io.text_sources import read_documents

    prompts = list(prompt or ())
    if prompt_file is not None:
        for document in read_documents(prompt_file, UsageError):
            if not isinstance(document, str):
                raise UsageError(f"{prompt_file} holds conversations, and prompts are texts")
            prompts.append(document)
    if not prompts:
        raise typer.BadParameter("there is nothing to continue: give --prompt or --prompt-file")
    alone = len(prompts) == 1 and not as_json
    if read_package(directory).parts is not None:
        if stop or temperature or top_k is not None or top_p is not None:
            raise UsageError("an encoder-decoder takes the likeliest tokens, or --beams")
        both = EncoderDecoderRunner(directory, provider=provider, threads=threads)
        found = both.generate(prompts, max_new_tokens=max_new_tokens, beams=beams)
        if alone:
            print(found[0].text, end="")
    elif beams > 1:
        raise UsageError("--beams is of an encoder-decoder, and this package has one model")
    else:
        runner = OnnxRunner(directory, provider=provider, threads=threads)
        found = runner.generate(
            prompts,
            max_new_tokens=max_new_tokens,
            stop=stop or (),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            on_text=(lambda _, piece: print(piece, end="", flush=True)) if alone else None,
        )
    if as_json:
        rows = [{"prompt": p, **asdict(each)} for p, each in zip(prompts, found, strict=True)]
        print(json.dumps(rows, indent=1))
    elif alone:
        print()
    else:
        for number, (text, each) in enumerate(zip(prompts, found, strict=True), 1):
            print(f"--- {number} of {len(found)}: {_shortened(text)}\n{each.text}")
    if not session.quiet:
        _say_speed(found)


def _shortened(text: str) -> str:
    """Return the end of a prompt, which its continuation follows, in one line."""
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"...{line[-57:]}"


def _say_speed(found: Sequence[Generation]) -> None:
    """Say on standard error how fast a batch was; the first new tokens count with the prompts."""
    for what, count, seconds in (
        ("prompt", sum(each.prompt_tokens for each in found), found[0].prompt_seconds),
        (
            "new",
            sum(len(each.tokens) - 1 for each in found),
            max(each.decode_seconds for each in found),
        ),
    ):
        if count:
            print(f"{what}: {count} tokens, {count / seconds:.1f} per second", file=sys.stderr)
