"""What the demo's models must beat: letter frequencies and the 5-gram model, against their formulas."""

import itertools
import math

import numpy as np
import pytest

from fusecell.demo.baselines import KneserNey, unigram_bits


def test_unigram_bits_are_the_entropy_of_the_letters():
    text = np.array([0] * 7 + [1])
    expected = -sum(count / 8 * math.log2((count + 1) / 10) for count in (7, 1))
    assert unigram_bits(text, text, 2) == pytest.approx(expected, abs=1e-12)


def slow_kneser_ney(training, context, char, size, order):
    """The formula, recursively, over sets and lists."""
    grams = [tuple(training[i : i + order]) for i in range(len(training) - order + 1)]
    levels = {order: {gram: grams.count(gram) for gram in set(grams)}}
    for length in range(order - 1, 0, -1):
        longer = levels[length + 1]
        levels[length] = {gram[1:]: sum(other[1:] == gram[1:] for other in longer) for gram in longer}

    def probability(context, length):
        if length == 0:
            return 1 / size
        counts = levels[length]
        below = probability(context[1:], length - 1)
        after = {gram[-1]: count for gram, count in counts.items() if gram[:-1] == context}
        if not after:
            return below
        once, twice = (sum(count == times for count in counts.values()) for times in (1, 2))
        discount = once / (once + 2 * twice) if once and twice else 0.5
        total = sum(after.values())
        return max(after.get(char, 0) - discount, 0) / total + discount * len(after) / total * below

    return probability(tuple(context), order)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_kneser_ney_is_its_formula(order):
    random = np.random.default_rng(order)
    training, text = random.integers(0, 4, 90), random.integers(0, 5, 40)
    probabilities = KneserNey(training, 5, order).probabilities(text)
    assert len(probabilities) == 40 - order + 1
    for position, value in enumerate(probabilities):
        context, char = text[position : position + order - 1], text[position + order - 1]
        assert value == pytest.approx(slow_kneser_ney(training, context, char, 5, order), rel=1e-12)


def test_kneser_ney_probabilities_sum_to_one():
    training = np.random.default_rng(0).integers(0, 6, 400)
    model = KneserNey(training, 6, 3)
    for context in itertools.product(range(6), repeat=2):
        texts = [np.array([*context, char]) for char in range(6)]
        assert sum(model.probabilities(text)[0] for text in texts) == pytest.approx(1, abs=1e-12)


def test_kneser_ney_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="63 bits"):
        KneserNey(np.zeros(100, np.int64), 1000, 7)
