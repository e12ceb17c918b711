"""Train what is left after pruning or merging."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from graphprune.errors import CalibrationError, SelectionError, TrainingError, UsageError
from graphprune.pipeline.pass_base import COUPLING, Analysis, Context, Outcome, Pass

if TYPE_CHECKING:
    from graphprune.calibration.data import Calibration
    from graphprune.ir.program import Program
    from graphprune.training.loop import Trained, TrainingConfig
    from graphprune.training.objective import Objective
    from graphprune.training.samples import Samples
    from graphprune.training.trainable import Trainable

_RANGES: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    ("at least 0", lambda value: value >= 0, ("warmup", "weight_decay", "clip")),
    (
        "at least 1",
        lambda value: value >= 1,
        ("rank", "epochs", "steps", "batch", "micro", "every", "patience"),
    ),
    ("at least 2", lambda value: value >= 2, ("length",)),
    ("positive", lambda value: value > 0, ("alpha", "lr")),
    ("in [0, 1)", lambda value: 0 <= value < 1, ("dropout", "held_out")),
    ("in [0, 1]", lambda value: 0 <= value <= 1, ("distil",)),
    ("in (0, 1]", lambda value: 0 < value <= 1, ("share",)),
)


@dataclass(frozen=True)
class Recover(Pass):
    """Train the weights that are left: all, or low-rank adapters that are merged into them.

    Before
    ------
    ::

        down[64, 84]  as pruning left it

    After
    -----
    The same sizes, other values; with ``method=lora`` a change of rank 8::

        down[64, 84]  down + 2 B[64, 8] A[8, 84]

    The trained values lie beside the plan of a run (``plan.edits``), for `apply` and `verify`: with
    ``method=full`` as large as the checkpoint, which loads without them.

    Options
    -------
    method
        lora trains adapters made by peft, full the parameters themselves.
    target
        Which weights: layers (those of numbered layers), all, or a glob over names; none takes
        layers for lora and all for full.
    rank
        Of the adapters.
    alpha
        Their scale is alpha / rank.
    dropout
        Of what comes into them; experts and convolutions have none.
    lr
        The highest learning rate of AdamW.
    epochs
        How often all samples are gone through; none takes 2 unless steps are given.
    steps
        Steps of the optimizer.
    share
        The part of these steps that is done: uptraining's alpha, with the steps of pre-training.
    batch
        Samples of a step.
    micro
        Samples that are run at once.
    warmup
        Steps over which the learning rate rises; none takes 100, or a tenth of the steps if that is
        less.
    schedule
        Whether it then falls, linear to zero, or stays.
    weight_decay
        Of AdamW, but for biases and norms.
    clip
        The largest norm of the gradient; 0 for any.
    distil
        The weight, in [0, 1], of the divergence from the logits of the program that the pipeline
        started from; the next-token loss has the rest. At 1 no tokens are needed.
    text
        A file to train on, cut into windows; none takes the calibration data.
    length
        Tokens of each window of the text.
    held_out
        The part of the samples that is not trained on but measured, one at least if not 0.
    every
        Steps from one measurement and checkpoint to the next.
    patience
        How many measurements in a row may be no better before training stops with the best weights;
        none does all steps and takes the last.
    keep_zeros
        Whether elements of matrices that are zero, as `sparsify` leaves them, stay so.
    checkpoint
        A directory to write checkpoints to, and to go on from if there is one; it must be of the
        same options, data and program.

    Requires
    --------
    Calibration data, or a text; peft for lora.

    Preserves
    ---------
    The coupling.

    Refuses
    -------
    A target that matches nothing (`SelectionError`); a program without logits of next tokens, but
    for distil=1, with which there must be a pass before; too few samples, a loss that is not
    finite, a checkpoint of another training (`TrainingError`).

    Reference
    ---------
    Ma et al., LLM-Pruner, 2305.11627, section 3.3 and its code, whose LoRA settings are the
    defaults; it trains on the answers of an instruction set, this on all tokens. Uptraining:
    Ainslie et al., GQA, 2305.13245, section 2.1, ``recover{method=full steps=N share=0.05}``.

    Example
    -------
    >>> str(Recover(steps=3, lr=0.001))
    'recover{lr=0.001 steps=3}'
    """

    name: ClassVar[str] = "recover"
    resizes: ClassVar[bool] = False
    preserves: ClassVar[frozenset[Analysis[Any]]] = frozenset({COUPLING})

    method: Literal["lora", "full"] = "lora"
    target: str | None = None
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    lr: float = 1e-4
    epochs: int | None = None
    steps: int | None = None
    share: float = 1.0
    batch: int = 64
    micro: int = 4
    warmup: int | None = None
    schedule: Literal["linear", "constant"] = "linear"
    weight_decay: float = 0.0
    clip: float = 1.0
    distil: float = 0.0
    text: str | None = None
    length: int = 256
    held_out: float = 0.1
    every: int = 100
    patience: int | None = None
    keep_zeros: bool = True
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for wanted, holds, names in _RANGES:
            for name in names:
                value = getattr(self, name)
                if value is not None and not holds(value):
                    raise UsageError(f"recover: {name} {value:g} is not {wanted}")
        if self.epochs is not None and self.steps is not None:
            raise UsageError("recover: give steps or epochs, not both")
        if self.patience is not None and not self.held_out:
            raise UsageError("recover: patience looks at held-out samples: held_out must not be 0")
        if self.method == "full":
            given = [name for name in ("rank", "alpha", "dropout") if name in self.values()]
            if given:
                raise UsageError(f"recover: {given[0]} is of lora; method=full has no adapters")
        elif find_spec("peft") is None:
            raise TrainingError("recover: LoRA needs peft: pip install 'graphprune[recover]'")

    @property
    def requires_calibration(self) -> bool:
        """Return whether there is no text to train on; a missing text is refused before all work.

        Raises
        ------
        CalibrationError
            When the text does not exist.
        """
        if self.text is not None and not Path(self.text).is_file():
            raise CalibrationError(f"{self.text} does not exist or is no file")
        return self.text is None

    def run(self, program: Program, context: Context) -> Outcome:
        """Train, and take the weights over where they have changed."""
        import torch

        from graphprune.calibration.data import LABELS
        from graphprune.training.loop import train
        from graphprune.training.samples import Samples

        data = self._data(program, context)
        samples, held = Samples.split(data, self.held_out, context.seed)
        objective = self._objective(program, context, LABELS in samples.rows[0])
        config = self._config(samples, context.seed)
        student, details = self._student(program, context.seed)
        with context.bar("recovering", config.steps) as advance:
            trained = train(
                student,
                objective,
                samples,
                held,
                config,
                checkpoint=self._checkpoint(program, data, context),
                advance=advance,
            )
        new = student.weights()
        changed = [
            name for name, each in new.items() if not torch.equal(each, program.take([name])[name])
        ]
        details = {
            **_told(objective, samples, held, trained),
            "learning rate": config.lr,
            **details,
        }
        if note := _note(trained, bool(changed)):
            details["note"] = note
        if not changed:
            return Outcome(program, details=details)
        return Outcome(program.with_weights(new), details=details, edited=True)

    def _data(self, program: Program, context: Context) -> Calibration:
        """Return the windows of the text, or the calibration data."""
        from graphprune.calibration.data import Calibration
        from graphprune.calibration.tokens import token_batch, tokenize
        from graphprune.io.text_sources import read_documents

        if self.text is None:
            assert context.calibration is not None, "the pass manager has asked for it"
            data = context.calibration
        else:
            source = program.source
            if source is None or source.directory is None:
                raise TrainingError(
                    "a text is read by the tokenizer of a checkpoint directory, and this program "
                    "came from none: give calibration data instead"
                )
            stream = tokenize(read_documents(self.text), source.directory)
            windows = stream.windows(self.length)
            if not len(windows):
                raise TrainingError(
                    f"{self.text} has {len(stream.ids)} tokens; one window takes {self.length}"
                )
            data = Calibration.from_batches([token_batch(windows)])
        data.check(program)
        return data

    def _objective(self, program: Program, context: Context, labeled: bool) -> Objective:
        from graphprune.calibration.losses import why_no_scores
        from graphprune.training.objective import Objective

        if self.distil and program is context.original:
            raise TrainingError("distil: no pass has changed the program, which is its own teacher")
        names = [value.name for value in program.outputs]
        output = "logits" if "logits" in names else names[0]
        if self.distil < 1 and not labeled and (why := why_no_scores(program, output)):
            raise TrainingError(f"{why}: train it with distil=1")
        teacher = context.original if self.distil else None
        return Objective(output, teacher, self.distil, labeled)

    def _config(self, samples: Samples, seed: int) -> TrainingConfig:
        from graphprune.training.loop import TrainingConfig

        total = self.steps or (self.epochs or 2) * samples.steps(self.batch)
        steps = max(1, round(total * self.share))
        warmup = min(100, steps // 10) if self.warmup is None else self.warmup
        if warmup >= steps:
            raise TrainingError(f"{warmup} steps of warm-up leave none of {steps} to train")
        return TrainingConfig(
            steps=steps,
            lr=self.lr,
            batch=self.batch,
            micro=self.micro,
            warmup=warmup,
            schedule=self.schedule,
            weight_decay=self.weight_decay,
            clip=self.clip,
            every=self.every,
            patience=self.patience,
            seed=seed,
        )

    def _student(self, program: Program, seed: int) -> tuple[Trainable, dict[str, Any]]:
        """Return what is trained, and what there is to say of it."""
        from graphprune.analysis.matrices import contractions
        from graphprune.training.lora import Adapters
        from graphprune.training.trainable import AllWeights, kept_zeros

        others = _untrainable(program)
        known = {name for name, kind in program.kinds.items() if kind == "parameter"} - {*others}
        matrices = []
        if self.method == "lora":
            found = contractions(program)
            matrices = [matrix for matrix in found.matrices if matrix.weight in known]
            others = {**found.others, **others}
            known = {matrix.weight for matrix in matrices}
        names = self._targets(known)
        others |= dict.fromkeys(sorted(known - {*names}), "it is no target")
        zeros = kept_zeros(program, names) if self.keep_zeros else {}
        student: Trainable
        if self.method == "full":
            student = AllWeights(program, names, zeros)
        else:
            student = Adapters(
                program,
                [matrix for matrix in matrices if matrix.weight in names],
                rank=self.rank,
                alpha=self.alpha,
                dropout=self.dropout,
                zeros=zeros,
                seed=seed,
            )
        return student, {
            "trained weights": len(names),
            "trainable": sum(each.numel() for each in student.parameters.values()),
            "zeros kept": sum(int(zero.sum()) for zero in zeros.values()),
            "untouched": others,
        }

    def _targets(self, names: Iterable[str]) -> list[str]:
        from graphprune.ir.provenance import layer_of

        target = self.target or ("layers" if self.method == "lora" else "all")
        found = sorted(
            name
            for name in names
            if target == "all"
            or (bool(layer_of(name)) if target == "layers" else fnmatchcase(name, target))
        )
        if not found:
            kind = "matrix" if self.method == "lora" else "floating-point parameter"
            raise SelectionError(f"target {target!r} matches no {kind}")
        return found

    def _checkpoint(self, program: Program, data: Calibration, context: Context) -> Any:
        from graphprune.training.loop import Checkpoint
        from graphprune.weights.tensors import digest

        if self.checkpoint is None:
            return None
        identity: dict[str, Any] = {
            name: getattr(self, name)
            for name in self.options()
            if name not in ("text", "checkpoint")
        }
        weights = digest([program.weights])
        identity |= {"seed": context.seed, "data": data.sha256, "program": weights}
        if self.distil:
            identity["original"] = digest([context.original.weights])
        return Checkpoint(context.path(self.checkpoint) / "checkpoint.pt", identity)


def _untrainable(program: Program) -> dict[str, str]:
    """Return the parameters that no gradient reaches, and why."""
    why = {}
    for name, node in program.weight_nodes():
        if program.kinds[name] == "parameter" and not program.weights[name].is_floating_point():
            why[name] = f"its elements are {program.weights[name].dtype}"
        elif program.kinds[name] == "parameter" and not node.users:
            why[name] = "nothing uses it"
    return why


def _told(
    objective: Objective, samples: Samples, held: Samples, trained: Trained
) -> dict[str, Any]:
    """Return what a report says of a training."""
    told: dict[str, Any] = {
        "loss": objective.name,
        "measured on": f"{len(held)} held-out samples" if len(held) else "what is trained on",
        "loss before": _short(trained.measured[0]),
        "loss after": _short(trained.measured[trained.best]),
        "samples": len(samples),
        "steps": trained.step,
    }
    if len(trained.measured) > 2:
        told["losses"] = {str(step): _short(loss) for step, loss in trained.measured.items()}
    if trained.best != trained.step:
        told["best step"] = trained.best
    if trained.stopped:
        told["stopped"] = "the loss went down no more"
    if trained.resumed:
        told["resumed at step"] = trained.resumed
    return told


def _short(loss: float) -> float:
    return float(f"{loss:.5g}")


def _note(trained: Trained, changed: bool) -> str:
    """Return what should not be overlooked."""
    if not changed:
        why = "no step lowered the loss" if trained.best == 0 else "the steps were too small"
        return f"no weight has changed: {why}"
    if trained.measured[trained.best] >= trained.measured[0]:
        return "the loss has not gone down"
    return ""
