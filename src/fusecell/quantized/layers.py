"""GRU, LSTM and RNN whose cells are quantized: torch.nn's arguments and layouts, the weights in the cells' buffers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from fusecell.drop_in import GRU, LSTM, RNN
from fusecell.execution.call_form import CellFactory
from fusecell.quantized.cell import QuantizedCell

__all__ = ["QuantizedGRU", "QuantizedLSTM", "QuantizedRNN", "quantized_layer"]


class _Quantized:
    """Base class of the three, before the drop-in's class in the order of method resolution."""

    bidirectional: bool
    cells: Sequence[QuantizedCell]  # an nn.ModuleList
    like: Tensor

    def leaf_cells(self) -> list[tuple[int, int, QuantizedCell]]:
        """Return the cells as (layer, direction, cell), bottom first."""
        directions = 2 if self.bidirectional else 1
        return [(index // directions, index % directions, cell) for index, cell in enumerate(self.cells)]

    def _weight(self, name: str) -> Tensor:
        """Return a tensor of the dtype and on the device of the weights, which is all that the layer reads of them."""
        return self.like

    def _cell_factory(self) -> CellFactory:
        """Return how to get the cell of a layer that has one; its weights are its own."""
        names = ("training", "input_size", "hidden_size", "bias", "proj_size")
        return CellFactory(lambda: self.cells[0], names, {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        module: Any = nn.Module
        module.__setstate__(self, state)  # torch.nn's own looks for the names of weights

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        module: Any = nn.Module
        return module._apply(self, fn, recurse)  # torch.nn's own looks for weights too

    def flatten_parameters(self) -> None:
        """Do nothing: it is for weights on a GPU."""

    def is_torchs(self) -> bool:
        """The cells have no equation of torch.nn's."""
        return False

    def extra_repr(self) -> str:
        text: str = super().extra_repr()  # type: ignore[misc]  # the layer's, after this class
        return f"{text}, weights={self.cells[0].format!r}"


class QuantizedGRU(_Quantized, GRU):  # type: ignore[misc]  # whose cells are another class's
    """A :class:`fusecell.GRU` whose weights are stored in 16 or 8 bits; :func:`fusecell.quantize` makes it."""


class QuantizedLSTM(_Quantized, LSTM):  # type: ignore[misc]  # as above
    """A :class:`fusecell.LSTM` whose weights are stored in 16 or 8 bits; :func:`fusecell.quantize` makes it."""


class QuantizedRNN(_Quantized, RNN):  # type: ignore[misc]  # as above
    """A :class:`fusecell.RNN` whose weights are stored in 16 or 8 bits; :func:`fusecell.quantize` makes it."""


_CLASSES: dict[type, type] = {GRU: QuantizedGRU, LSTM: QuantizedLSTM, RNN: QuantizedRNN}


def quantized_layer(layer: GRU | LSTM | RNN, weights: str, keep: list[Collection[str]]) -> nn.Module:
    """Return a layer with the arguments of another, whose cells are quantized.

    Arguments:
        keep: for each cell, the names of its weights that stay float32.

    Raises:
        TypeError: for a user's subclass.
    """
    kind: Any = _CLASSES.get(type_before_parametrizations(layer))
    if kind is None:
        raise TypeError(
            f"{type(layer).__name__} is a subclass of a fusecell layer, whose forward may read weights: quantize takes "
            f"{', '.join(each.__name__ for each in _CLASSES)} themselves, and any cell of yours in a Recurrent."
        )
    cells = [QuantizedCell(cell, weights, names) for (*_, cell), names in zip(layer.leaf_cells(), keep, strict=True)]
    quantized: Any = kind.__new__(kind)
    nn.Module.__init__(quantized)
    attributes = {name: value for name, value in vars(layer).items() if name not in vars(quantized)}
    vars(quantized).update(attributes)
    # torch.nn's lists of its weights, of which there are none.
    for name in ("_flat_weights", "_flat_weights_names", "_all_weights", "_flat_weight_refs"):
        vars(quantized)[name] = []
    quantized.cells = nn.ModuleList(cells)
    quantized.register_buffer("like", torch.zeros(0), persistent=False)
    layer_of_cells: nn.Module = quantized.eval()
    return layer_of_cells
