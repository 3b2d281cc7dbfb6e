"""Baselines of the demo: character frequencies, and a 5-gram model with Kneser-Ney smoothing."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["KneserNey", "unigram_bits"]

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]


def unigram_bits(training: Ids, held_out: Ids, size: int) -> float:
    """Return the bits per character of held-out text under the training text's character frequencies.

    Arguments:
        training, held_out: ids, int64 (length,).
        size: how many different ids there are; each counts once more than it occurs (add-one smoothing).
    """
    counts = np.bincount(training, minlength=size) + 1.0
    return float(-np.log2(counts / counts.sum())[held_out].mean())


class KneserNey:
    r"""An interpolated n-gram model of characters.

    .. math:: p_k(c \mid u) = \frac{\max(n(uc) - d_k, 0)}{n(u)} + \frac{d_k\, t(u)}{n(u)}\, p_{k-1}(c \mid u')

    where n counts occurrences at the highest order and distinct left neighbours below it, t(u) is the number of
    characters seen after u, u' is u without its first character, and p_0 is uniform.

    Example:
        >>> import numpy as np
        >>> text = np.array([0, 1, 2] * 50)
        >>> bool((KneserNey(text, size=3, order=3).probabilities(text) > 0.9).all())
        True

    Arguments:
        training: ids, int64 (length,).
        size: how many different ids there are.
        order: characters of an n-gram, context included.

    Raises:
        ValueError: if an n-gram doesn't fit 63 bits, or the text is shorter than one.

    Paper: R. Kneser and H. Ney, "Improved backing-off for m-gram language modeling", ICASSP 1995; the interpolated
    form is that of Chen and Goodman, 1999.
    """

    def __init__(self, training: Ids, size: int, order: int = 5) -> None:
        if order * math.log2(max(size, 2)) >= 63 or len(training) < order:
            raise ValueError(
                f"KneserNey: {order} characters out of {size} must fit 63 bits and the training text ({len(training)}) "
                "must be no shorter than one n-gram; lower the order."
            )
        self.size = size
        self.order = order
        self.levels: list[_Level] = []
        grams, counts = np.unique(_grams(training, order, size), return_counts=True)
        for length in range(order, 0, -1):
            self.levels.append(_Level(grams, counts, size))
            # Below the top an n-gram counts once for each character seen before it.
            grams, counts = np.unique(grams % size ** (length - 1), return_counts=True)

    def probabilities(self, text: Ids) -> Floats:
        """Return the probability of each character given those before it, float64 (len(text) - order + 1,).

        The first is that of the ``order``-th character.
        """
        probability = np.full(len(text) - self.order + 1, 1.0 / self.size)
        for length, level in zip(range(1, self.order + 1), reversed(self.levels), strict=True):
            probability = level.refine(_grams(text[self.order - length :], length, self.size), probability)
        return probability


class _Level:
    """The counts of the n-grams of one length."""

    def __init__(self, grams: Ids, counts: Ids, size: int) -> None:
        # The estimate of Ney, Essen and Kneser (1994); 0.5 where a text is too small for it.
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        self.discount = once / (once + 2.0 * twice) if once and twice else 0.5
        self.size = size
        self.grams, self.counts = grams, counts
        self.contexts, first = np.unique(grams // size, return_index=True)
        self.followers = np.diff(np.append(first, len(grams)))
        self.totals = np.add.reduceat(counts, first)

    def refine(self, grams: Ids, below: Floats) -> Floats:
        """Return the probability of each gram's last character, interpolated with ``below``, that of one order less."""
        count = _look_up(self.grams, self.counts, grams)
        total = _look_up(self.contexts, self.totals, grams // self.size)
        followers = _look_up(self.contexts, self.followers, grams // self.size)
        denominator = np.maximum(total, 1)
        interpolated = (np.maximum(count - self.discount, 0.0) + self.discount * followers * below) / denominator
        # A context that the training text lacks says nothing: the shorter one decides.
        return np.where(total > 0, interpolated, below)


def _grams(text: Ids, length: int, size: int) -> Ids:
    """Encode every run of ``length`` ids as one integer, the oldest id as its highest digit."""
    # As integers, n-grams sort and search as arrays; `// size` gives the context, `% size ** (length - 1)` the tail.
    count = len(text) - length + 1
    key = np.zeros(count, np.int64)
    for offset in range(length):
        key = key * size + text[offset : offset + count]
    return key


def _look_up(keys: Ids, values: Ids, queries: Ids) -> Ids:
    """Return the value of each query in a table with sorted keys, 0 where it is missing."""
    index = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[index] == queries, values[index], 0)
