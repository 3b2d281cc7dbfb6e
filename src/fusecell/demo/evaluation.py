"""Evaluate models on held-out text: all on the same characters, in slices spread over the whole text."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fusecell.demo.baselines import KneserNey, unigram_bits
from fusecell.demo.model import CharacterModel
from fusecell.demo.train import in_rows

__all__ = ["Exam"]


class Exam:
    """Slices of held-out text that every model is scored on.

    A slice begins with characters that are read but not scored, because the state starts at zero there.

    Arguments:
        held_out: ids, int64 (length,).
        rows: the number of slices, evenly spread.
        warmup: characters at the beginning of each slice that are only read.
        scored: characters of each slice that are scored; fewer if the slice is shorter.

    Raises:
        ValueError: if a slice would have nothing to score.
    """

    def __init__(self, held_out: NDArray[np.int64], rows: int = 256, warmup: int = 64, scored: int = 160) -> None:
        length = len(held_out) // rows
        scored = min(scored, length - warmup)
        if scored < 1:
            raise ValueError(
                f"{len(held_out)} held-out characters in {rows} slices leave {length} each, of which {warmup} are only "
                "read; lower rows or warmup."
            )
        self.held_out = held_out
        self.warmup = warmup
        self.text = in_rows(held_out, rows)[: warmup + scored]
        starts = np.arange(rows) * length
        self.positions = (starts[:, None] + np.arange(warmup, warmup + scored)).ravel()

    def __len__(self) -> int:
        return len(self.positions)

    @torch.no_grad()
    def bits(self, model: CharacterModel, window: int = 64) -> float:
        """Return a model's bits per scored character; its state is carried from window to window."""
        total, state = 0.0, None
        for start in range(0, len(self.text) - 1, window):
            targets = self.text[start + 1 : start + window + 1]
            scores, state = model(self.text[start : start + len(targets)], state)
            # A score belongs to the next character: the warmup's last one predicts the first that counts.
            unscored = max(self.warmup - 1 - start, 0)
            if unscored < len(targets):
                counted = scores[unscored:].flatten(0, 1), targets[unscored:].flatten()
                total += nn.functional.cross_entropy(*counted, reduction="sum").item()
        return total / len(self) / math.log(2)

    def unigram_bits(self, training: NDArray[np.int64], size: int) -> float:
        """Return the bits per character of the training text's character frequencies, on the same characters."""
        return unigram_bits(training, self.held_out[self.positions], size)

    def ngram_bits(self, ngram: KneserNey) -> float:
        """Return the bits per character of an n-gram model on the same characters, each given all those before it."""
        probabilities = ngram.probabilities(self.held_out)[self.positions - ngram.order + 1]
        return float(-np.log2(probabilities).mean())
