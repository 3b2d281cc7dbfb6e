"""The race: models trained in turns of about a second, so that what else the machine does meets all alike."""

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
from fusecell.demo.report import telling
from fusecell.demo.train import Budget, Point, Trainer

__all__ = ["Lane", "race"]

_SAVE_EVERY = 20.0
_EVALUATION = 0.1
"""The largest share of the time that goes into points of the curves: a slow machine draws fewer."""


@dataclass
class Lane:
    """A model in the race.

    Arguments:
        name: what it is called.
        trainer: where it stands.
        budget: how far it goes.
        threads: torch's number of threads while it trains.
        folder: of its checkpoint.
        losses: bits per character of the steps since the last point of its curve.
        evaluating: seconds that went into the points.
    """

    name: str
    trainer: Trainer
    budget: Budget
    threads: int
    folder: Path
    losses: list[float] = field(default_factory=list)
    evaluating: float = 0.0

    def __post_init__(self) -> None:
        self.begun = self.budget.used(self.trainer)
        self.before = self.trainer.seconds

    def go(self, share: float) -> Iterator[float]:
        """Train until so much of what was left at the start is used, yielding how much is after each step."""
        torch.set_num_threads(self.threads)
        # Exactly 1 at the end, whatever the share at the start was.
        until = 1 - (1 - self.begun) * (1 - share)
        for bits in self.trainer.run(self.budget, until):
            self.losses.append(bits)
            yield (self.budget.used(self.trainer) - self.begun) / (1 - self.begun)

    def add_point(self, exam: Exam) -> None:
        """A point of the curve, if there was a step since the last."""
        if not self.losses:
            return
        torch.set_num_threads(1)  # a busy machine then delays it least
        began, trainer = time.monotonic(), self.trainer
        held_out = exam.bits(trainer.model)
        self.evaluating += time.monotonic() - began
        training = sum(self.losses) / len(self.losses)
        trainer.curve.append(Point(trainer.seconds, trainer.characters, training, held_out))
        self.losses = []


def race(lanes: Sequence[Lane], corpus: Corpus, exam: Exam, console: Console, points: int = 10) -> None:
    """Use up every lane's budget in turns, adding ``points`` points to each curve at most and saving as it goes.

    The checkpoints are saved on the way out too, an interruption included.
    """
    longest = max(lane.budget.seconds - lane.trainer.seconds for lane in lanes)
    turns_per_point = max(1, math.ceil(longest / points))
    turns = points * turns_per_point
    saved = time.monotonic()
    try:
        with telling(console, [lane.name for lane in lanes]) as tell:
            for turn in range(1, turns + 1):
                for lane in lanes:
                    for used in lane.go(turn / turns):
                        tell.step(lane.name, used, lane.losses[-1], lane.trainer.speed)
                if turn == turns or (turn % turns_per_point == 0 and _time_for_points(lanes)):
                    for lane in lanes:
                        lane.add_point(exam)
                if time.monotonic() - saved > _SAVE_EVERY:
                    _save(lanes, corpus)
                    saved = time.monotonic()
    finally:
        _save(lanes, corpus)


def _time_for_points(lanes: Sequence[Lane]) -> bool:
    training = sum(lane.trainer.seconds - lane.before for lane in lanes)
    return sum(lane.evaluating for lane in lanes) < _EVALUATION * training


def _save(lanes: Sequence[Lane], corpus: Corpus) -> None:
    for lane in lanes:
        save_checkpoint(lane.trainer, corpus, lane.folder)
