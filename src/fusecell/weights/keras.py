"""Keras's layers: kernel (I, gates H), recurrent_kernel (H, gates H) and bias; GRU's gates are z, r, h.

A GRU with ``reset_after=True`` has two biases, (2, 3 H); other layers have one. RTNeural's files hold the same tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fusecell.weights.cell_weights import Array, CellWeights, DenseWeights, reordered

__all__ = ["cell_from_keras", "cell_to_keras", "from_keras", "is_keras"]

_BY_GATES = {1: "RNN", 3: "GRU", 4: "LSTM"}
_GRU = (1, 0, 2)
"""Keras's order of torch.nn's gates, and back."""
_RECURRENT = {"GRU": "GRU", "LSTM": "LSTM", "SimpleRNN": "RNN"}


def is_keras(source: Any) -> bool:
    """Whether a source is a layer or model of Keras."""
    return hasattr(source, "get_weights") and hasattr(source, "get_config")


def from_keras(layer: Any) -> Iterator[CellWeights | DenseWeights]:
    """Iterate over the weights in a layer or model, in the order of its layers.

    Warns:
        UserWarning: for what a layer does besides, which is no part of its weights.

    Raises:
        TypeError: for a layer with weights of another kind.
        ValueError: for one that computes with other activations.
    """
    yield from _from_keras(layer, in_bidirectional=False)


def _from_keras(layer: Any, *, in_bidirectional: bool) -> Iterator[CellWeights | DenseWeights]:
    kind = type(layer).__name__.removesuffix("Cell")
    if kind == "Bidirectional":
        mode = getattr(layer, "merge_mode", "concat")
        if mode != "concat":
            _warn(layer, f"combines its directions by merge_mode={mode!r}, and layers here concatenate them")
        yield from _from_keras(layer.forward_layer, in_bidirectional=True)
        yield from _from_keras(layer.backward_layer, in_bidirectional=True)
    elif kind in _RECURRENT:
        _check_activations(layer, _RECURRENT[kind])
        if getattr(layer, "go_backwards", False) and not in_bidirectional:
            _warn(layer, "goes backwards, as Recurrent(cell, reverse=True) does, which leaves outputs in input time")
        weights = cell_from_keras(layer.get_weights(), layer.name)
        if weights.kind == "RNN":
            activation = layer.activation.__name__
            weights = CellWeights(**{**vars(weights), "nonlinearity": activation})
        yield weights
    elif kind == "Dense":
        values = layer.get_weights()
        yield DenseWeights(values[0].T, values[1] if len(values) > 1 else None, layer.name)
    elif getattr(layer, "layers", None):
        for part in layer.layers:
            yield from _from_keras(part, in_bidirectional=False)
    elif kind == "RNN":
        for cell in getattr(layer.cell, "cells", [layer.cell]):
            yield from _from_keras(cell, in_bidirectional=in_bidirectional)
    elif layer.get_weights():
        raise TypeError(f"weights.load: Keras's {type(layer).__name__} {layer.name} has no counterpart here.")


def _warn(layer: Any, what: str) -> None:
    warnings.warn(f"weights.load: Keras's {layer.name} {what}. Its weights are copied all the same.", stacklevel=6)


def _check_activations(layer: Any, kind: str) -> None:
    expected = {"GRU": ("tanh", "sigmoid"), "LSTM": ("tanh", "sigmoid")}.get(kind)
    actual = [getattr(layer, name).__name__ for name in ("activation", "recurrent_activation") if hasattr(layer, name)]
    if expected is not None and tuple(actual) != expected:
        raise ValueError(f"weights.load: {layer.name} has the activations {', '.join(actual)}, not tanh and sigmoid.")


def cell_from_keras(values: Sequence[Any], name: str = "the source") -> CellWeights:
    """Return the weights of the tensors [kernel, recurrent_kernel, bias], the last of which may be left out."""
    arrays = [np.asarray(value) for value in values]
    if len(arrays) not in (2, 3) or arrays[0].ndim != 2 or arrays[1].ndim != 2:
        raise ValueError(
            f"weights.load: {name} is not [kernel, recurrent_kernel, bias], got {[each.shape for each in arrays]}."
        )
    kernel, recurrent = arrays[0].T, arrays[1].T
    gates = _BY_GATES.get(len(recurrent) // recurrent.shape[1])
    if gates is None:
        raise ValueError(f"weights.load: {name} has a recurrent kernel of {recurrent.T.shape}, of no known cell.")
    order = _GRU if gates == "GRU" else tuple(range(len(recurrent) // recurrent.shape[1]))
    bias = arrays[2] if len(arrays) == 3 else None
    reset_after = gates != "GRU" or bias is None or bias.ndim == 2
    biases = [bias, None] if bias is None or bias.ndim == 1 else [bias[0], bias[1]]
    weight_ih, weight_hh = (reordered(value, order) for value in (kernel, recurrent))
    bias_ih, bias_hh = (None if value is None else reordered(value, order) for value in biases)
    return CellWeights(gates, weight_ih, weight_hh, bias_ih, bias_hh, reset_after=reset_after, name=name)


def cell_to_keras(weights: CellWeights) -> list[Array]:
    """Return [kernel, recurrent_kernel, bias] for ``layer.set_weights``."""
    order = _GRU if weights.kind == "GRU" else tuple(range(len(weights.weight_hh) // weights.hidden_size))
    values = [reordered(value, order).T for value in (weights.weight_ih, weights.weight_hh)]
    if weights.bias_ih is None:
        return values
    biases = [reordered(value, order) for value in weights.biases()]
    if weights.kind == "GRU" and weights.reset_after:
        return [*values, np.stack(biases)]
    return [*values, biases[0] + biases[1]]
