"""The weights of one cell as torch.nn has them, in NumPy: what other frameworks' are read into and written from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fusecell.cells import GRUCell, LSTMCell, RNNCell
from fusecell.drop_in import GRU, LSTM, RNN
from fusecell.layers import Bidirectional, Recurrent, Sequential

__all__ = ["GATES", "Array", "CellWeights", "DenseWeights", "parts_of", "reordered"]

Array = npt.NDArray[Any]
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
"""Gates of a kind of cell: torch.nn's are r, z, n and i, f, g, o."""


def reordered(value: Array, order: Sequence[int]) -> Array:
    """Return the blocks of the first dimension, one for each gate, in another order."""
    blocks = np.split(value, len(order))
    return np.concatenate([blocks[place] for place in order])


@dataclass(frozen=True)
class CellWeights:
    """The weights of one cell, and where they are from.

    Attributes:
        kind: ``"GRU"``, ``"LSTM"`` or ``"RNN"``.
        weight_ih, weight_hh: (gates H, I) and (gates H, H).
        bias_ih, bias_hh: (gates H,); None for zeros.
        reset_after: of a GRU, whether the reset gate acts after the product with W_hn.
        nonlinearity: of an RNN.
        name: of the layer or the tensors, for messages.
    """

    kind: str
    weight_ih: Array
    weight_hh: Array
    bias_ih: Array | None = None
    bias_hh: Array | None = None
    reset_after: bool = True
    nonlinearity: str = "tanh"
    name: str = "the source"

    def __post_init__(self) -> None:
        rows, size = self.weight_hh.shape
        if rows != GATES[self.kind] * size or self.weight_ih.shape[0] != rows:
            raise ValueError(
                f"{self.name}: a {self.kind} has weights of shapes ({GATES[self.kind]} H, I) and ({GATES[self.kind]} "
                f"H, H), got {self.weight_ih.shape} and {self.weight_hh.shape}."
            )
        for bias in (self.bias_ih, self.bias_hh):
            if bias is not None and bias.shape != (rows,):
                raise ValueError(f"{self.name}: a bias of shape ({rows},) is expected, got {bias.shape}.")

    @property
    def hidden_size(self) -> int:
        return int(self.weight_hh.shape[1])

    def biases(self) -> tuple[Array, Array]:
        """Return both biases, zeros for one that there is none of."""
        zeros = np.zeros(len(self.weight_hh), self.weight_hh.dtype)
        return (zeros if self.bias_ih is None else self.bias_ih), (zeros if self.bias_hh is None else self.bias_hh)


@dataclass(frozen=True)
class DenseWeights:
    """The weights of a linear layer: (outputs, inputs) and (outputs,)."""

    weight: Array
    bias: Array | None = None
    name: str = "the source"


class _CellPart:
    """One cell of a module: reads and writes its parameters.

    Arguments:
        owner: the module that has the parameters.
        suffix: behind their names, ``"_l0_reverse"``.
        options: the module that says what kind of cell it is.
    """

    def __init__(self, owner: Any, suffix: str, path: str) -> None:
        self._owner, self._suffix, self.path = owner, suffix, path
        self.kind = next(name for name, types in _KINDS.items() if isinstance(owner, types))
        if getattr(owner, "proj_size", 0):
            raise TypeError(f"{path} has proj_size={owner.proj_size}, which other frameworks' layers lack.")
        expected = {"GRU": "tanh", "LSTM": "tanh", "RNN": getattr(owner, "nonlinearity", None)}[self.kind]
        own = getattr(owner, "activation", None) or expected, getattr(owner, "gate_activation", "sigmoid")
        if own != (expected, "sigmoid"):
            raise TypeError(
                f"{path} has the activations {own[0]} and {own[1]}: only cells with torch.nn's are converted."
            )

    def _get(self, name: str) -> torch.Tensor | None:
        return getattr(self._owner, name + self._suffix, None)

    def read(self) -> CellWeights:
        values = [self._get(name) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        weight_ih, weight_hh, bias_ih, bias_hh = (
            None if value is None else value.detach().numpy().copy() for value in values
        )
        assert weight_ih is not None
        assert weight_hh is not None
        return CellWeights(self.kind, weight_ih, weight_hh, bias_ih, bias_hh, name=self.path, **self._options())

    def _options(self) -> dict[str, Any]:
        if self.kind == "GRU":
            return {"reset_after": bool(getattr(self._owner, "reset_after", True))}
        return {"nonlinearity": self._owner.nonlinearity} if self.kind == "RNN" else {}

    def check(self, weights: CellWeights) -> None:
        """Raise ValueError where weights are not those of a cell like this one."""
        own = self.read()
        if weights.kind != own.kind:
            raise ValueError(f"{weights.name} is a {weights.kind}, {self.path} a {own.kind}.")
        if weights.reset_after != own.reset_after:
            when = "after" if weights.reset_after else "before"
            raise ValueError(
                f"{weights.name} applies its reset gate {when} the product, {self.path} does not: make the layer with "
                f"reset_after={weights.reset_after}."
            )
        if weights.nonlinearity != own.nonlinearity:
            raise ValueError(f"{weights.name} computes {weights.nonlinearity}, {self.path} {own.nonlinearity}.")
        shapes = [(value.weight_ih.shape[1], value.hidden_size) for value in (weights, own)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{weights.name} has input_size={shapes[0][0]} and hidden_size={shapes[0][1]}, {self.path} "
                f"{shapes[1][0]} and {shapes[1][1]}."
            )
        if self._get("bias_ih") is None and any(bias.any() for bias in weights.biases()):
            raise ValueError(f"{weights.name} has biases, {self.path} has none: make the layer with bias=True.")

    def write(self, weights: CellWeights) -> None:
        values = dict(zip(("bias_ih", "bias_hh"), weights.biases(), strict=True))
        values |= {"weight_ih": weights.weight_ih, "weight_hh": weights.weight_hh}
        with torch.no_grad():
            for name, value in values.items():
                parameter = self._get(name)
                if parameter is not None:
                    parameter.copy_(torch.from_numpy(np.ascontiguousarray(value)))


class _LinearPart:
    """A linear layer of a module."""

    def __init__(self, owner: nn.Linear, path: str) -> None:
        self._owner, self.path = owner, path

    def read(self) -> DenseWeights:
        bias: torch.Tensor | None = self._owner.bias
        return DenseWeights(
            self._owner.weight.detach().numpy().copy(),
            None if bias is None else bias.detach().numpy().copy(),
            self.path,
        )

    def check(self, weights: DenseWeights) -> None:
        own = self.read()
        if weights.weight.shape != own.weight.shape:
            raise ValueError(
                f"{weights.name} has a weight of {weights.weight.shape}, {self.path} of {own.weight.shape}."
            )
        if own.bias is None and weights.bias is not None and weights.bias.any():
            raise ValueError(f"{weights.name} has a bias, {self.path} has none.")

    def write(self, weights: DenseWeights) -> None:
        with torch.no_grad():
            self._owner.weight.copy_(torch.from_numpy(np.ascontiguousarray(weights.weight)))
            if self._owner.bias is not None:
                self._owner.bias.zero_()
                if weights.bias is not None:
                    self._owner.bias.copy_(torch.from_numpy(np.ascontiguousarray(weights.bias)))


_KINDS: dict[str, Any] = {"GRU": (GRU, GRUCell), "LSTM": (LSTM, LSTMCell), "RNN": (RNN, RNNCell)}
Part = Any
"""A part of a module with weights: what has ``read``, ``check``, ``write`` and ``path``."""


def parts_of(module: nn.Module, path: str = "") -> Iterator[Part]:
    """Iterate over the cells and linear layers of a module, in the order in which they are applied.

    Raises:
        TypeError: for a module with weights of another kind.
    """
    here = path or type(module).__name__
    if isinstance(module, GRU | LSTM | RNN):
        for layer in range(module.num_layers):
            for suffix in ("", "_reverse") if module.bidirectional else ("",):
                yield _CellPart(module, f"_l{layer}{suffix}", f"{here}, layer {layer}{suffix.replace('_', ', ')}")
    elif isinstance(module, GRUCell | LSTMCell | RNNCell):
        yield _CellPart(module, "", here)
    elif isinstance(module, Recurrent):
        yield from parts_of(module.cell, f"{path}.cell" if path else "")
    elif isinstance(module, Bidirectional):
        yield from parts_of(module.forward_layer, f"{here}.forward_layer")
        yield from parts_of(module.backward_layer, f"{here}.backward_layer")
    elif isinstance(module, Sequential | nn.Sequential):
        for name, part in module.named_children():
            yield from parts_of(part, f"{path}.{name}" if path else name)
    elif isinstance(module, nn.Linear):
        yield _LinearPart(module, here)
    elif any(True for _ in module.parameters()):
        raise TypeError(
            f"{here} is a {type(module).__name__}: weights are converted of GRU, LSTM, RNN, their cells, Recurrent, "
            "Bidirectional, nn.Linear and Sequential."
        )
