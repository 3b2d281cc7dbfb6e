"""Layers of ONNX's recurrent nodes: torch.nn's where these compute the same, else cells of the node's own equation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fusecell.cells import GRUCell, LSTMCell, RNNCell
from fusecell.drop_in import GRU, LSTM, RNN
from fusecell.layers import Bidirectional, Recurrent
from fusecell.onnx.node_cells import NODE_CELLS, Activation, NodeCell, activations_of
from fusecell.onnx.recurrent_nodes import GATES, reordered

__all__ = ["NodeWeights", "RecurrentLayer", "UnknownActivations", "layer_of_node"]

RecurrentLayer = GRU | LSTM | RNN | Recurrent | Bidirectional
_LAYERS: Mapping[str, Any] = {"GRU": GRU, "LSTM": LSTM, "RNN": RNN}
_CELLS: Mapping[str, Any] = {"GRU": GRUCell, "LSTM": LSTMCell, "RNN": RNNCell}
_ACTIVATIONS = {"GRU": ["sigmoid", "tanh"], "LSTM": ["sigmoid", "tanh", "tanh"], "RNN": ["tanh"]}
_FLAGS = {"GRU": "linear_before_reset", "LSTM": "input_forget"}


class UnknownActivations(ValueError):
    """A node's activations are too few, too many, or none of ONNX's; the text says which."""


class NodeWeights(NamedTuple):
    """The constants of a node, of one direction or of two.

    Arguments:
        w, r, b: as ONNX has them, (directions, ...); b is None where the node has no biases.
        peepholes: P of an LSTM, None where it has none.
    """

    w: npt.NDArray[Any]
    r: npt.NDArray[Any]
    b: npt.NDArray[Any] | None
    peepholes: npt.NDArray[Any] | None

    @property
    def dtype(self) -> torch.dtype:
        return torch.from_numpy(self.w).dtype

    def of_direction(self, at: int) -> dict[str, npt.NDArray[Any]]:
        """Return what a direction has, by the names of a cell's parameters."""
        values = {"weight_ih": self.w[at], "weight_hh": self.r[at]}
        if self.b is not None:
            values["bias_ih"], values["bias_hh"] = np.split(self.b[at], 2)
        return values


def layer_of_node(kind: str, attributes: Mapping[str, Any], weights: NodeWeights) -> RecurrentLayer:
    """Return a layer that computes a node.

    Arguments:
        kind: "GRU", "LSTM" or "RNN".
        attributes: of the node, in Python's types.

    Raises:
        UnknownActivations: for activations that ONNX doesn't have.
    """
    directions = _activations(kind, attributes, len(weights.w))
    options = _torchs_options(kind, attributes, directions)
    reverse = attributes.get("direction") == "reverse"
    if options is not None and weights.peepholes is None:
        if reverse:
            return Recurrent(_weighted(_CELLS[kind], kind, weights, options, ("",)), reverse=True)
        options["bidirectional"] = len(directions) == 2
        layer: RecurrentLayer = _weighted(_LAYERS[kind], kind, weights, options, ("_l0", "_l0_reverse"))
        return layer
    layers = [
        Recurrent(_node_cell(kind, attributes, weights, at, each), reverse=reverse)
        for at, each in enumerate(directions)
    ]
    return layers[0] if len(layers) == 1 else Bidirectional(*layers)


def _activations(kind: str, attributes: Mapping[str, Any], directions: int) -> list[list[Activation]]:
    """Return the activations of each direction; ONNX Runtime takes their names in lower case, too."""
    count = len(_ACTIVATIONS[kind])
    names = [str(each) for each in attributes.get("activations", [])] or _ACTIVATIONS[kind] * directions
    if len(names) != count * directions:
        raise UnknownActivations(f"the activations {', '.join(names)}, expected {count} for each direction")
    numbers = [[float(each) for each in attributes.get(f"activation_{letter}", [])] for letter in ("alpha", "beta")]
    try:
        activations = activations_of(names, *numbers)
    except ValueError as error:
        raise UnknownActivations(str(error)) from error
    return [activations[start : start + count] for start in range(0, len(names), count)]


def _torchs_options(
    kind: str, attributes: Mapping[str, Any], directions: Sequence[Sequence[Activation]]
) -> dict[str, Any] | None:
    """Return the arguments of the layer of a node's name that computes the same; None if it can't."""
    if attributes.get("clip") or attributes.get("input_forget"):
        return None
    names = [[each.name for each in direction] for direction in directions]
    if kind == "RNN" and all(each == ["relu"] for each in names):
        return {"nonlinearity": "relu"}
    if any(each != _ACTIVATIONS[kind] for each in names):
        return None
    return {"reset_after": False} if kind == "GRU" and not attributes.get("linear_before_reset", 0) else {}


def _weighted(make: Any, kind: str, weights: NodeWeights, options: Mapping[str, Any], suffixes: Sequence[str]) -> Any:
    """Make a layer or a cell with torch's names and order of gates, and copy a node's weights.

    Arguments:
        suffixes: of the names of its weights, for each direction.
    """
    sizes = weights.w.shape[-1], weights.r.shape[-1]
    module = make(*sizes, bias=weights.b is not None, dtype=weights.dtype, **options)
    order = [int(place) for place in np.argsort(GATES[kind])]
    with torch.no_grad():
        for at, suffix in enumerate(suffixes[: len(weights.w)]):
            for name, value in weights.of_direction(at).items():
                getattr(module, name + suffix).copy_(torch.from_numpy(reordered(value, order)))
    return module


def _node_cell(
    kind: str, attributes: Mapping[str, Any], weights: NodeWeights, at: int, activations: Sequence[Activation]
) -> NodeCell:
    """Return a cell that computes one direction of a node, with its weights."""
    flags = {_FLAGS[kind]: bool(attributes.get(_FLAGS[kind], 0))} if kind in _FLAGS else {}
    sizes, clip = (weights.w.shape[-1], weights.r.shape[-1]), attributes.get("clip") or None
    cell = NODE_CELLS[kind](*sizes, activations, clip, weights.dtype, flags)
    values = weights.of_direction(at)
    if weights.peepholes is not None:
        values["peepholes"] = weights.peepholes[at]
    with torch.no_grad():
        for name, value in values.items():
            cell.get_parameter(name).copy_(torch.from_numpy(np.ascontiguousarray(value)))
    return cell
