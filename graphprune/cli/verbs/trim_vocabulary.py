"""`trim-vocabulary`: a checkpoint of fewer tokens, with its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphprune.cli.options import AsJson, Checkpoint, LoadOptions, NeededOutput, Overwrite
from graphprune.cli.session import Session, verb
from graphprune.cli.writing import destination
from graphprune.errors import UsageError

if TYPE_CHECKING:
    from graphprune.ir.program import Program
    from graphprune.vocabulary.trim import Vocabulary

_WHICH = "Which tokens stay"


@verb("graphprune trim-vocabulary DIR --text text.txt -o OUT")
def trim_vocabulary(
    session: Session,
    directory: Checkpoint,
    output: NeededOutput,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Tokens that this text takes: a file, or JSON lines.",
            rich_help_panel=_WHICH,
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(help="Only the most frequent of them.", rich_help_panel=_WHICH),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A list instead, a token on each line as the tokenizer spells it.",
            rich_help_panel=_WHICH,
        ),
    ] = None,
    overwrite: Overwrite = False,
    *,
    loading: LoadOptions,
    as_json: AsJson = False,
) -> None:
    """Keep some tokens: embedding, head, tokenizer and the ids in configs follow.

    This changes what the ids of tokens mean, so it comes before everything else. Logits of tokens
    that stay are those of the original, and a text of such tokens is cut as before; other words
    are spelled by smaller tokens. Special tokens and what words fall back to stay beside those
    asked for.
    """
    from graphprune.transforms.vocabulary import vocabulary_size
    from graphprune.vocabulary.trim import MAP

    if (text is None) == (keep is None):
        raise UsageError("say which tokens stay: by --text FILE or by --keep FILE")
    if count is not None and text is None:
        raise UsageError("--count counts the tokens of a text: give --text FILE")
    with destination(output, directory, overwrite=overwrite, replaces=MAP) as folder:
        program = session.load(directory, loading)
        vocabulary = _chosen(program, text, count, keep)
        with session.working("leaving tokens out"):
            smaller = vocabulary.trimmed()
        with session.working(f"writing {output}"):
            vocabulary.write_into(smaller, folder)
    before, after = vocabulary_size(program), len(vocabulary.kept)
    counts = program.parameter_count(), smaller.parameter_count()
    if as_json:
        parameters = dict(zip(("before", "after"), counts, strict=True))
        print(json.dumps({"tokens": {"before": before, "after": after}, "parameters": parameters}))
    elif not session.quiet:
        print(f"tokens {before:,} -> {after:,}, parameters {counts[0]:,} -> {counts[1]:,}")
        print(f"{output}: ids of tokens are other ones; {MAP} lists the old id of each")


def _chosen(program: Program, text: str | None, count: int | None, keep: Path | None) -> Vocabulary:
    from graphprune.vocabulary.trim import vocabulary_of_list, vocabulary_of_text

    if text is not None:
        return vocabulary_of_text(program, text, count)
    assert keep is not None
    try:
        lines = keep.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{keep}: cannot be read: {error}") from error
    return vocabulary_of_list(program, [line for line in lines if line])
