"""Models of TensorFlow Lite, against what TensorFlow Lite computed with them (`scripts/tflite_models.py`)."""

from __future__ import annotations

import builtins
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fusecell as fc

FOLDER = Path(__file__).parent / "tflite_models"
X = np.random.default_rng(0).standard_normal((1, 7, 5)).astype(np.float32)


def first(kind, size, **options):
    return kind(5, size, batch_first=True, **options)


MODELS = {
    "lstm": lambda: fc.Sequential(first(fc.LSTM, 6), nn.Linear(6, 2)),
    "gru": lambda: fc.Sequential(first(fc.GRU, 6), fc.LSTM(6, 4, batch_first=True)),
    "gru_before": lambda: first(fc.GRU, 6, reset_after=False),
    "rnn": lambda: first(fc.RNN, 6, nonlinearity="relu"),
    "bidirectional": lambda: first(fc.GRU, 6, bidirectional=True),
    "gru_float16": lambda: first(fc.GRU, 6),
    "legacy_lstm": lambda: fc.Sequential(first(fc.LSTM, 6), nn.Linear(6, 2)),
    "legacy_bidirectional": lambda: first(fc.LSTM, 6, bidirectional=True),
}


def outputs(model):
    with torch.no_grad():
        result = model(torch.from_numpy(X))
    return (result[0] if isinstance(result, tuple) else result).numpy()


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_tensorflow_lite(name):
    model, expected = MODELS[name](), np.load(FOLDER / "outputs.npz")[name]
    fc.weights.load(model, FOLDER / f"{name}.tflite")
    assert outputs(model) == pytest.approx(expected, abs=1e-6)


def test_weights_of_eight_bits():
    """TensorFlow Lite rounds what these multiply to 8 bits as well: its outputs are no nearer than that."""
    model = fc.Sequential(first(fc.GRU, 48), nn.Linear(48, 32))
    fc.weights.load(model, str(FOLDER / "gru_int8.tflite"))
    assert outputs(model) == pytest.approx(np.load(FOLDER / "outputs.npz")["gru_int8"], abs=5e-3)
    levels = model[0].weight_hh_l0[0] / model[0].weight_hh_l0[0].abs().max() * 127
    assert (levels - levels.round()).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("odd", lambda: first(fc.LSTM, 6), "something else than a LSTM: other activations"),
        ("gru", lambda: first(fc.GRU, 6), "the source has cell, cell in this order, GRU cell"),
        ("gru_before", lambda: first(fc.GRU, 6), r"make the layer with reset_after=False"),
        ("lstm", lambda: fc.Sequential(first(fc.LSTM, 8), nn.Linear(8, 2)), "hidden_size=6"),
    ],
)
def test_what_does_not_fit_is_refused(name, model, message):
    with pytest.raises(ValueError, match=message):
        fc.weights.load(model(), FOLDER / f"{name}.tflite")


def test_a_file_of_another_kind(tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(b"no model at all, but long enough")
    with pytest.raises(ValueError, match="no model of TensorFlow Lite"):
        fc.weights.load(fc.GRU(5, 6), path)
    with pytest.raises(ValueError, match=r"\.json, and of TensorFlow Lite, \.tflite, got model\.h5"):
        fc.weights.load(fc.GRU(5, 6), tmp_path / "model.h5")


@pytest.mark.parametrize("name", ["gru", "legacy_lstm", "gru_int8"])
def test_damaged_files_are_refused_or_read(name, tmp_path):
    """Never another error, nor a loop without an end: what a byte more or less can do is a number or a ValueError."""
    content, rng = (FOLDER / f"{name}.tflite").read_bytes(), random.Random(0)
    path, refused = tmp_path / "damaged.tflite", 0
    for turn in range(150):
        changed = bytearray(content)
        if turn % 5 == 0:
            del changed[rng.randrange(len(changed)) :]
        for _ in range(rng.randrange(1, 8)):
            if changed:
                changed[rng.randrange(len(changed))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        path.write_bytes(changed)
        try:
            fc.weights.load(MODELS["gru" if name != "legacy_lstm" else name](), path)
        except ValueError:
            refused += 1
    assert refused > 20


def test_without_the_package(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "tflite":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ModuleNotFoundError, match="pip install tflite"):
        fc.weights.load(first(fc.GRU, 6), FOLDER / "gru.tflite")
