"""What each ATen call of a step gives, by the kinds of its arguments' values: rows, weights, sums, complex numbers.

A call on weights alone becomes a step of the weight prologue (`weight_prologue`), one on rows becomes primitives, by a
rule of `rules`. In the backward sums over rows, the gradients of weights, have rules of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusecell.compiler.frontend.aten_arguments import mapped, values_in
from fusecell.compiler.frontend.complex_operations import ComplexOperations
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
from fusecell.compiler.frontend.remedies import AS_INPUT, REMEDIES, without_rule
from fusecell.compiler.frontend.rules import ELEMENTWISE, RULES
from fusecell.compiler.frontend.rules.complex_numbers import (
    MAKES_COMPLEX,
)
from fusecell.compiler.frontend.rules.integers import INTEGER_RULES
from fusecell.compiler.frontend.rules.movement import (
    CONSTANTS,
    KEEPS,
    MOVES,
    filled,
    padded_with,
    repeated_for_rows,
)
from fusecell.compiler.frontend.rules.row_numbers import row_numbers
from fusecell.compiler.frontend.rules.weight_sums import SUMS
from fusecell.compiler.frontend.shared_memory import strided
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

__all__ = ["READS_VALUES", "OperationValues"]

_NUMBERS = (torch.bool, torch.int64, torch.int32)

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


class OperationValues(ComplexOperations):
    """The values of the results of operations; the arguments are those of `TensorValues`."""

    @cached_property
    def _mask_places(self) -> dict[int, Weight]:
        """The positions of the features that masks pick, by the masks' slots; the gradient needs them again."""
        return {}

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
        if name == "nan_to_num" and results[0].is_floating_point():
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
