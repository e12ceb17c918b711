"""The packaged checkpoint with draws of calibration text, and its perplexity on held-out text."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import graphprune as gp
from graphprune import reference
from graphprune.evaluation.perplexity import perplexity


@dataclass(frozen=True)
class Study:
    """A program and what pipelines on it are calibrated with, one draw of text for each seed."""

    program: gp.Program
    draws: tuple[gp.Calibration, ...]

    @classmethod
    def of_reference(cls, seeds: int, samples: int) -> Study:
        """Take the packaged checkpoint, with `samples` windows of 128 tokens in each draw."""
        torch.set_num_threads(1)
        directory = reference.checkpoint_dir()
        text = reference.calibration_text()
        # The model was trained on windows that were cut anywhere: few of them began with bos.
        draws = (
            gp.Calibration.from_text(
                text, directory, samples=samples, length=128, seed=seed, first_token=False
            )
            for seed in range(seeds)
        )
        return cls(gp.load(directory), tuple(draws))

    def after(self, pipeline: str, draws: int | None = None) -> list[float]:
        """Perplexity after `pipeline`, for each draw or for so many of the first."""
        parsed = gp.Pipeline.parse(pipeline)
        return [
            held_out(parsed.run(self.program, calibration=draw, seed=seed, quiet=True).program)
            for seed, draw in enumerate(self.draws[:draws])
        ]


def held_out(program: gp.Program) -> float:
    """Perplexity on text that was neither trained on nor calibrated with."""
    text, directory = reference.heldout_text(), reference.checkpoint_dir()
    found = perplexity(program, text, directory, first_token=False)
    return found.perplexity
