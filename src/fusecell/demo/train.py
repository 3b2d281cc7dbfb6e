"""Train a character model by truncated backpropagation through time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fusecell.demo.model import CharacterModel, build_model
from fusecell.demo.settings import Settings
from fusecell.layers import detach

__all__ = ["Budget", "Point", "Trainer", "in_rows"]


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a learning curve.

    Arguments:
        seconds: of training so far, without evaluation.
        characters: how many were trained on so far.
        training: bits per character of the training text since the point before.
        held_out: bits per character of held-out text.
    """

    seconds: float
    characters: int
    training: float
    held_out: float


@dataclass(frozen=True, slots=True)
class Budget:
    """The end of training: a number of seconds or of steps, whichever is reached first."""

    seconds: float = math.inf
    steps: float = math.inf

    def used(self, trainer: Trainer) -> float:
        """Return the share of the budget that a trainer has used, 0 to 1."""
        return min(max(trainer.seconds / self.seconds, trainer.step / self.steps), 1.0)


@dataclass
class Trainer:
    """A model in training: weights, optimizer, text position, state and learning curve."""

    settings: Settings
    text: Tensor
    model: CharacterModel
    optimizer: torch.optim.Adam
    state: Tensor | None = None
    step: int = 0
    seconds: float = 0.0
    curve: list[Point] = field(default_factory=list)

    @classmethod
    def new(cls, settings: Settings, training: NDArray[np.int64], vocabulary_size: int) -> Trainer:
        """Create a trainer at its first step.

        Raises:
            ValueError: if the text is too short for one window of each row.
        """
        text = in_rows(training, settings.batch_size)
        if len(text) <= settings.window:
            raise ValueError(
                f"{len(training)} characters are too few for {settings.batch_size} rows with windows of "
                f"{settings.window}; lower batch_size or window."
            )
        model = build_model(settings, vocabulary_size)
        return cls(settings, text, model, torch.optim.Adam(model.parameters(), lr=settings.learning_rate))

    @property
    def characters(self) -> int:
        """Characters trained on so far."""
        return self.step * self.settings.window * self.settings.batch_size

    @property
    def speed(self) -> float:
        """Characters per second, 0 before the first step."""
        return self.characters / self.seconds if self.seconds else 0.0

    def learning_rate(self, used: float) -> float:
        """Return the learning rate at a share of the budget: a linear warmup, then a cosine to 1/50 of the peak."""
        peak, warmup = self.settings.learning_rate, self.settings.warmup
        if used < warmup:
            # Not from 0: the first update would then do nothing.
            return peak * max(used / warmup, 0.05)
        return peak * (0.02 + 0.98 * (1 + math.cos(math.pi * (used - warmup) / (1 - warmup))) / 2)

    def advance(self, used: float) -> float:
        """Make one update on the next window of every row; return the window's bits per character.

        Arguments:
            used: the share of the budget used so far, for the learning rate.
        """
        began = time.perf_counter()
        ids, targets = self._next_window()
        scores, state = self.model(ids, self.state)
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own method is untyped
        # Gradients through time explode now and then (Pascanu et al., 2013, arXiv:1211.5063).
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(used)
        self.optimizer.step()
        self.state = detach(state)  # truncated here: no gradient flows into the window before
        self.step += 1
        self.seconds += time.perf_counter() - began
        return loss.item() / math.log(2)

    def run(self, budget: Budget, share: float = 1.0) -> Iterator[float]:
        """Make updates until a share of the budget is used; yield the bits per character of each."""
        while (used := budget.used(self)) < share:
            yield self.advance(used)

    def _next_window(self) -> tuple[Tensor, Tensor]:
        window = self.settings.window
        # One less: the last character of a row has no next one to predict.
        per_pass = (len(self.text) - 1) // window
        start = self.step % per_pass * window
        if start == 0:
            # A new pass over the text: the rows' ends don't lead on to their beginnings.
            self.state = None
        return self.text[start : start + window], self.text[start + 1 : start + window + 1]


def in_rows(ids: NDArray[np.int64], rows: int) -> Tensor:
    """Split a text into rows of equal length; return them time-major, (len(ids) // rows, rows)."""
    length = len(ids) // rows
    # Copied: a transposed view would give every window strided memory.
    return torch.from_numpy(ids[: length * rows].reshape(rows, length).T.copy())
