"""The models of the page: what they are trained on, and that they learn it."""

from __future__ import annotations

import sys

import pytest
import torch

from fusecell.play import KINDS, train_models
from fusecell.play.models import ALPHABET, TASKS, _prose_codes, encode


def test_a_text_is_one_hot_and_what_is_unknown_a_space():
    x = encode("Cat, 猫")
    assert x.shape == (6, 30)
    assert "".join(ALPHABET[index] for index in x.argmax(-1)) == "cat,  "
    assert (x.sum(-1) == 1).all()


def test_texts_of_training_and_those_held_out():
    """Both are prose in the alphabet's letters; no window of one is in the other."""
    generator = torch.Generator().manual_seed(0)
    batches = {held: TASKS["text"].batch(generator, held).argmax(-1).T for held in (False, True)}
    texts = {held: ["".join(ALPHABET[code] for code in row) for row in batch] for held, batch in batches.items()}
    assert all("  " not in text and " " in text for rows in texts.values() for text in rows)
    assert set(texts[False]) & set(texts[True]) == set()


def test_a_python_without_its_help_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    _prose_codes.cache_clear()
    with pytest.raises(ModuleNotFoundError, match="use a complete one"):
        train_models(updates=1)


def test_curves_are_within_what_can_be_drawn():
    curves = TASKS["curve"].batch(torch.Generator().manual_seed(0), False)
    assert curves.abs().max() < 0.95
    assert curves.std(0).min() > 0.05


def test_models_learn():
    """After 100 updates each beats the guess that knows how often letters are, and that of a flat line."""
    generator = torch.Generator().manual_seed(1)
    letters = torch.cat([TASKS["text"].batch(generator, True) for _ in range(8)]).flatten(0, 1).mean(0)
    guess = {
        "text": -(letters * letters.clamp_min(1e-9).log2()).sum().item(),
        "curve": torch.cat([TASKS["curve"].batch(generator, True) for _ in range(8)]).square().mean().item(),
    }
    models = train_models(updates=100)
    assert [(model.task, model.kind) for model in models] == [(task, kind) for task in TASKS for kind in KINDS]
    for model in models:
        assert model.loss < 0.95 * guess[model.task], (model.task, model.kind)


def test_equal_seeds_give_equal_models():
    for model, same in zip(train_models(3, updates=2), train_models(3, updates=2), strict=True):
        assert model.loss == same.loss
        for value, other in zip(model.cell.parameters(), same.cell.parameters(), strict=True):
            assert torch.equal(value, other)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nothing", "There is no cell 'nothing' in the zoo; expected one of rnn_tanh,"),
        ("scrn", "whose output is its first state"),
        ("lstm_projected", "all of whose values have hidden_size features, 32 here; those of lstm_projected have"),
    ],
)
def test_kinds_that_cannot_be_shown(kind, message):
    with pytest.raises(ValueError, match=message):
        train_models(kinds=["gru", kind], updates=0)
