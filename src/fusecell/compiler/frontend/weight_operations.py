"""Calls of a step on weights alone: steps of the weight prologue, and what of them the graph has to compute."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fusecell.compiler.frontend.aten_arguments import mapped, tensors_in
from fusecell.compiler.frontend.prologue_recorder import weight_views
from fusecell.compiler.frontend.rules.movement import CONSTANTS, KEEPS, MOVES, as_stored
from fusecell.compiler.frontend.tensor_values import TensorValues
from fusecell.compiler.frontend.traced_values import Complex, Row, Untraceable, Value, Weight
from fusecell.compiler.frontend.weight_prologue import Ref

__all__ = ["WeightOperations"]

_FILLING = ("cat", "stack", "constant_pad_nd", "tril", "triu", "diag_embed")
"""Moves whose results hold more than the elements of one argument: zeros, or elements of several."""


class WeightOperations(TensorValues):
    """The values of calls on weights alone; the arguments are those of `TensorValues`."""

    @cached_property
    def _resolved(self) -> set[int]:
        """Copies that torch makes of conjugates where an operation has no rule for them, below autograd."""
        return set()

    def _of_weights(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        values: list[Any],
        options: dict[str, Any],
        results: Sequence[Tensor],
        operands: list[Value],
    ) -> Sequence[Value | None] | None:
        """Record a call on weights alone as a step of the prologue; return None where the graph has to compute it."""
        if any(self.writer.rows in result.shape for result in results) or self._is_repeated_for_rows(name, values):
            return None  # spread over rows
        fill = _fill(name, values, operands)
        fill = None if fill is None else as_stored(fill, results[0].dtype)
        if name == "_efficientzerotensor":  # which has no memory that a kernel could read
            func, name = torch.ops.aten.zeros.default, "zeros"
        # The backward runs after the prologue: what it computes on weights can only be part of the graph.
        if self.backward and fill is None and not _is_view(name):
            return None
        if name == "lift_fresh" and fill is not None:
            number = torch.ops.aten.scalar_tensor.default
            weights = self.weights.record(number, "number", [fill], {"dtype": results[0].dtype}, results)
            return [Weight((), weights[0].slot, weights[0].view, fill)]
        if name == "clone" and _is_flagged_with_gradient(args[0]):
            self._resolved.add(id(results[0]))
            # The gradient of such a copy arrives at what is copied; the parts of a conjugate are resolved themselves.
            if args[0].is_complex():
                return [operands[0]]
        tensors = iter(tensors_in(args))
        refs = mapped(values, lambda value: self._ref(value, next(tensors)), name, Weight)
        weights = self.weights.record(func, name, refs, mapped(options, self._ref_plain, name, Weight), results)
        if fill is not None:
            return [Weight(weight.shape, weight.slot, weight.view, fill) for weight in weights]
        # The gradient of what is repeated is added up, which the prologue's own backward does.
        is_repeated = name == "expand" and args[0].requires_grad and results[0].numel() > args[0].numel()
        if len(operands) == 1 and isinstance(values[0], Weight) and (self.backward or not is_repeated):
            return weight_views(func, name, values[0], values[1:], weights)
        return weights

    def _is_repeated_for_rows(self, name: str, values: Sequence[Any]) -> bool:
        """Whether a value that is the same for all rows is repeated once for each: ``weight.repeat(N)``."""
        return name == "repeat" and list(values[1]) == [self.writer.rows] and not self._is_of_rows(values[0])

    def _is_of_rows(self, value: Value) -> bool:
        """Whether a value, or its real part, differs from row to row."""
        row = value.real if isinstance(value, Complex) else value
        return isinstance(row, Row) and row.axis is not None and self.builder.nodes[row.node].op != "const"

    def _ref(self, value: Weight, tensor: Tensor) -> Ref:
        if not self.backward and not self.is_in_prologue(tensor):
            name = tensor.grad_fn._forward_cls.__name__  # type: ignore[union-attr]  # a Function's node
            raise Untraceable(
                f"The step computes with a weight that {name}, a custom Function, has made together with rows: the "
                "gradient would not go back through it."
            )
        has_gradient = tensor.requires_grad or id(tensor) in self._resolved
        return Ref(value.slot, self.weights.slots[value.slot].differentiable and not has_gradient)

    def _ref_of(self, tensor: Tensor) -> Ref:
        """Return the reference to a tensor whose value is a weight."""
        value = self.value(tensor)
        assert isinstance(value, Weight)
        return self._ref(value, tensor)

    def _ref_plain(self, value: Weight) -> Ref:
        return Ref(value.slot)


def _is_flagged_with_gradient(tensor: Tensor) -> bool:
    return (tensor.is_conj() or tensor.is_neg()) and tensor.requires_grad and torch.is_grad_enabled()


def _fill(name: str, values: list[Any], operands: list[Value]) -> float | None:
    """Return the number that a factory fills with, or that a view or copy of its result is filled with."""
    if name in CONSTANTS:
        value = CONSTANTS[name]
        argument = values[0] if name == "scalar_tensor" else values[-1] if values else None
        if value is not None:
            return value
        return float(argument) if isinstance(argument, int | float) else None
    if len(operands) == 1 and isinstance(operands[0], Weight) and (_is_view(name) or name in ("clone", "_to_copy")):
        return operands[0].fill
    return None


def _is_view(name: str) -> bool:
    fills_in = name.endswith("backward") or name in _FILLING
    return (name in MOVES and not fills_in) or name in KEEPS
