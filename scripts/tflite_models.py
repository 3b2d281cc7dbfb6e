"""Write the models that tests/weights/test_tflite.py reads: ``python scripts/tflite_models.py``.

Needs ``pip install tensorflow tf_keras``. Each is a Keras model converted by TensorFlow's own converter; beside them
is what TensorFlow Lite computes with each for the same numbers. They were written by TensorFlow 2.21.0, Keras 3.15.1.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow
import tf_keras

FOLDER = Path(__file__).parent.parent / "tests" / "weights" / "tflite_models"
X = np.random.default_rng(0).standard_normal((1, 7, 5)).astype(np.float32)
SEQUENCE: dict[str, Any] = {"return_sequences": True, "bias_initializer": "uniform"}


def models() -> dict[str, Callable[[], list[Any]]]:
    """Return a function that makes the layers of each model, by the model's name."""
    new, old = keras.layers, tf_keras.layers
    return {
        "lstm": lambda: [new.LSTM(6, **SEQUENCE), new.Dense(2, bias_initializer="uniform")],
        "gru": lambda: [new.GRU(6, **SEQUENCE), new.LSTM(4, **SEQUENCE)],
        "gru_before": lambda: [new.GRU(6, reset_after=False, **SEQUENCE)],
        "rnn": lambda: [new.SimpleRNN(6, activation="relu", **SEQUENCE)],
        "bidirectional": lambda: [new.Bidirectional(new.GRU(6, **SEQUENCE))],
        "gru_float16": lambda: [new.GRU(6, **SEQUENCE)],
        "gru_int8": lambda: [new.GRU(48, **SEQUENCE), new.Dense(32, bias_initializer="uniform")],
        "odd": lambda: [new.LSTM(6, activation="relu", return_sequences=True)],
        "legacy_lstm": lambda: [old.LSTM(6, **SEQUENCE), old.Dense(2, bias_initializer="uniform")],
        "legacy_bidirectional": lambda: [old.Bidirectional(old.LSTM(6, **SEQUENCE))],
    }


def convert(name: str, layers: list[Any]) -> bytes:
    """Convert a model; its name says in which format its weights are."""
    maker = tf_keras if name.startswith("legacy") else keras
    model = maker.Sequential([maker.layers.Input(X.shape[1:], batch_size=1), *layers])
    converter = tensorflow.lite.TFLiteConverter.from_keras_model(model)
    if name.endswith(("int8", "float16")):
        converter.optimizations = [tensorflow.lite.Optimize.DEFAULT]
    if name.endswith("float16"):
        converter.target_spec.supported_types = [tensorflow.float16]
    return bytes(converter.convert())


def main() -> None:
    """Write all of them."""
    outputs = {}
    FOLDER.mkdir(exist_ok=True)
    for name, make in models().items():
        content = convert(name, make())
        (FOLDER / f"{name}.tflite").write_bytes(content)
        interpreter = tensorflow.lite.Interpreter(model_content=content)
        interpreter.allocate_tensors()
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], X)
        interpreter.invoke()
        outputs[name] = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    np.savez_compressed(FOLDER / "outputs.npz", **outputs)


if __name__ == "__main__":
    main()
