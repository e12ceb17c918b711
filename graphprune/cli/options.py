"""Arguments and options that several verbs take, under the titles that help shows them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from graphprune.io import reference

CALIBRATION = "Calibration"
HELDOUT = "Held-out text"
RESULT = "Result"
PLACE = "Precision, device and memory"


class Form(StrEnum):
    """The kinds of checkpoint that may be written."""

    plain = "plain"
    any = "any"


class ComputeType(StrEnum):
    """Element types to hold weights and to compute in."""

    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class DType(StrEnum):
    """Element types that a checkpoint may be stored in."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="DIR",
        help=f"A Hugging Face directory, or one that graphprune wrote; '{reference.NAME}' is the "
        "small model that comes with graphprune.",
    ),
]
_OUTPUT = typer.Option(
    "--output",
    "-o",
    metavar="OUT",
    help="A directory to make; it appears whole.",
    rich_help_panel=RESULT,
)
Output = Annotated[Path | None, _OUTPUT]
NeededOutput = Annotated[Path, _OUTPUT]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace OUT if graphprune wrote it.",
        rich_help_panel=RESULT,
    ),
]
PlainForm = Annotated[
    Form,
    typer.Option(
        "--form",
        help="plain: what plain transformers loads; sizes that its config refuses give way to the "
        "nearest that it accepts, and what it cannot load is refused. any: a checkpoint with its "
        "own code, or an archive, if need be.",
        rich_help_panel=RESULT,
    ),
]
StoredType = Annotated[
    DType | None,
    typer.Option(
        "--dtype",
        help="Element type to store; by default that of the checkpoint that is read.",
        rich_help_panel=RESULT,
    ),
]
ShardSize = Annotated[
    str | None,
    typer.Option(
        "--shard-size",
        metavar="SIZE",
        help="The most that one file of weights may take; 5GB if left out.",
        rich_help_panel=RESULT,
    ),
]
NoCache = Annotated[
    bool,
    typer.Option("--no-cache", help="Neither use graphs that were kept nor keep this one."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json that 'run' wrote.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of whatever is random.")]
TokenizerDirectory = Annotated[
    str | None,
    typer.Option("--tokenizer", metavar="DIR", help="Where the tokenizer is, if not in DIR."),
]

CalibrationText = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="A text, JSON lines or NAME:SPLIT:COLUMN of a data set; or inputs by name, such as "
        "images, in a .safetensors file.",
        rich_help_panel=CALIBRATION,
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        "--samples",
        help="Windows of calibration text, as many as the passes need if left out; or samples of "
        "other data, all of them if left out.",
        min=1,
        rich_help_panel=CALIBRATION,
    ),
]
CalibrationLength = Annotated[
    int | None,
    typer.Option(
        "--calibration-length",
        help="Tokens of each window of calibration text; as the passes need if left out.",
        min=1,
        rich_help_panel=CALIBRATION,
    ),
]
FirstToken = Annotated[
    bool,
    typer.Option(
        "--first-token/--no-first-token",
        help="Begin windows of text with what the tokenizer puts before a text, such as bos.",
    ),
]

HeldOutText = Annotated[
    Path | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="A text, JSON lines or NAME:SPLIT:COLUMN of a data set; the packaged held-out text "
        "if left out.",
        rich_help_panel=HELDOUT,
    ),
]
Length = Annotated[
    int, typer.Option("--length", help="Tokens of each window.", rich_help_panel=HELDOUT)
]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", help="Use no more of the text.", min=1, rich_help_panel=HELDOUT),
]
BatchSize = Annotated[
    int,
    typer.Option("--batch-size", help="Windows at once.", min=1, rich_help_panel=HELDOUT),
]


_COMPUTE_HELP = (
    "Element type to hold weights and to compute in; auto keeps the stored type and computes in "
    "float32 on a processor, in the stored type on a GPU."
)


@dataclass(frozen=True)
class LoadOptions:
    """Where, in which type and within what memory a model is loaded."""

    compute_dtype: Annotated[
        ComputeType,
        typer.Option("--compute-dtype", "--dtype", help=_COMPUTE_HELP, rich_help_panel=PLACE),
    ] = ComputeType.auto
    device: Annotated[
        str | None,
        typer.Option("--device", help="Where to compute, such as 'cuda'.", rich_help_panel=PLACE),
    ] = None
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="The most that weights and activations may take, such as 8GB; what goes past it "
            "lies in scratch files.",
            rich_help_panel=PLACE,
        ),
    ] = None


@dataclass(frozen=True)
class LoadToWriteOptions(LoadOptions):
    """The same for a verb whose --dtype is what it writes."""

    compute_dtype: Annotated[
        ComputeType,
        typer.Option("--compute-dtype", help=_COMPUTE_HELP, rich_help_panel=PLACE),
    ] = ComputeType.auto


@dataclass(frozen=True)
class CalibrationOptions:
    """The options for calibration text; a verb that takes them has a parameter of this class."""

    calibration: CalibrationText = None
    samples: Samples = None
    calibration_length: CalibrationLength = None
    tokenizer: TokenizerDirectory = None
    first_token: FirstToken = True


@dataclass(frozen=True)
class HeldOutOptions:
    """The options for the text that is measured on."""

    text: HeldOutText = None
    tokenizer: TokenizerDirectory = None
    length: Length = 256
    max_tokens: MaxTokens = None
    batch_size: BatchSize = 4
    first_token: FirstToken = True

    @property
    def path(self) -> Path:
        """The text itself: the packaged one where none is named."""
        return self.text or reference.heldout_text()
