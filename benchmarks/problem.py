"""The problem that every contestant solves: weights, an input, and the answer in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fusecell as fc
from benchmarks.shapes import Mode, Shape

__all__ = ["Array", "Call", "Problem", "make_problem"]

Array = np.ndarray
Call = Callable[[], object]
_LAYERS = {"gru": fc.GRU, "lstm": fc.LSTM, "rnn_tanh": fc.RNN}


@dataclass(frozen=True)
class Problem:
    """A layer or cell in float32, its arguments, and the expected result.

    Arguments:
        shape: the sizes.
        mode: what is computed.
        layer: our drop-in where torch.nn has the layer, else ``Recurrent`` of a cell in ``CELLS``; in a step mode, a
            cell.
        inputs: float32: x (T, N, I); in a step mode x (N, I) and the state (N, H).
        weight: float32, like the outputs; random factors in the loss ``(y * weight).sum()``, for a dense gradient.
        answer: computed by a Python loop over the step in float64: the outputs as "y", or the gradients of the loss by
            their parameters' names.
    """

    shape: Shape
    mode: Mode
    layer: nn.Module
    inputs: tuple[Tensor, ...]
    weight: Tensor
    answer: Mapping[str, Array]

    @property
    def in_torch(self) -> bool:
        """Whether torch.nn has this layer."""
        return self.shape.cell in _LAYERS

    @property
    def names(self) -> tuple[str, ...]:
        """Names of what a call returns: "y", or the parameters whose gradients it returns."""
        return tuple(_parameters(self.layer)) if self.mode.training else ("y",)

    def weights(self) -> dict[str, Array]:
        """Return the parameters as arrays, by name."""
        return {name: value.detach().numpy() for name, value in _parameters(self.layer).items()}

    def call(self, layer: nn.Module) -> Call:
        """Return a call of ``layer`` and, in training, of its backward; its parameters are named as ours are."""
        inputs, weight = self.inputs, self.weight
        if not self.mode.training:
            return lambda: layer(*inputs)
        parameters = list(layer.parameters())

        def call() -> tuple[Tensor, ...]:
            loss = (_outputs(layer(*inputs)) * weight).sum()
            return torch.autograd.grad(loss, parameters)

        return call

    def arrays(self, returned: object) -> dict[str, Array]:
        """Return the result of such a call as arrays, by name."""
        if self.mode is Mode.STREAM and not isinstance(returned, tuple):  # a step's output, (1, H)
            value: Any = returned
            return {"y": np.array(value.detach() if isinstance(value, Tensor) else value)[None]}
        values: Any = returned if self.mode.training else (_outputs(returned),)
        return {name: value.detach().numpy() for name, value in zip(self.names, values, strict=True)}


def make_problem(shape: Shape, mode: Mode) -> Problem:
    """Make a problem with initial weights and normally distributed inputs, the same in every run."""
    torch.manual_seed(0)
    member = next(member for member in fc.CELLS if member.name == shape.cell)
    if mode.single:
        layer: nn.Module = member.make(shape.inputs, shape.hidden)
        sizes: list[tuple[int, ...]] = [(shape.batch, shape.inputs), (shape.batch, shape.hidden)]
    else:
        kind = _LAYERS.get(shape.cell)
        layer = kind(shape.inputs, shape.hidden) if kind else fc.Recurrent(member.make(shape.inputs, shape.hidden))
        sizes = [(shape.steps, shape.batch, shape.inputs)]
    inputs = tuple(torch.randn(size) for size in sizes)
    weight = torch.randn(*sizes[0][:-1], shape.hidden)
    layer.train(mode.training)
    # The reference: the same weights, the definition of the step, and twice the digits.
    exact = copy.deepcopy(layer).double()
    definition = Problem(shape, mode, exact, tuple(value.double() for value in inputs), weight.double(), {})
    with fc.runner("eager"):
        answer = definition.arrays(definition.call(exact)())
    return Problem(shape, mode, layer, inputs, weight, answer)


def _parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by the names they have in a cell: without ``_l0`` and without ``cell.``."""
    return {name.removesuffix("_l0").removeprefix("cell."): value for name, value in layer.named_parameters()}


def _outputs(returned: Any) -> Tensor:
    """Return y of a layer's (y, state), or the (first) state that a cell returns."""
    outputs: Tensor = returned if isinstance(returned, Tensor) else returned[0]
    return outputs
