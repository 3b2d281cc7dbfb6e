"""``weights.load`` and ``weights.dump``: weights from and for other frameworks, every tensor accounted for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fusecell.weights.cell_weights import CellWeights, DenseWeights, parts_of
from fusecell.weights.jax import TO_JAX, from_tree, is_equinox
from fusecell.weights.keras import cell_from_keras, cell_to_keras, from_keras, is_keras
from fusecell.weights.tflite import from_tflite

__all__ = ["FORMATS", "dump", "load"]

FORMATS = ("keras", "flax", "nnx", "equinox", "haiku", "rtneural")
"""What :func:`dump` writes: of Flax that of linen, and nnx."""


def load(module: nn.Module, source: Any) -> None:
    """Copy the weights of another framework's layers into a module.

    Example:
        >>> import fusecell as fc
        >>> trained = fc.GRU(3, 8)
        >>> tensors = fc.weights.dump(trained, "keras")  # as keras_layer.get_weights() returns them
        >>> [tensor.shape for tensor in tensors]
        [(3, 24), (8, 24), (2, 24)]
        >>> layer = fc.GRU(3, 8)
        >>> fc.weights.load(layer, tensors)
        >>> bool((layer.weight_hh_l0 == trained.weight_hh_l0).all())
        True

    Arguments:
        module: GRU, LSTM, RNN, their cells, ``Recurrent``, ``Bidirectional``, ``nn.Linear``, or a ``Sequential`` of
            these.
        source: a layer or model of Keras, or the tensors of one layer, ``[kernel, recurrent_kernel, bias]``; the
            parameters of Flax (linen or nnx), Equinox or Haiku, a cell's or a tree in which all cells are in their
            order; a file of RTNeural, ``.json``, or what is in one; a file of TensorFlow Lite, ``.tflite``. Or a list
            of these, one for each cell.

    Raises:
        ValueError: where a cell of the source is of another kind or size than its place in the module, the source has
            more cells or fewer, a tensor belongs to none, or the source computes something else: another order of the
            reset gate, other activations.
        TypeError: for a source or a module of another kind.
    """
    parts, weights = list(parts_of(module)), list(_read(source))
    if not any(isinstance(value, DenseWeights) for value in weights):
        parts = [part for part in parts if isinstance(part.read(), CellWeights)]
    kinds = [[type(value).__name__.removesuffix("Weights") for value in values] for values in (weights, _values(parts))]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"weights.load: the source has {_counted(kinds[0])} in this order, {type(module).__name__} "
            f"{_counted(kinds[1])}."
        )
    for part, value in zip(parts, weights, strict=True):
        part.check(value)
    for part, value in zip(parts, weights, strict=True):
        part.write(value)


def dump(module: nn.Module, format: str) -> Any:
    """Return a module's weights as another framework has them, in NumPy.

    Example:
        >>> import fusecell as fc
        >>> params = fc.weights.dump(fc.GRUCell(3, 8), "flax")
        >>> sorted(params), params["ir"]["kernel"].shape
        (['hn', 'hr', 'hz', 'in', 'ir', 'iz'], (3, 8))

    Arguments:
        module: as of :func:`load`.
        format: one of ``fusecell.weights.FORMATS``.

    Returns:
        For one cell its tensors: a list for Keras's ``set_weights``, a dict for the others; for several a list of
        these, in the order of layers, forward before backward. For RTNeural the contents of a file, to be written by
        ``json.dump``.

    Raises:
        ValueError: where the framework has no such cell, and for another format.
    """
    values = [part.read() for part in parts_of(module)]
    if format == "rtneural":
        return {"in_shape": [None, None, _input_size(values[0])], "layers": [_to_rtneural(value) for value in values]}
    writers = {"keras": cell_to_keras, **TO_JAX}
    if format not in writers:
        raise ValueError(f"weights.dump writes {', '.join(FORMATS)}, got {format!r}.")
    results = [writers[format](value) if isinstance(value, CellWeights) else _dense(value, format) for value in values]
    return results[0] if len(results) == 1 else results


def _values(parts: list[Any]) -> list[Any]:
    return [part.read() for part in parts]


def _counted(kinds: list[str]) -> str:
    return ", ".join(kinds).lower() or "nothing"


def _read(source: Any) -> Iterator[CellWeights | DenseWeights]:
    """Iterate over what is in a source of any kind."""
    if isinstance(source, str | os.PathLike):
        yield from _from_file(Path(source))
    elif is_keras(source):
        yield from from_keras(source)
    elif isinstance(source, Mapping) and isinstance(source.get("layers"), list):
        yield from _from_rtneural(source)
    elif isinstance(source, list | tuple) and source and all(np.ndim(value) for value in source if not _is_tree(value)):
        if any(_is_tree(value) for value in source):
            for value in source:
                yield from _read(value)
        else:
            yield cell_from_keras(source)
    elif _is_tree(source) and not isinstance(source, list | tuple):
        yield from from_tree(source)
    else:
        raise TypeError(
            "weights.load takes a layer of Keras, parameters of Flax, Equinox or Haiku, or a file of RTNeural or "
            f"TensorFlow Lite, got {type(source).__name__}."
        )


def _from_file(path: Path) -> Iterator[CellWeights | DenseWeights]:
    if path.suffix == ".tflite":
        yield from from_tflite(path)
    elif path.suffix == ".json":
        yield from _from_rtneural(json.loads(path.read_text(encoding="utf-8")))
    else:
        raise ValueError(
            f"weights.load reads files of RTNeural, .json, and of TensorFlow Lite, .tflite, got {path.name}; load it "
            "with its framework, and pass the layer or the parameters."
        )


def _is_tree(value: Any) -> bool:
    return (
        isinstance(value, Mapping | list | tuple)
        or is_keras(value)
        or is_equinox(value)
        or hasattr(value, "to_pure_dict")
    )


def _dense(weights: DenseWeights, format: str) -> Any:
    if format == "keras":
        return [weights.weight.T, *([] if weights.bias is None else [weights.bias])]
    names = ("w", "b") if format == "haiku" else ("weight", "bias") if format == "equinox" else ("kernel", "bias")
    value = weights.weight if format == "equinox" else weights.weight.T
    return {names[0]: value} if weights.bias is None else {names[0]: value, names[1]: weights.bias}


# RTNeural: the tensors of Keras as nested lists


def _from_rtneural(content: Mapping[str, Any]) -> Iterator[CellWeights | DenseWeights]:
    for place, layer in enumerate(content["layers"]):
        kind, name = layer.get("type"), f"layer {place} ({layer.get('type')})"
        tensors = [np.asarray(value, dtype=np.float32) for value in layer.get("weights", [])]
        if kind in ("gru", "lstm"):
            yield cell_from_keras(tensors, name)
        elif kind in ("dense", "time-distributed-dense"):
            if layer.get("activation"):
                raise ValueError(
                    f"weights.load: {name} has the activation {layer['activation']}; put it behind a Linear."
                )
            yield DenseWeights(tensors[0].T, tensors[1] if len(tensors) > 1 else None, name)
        elif tensors:
            raise ValueError(f"weights.load: {name} has no counterpart here; GRU, LSTM and dense layers are read.")


def _to_rtneural(weights: CellWeights | DenseWeights) -> dict[str, Any]:
    if isinstance(weights, DenseWeights):
        bias = np.zeros(len(weights.weight), np.float32) if weights.bias is None else weights.bias
        tensors, kind, size = [weights.weight.T, bias], "dense", len(weights.weight)
    elif weights.kind == "RNN" or not weights.reset_after:
        raise ValueError(f"{weights.name}: RTNeural has a GRU that resets after its product, and an LSTM.")
    else:
        tensors, kind, size = cell_to_keras(_with_biases(weights)), weights.kind.lower(), weights.hidden_size
    shape = [None, None, size]
    return {"type": kind, "activation": "", "shape": shape, "weights": [tensor.tolist() for tensor in tensors]}


def _with_biases(weights: CellWeights) -> CellWeights:
    bias_ih, bias_hh = weights.biases()
    return CellWeights(**{**vars(weights), "bias_ih": bias_ih, "bias_hh": bias_hh})


def _input_size(weights: CellWeights | DenseWeights) -> int:
    weight = weights.weight_ih if isinstance(weights, CellWeights) else weights.weight
    return int(weight.shape[1])
