"""ONNX's own recurrent nodes, GRU, LSTM and RNN: which cells they compute, and the layouts of their weights.

ONNX orders the gates z, r, h and i, o, f, c where torch.nn has r, z, n and i, f, g, o; rows of one gate follow another.
https://onnx.ai/onnx/operators/onnx__GRU.html, onnx__LSTM.html, onnx__RNN.html.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fusecell.cell import Cell
from fusecell.cells import GRUCell, LSTMCell, RNNCell

__all__ = ["GATES", "attributes_of", "node_kind", "packed_weights", "reordered"]

Array = npt.NDArray[Any]

GATES: Mapping[str, Sequence[int]] = {"GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2), "RNN": (0,)}
"""By kind of node: for each gate in ONNX's order, its place in torch's."""


def node_kind(cell: Cell) -> str | None:
    """Return "GRU", "LSTM" or "RNN" for a cell that such a node computes."""
    if type(cell) is GRUCell and (cell.activation, cell.gate_activation) == ("tanh", "sigmoid"):
        return "GRU"
    if type(cell) is LSTMCell and cell.is_torchs() and not getattr(cell, "proj_size", 0):
        return "LSTM"
    return "RNN" if type(cell) is RNNCell and cell.is_torchs() else None


def attributes_of(kind: str, cells: Sequence[Cell]) -> dict[str, Any]:
    """Return the attributes of the node of one cell, or of one for each direction."""
    first: Any = cells[0]
    if kind == "GRU":
        return {"linear_before_reset": int(first.reset_after)}
    if kind == "RNN":
        return {"activations": ["Relu" if first.nonlinearity == "relu" else "Tanh"] * len(cells)}
    return {}


def reordered(weight: Array, order: Sequence[int]) -> Array:
    """Return rows gate by gate in another order."""
    gates = np.split(weight, len(order))
    return np.concatenate([gates[place] for place in order])


def packed_weights(kind: str, cells: Sequence[Cell]) -> tuple[Array, Array, Array]:
    """Return W (directions, gates * H, I), R (directions, gates * H, H) and B (directions, 2 * gates * H)."""
    order = GATES[kind]

    def of(cell: Any, name: str) -> Array:
        value = getattr(cell, name)
        if value is None:
            value = cell.weight_ih.new_zeros(len(cell.weight_ih))
        return reordered(value.detach().numpy(), order)

    w, r = (np.stack([of(cell, name) for cell in cells]) for name in ("weight_ih", "weight_hh"))
    b = np.stack([np.concatenate([of(cell, "bias_ih"), of(cell, "bias_hh")]) for cell in cells])
    return w, r, b
