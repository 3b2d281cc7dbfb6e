"""Compare models by training them in turns of about a second, so that other load on the machine affects all alike."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from fusecell.demo.checkpoint import save_checkpoint
from fusecell.demo.corpus import Corpus
from fusecell.demo.evaluation import Exam
from fusecell.demo.report import progress_bars
from fusecell.demo.train import Budget, Point, Trainer

__all__ = ["Lane", "race"]

_SAVE_EVERY = 20.0
"""Seconds between two saves of the checkpoints."""
_EVALUATION = 0.1
"""The largest share of the time spent evaluating: on a slow machine the curves get fewer points."""


@dataclass
class Lane:
    """One of the models that are compared, with its budget and its folder.

    Arguments:
        name: its title in tables and plots.
        trainer: its training run.
        budget: when its training ends.
        threads: torch's number of threads while it trains.
        folder: where its checkpoint goes.
        losses: bits per character of each step since the last point of its curve.
        evaluating: seconds spent on the points so far.
    """

    name: str
    trainer: Trainer
    budget: Budget
    threads: int
    folder: Path
    losses: list[float] = field(default_factory=list)
    evaluating: float = 0.0

    def __post_init__(self) -> None:
        self.start = self.budget.used(self.trainer)  # above 0 in a run that was resumed
        self.start_seconds = self.trainer.seconds

    def go(self, share: float) -> Iterator[float]:
        """Train until ``share`` of the budget left at the start is used; yield the share used after each step."""
        torch.set_num_threads(self.threads)
        # In this form, rounding can't keep it from being exactly 1 at the end.
        until = 1 - (1 - self.start) * (1 - share)
        for bits in self.trainer.run(self.budget, until):
            self.losses.append(bits)
            yield (self.budget.used(self.trainer) - self.start) / (1 - self.start)

    def add_point(self, exam: Exam) -> None:
        """Evaluate the model and add a point to its curve, if there was a step since the last one."""
        if not self.losses:
            return
        torch.set_num_threads(1)  # the least delayed where other processes use the cores
        began, trainer = time.monotonic(), self.trainer
        held_out = exam.bits(trainer.model)
        self.evaluating += time.monotonic() - began
        training = sum(self.losses) / len(self.losses)
        trainer.curve.append(Point(trainer.seconds, trainer.characters, training, held_out))
        self.losses = []


def race(lanes: Sequence[Lane], corpus: Corpus, exam: Exam, console: Console, points: int = 10) -> None:
    """Train all models in turns until their budgets are used up, evaluating and saving on the way.

    The checkpoints are also saved at the end, after an interruption too.

    Arguments:
        lanes: the models.
        corpus: its vocabulary is saved with each checkpoint.
        exam: evaluates the points of the curves.
        console: shows a progress bar for each model.
        points: the most points that each curve gets.
    """
    longest = max(lane.budget.seconds - lane.trainer.seconds for lane in lanes)
    turns_per_point = max(1, math.ceil(longest / points))
    turns = points * turns_per_point
    saved = time.monotonic()
    try:
        with progress_bars(console, [lane.name for lane in lanes]) as bars:
            for turn in range(1, turns + 1):
                for lane in lanes:
                    for used in lane.go(turn / turns):
                        bars.step(lane.name, used, lane.losses[-1], lane.trainer.speed)
                if turn == turns or (turn % turns_per_point == 0 and _time_for_points(lanes)):
                    for lane in lanes:
                        lane.add_point(exam)
                if time.monotonic() - saved > _SAVE_EVERY:
                    _save(lanes, corpus)
                    saved = time.monotonic()
    finally:
        _save(lanes, corpus)


def _time_for_points(lanes: Sequence[Lane]) -> bool:
    training = sum(lane.trainer.seconds - lane.start_seconds for lane in lanes)
    return sum(lane.evaluating for lane in lanes) < _EVALUATION * training


def _save(lanes: Sequence[Lane], corpus: Corpus) -> None:
    for lane in lanes:
        save_checkpoint(lane.trainer, corpus, lane.folder)
