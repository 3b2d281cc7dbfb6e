"""How large the integers of a step may become, so that a kernel, which has them as floating-point numbers, is exact.

A bound is a list: of what a value is at most where no integer of the inputs is larger than the size at that place of
`_SIZES`. From it follows the largest input with which all integers that the step computes are numbers of the kernel's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fusecell.compiler.frontend.aten_arguments import Key, key_of, tensors_in
from fusecell.compiler.frontend.traced_values import Untraceable

__all__ = ["INTEGERS", "NARROW_INTEGERS", "WholeNumbers"]

NARROW_INTEGERS = (torch.uint8, torch.int8, torch.int16)
INTEGERS = (torch.int64, torch.int32, *NARROW_INTEGERS)
Bound = npt.NDArray[np.float64]
_SIZES: Bound = np.unique(np.floor(2.0 ** (np.arange(53 * 16 + 1) / 16)))
_OF_FLOATS = 4096.0
"""What a floating-point number that is made an integer is taken to be at most: a position, or a count."""
_LARGEST_EXPONENT = 1074.0
_LIMITS = {torch.float64: 2**53}
_OTHER_LIMIT = 2**24


def _largest(operands: Sequence[Bound]) -> Bound:
    bound: Bound = np.maximum.reduce(operands)
    return bound


def _of_bits(operands: Sequence[Bound]) -> Bound:
    """Return the bound of numbers made of the bits of others."""
    return 2 * _largest(operands) + 1


# From the bounds of an operation's arguments, numbers included, to that of its result.
_RULES: Mapping[str, Callable[[Sequence[Bound]], Bound]] = {
    "mul": np.multiply.reduce,
    "square": lambda operands: operands[0] ** 2,
    "pow": lambda operands: operands[0] ** operands[1],
    "remainder": lambda operands: operands[1],
    "fmod": lambda operands: np.minimum(operands[0], operands[1]),
    "gcd": _largest,
    "lcm": np.multiply.reduce,
    "frexp": lambda operands: _constant(_LARGEST_EXPONENT),
    "div": lambda operands: operands[0],
    "floor_divide": lambda operands: operands[0],
    "bitwise_or": _of_bits,
    "bitwise_xor": _of_bits,
    "bitwise_not": _of_bits,
    "__lshift__": lambda operands: operands[0] * 2 ** operands[1],
    "bitwise_left_shift": lambda operands: operands[0] * 2 ** operands[1],
    "__rshift__": lambda operands: operands[0],
    "bitwise_right_shift": lambda operands: operands[0],
    **dict.fromkeys(("where", "maximum", "minimum", "cat", "stack", "index_put", "scatter", "gather"), _largest),
    **dict.fromkeys(("index", "index_select", "select", "slice", "embedding"), lambda operands: operands[0]),
}
_ELEMENTS = ("argmax", "argmin", "argsort", "sort", "topk", "max", "min", "searchsorted", "bucketize", "count_nonzero")
_SUMS = ("sum", "cumsum")
_ADDING = ("scatter_add", "index_add", "scatter_reduce")


class WholeNumbers:
    """The bounds of the integers of a step.

    Arguments:
        dtype: what the kernel computes in.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._limit = _LIMITS.get(dtype, _OTHER_LIMIT)
        self._dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._bounds: dict[Key, Bound] = {}
        self._fits = np.ones(len(_SIZES), dtype=bool)

    @property
    def largest_input(self) -> int | None:
        """The largest integer that an input may have; None for all that the kernel's dtype has."""
        fitting = _SIZES[self._fits & (self._limit >= _SIZES)]
        return None if self._fits[self._limit >= _SIZES].all() else int(fitting.max())

    def take_input(self, tensor: Tensor) -> None:
        """Note that a tensor holds integers of an input."""
        self._bounds[key_of(tensor)] = np.minimum(_SIZES, float(torch.iinfo(tensor.dtype).max) + 1)

    def note(self, name: str, args: Sequence[Any], alpha: float, result: Tensor) -> None:
        """Note an operation of rows whose result is integers.

        Arguments:
            alpha: what the second argument of a sum is multiplied by.

        Raises:
            Untraceable: where these may be too large, whatever the inputs.
        """
        bound = self._bound_of(name, args, result) * max(1.0, abs(alpha))
        largest = float(torch.iinfo(result.dtype).max)
        # Those of 8 and 16 bits wrap around in a kernel too, where they are exact; those of 32 and 64 bits do not.
        wraps = result.dtype in NARROW_INTEGERS
        self._bounds[key_of(result)] = np.minimum(bound, largest + 1) if wraps else bound
        self._fits &= bound <= (self._limit if wraps else min(self._limit, largest))
        if not self._fits[0]:
            kind = str(self._dtype).removeprefix("torch.")
            remedy = "Convert the model with .double(), or compute" if self._dtype == torch.float32 else "Compute"
            raise Untraceable(
                f"The step computes integers up to {float(bound[0]):.3g}, and a kernel has them as {kind}, which has "
                f"all of them up to {self._limit:,} only. {remedy} them outside the cell."
            )

    def _bound_of(self, name: str, args: Sequence[Any], result: Tensor) -> Bound:
        first = next(tensors_in(args), None)
        if first is None:
            return _constant(0.0)
        if name in _ELEMENTS:  # positions, or elements of integers
            elements = _constant(0.0) if first.dtype.is_floating_point else self._of_operand(first)
            return np.maximum(elements, first.numel())
        if name in ("_to_copy", "to", "copy") and first.dtype.is_floating_point:
            return _constant(_OF_FLOATS)
        operands = [self._of_operand(arg) for arg in _operands(args)]
        if name in _SUMS:
            return operands[0] * max(1.0, first.numel() / max(1, result.numel()) if name == "sum" else first.numel())
        if name in _ADDING:  # all values may meet at one place
            return operands[0] + operands[-1] * first.numel()
        if name == "prod":
            return operands[0] ** (first.numel() / max(1, result.numel()))
        if name == "clamp":
            return _largest(operands[1:] if len(operands) > 2 else operands)
        if name == "bitwise_and":
            positive = [arg for arg in args if isinstance(arg, int) and arg >= 0]
            return _constant(positive[0]) if positive else _of_bits(operands)
        rule = _RULES.get(name)
        return np.add.reduce(operands) if rule is None else rule(operands)

    def _of_operand(self, operand: Any) -> Bound:
        if not isinstance(operand, Tensor):
            return _constant(abs(float(operand)))
        if operand.dtype == torch.bool or operand.numel() == 0:
            return _constant(1.0)
        bound = self._bounds.get(key_of(operand))
        # Of what the step has of weights alone the numbers are those of the trace.
        return _constant(float(operand.detach().abs().max())) if bound is None else bound


def _operands(args: Sequence[Any]) -> list[Any]:
    """List the tensors and numbers of an operation, those in its lists of tensors included."""
    listed = [list(tensors_in(arg)) if isinstance(arg, list | tuple) else [arg] for arg in args]
    return [arg for several in listed for arg in several if isinstance(arg, Tensor | int | float)]


def _constant(value: float) -> Bound:
    return np.full(len(_SIZES), float(value))
