"""``TangentStep``: a cell with a tangent beside each of its states, compiled as any other.

torch's tangents of a few operations have no gradients of their own, or wrong ones: norms are spelled out here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fusecell.attribute_paths import getter
from fusecell.cell import Cell
from fusecell.compiler.programs.rebind import rebound
from fusecell.execution.options import State
from fusecell.shapes import Shape, packed
from fusecell.torch_transforms import sharing_dual_level

__all__ = ["TangentStep"]

_TANGENT = "_tangent"


def _layer_norm(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    dims = list(range(-len(shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    result = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    result = result if weight is None else result * weight
    return result if bias is None else result + bias


def _group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    parts = x.reshape(x.shape[0], groups, -1)
    result = _layer_norm(parts, parts.shape[-1:], eps=eps).reshape(x.shape)
    sizes = (-1, *[1] * (x.dim() - 2))
    result = result if weight is None else result * weight.reshape(sizes)
    return result if bias is None else result + bias.reshape(sizes)


class _SpelledOut(TorchFunctionMode):
    """Function mode in which norms are computed by operations whose tangents have gradients."""

    functions: ClassVar[Mapping[Any, Callable[..., Tensor]]] = {
        torch.layer_norm: _layer_norm,
        torch.nn.functional.layer_norm: _layer_norm,
        torch.group_norm: _group_norm,
        torch.nn.functional.group_norm: _group_norm,
    }

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        function: Callable[..., Any] = self.functions.get(func, func)
        return function(*args, **(kwargs or {}))


class TangentStep(Cell):
    r"""A cell with a tangent beside each of its states: its output is the tangent of the cell's.

    .. math:: (\dot y, \dot s') = \frac{\partial\,\mathrm{step}}{\partial (x, s, W)} \cdot (\dot x, \dot s, \dot W)

    Arguments:
        cell: the cell.
        output: the shape of a row of its output.
        of_inputs: whether inputs have tangents, which are inputs behind them.
        directions: the tangent of each weight that has one, by the weight's path.
        with_value: the outputs are two, ``"value"``, the cell's own, and ``"tangent"``.
    """

    outputs = ("value", "tangent")

    def __init__(
        self,
        cell: Cell,
        output: Shape,
        of_inputs: bool,
        directions: Mapping[str, Tensor],
        with_value: bool = False,
    ) -> None:
        super().__init__(cell.input_size, cell.hidden_size)
        self.cell = cell
        self.of_inputs = of_inputs
        names = {
            "inputs": (*cell.inputs, *(name + _TANGENT for name in cell.inputs * of_inputs)),
            "states": (*cell.states, *(name + _TANGENT for name in cell.states)),
        }
        self.__dict__.update(names)
        self.state_sizes = (*cell.state_sizes, *cell.state_sizes)
        self.output_size = dict.fromkeys(self.outputs, output) if with_value else output
        self.with_value, self.output = with_value, output
        self.paths = tuple(directions)
        # Attributes, not a list of them: kernels take these as they are.
        for path, value in directions.items():
            setattr(self, self.direction_path(path), value)

    def direction_path(self, path: str) -> str:
        """Return where the tangent of a weight is, by the weight's path."""
        return f"direction_{self.paths.index(path)}"

    @property
    def directions(self) -> list[Tensor]:
        """The tangent of each weight that has one, in the order of ``paths``."""
        return [getattr(self, self.direction_path(path)) for path in self.paths]

    def apart(self) -> TangentStep:
        """Return a cell, on plain tensors, none of whose tangents shares its memory with a weight or another tangent.

        The gradient of a tensor that is there twice would be the sum of both.
        """
        seen = {value.untyped_storage().data_ptr() for value in map(self._weight, self.paths)}
        copies = {}
        for path, value in zip(self.paths, self.directions, strict=True):
            place = value.untyped_storage().data_ptr()
            if place in seen:
                copies[self.direction_path(path)] = value.detach().clone().requires_grad_(value.requires_grad)
            seen.add(place)
        if not copies:
            return self
        result = rebound(self, copies, ())
        assert isinstance(result, TangentStep)
        return result

    def _weight(self, path: str) -> Tensor:
        value: Tensor = getter(path)(self.cell)
        return value

    def halves(self, output: Tensor, leading: int) -> tuple[Tensor, Tensor]:
        """Split what kernels return as one output, behind some dimensions: the cell's own output, and its tangent."""
        both = output.reshape(*output.shape[:leading], 2, *self.output)
        return both.select(leading, 0), both.select(leading, 1)

    def rates_of(self, output: Tensor) -> Tensor:
        """Return the tangents of an output (T, N, ...) of kernels."""
        return self.halves(output, 2)[1] if self.with_value else output

    def step(self, x: Any, state: State) -> tuple[Any, State]:
        inputs = x if len(self.inputs) > 1 else (x,)
        count, states = len(self.cell.inputs), len(self.cell.states)
        primal, moving = inputs[:count], inputs[count:]
        weights = tuple(getter(path)(self.cell) for path in self.paths)

        def results(*values: Tensor) -> State:
            cell = rebound(self.cell, dict(zip(self.paths, values[states + len(moving) :], strict=True)), ())
            of_x = values[states : states + len(moving)] or primal
            output, after = cell.step(of_x if count > 1 else of_x[0], values[:states])
            return packed(output, 1), *after

        primals = (*state[:states], *(primal if moving else ()), *weights)
        tangents = (*state[states:], *moving, *self.directions)
        with warnings.catch_warnings(), _SpelledOut(), sharing_dual_level():
            for kind in (DeprecationWarning, FutureWarning):  # torch's own, of its first use
                warnings.simplefilter("ignore", kind)
            pair: Any = torch.func.jvp(results, primals, tangents)
        values, rates = pair
        output = dict(zip(self.outputs, (values[0], rates[0]), strict=True)) if self.with_value else rates[0]
        return output, (*values[1:], *rates[1:])
