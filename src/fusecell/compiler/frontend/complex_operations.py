"""Calls of a step on complex numbers, which are pairs of real values in the graph."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fusecell.compiler.frontend.aten_arguments import mapped, values_in
from fusecell.compiler.frontend.remedies import REMEDIES
from fusecell.compiler.frontend.rules.complex_numbers import COMPLEX, KEEPS_PAIR, moved_pair, sum_of_pairs
from fusecell.compiler.frontend.rules.movement import MOVES
from fusecell.compiler.frontend.rules.weight_sums import SUMS
from fusecell.compiler.frontend.shared_memory import strided
from fusecell.compiler.frontend.traced_values import Complex, Sum, Untraceable, Value, Weight
from fusecell.compiler.frontend.weight_operations import WeightOperations
from fusecell.compiler.frontend.weight_prologue import Ref

__all__ = ["ComplexOperations"]


class ComplexOperations(WeightOperations):
    """The values of calls on complex numbers; the arguments are those of `TensorValues`."""

    @cached_property
    def _parts(self) -> dict[int, Weight]:
        """The real and imaginary parts of the slots that are complex, as slots of their own."""
        return {}

    @cached_property
    def _halves(self) -> dict[int, list[Weight]]:
        """By the slots that are complex, the slots of the real part and of the imaginary part."""
        return {}

    def _of_complex(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        values: list[Any],
        options: dict[str, Any],
        results: Sequence[Tensor],
    ) -> Sequence[Value | None]:
        """Return the values of an operation on complex numbers, as pairs of real values."""
        writer = self.writer
        if any(isinstance(value, Complex) and isinstance(value.real, Sum) for value in values_in(values)):
            return [self._of_complex_sums(name, values, options)]
        values = mapped(values, self._pair_of_weight, name, Weight)
        if name in KEEPS_PAIR or (name in ("_to_copy", "to") and isinstance(values[0], Complex)):
            return [values[0]]
        if name in ("_to_copy", "to"):
            row = writer.number(values[0])
            return [Complex(row.shape, row, writer.const(0.0, row.shape, row.axis, row.split))]
        if name == "copy":
            return [moved_pair(writer, lambda numbers: numbers.expand(results[0].shape), values[1])]
        if name == "as_strided":
            return [moved_pair(writer, lambda numbers: strided(numbers, args[0], results[0]), values[0])]
        if name in MOVES:
            moved = moved_pair(writer, func, *values, **options)
            return moved if isinstance(moved, list) else [moved]
        rule = COMPLEX.get(name)
        if rule is None:
            of_parts = "Compute with their real and imaginary parts."
            raise Untraceable(f"The op {name} has no rule for complex numbers. {REMEDIES.get(name, of_parts)}")
        result = rule(writer, *values, **{key: value for key, value in options.items() if key != "dtype"})
        return list(result) if isinstance(result, tuple) else [result]

    def _of_complex_sums(self, name: str, values: list[Any], options: dict[str, Any]) -> Value:
        """Return the result of an operation on gradients of complex weights: the same on both of their parts."""
        pair = values[0]
        if name == "view_as_real":
            return sum_of_pairs(self.writer, pair)
        if name in ("_conj", "_conj_physical", "conj_physical"):
            return Complex(pair.shape, pair.real, self.writer.scaled(pair.imaginary, -1.0))
        rule = SUMS.get(name)
        is_scaled = name in ("mul", "div") and isinstance(pair, Complex) and isinstance(values[1], int | float)
        if rule is None or (name in ("mul", "div") and not is_scaled):
            raise Untraceable(
                f"The gradient of a complex weight goes through {name}; keep the weight as two real ones."
            )
        real, imaginary = (
            rule(self.writer, *mapped(values, part, name, Complex), **options)
            for part in (lambda pair: pair.real, lambda pair: pair.imaginary)
        )
        return Complex(real.shape, real, imaginary)

    def _pair_of_weight(self, value: Weight) -> Value:
        """Return a weight, a complex one as its two parts, which the prologue takes apart."""
        if value.fill is not None or not self.weights.slots[value.slot].dtype.is_complex:
            return value
        parts = self._parts.get(value.slot)
        if parts is None:
            complex_dtype = self.weights.slots[value.slot].dtype
            real = torch.view_as_real(torch.empty(self.weights.slots[value.slot].shape, dtype=complex_dtype))
            # A conjugate may be a view with a flag, which has no real view.
            shape = torch.empty(self.weights.slots[value.slot].shape, dtype=complex_dtype)
            resolve, view = torch.ops.aten.resolve_conj.default, torch.ops.aten.view_as_real.default
            (resolved,) = self.weights.record(resolve, "resolved", [Ref(value.slot)], {}, [shape])
            (parts,) = self.weights.record(view, "view_as_real", [Ref(resolved.slot)], {}, [real])
            # A number takes the precision of what it meets: Python's 1j is complex128 where autograd keeps it.
            if not self.weights.slots[value.slot].shape and real.dtype != self.dtype:
                copy, dtype = torch.ops.aten._to_copy.default, {"dtype": self.dtype}
                (parts,) = self.weights.record(copy, "to", [Ref(parts.slot)], dtype, [real.to(self.dtype)])
            self._parts[value.slot] = parts
            # Each by itself, for the gradient of a product: the prologue drops those that nothing takes.
            select = torch.ops.aten.select.int
            self._halves[value.slot] = [
                self.weights.record(select, name, [Ref(parts.slot), -1, half], {}, [real[..., half]])[0]
                for half, name in enumerate(("real", "imag"))
            ]
        pair: Value = COMPLEX["view_as_complex"](self.writer, self.writer.row(parts))
        return pair
