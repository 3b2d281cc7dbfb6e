"""Recorder: a dispatch mode that runs every ATen call of a step and of its gradient, and writes it into a graph.

A call on weights alone becomes a step of the weight prologue (`weight_prologue`), one on rows becomes primitives, by a
rule of `rules`. In the backward sums over rows, the gradients of weights, have rules of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusecell.attribute_paths import global_path
from fusecell.compiler.frontend.aten_arguments import Key, key_of, mapped, tensors_in, values_in
from fusecell.compiler.frontend.custom_functions import is_custom_node, is_of_operator, plain_arguments, tensor_results
from fusecell.compiler.frontend.draws import Draw, draw_name, fill, form_of, new_tensor
from fusecell.compiler.frontend.dtypes import casts_of, mixes_with, widens
from fusecell.compiler.frontend.graph_writer import Writer
from fusecell.compiler.frontend.isolation import users_globals, users_line
from fusecell.compiler.frontend.rules import ELEMENTWISE, RULES
from fusecell.compiler.frontend.rules.backward import SUMS
from fusecell.compiler.frontend.rules.complex_numbers import (
    COMPLEX,
    KEEPS_PAIR,
    MAKES_COMPLEX,
    moved_pair,
    sum_of_pairs,
)
from fusecell.compiler.frontend.rules.movement import CONSTANTS, KEEPS, MOVES, filled, padded_with
from fusecell.compiler.frontend.shared_memory import Overwritten, overwritten, strided
from fusecell.compiler.frontend.traced_values import (
    Complex,
    ExternalGrad,
    Masked,
    Row,
    Sum,
    Unsupported,
    Untraceable,
    Value,
    Weight,
)
from fusecell.compiler.frontend.weight_prologue import CustomCall, Ref, Weights, weight_views
from fusecell.compiler.ir.graph import Builder
from fusecell.torch_internals import autograd_node, disable_current_modes, is_wrapped, without_torch_functions

__all__ = ["MOST_NODES", "Recorder"]

_NUMBERS = (torch.bool, torch.int64, torch.int32)
MOST_NODES = 25_000
"""Values of a step and its gradient, beyond which it isn't compiled: that would take minutes."""

_VALUE_CHECKS = ("_linalg_check_errors",)
"""Calls that raise for some values, singular matrices, and return nothing: compiled, these give infinities and NaN."""

_VALUE_READS = ("_local_scalar_dense", "is_nonzero", "equal")
_SHAPE_CHECKS = ("is_same_size", "_has_same_storage_numel")
"""Calls that look at the shapes of tensors alone."""

_FILLING = ("cat", "stack", "constant_pad_nd", "tril", "triu", "diag_embed")
"""Moves whose results hold more than the elements of one argument: zeros, or elements of several."""

_MOST_LITERALS = 1 << 16
"""Elements of a tensor that a step may spell out: its numbers are part of the text that two traces must agree in."""

_EXACT = ELEMENTWISE | {"index_put", "gather", "index_select"}
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
_READS = (
    "The step reads the value of a tensor, to decide what to compute. A compiled loop computes the same for "
    "all values: write torch.where(condition, a, b), which takes both branches and chooses row by row; run an "
    "iteration a fixed number of times; and give torch.distributions validate_args=False."
)

_RANDOM = "The step draws random numbers; draw them in Cell.draw, which is called once per sequence."


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch annotates it in part
    """Dispatch mode that runs a step's ATen calls and records them.

    A tensor is recognised by its memory, not by its object: what autograd saved comes back as a new object. So that no
    memory is used twice, every tensor that has been met stays alive until the trace ends.

    Arguments:
        builder: the graph to write into.
        rows: the number of rows of the inputs; no other dimension has it.
        dtype: what the step computes in.
        sources: the path of each parameter, buffer and attribute of the cell, and the tensor, by its ``id``.
        generator: of the numbers that stand for a step's draws in the trace; without one a draw is refused.
    """

    def __init__(
        self,
        builder: Builder,
        rows: int,
        dtype: torch.dtype,
        sources: dict[int, tuple[str, Tensor]],
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.builder = builder
        self.dtype = dtype
        self._dtypes = mixes_with(dtype)
        self._casts = casts_of(dtype)
        self.sources = sources
        self.draws: list[Draw] = []
        self._generator = generator
        self.weights = Weights(builder, dtype)
        self.writer = Writer(builder, rows, self.weights.leaf, self.weights.literal)
        self.backward = False
        self.gradients: dict[int, Value] = {}
        self._values: dict[Key, Value | Overwritten] = {}
        self._by_storage: dict[int, set[Key]] = {}
        self._fixed: set[int] = {tensor.untyped_storage()._cdata for _, tensor in sources.values()}
        self._keep_alive: list[Tensor] = []
        # By slot: the tensors that have its value and a gradient, by their edge in autograd's graph.
        self._edges: dict[int, dict[tuple[Any, int], Tensor]] = {}
        self._parts: dict[int, Weight] = {}
        """The real and imaginary parts of the slots that are complex, as slots of their own."""
        self._prologue_nodes: set[Any] = set()
        """The autograd nodes of Functions and operators that the prologue applies as the step did."""
        self._inside: tuple[frozenset[int], set[int]] | None = None
        """While a Function is applied that is one step of the prologue: the memory of its arguments, and of results."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would import torch._dynamo and sympy, 1.0 s in a fresh process, to guard a compilation that doesn't
        # happen here. The method is private: where torch drops it the first trace is slower, and nothing else.
        return False

    # values of tensors

    def know(self, tensor: Tensor, value: Value, *, fixed: bool = False) -> None:
        """Set the value of a tensor; a ``fixed`` one must not be written to."""
        key = key_of(tensor)
        self._values[key] = value
        self._by_storage.setdefault(key[0], set()).add(key)
        self._keep_alive.append(tensor)
        if fixed:
            self._fixed.add(key[0])

    def value(self, tensor: Tensor) -> Value:
        """Return the value of a tensor; `Unsupported` for one that neither the cell nor the step has."""
        key = key_of(tensor)
        value = self._values.get(key)
        if value is None:
            value = self._source(tensor)
        if isinstance(value, Overwritten):
            # Asked for by the tracer, too, while the recorder is in force.
            with without_torch_functions(), disable_current_modes():
                value = self._values[key] = self._settled(value)
        if isinstance(value, Weight) and tensor.grad_fn is not None and not self.backward:
            self._edges.setdefault(value.slot, {}).setdefault((tensor.grad_fn, tensor.output_nr), tensor)
        return value

    def _source(self, tensor: Tensor) -> Value:
        """Return the value of a tensor that is met for the first time: an attribute of the cell."""
        path, source = self.sources.get(id(tensor), ("", tensor))
        if not path:
            path = self._global_path(tensor)
        if not path:
            shape = tuple(tensor.shape)
            return Unsupported(
                shape,
                f"The step uses a tensor of shape {shape} that is neither an input, a state, a parameter, a buffer or "
                "an attribute of the cell nor made in the step; keep it on the cell with register_buffer.",
            )
        self.know(source, self.weights.source(path, source), fixed=True)
        return self._settled(self._values[key_of(source)])

    def _global_path(self, tensor: Tensor) -> str:
        """Return the path of a tensor that is a global variable of the user's code; empty if it is none."""
        names = None if self.backward else users_globals()
        path = None if names is None else global_path(tensor, names)
        if path is not None:
            self.sources[id(tensor)] = path, tensor
        return path or ""

    def _know_literal(self, tensor: Tensor) -> None:
        """Set the value of a tensor of numbers that the step spells out, such as a list of positions."""
        if not tensor.shape or tensor.numel() > _MOST_LITERALS or self.is_known(tensor) or id(tensor) in self.sources:
            return
        self.know(tensor, self.weights.literal(tensor), fixed=True)

    def may_read(self, tensor: Tensor) -> bool:
        """Whether the step may read a tensor's value: one of buffers alone. The prologue then assumes this value."""
        value = None if is_wrapped(tensor) else self.value(tensor)
        if self.backward or not isinstance(value, Weight) or self.weights.slots[value.slot].differentiable:
            return False
        self.weights.assume(value.slot)
        return True

    def is_known(self, tensor: Tensor) -> bool:
        return key_of(tensor) in self._values

    # custom Functions

    def on_apply(self, function: type[Any], args: Sequence[Any], apply: Callable[..., Any]) -> Any:
        """Apply a Function for the step; record it as one step of the prologue if its tensors are all weights.

        One that is given rows is followed through its operations, and its backward, which autograd runs, likewise.
        """
        tensors = list(tensors_in(args))
        if self._inside is not None or not tensors or not all(isinstance(self.value(t), Weight) for t in tensors):
            return apply(*args)
        if is_of_operator(function):
            # Inside its Function gradients are off; the prologue calls the operator itself, with them as they are here.
            with self.weights.as_outside():
                result = apply(*args)
            self._prologue_nodes.update(value.grad_fn for value in tensors_in([result]))
            return result
        plain_arguments(function, args)
        refs = [mapped(arg, self._ref_of, "") for arg in args]
        self._inside = frozenset(tensor.untyped_storage()._cdata for tensor in tensors), set()
        try:
            result = apply(*args)
            results = tensor_results(function, result)
            self._prologue_nodes.update(value.grad_fn for value in results if value is not None)
            # A tensor is recognised by its memory: a result that is an argument untouched, but has another gradient,
            # gets memory of its own.
            storages: set[int] = {tensor.untyped_storage()._cdata for tensor in tensors}
            for index, value in enumerate(results):
                if value is not None and value.untyped_storage()._cdata in storages:
                    results[index] = value = value.clone()
                if value is not None:
                    storages.add(value.untyped_storage()._cdata)
        finally:
            self._inside = None
        if any(value is not None and self.writer.rows in value.shape for value in results):
            raise Untraceable(f"{function.__name__} makes rows of a weight{users_line()}.")
        weights = self.weights.record_function(CustomCall(function), refs, results)
        for tensor, weight in zip([value for value in results if value is not None], weights, strict=True):
            self.know(tensor, weight)
        return tuple(results) if isinstance(result, tuple | list) else results[0]

    def _call_inside(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call inside a Function that is one step of the prologue, without recording it."""
        assert self._inside is not None
        arguments, created = self._inside
        if torch.Tag.nondeterministic_seeded in func.tags and not _is_deterministic(func, args, kwargs):
            raise Untraceable(_RANDOM)
        tensors = list(tensors_in([*args, *kwargs.values()]))
        storages = {tensor.untyped_storage()._cdata for tensor in tensors}
        # The prologue applies the Function to its arguments alone, where another tensor may have changed since.
        if not storages <= arguments | created and not func._schema.name.endswith("::lift_fresh"):
            raise Untraceable(
                "The step applies a custom Function that reads a tensor that is none of its arguments; pass it as one."
            )
        if any(target.untyped_storage()._cdata in arguments for target in _written(func, args, kwargs)):
            raise Untraceable("The step applies a custom Function that changes a weight in place; return a new tensor.")
        result = func(*args, **kwargs)
        results = [result] if isinstance(result, Tensor) else result
        if not isinstance(results, list | tuple):
            raise Untraceable("The step reads the value of a tensor.")
        for tensor in tensors_in(results):
            created.add(tensor.untyped_storage()._cdata)
            self._keep_alive.append(tensor)
        return result

    def is_in_prologue(self, tensor: Tensor) -> bool:
        """Whether the prologue computes a weight's value, and so its gradient, by the operation that the step used."""
        return not is_custom_node(tensor.grad_fn) or tensor.grad_fn in self._prologue_nodes

    def uses(self, slot: int) -> list[Tensor]:
        """List the tensors that have the value of a slot, and a gradient."""
        return list(self._edges.get(slot, {}).values())

    def hooked_weight(self) -> str | None:
        """Return the name of a computed weight that the step has registered a hook on, if there is one."""
        for tensor in self._keep_alive:
            if tensor._backward_hooks:
                value = self._values.get(key_of(tensor))
                if isinstance(value, Weight):
                    return self.weights.slots[value.slot].name
        return None

    # recording

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.backward:
            # The guard against reading values is in force there for the user's code, not for this.
            with without_torch_functions():
                return self._dispatch(func, args, kwargs or {})
        return self._dispatch(func, args, kwargs or {})

    def _dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in _VALUE_CHECKS:
            return None
        if name in _SHAPE_CHECKS:
            return func(*args, **kwargs)
        if name in _VALUE_READS and not self.backward and all(map(self.may_read, tensors_in(args))):
            return func(*args, **kwargs)
        try:
            if self._inside is not None:
                return self._call_inside(func, args, kwargs)
            if name == "lift_fresh" and not self.backward:
                self._know_literal(args[0])
            # torch tags the operations that draw from a generator.
            if torch.Tag.nondeterministic_seeded in func.tags and not _is_deterministic(func, args, kwargs):
                return self._draw(func, name, args, kwargs)
            target = self._check(func, args, kwargs)
            sharing = self._sharing(target)
            # Looked up before the call: what is written in place still has its old value.
            values = mapped(args, self.value, name)
            options = mapped(kwargs, self.value, name)
            result = func(*args, **kwargs)
            # The recorder may read values of its own tensors, such as index tables; the step may not.
            with without_torch_functions():
                self._record(func, name, args, values, options, result, target)
                if target is not None:
                    self._overwrite(sharing, target)
        except Untraceable as refusal:
            raise Untraceable(self._located(refusal, name)) from None
        return result

    def _located(self, refusal: Untraceable, name: str) -> str:
        """Return a refusal's sentence with the operation and the user's line; in the backward, with autograd's node."""
        text = str(refusal)
        if " [aten" in text:
            return text
        place = users_line()
        if self.backward:
            node = autograd_node()
            place = f" in the gradient of {node.name()}" if node is not None else ""
        return f"{text.removesuffix('.')} [aten.{name}{place}]."

    def _check(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Refuse a side effect before it happens; return the tensor that the call writes to, if any."""
        if not func._schema.is_mutable:
            return None
        written = _written(func, args, kwargs)
        for target in written:
            if not isinstance(target, Tensor):
                raise Untraceable("The step writes to several tensors at once.")
            if isinstance(self.value(target), Unsupported) and not self.is_known(target):
                raise Untraceable(
                    f"The step changes in place a tensor of shape {tuple(target.shape)} that is neither made in the "
                    "step nor a parameter, buffer or attribute of the cell; compute a new tensor, and return it as a "
                    "state if it is to be there at the next step."
                )
            if target.untyped_storage()._cdata in self._fixed:
                raise Untraceable(self._fixed_reason(target))
        if len(written) != 1:
            raise Untraceable("The step writes to several tensors at once.")
        only: Tensor = written[0]
        return only

    def _draw(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Record a draw as an input of the graph; drawn once in a trace, its numbers would be constants."""
        if self._generator is None or self.backward:
            raise Untraceable(_RANDOM)
        arguments = _named_arguments(func, args, kwargs)
        method, numbers = form_of(name, arguments)
        target = self._check(func, args, kwargs)
        tensor = new_tensor(name, arguments) if target is None else target
        key = key_of(tensor)
        sharing = [other for other in self._by_storage.get(key[0], ()) if other != key and other in self._values]
        fill(tensor, method, numbers, self._generator)
        rows = self.writer.rows
        axes = [axis for axis, size in enumerate(tensor.shape) if size and size % rows == 0]
        if len(axes) > 1:
            raise Untraceable("The step draws a tensor with several dimensions as long as the batch.")
        shape, axis, split = list(tensor.shape), None, (1, 1)
        for axis in axes:
            shape[axis] //= rows
            split = 1, shape[axis]
        node = self.builder.append("input", (), {"shape": [math.prod(shape)]}, draw_name(len(self.draws)))
        row = Row(tuple(tensor.shape), node, axis, split=split)
        value = self.writer.truth(row) if tensor.dtype == torch.bool else row
        self._check_result(tensor, value, name)
        self.draws.append(Draw(method, numbers, tuple(shape), axis, tensor.dtype))
        self.know(tensor, value)
        self._overwrite(sharing, tensor)
        return tensor

    def _fixed_reason(self, target: Tensor) -> str:
        """Say why a write to an input, a state or a tensor of the cell is refused."""
        storage = target.untyped_storage()._cdata
        for path, tensor in self.sources.values():
            if tensor.untyped_storage()._cdata == storage:
                name = path.rpartition(".")[2]
                return (
                    f"The step changes self.{path} in place, which a compiled loop would not. Keep it in the state: "
                    f'name it in `states = ("h", "{name}")` and return its new value as part of the new state.'
                )
        return "The step changes an input or a state in place; compute a new tensor instead."

    def _settled(self, value: Value | Overwritten) -> Value:
        """Return the value of a tensor of whose memory a part was written to."""
        if not isinstance(value, Overwritten):
            return value
        before, written = self._settled(value.before), self._settled(value.written)
        return Overwritten(before, written, value.places).value(self.writer)

    def _overwrite(self, keys: Sequence[Key], target: Tensor) -> None:
        """Note that tensors have other elements now, where they share memory with one that was written to."""
        written = self._values[key_of(target)]
        for key in keys:
            places = overwritten(key, target)
            if places is not None:
                # Looked at only if the step reads the tensor again: most are temporaries.
                self._values[key] = Overwritten(self._values[key], written, places)

    def _sharing(self, target: Tensor | None) -> list[Key]:
        """List the other tensors that share the memory a call is about to write to."""
        # Writes to computed weights are steps of the prologue, where views see them as they do in the step.
        if target is None or isinstance(self.value(target), Weight):
            return []
        target_key = key_of(target)
        return [key for key in self._by_storage.get(target_key[0], ()) if key != target_key and key in self._values]

    def _record(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        values: list[Any],
        options: dict[str, Any],
        result: Any,
        target: Tensor | None,
    ) -> None:
        results = [result] if isinstance(result, Tensor) else result
        if not isinstance(results, list | tuple) or not all(isinstance(r, Tensor) or r is None for r in results):
            raise Untraceable(_READS)
        if any(isinstance(result, Tensor) and result.is_meta for result in results):
            return  # torch asks for a shape; a tensor without memory has no value
        operands = list(values_in((values, options)))
        if target is not None and isinstance(operands[0], Weight):
            self._change_weight(func, args, values, operands)
            return
        # Counted as the graph grows: a step that unrolls a long loop is not traced to its end before it is refused.
        if len(self.builder.nodes) > MOST_NODES:
            size = f"{len(self.builder.nodes):,} values in its graph" + (", its gradient's included" * self.backward)
            raise Untraceable(f"The step is too large: {size}, and there may be {MOST_NODES:,}.")
        # In place the value is that of the operation without the underscore; the tensor then has it.
        op = name.rstrip("_") if target is not None else name
        try:
            result_values = self._result_values(func, op, args, values, options, results, operands)
            for tensor, value in zip(results, result_values, strict=True):
                if tensor is not None and value is not None:
                    self._check_result(tensor, value, op)
        except Untraceable as refusal:
            if target is not None or self.backward:
                raise
            # Refused only where the step's results need it: statistics for a log are left out.
            reason = self._located(refusal, name)
            result_values = [Unsupported(tuple(r.shape), reason) if isinstance(r, Tensor) else None for r in results]
        for tensor, value in zip(results, result_values, strict=True):
            if tensor is None:
                continue
            if value is None:
                value = Unsupported(tuple(tensor.shape), f"The step uses a result of {name} that has no rule.")
            if target is None and isinstance(value, Weight) and self.is_known(tensor):
                continue  # a view of all of it, such as detach: the same weight
            self.know(tensor, value)

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
        if unsupported and name in CONSTANTS:  # zeros or ones like something: of that only the shape matters
            return [filled(self.writer, name, values, results[0])]
        masked = [value for value in unsupported if isinstance(value, Masked)]
        if masked and len(masked) == len(unsupported):
            of_masked = self._of_masked(func, name, args, values, options, results, masked)
            if of_masked is not None:
                return of_masked
        if unsupported:
            return self._of_unsupported(unsupported[0], operands, results)
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
            return self._of_complex(func, name, values, options, results)
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
        if any((value.mask.node, value.mask.shape) != (mask.node, mask.shape) for value in masked):
            return None
        of_rows = mask.axis == 0 and set(mask.shape[1:]) <= {1}
        if name not in ELEMENTWISE and name not in KEEPS and not of_rows:
            return None

        def whole(value: Masked) -> Row:
            # In a sum over rows, a weight's gradient, the others count as zero.
            return writer.only_rows(mask, value.row) if self.backward and of_rows else value.row

        values, options = mapped(values, whole, name, Masked), mapped(options, whole, name, Masked)
        all_rows = self._result_values(func, name, args, values, options, results, list(values_in((values, options))))
        return [Masked((), masked[0].reason, value, mask) if isinstance(value, Row) else value for value in all_rows]

    def _of_complex(
        self, func: Any, name: str, values: list[Any], options: dict[str, Any], results: Sequence[Tensor]
    ) -> Sequence[Value | None]:
        """Return the values of an operation on complex numbers, as pairs of real values."""
        writer = self.writer
        if any(isinstance(value, Complex) and isinstance(value.real, Sum) for value in values_in(values)):
            return [self._of_complex_sums(name, values, options)]
        values = mapped(values, self._pair_of_weight, name, Weight)
        if name in KEEPS_PAIR or (name in ("_to_copy", "to") and isinstance(values[0], Complex)):
            return [values[0]]
        if name == "copy":
            return [moved_pair(writer, lambda numbers: numbers.expand(results[0].shape), values[1])]
        if name in MOVES:
            moved = moved_pair(writer, func, *values, **options)
            return moved if isinstance(moved, list) else [moved]
        rule = COMPLEX.get(name)
        if rule is None:
            raise Untraceable(
                f"The op {name} has no rule for complex numbers; compute with their real and imaginary parts."
            )
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
            real = torch.empty(*self.weights.slots[value.slot].shape, 2, dtype=self.dtype)
            view = torch.ops.aten.view_as_real.default
            (parts,) = self.weights.record(view, "view_as_real", [Ref(value.slot)], {}, [real])
            self._parts[value.slot] = parts
        pair: Value = COMPLEX["view_as_complex"](self.writer, self.writer.row(parts))
        return pair

    def _of_rows(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        values: list[Any],
        options: dict[str, Any],
        results: Sequence[Tensor],
    ) -> Sequence[Value | None]:
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
            rows = writer.move(func, *values, **options)
            return rows if isinstance(rows, list) else [rows]
        rule = RULES.get(name)
        if name in _DECISIONS:
            raise Untraceable(_READS)
        if rule is None:
            raise Untraceable(f"The op {name} has no rule.")
        options = {key: value for key, value in options.items() if key not in ("dtype", "memory_format")}
        if name == "nan_to_num":
            options["largest"] = torch.finfo(results[0].dtype).max
        if any(result is not None and result.dtype in self._casts for result in results):
            # Next to a tensor of a narrower dtype torch takes Python's numbers in float32.
            values = [float(np.float32(value)) if isinstance(value, float) else value for value in values]
        if name.startswith("bitwise_"):
            options["of_masks"] = results[0].dtype == torch.bool
        result = rule(writer, *values, **options)
        if name not in ELEMENTWISE:
            return list(result) if isinstance(result, tuple) else [result]
        rows = list(result) if isinstance(result, tuple) else [result]
        return [self._rounded(row, tensor) for row, tensor in zip(rows, results, strict=True)]

    def _rounded(self, value: Any, result: Tensor) -> Any:
        """Round a result of elementwise arithmetic in a narrower dtype than the step's, as torch does each time."""
        if not isinstance(value, Row) or result.dtype not in self._casts or self.writer.is_mask(value):
            return value
        return self.writer.point(self._casts[result.dtype], value)

    def _cast(self, value: Value, result: Tensor, source: torch.dtype) -> Row:
        if result.dtype == torch.bool:
            return self.writer.truth(value)
        row = self.writer.number(value)
        if result.dtype in _NUMBERS:
            if not source.is_floating_point:
                return row
            # Integers are numbers without a fraction: exact up to 2^24 in float32. They have no -0.
            whole = RULES["trunc"](self.writer, row)
            return self.writer.point("where", self.writer.point("eq", whole, 0.0), 0.0, whole)
        if result.dtype in self._casts:
            return self.writer.point(self._casts[result.dtype], row)
        if result.dtype not in self._dtypes and not widens(self.dtype, result.dtype):
            raise Untraceable(f"The step computes in {result.dtype} where the cell is {self.dtype}.")
        return row

    def _of_sums(
        self, name: str, values: list[Any], options: dict[str, Any], results: Sequence[Tensor], operands: list[Value]
    ) -> Sequence[Value | None]:
        if not any(isinstance(value, Sum) for value in operands):
            sums = [value for value in operands if isinstance(value, Complex) and isinstance(value.real, Sum)]
            if len(sums) == 1 and name == "add" and options.get("alpha", 1) == 1:
                return sums  # a complex weight's own gradient, and what comes by way of others that are made of it
            if sums or any(self._is_of_rows(value) for value in operands):
                raise Untraceable("The gradient of a weight that others are made of is no sum over rows.")
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
        if any(self.writer.rows in result.shape for result in results):
            return None  # spread over rows
        fill = _fill(name, values, operands)
        if name == "_efficientzerotensor":  # which has no memory that a kernel could read
            func, name = torch.ops.aten.zeros.default, "zeros"
        # The backward runs after the prologue: what it computes on weights can only be part of the graph.
        if self.backward and fill is None and not _is_view(name):
            return None
        if name == "lift_fresh" and fill is not None:
            number = torch.ops.aten.scalar_tensor.default
            weights = self.weights.record(number, "number", [fill], {"dtype": results[0].dtype}, results)
            return [Weight((), weights[0].slot, weights[0].view, fill)]
        tensors = iter(tensors_in(args))
        refs = mapped(values, lambda value: self._ref(value, next(tensors)), name, Weight)
        weights = self.weights.record(func, name, refs, mapped(options, self._ref_plain, name, Weight), results)
        if fill is not None:
            return [Weight(weight.shape, weight.slot, weight.view, fill) for weight in weights]
        if len(operands) == 1 and isinstance(operands[0], Weight) and isinstance(values[0], Weight):
            return weight_views(func, name, operands[0], values[1:], weights)
        return weights

    def _ref(self, value: Weight, tensor: Tensor) -> Ref:
        if not self.backward and not self.is_in_prologue(tensor):
            name = tensor.grad_fn._forward_cls.__name__  # type: ignore[union-attr]  # a Function's node
            raise Untraceable(
                f"The step computes with a weight that {name}, a custom Function, has made together with rows: the "
                "gradient would not go back through it."
            )
        return Ref(value.slot, self.weights.slots[value.slot].differentiable and not tensor.requires_grad)

    def _ref_of(self, tensor: Tensor) -> Ref:
        """Return the reference to a tensor whose value is a weight."""
        value = self.value(tensor)
        assert isinstance(value, Weight)
        return self._ref(value, tensor)

    def _ref_plain(self, value: Weight) -> Ref:
        return Ref(value.slot)

    def _change_weight(self, func: Any, args: tuple[Any, ...], values: list[Any], operands: list[Value]) -> None:
        """Record a write to a computed weight."""
        target = values[0]
        if not all(isinstance(value, Weight) for value in operands):
            raise Untraceable(
                "The step writes values of the batch into a tensor that was made without the batch dimension."
            )
        tensors = iter(tensors_in(args[1:]))
        rest = mapped(values[1:], lambda value: self._ref(value, next(tensors)), "", Weight)
        refs = [Ref(target.slot), *rest]
        self.weights.record_write(func, refs, {}, target)
        # The written tensor, and every view of it, is no longer filled with one number.
        storage = args[0].untyped_storage()._cdata
        for key in self._by_storage.get(storage, ()):
            old = self._values.get(key)
            if isinstance(old, Weight):
                self._values[key] = Weight(old.shape, old.slot, old.view)

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
            if tensor.dtype not in (torch.complex64, torch.complex128):
                raise Untraceable(f"The step computes in {tensor.dtype} where the cell is {self.dtype}.")
        if isinstance(value, Row):
            # A factory's numbers may have another dtype: they take that of the values that they are combined with.
            constant = self.builder.nodes[value.node].op == "const"
            known = (*self._dtypes, *_NUMBERS, *(self._casts if name not in RULES or name in _EXACT else ()))
            # A wider dtype holds the step's numbers as they are; arithmetic in it is another matter.
            unchanged = widens(self.dtype, tensor.dtype) and name not in RULES
            if tensor.dtype not in known and not constant and not unchanged:
                raise Untraceable(f"The step computes in {tensor.dtype} where the cell is {self.dtype}.")
            if value.shape != tuple(tensor.shape):
                value_shape, shape = value.shape, tuple(tensor.shape)
                raise Untraceable(f"A rule gives the shape {value_shape}, torch {shape}; please report this.")

    # gradients of the weights that the graph takes

    def watch(self) -> Iterator[Any]:
        """Collect the gradient of each computed weight as it arrives; beyond it torch goes on with an external one.

        Yields:
            Handles, to be removed after the backward.
        """
        for slot in sorted({*self.weights.leaf_slots(), *self._parts}):
            if self.weights.slots[slot].tensor is not None:
                continue  # a leaf of autograd: the engine returns its gradient
            for node, output in self._edges.get(slot, ()):
                yield node.register_prehook(self._hook(slot, output))

    def _hook(self, slot: int, output: int) -> Callable[[tuple[Tensor | None, ...]], tuple[Tensor | None, ...]]:
        def hook(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
            gradient = gradients[output]
            if gradient is None:
                return gradients
            self.collect(slot, self.value(gradient))
            # A copy has memory, and so a value, of its own.
            external = gradient.clone()
            self.know(external, ExternalGrad(tuple(external.shape)))
            return (*gradients[:output], external, *gradients[output + 1 :])

        return hook

    def collect(self, slot: int, gradient: Value) -> None:
        """Add to the gradient of a slot."""
        if isinstance(gradient, ExternalGrad):
            return
        if isinstance(gradient, Complex) and slot in self._parts:
            with without_torch_functions(), disable_current_modes():
                slot, gradient = self._parts[slot].slot, sum_of_pairs(self.writer, gradient)
        if not isinstance(gradient, Sum):
            raise Untraceable(f"The gradient of {self.weights.slots[slot].name} is no sum over rows.")
        so_far = self.gradients.get(slot)
        self.gradients[slot] = gradient if not isinstance(so_far, Sum) else self.writer.total(so_far, gradient)


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


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """List the tensors that a call writes to."""
    return [
        args[position] if position < len(args) else kwargs.get(argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _named_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs


def _is_deterministic(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation that may draw random numbers draws none in this call: dropout outside training."""
    arguments = _named_arguments(func, args, kwargs)
    if "rrelu" in func._schema.name:
        return not arguments.get("training", False)
    return "dropout" in func._schema.name and arguments.get("train") is False
