"""What every contestant computes: one set of weights, one input, and the answer in float64."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch

import fusecell as fc
from benchmarks.shapes import Shape

__all__ = ["Array", "Problem", "make_problem"]

Array = np.ndarray
_LAYERS = {"gru": fc.GRU, "lstm": fc.LSTM, "rnn_tanh": fc.RNN}


@dataclass(frozen=True)
class Problem:
    """A layer in float32, its input (T, N, I) and its outputs (T, N, H) in float64.

    Arguments:
        shape: the sizes.
        layer: our drop-in where torch.nn has the layer, else ``Recurrent`` of a zoo cell.
        input: float32.
        answer: of the step's own definition, looped over in Python and computed in float64.
    """

    shape: Shape
    layer: torch.nn.Module
    input: torch.Tensor
    answer: Array

    @property
    def in_torch(self) -> bool:
        """Whether torch.nn has this layer."""
        return self.shape.cell in _LAYERS

    def weights(self) -> dict[str, Array]:
        """The parameters by name, a drop-in's without the layer's number."""
        return {name.removesuffix("_l0"): value.numpy() for name, value in self.layer.state_dict().items()}


def make_problem(shape: Shape) -> Problem:
    """Draw weights as the layer does and a normal input, the same for every run."""
    torch.manual_seed(0)
    if shape.cell in _LAYERS:
        layer: torch.nn.Module = _LAYERS[shape.cell](shape.inputs, shape.hidden)
    else:
        member = next(member for member in fc.CELLS if member.name == shape.cell)
        layer = fc.Recurrent(member.make(shape.inputs, shape.hidden))
    layer.eval()
    x = torch.randn(shape.steps, shape.batch, shape.inputs)
    with torch.inference_mode(), fc.runner("eager"):
        answer = copy.deepcopy(layer).double()(x.double())[0].numpy()
    return Problem(shape, layer, x, answer)
