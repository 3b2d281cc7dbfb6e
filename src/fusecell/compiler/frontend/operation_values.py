"""What each ATen call of a step gives, by the kinds of its arguments' values: rows, weights, sums, complex numbers.

A call on weights alone becomes a step of the weight prologue (`weight_prologue`), one on rows becomes primitives, by a
rule of `rules`. In the backward sums over rows, the gradients of weights, have rules of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusecell.compiler.frontend.aten_arguments import mapped, tensors_in, values_in
from fusecell.compiler.frontend.dtypes import widens
from fusecell.compiler.frontend.narrow_dtypes import (
    HOLD_NARROW_INTEGERS,
    NARROW_INTEGERS,
    ROUNDED,
    WRAPPED,
    in_dtype,
    other_dtype,
    wrapped,
)
from fusecell.compiler.frontend.prologue_recorder import weight_views
from fusecell.compiler.frontend.remedies import AS_INPUT, REMEDIES, without_rule
from fusecell.compiler.frontend.rules import ELEMENTWISE, RULES
from fusecell.compiler.frontend.rules.complex_numbers import (
    COMPLEX,
    KEEPS_PAIR,
    MAKES_COMPLEX,
    moved_pair,
    sum_of_pairs,
)
from fusecell.compiler.frontend.rules.integers import INTEGER_RULES
from fusecell.compiler.frontend.rules.movement import (
    CONSTANTS,
    KEEPS,
    MOVES,
    as_stored,
    filled,
    padded_with,
    repeated_for_rows,
)
from fusecell.compiler.frontend.rules.row_numbers import row_numbers
from fusecell.compiler.frontend.rules.weight_sums import SUMS
from fusecell.compiler.frontend.shared_memory import strided
from fusecell.compiler.frontend.tensor_values import TensorValues
from fusecell.compiler.frontend.traced_values import (
    Complex,
    ExternalGrad,
    Masked,
    Row,
    RowNumbers,
    Sum,
    Unsupported,
    Untraceable,
    Value,
    Weight,
)
from fusecell.compiler.frontend.weight_prologue import Ref
from fusecell.compiler.ir.graph import Builder

__all__ = ["READS_VALUES", "OperationValues"]

_NUMBERS = (torch.bool, torch.int64, torch.int32)
_FILLING = ("cat", "stack", "constant_pad_nd", "tril", "triu", "diag_embed")
"""Moves whose results hold more than the elements of one argument: zeros, or elements of several."""

_EXACT = ROUNDED | {"index_put", "gather", "index_select"}
"""Operations in a narrower dtype than the step's whose results are rounded here, or are elements of their arguments."""

_DECISIONS = (
    "_is_all_true",
    "_is_any_true",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
)
"""Operations whose only use is to decide what to do by a tensor's values, or whose result's size depends on these."""
READS_VALUES = (
    "The step reads the value of a tensor, to decide what to compute. A compiled loop computes the same for "
    "all values: write torch.where(condition, a, b), which takes both branches and chooses row by row; run an "
    "iteration a fixed number of times; and give torch.distributions validate_args=False."
)


class OperationValues(TensorValues):
    """The values of the results of operations; the arguments are those of `TensorValues`."""

    def __init__(
        self,
        builder: Builder,
        rows: int,
        dtype: torch.dtype,
        sources: dict[int, tuple[str, Tensor]],
        leftovers: Mapping[int, tuple[str, Tensor]],
    ) -> None:
        super().__init__(builder, rows, dtype, sources, leftovers)
        self._parts: dict[int, Weight] = {}
        """The real and imaginary parts of the slots that are complex, as slots of their own."""
        self._resolved: set[int] = set()
        """Copies that torch makes of conjugates where an operation has no rule for them, below autograd."""
        self._halves: dict[int, list[Weight]] = {}
        """By the slots that are complex, the slots of the real part and of the imaginary part."""
        self._mask_places: dict[int, Weight] = {}
        """The positions of the features that masks pick, by the masks' slots; the gradient needs them again."""

    def _result_values(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        values: list[Any],
        options: dict[str, Any],
        results: Sequence[Tensor],
        operands: list[Value],
    ) -> Sequence[Value | None]:
        """Return the values of the results of a call, by the kinds of its operands; None for one without a rule."""
        unsupported = [value for value in operands if isinstance(value, Unsupported)]
        if unsupported:
            return self._with_unsupported(func, name, args, values, options, results, operands, unsupported)
        if any(isinstance(value, Sum | ExternalGrad) for value in operands):
            return self._of_sums(name, values, options, results, operands)
        if all(isinstance(value, Weight) for value in operands):
            of_weights = self._of_weights(func, name, args, values, options, results, operands)
            if of_weights is not None:
                return of_weights
        if name in CONSTANTS:
            return [filled(self.writer, name, values, results[0])]
        is_complex = name in MAKES_COMPLEX or any(result is not None and result.is_complex() for result in results)
        if is_complex or any(isinstance(value, Complex) for value in operands):
            return self._of_complex(func, name, args, values, options, results)
        if name in KEEPS:
            return [operands[0]]
        # A weight meets rows as a row, too: `Writer.row` turns operands into rows.
        try:
            return self._of_rows(func, name, args, values, options, results)
        except Untraceable as refusal:
            # The backward computes on weights alone as well; it is refused only if a gradient needs the result.
            if not self.backward or any(isinstance(value, Row) for value in operands):
                raise
            return [Unsupported(tuple(result.shape), str(refusal)) for result in results]

    def _with_unsupported(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        values: list[Any],
        options: dict[str, Any],
        results: Sequence[Tensor],
        operands: list[Value],
        unsupported: list[Unsupported],
    ) -> Sequence[Value | None]:
        """Return the values of the results of an operation on what is no value of a graph by itself."""
        if name in CONSTANTS:  # zeros or ones like something: of that only the shape matters
            return [filled(self.writer, name, values, results[0])]
        masked = [value for value in unsupported if isinstance(value, Masked)]
        if masked and len(masked) == len(unsupported):
            of_masked = self._of_masked(func, name, args, values, options, results, masked)
            if of_masked is not None:
                return of_masked
        if all(isinstance(value, RowNumbers) for value in unsupported):
            if name in KEEPS or name in MOVES or name in ("_to_copy", "to"):
                return [row_numbers(tuple(results[0].shape))]
            if name in ("index", "index_put", "_index_put_impl"):
                return [RULES[name](self.writer, *values, **options)]
        return self._of_unsupported(unsupported[0], operands, results)

    def _of_unsupported(self, first: Unsupported, operands: list[Value], results: Sequence[Tensor]) -> Sequence[Value]:
        """Refuse an operation on an unsupported value, unless it is among external gradients: those are torch's."""
        if not self.backward or any(isinstance(value, Row | Sum) for value in operands):
            raise Untraceable(first.reason)
        if any(isinstance(value, ExternalGrad) for value in operands):
            return [ExternalGrad(tuple(result.shape)) for result in results]
        return [Unsupported(tuple(result.shape), first.reason) for result in results]

    def _of_masked(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        values: list[Any],
        options: dict[str, Any],
        results: Sequence[Tensor],
        masked: list[Masked],
    ) -> Sequence[Value | None] | None:
        """Return the results of an operation on elements that a mask picks: on all elements, to be taken by it later.

        Arithmetic is possible on elements, other operations where the mask picks whole rows. None for others.
        """
        mask, writer = masked[0].mask, self.writer
        if name == "index_put":
            return [RULES[name](writer, *values, **options)]
        if not all(value.is_of(mask) for value in masked):
            return None
        of_rows = masked[0].of_rows
        if name not in ELEMENTWISE and name not in KEEPS and not of_rows:
            return None
        others = [value for value in values_in((values, options)) if not isinstance(value, Masked)]
        # A value of all rows next to some of them, or several elements next to a list of picked ones: torch raises, but
        # for masks that happen to fit.
        if any(self._is_of_rows(value) or (not of_rows and math.prod(value.shape) > 1) for value in others):
            return None

        def whole(value: Masked) -> Row:
            # In a sum over rows, a weight's gradient, the others count as zero.
            return writer.only_rows(mask, value.row) if self.backward and of_rows else value.row

        values, options = mapped(values, whole, name, Masked), mapped(options, whole, name, Masked)
        all_rows = self._result_values(func, name, args, values, options, results, list(values_in((values, options))))
        return [Masked((), masked[0].reason, value, mask) if isinstance(value, Row) else value for value in all_rows]

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

    def _of_movement(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        values: list[Any],
        options: dict[str, Any],
        results: Sequence[Tensor],
    ) -> Sequence[Value | None] | None:
        """Return the results of an operation that moves, copies or casts elements; None for any other."""
        writer = self.writer
        if name in ("_to_copy", "to"):
            return [self._cast(values[0], results[0], args[0].dtype)]
        if name == "as_strided":
            return [writer.move(lambda numbers: strided(numbers, args[0], results[0]), values[0])]
        if name == "copy":
            copied = writer.move(lambda numbers: numbers.expand(results[0].shape), values[1])
            same = not isinstance(args[1], Tensor) or args[1].dtype == results[0].dtype
            return [copied if same else self._cast(copied, results[0], args[1].dtype)]
        if name in MOVES:
            if name == "constant_pad_nd" and len(values) > 2 and values[2] != 0:
                return [padded_with(writer, *values)]
            if self._is_repeated_for_rows(name, values):
                return [repeated_for_rows(writer, values[0])]
            rows = writer.move(func, *values, **options)
            return rows if isinstance(rows, list) else [rows]
        if name == "arange" and results[0].shape == (writer.rows,) and args[:2] in ((writer.rows,), (0, writer.rows)):
            return [row_numbers((writer.rows,))]
        return None

    def _of_rows(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        values: list[Any],
        options: dict[str, Any],
        results: Sequence[Tensor],
    ) -> Sequence[Value | None]:
        moved = self._of_movement(func, name, args, values, options, results)
        if moved is not None:
            return moved
        of_integers = results[0] is not None and results[0].dtype != torch.bool
        rule = (INTEGER_RULES.get(name) if of_integers else None) or RULES.get(name)
        if name in _DECISIONS:
            raise Untraceable(REMEDIES.get(name, READS_VALUES))
        if rule is None:
            raise Untraceable(without_rule(name))
        options = {key: value for key, value in options.items() if key not in ("dtype", "memory_format")}
        if name == "nan_to_num":
            options["largest"] = torch.finfo(results[0].dtype).max
        if any(result is not None and result.dtype in self._casts for result in results):
            # Next to a tensor of a narrower dtype torch takes Python's numbers in float32.
            values = [float(np.float32(value)) if isinstance(value, float) else value for value in values]
        if name in ELEMENTWISE:
            values = self._beside_narrower(args, values)
        if name in ("index", "index_put", "_index_put_impl"):
            values = [values[0], self._places(args[1], values[1]), *values[2:]]
            if name != "index" and any(isinstance(index, Tensor) and not index.numel() for index in args[1]):
                return [values[0]]  # a mask of one element that doesn't hold
        result = rule(self.writer, *values, **options)
        rows = list(result) if isinstance(result, tuple) else [result]
        if name not in ROUNDED and name not in WRAPPED:
            return rows
        dtypes = [self.dtype if tensor is None else tensor.dtype for tensor in results]
        return [in_dtype(self.writer, row, dtype, name, self._casts) for row, dtype in zip(rows, dtypes, strict=True)]

    def _beside_narrower(self, args: tuple[Any, ...], values: list[Any]) -> list[Any]:
        """Return arguments with float64 tensors of no dimension rounded to float32, if all with dimensions are that."""
        dtypes = {arg.dtype for arg in args if isinstance(arg, Tensor) and arg.is_floating_point() and arg.dim()}
        if torch.float32 not in self._casts or dtypes != {torch.float32}:
            return values
        return [
            self._through_float32(self.writer.row(value), arg.dtype)
            if isinstance(arg, Tensor) and arg.is_floating_point() and not arg.dim()
            else value
            for arg, value in zip(args, values, strict=True)
        ]

    def _places(self, tensors: Sequence[Any], indices: Sequence[Any]) -> list[Any]:
        """Return an index in which masks of features that the step may read, a list of bools say, are positions."""
        places = list(indices)
        for position, (tensor, index) in enumerate(zip(tensors, indices, strict=True)):
            if not isinstance(index, Weight) or tensor.dtype != torch.bool or tensor.dim() != 1:
                continue
            if index.slot not in self._mask_places and self.may_read(tensor):
                self._mask_places[index.slot] = self.weights.literal(tensor.nonzero()[:, 0])
            places[position] = self._mask_places.get(index.slot, index)
        return places

    def _is_repeated_for_rows(self, name: str, values: Sequence[Any]) -> bool:
        """Whether a value that is the same for all rows is repeated once for each: ``weight.repeat(N)``."""
        return name == "repeat" and list(values[1]) == [self.writer.rows] and not self._is_of_rows(values[0])

    def _as_truth(self, tensor: Tensor | None, value: Value | None) -> Value | None:
        """Return truth values as such: a kernel has those of a weight as numbers, and the sum of two is one too."""
        is_truth = tensor is not None and tensor.dtype == torch.bool
        return self.writer.truth(value) if is_truth and isinstance(value, Row) else value

    def _cast(self, value: Value, result: Tensor, source: torch.dtype) -> Row:
        if result.dtype == torch.bool:
            return self.writer.truth(value)
        row = self.writer.number(value)
        if result.dtype in _NUMBERS or result.dtype in NARROW_INTEGERS:
            if source.is_floating_point:
                # Integers are numbers without a fraction: exact up to 2^24 in float32. They have no -0.
                whole = RULES["trunc"](self.writer, row)
                row = self.writer.point("where", self.writer.point("eq", whole, 0.0), 0.0, whole)
            wraps = result.dtype in NARROW_INTEGERS and source not in (result.dtype, torch.bool)
            return wrapped(self.writer, row, result.dtype) if wraps else row
        if result.dtype in self._casts:
            return self.writer.point(self._casts[result.dtype], self._through_float32(row, source))
        if result.dtype not in self._dtypes and not widens(self.dtype, result.dtype):
            raise Untraceable(other_dtype(result.dtype, self.dtype, "_to_copy"))
        return row

    def _through_float32(self, row: Row, source: torch.dtype) -> Row:
        """Round a float64 to float32, by which torch rounds it to 16 bits: twice."""
        if source != torch.float64 or torch.float32 not in self._casts:
            return row
        return self.writer.point(self._casts[torch.float32], row)

    def _of_sums(
        self, name: str, values: list[Any], options: dict[str, Any], results: Sequence[Tensor], operands: list[Value]
    ) -> Sequence[Value | None]:
        if not any(isinstance(value, Sum) for value in operands):
            sums = [value for value in operands if isinstance(value, Complex) and isinstance(value.real, Sum)]
            if len(sums) == 1 and name == "add" and options.get("alpha", 1) == 1:
                return sums  # a complex weight's own gradient, and what comes by way of others that are made of it
            if sums or any(self._is_of_rows(value) for value in operands):
                raise Untraceable(f"The gradient of a weight that others are made of is no sum over rows. {AS_INPUT}")
            return [ExternalGrad(tuple(result.shape)) for result in results]
        rule = SUMS.get(name)
        if rule is None or not self.backward:
            raise Untraceable(
                "The step mixes the rows of the batch: it computes with a sum over them. Sum over features, x.sum(-1)."
            )
        return [rule(self.writer, *values, **options)]

    def _is_of_rows(self, value: Value) -> bool:
        """Whether a value, or its real part, differs from row to row."""
        row = value.real if isinstance(value, Complex) else value
        return isinstance(row, Row) and row.axis is not None and self.builder.nodes[row.node].op != "const"

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

    def _check_result(self, tensor: Tensor, value: Value, name: str) -> None:
        """Check a value against the tensor that torch computed: a defect of a rule must not become wrong numbers."""
        if isinstance(value, Sum) and not self.backward:
            raise Untraceable(
                "The step mixes the rows of the batch: it sums over them. Each row is a sequence of its own; sum over "
                "features, x.sum(-1), or pass what the batch shares as an input."
            )
        if isinstance(value, Complex):
            if value.shape != tuple(tensor.shape):
                raise Untraceable(
                    f"A rule gives the shape {value.shape}, torch {tuple(tensor.shape)}; please report this."
                )
            if tensor.dtype != (torch.complex128 if self.dtype == torch.float64 else torch.complex64):
                raise Untraceable(other_dtype(tensor.dtype, self.dtype, name))
        if isinstance(value, Row):
            # A factory's numbers may have another dtype: they take that of the values that they are combined with.
            constant = self.builder.nodes[value.node].op == "const"
            accepted = (*self._dtypes, *_NUMBERS, *(self._casts if name not in RULES or name in _EXACT else ()))
            accepted += NARROW_INTEGERS if name in HOLD_NARROW_INTEGERS else ()
            # A wider dtype holds the step's numbers as they are; arithmetic in it is another matter.
            unchanged = widens(self.dtype, tensor.dtype) and name not in RULES
            if tensor.dtype not in accepted and not constant and not unchanged:
                raise Untraceable(other_dtype(tensor.dtype, self.dtype, name))
            if value.shape != tuple(tensor.shape):
                value_shape, shape = value.shape, tuple(tensor.shape)
                raise Untraceable(f"A rule gives the shape {value_shape}, torch {shape}; please report this.")


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
