"""Recorder: a dispatch mode that runs every ATen call of a step and of its gradient, and writes it into a graph.

A call on weights alone becomes a step of the weight prologue (`weight_prologue`), one on rows becomes primitives, by a
rule of `rules`. In the backward sums over rows, the gradients of weights, have rules of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusecell.compiler.frontend.aten_arguments import (
    call,
    key_of,
    mapped,
    named_arguments,
    tensors_in,
    values_in,
    written_to,
)
from fusecell.compiler.frontend.custom_functions import is_of_operator, plain_arguments, tensor_results
from fusecell.compiler.frontend.draws import Draw, draw_name, draws_nothing, fill, form_of, new_tensor
from fusecell.compiler.frontend.isolation import users_line
from fusecell.compiler.frontend.operation_values import READS_VALUES, OperationValues
from fusecell.compiler.frontend.remedies import AS_INPUT, GRADIENT_REMEDIES, of_write
from fusecell.compiler.frontend.rules.complex_numbers import are_joined, sum_of_pairs
from fusecell.compiler.frontend.traced_values import (
    Complex,
    ExternalGrad,
    Row,
    Sum,
    Unsupported,
    Untraceable,
    Value,
    Weight,
)
from fusecell.compiler.frontend.weight_prologue import CustomCall, Ref
from fusecell.compiler.frontend.whole_numbers import INTEGERS, WholeNumbers
from fusecell.compiler.ir.graph import Builder
from fusecell.errors import CompilerError
from fusecell.torch_internals import autograd_node, disable_current_modes, without_torch_functions

__all__ = ["MOST_NODES", "Recorder"]

MOST_NODES = 25_000
"""Values of a step and its gradient, beyond which it isn't compiled: that would take minutes."""

_VALUE_CHECKS = ("_linalg_check_errors",)
"""Calls that raise for some values, singular matrices, and return nothing: compiled, these give infinities and NaN."""

_VALUE_READS = ("_local_scalar_dense", "is_nonzero", "equal")
_SHAPE_CHECKS = ("is_same_size", "_has_same_storage_numel", "promote_types", "result_type", "can_cast")
"""Calls that look at the shapes and dtypes of tensors alone."""

_RANDOM = "The step draws random numbers; draw them in Cell.draw, which is called once per sequence."


class Recorder(OperationValues, TorchDispatchMode):
    """Dispatch mode that runs a step's ATen calls and records them.

    Arguments:
        builder, rows, dtype, sources, leftovers: as of `TensorValues`.
        generator: of the numbers that stand for a step's draws in the trace; without one a draw is refused.
    """

    def __init__(
        self,
        builder: Builder,
        rows: int,
        dtype: torch.dtype,
        sources: dict[int, tuple[str, Tensor]],
        leftovers: Mapping[int, tuple[str, Tensor]],
        generator: torch.Generator | None = None,
    ) -> None:
        TorchDispatchMode.__init__(self)  # type: ignore[no-untyped-call]  # torch annotates it in part
        OperationValues.__init__(self, builder, rows, dtype, sources, leftovers)
        self.draws: list[Draw] = []
        self.whole_numbers = WholeNumbers(dtype)
        self._generator = generator
        self.gradients: dict[int, Value] = {}
        self._inside: tuple[frozenset[int], set[int]] | None = None
        """While a Function is applied that is one step of the prologue: the memory of its arguments, and of results."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would import torch._dynamo and sympy, 1.0 s in a fresh process, to guard a compilation that doesn't
        # happen here. The method is private: where torch drops it the first trace is slower, and nothing else.
        return False

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
        if torch.Tag.nondeterministic_seeded in func.tags and not draws_nothing(func, args, kwargs):
            raise Untraceable(_RANDOM)
        tensors = list(tensors_in([*args, *kwargs.values()]))
        storages = {tensor.untyped_storage()._cdata for tensor in tensors}
        # The prologue applies the Function to its arguments alone, where another tensor may have changed since.
        if not storages <= arguments | created and not func._schema.name.endswith("::lift_fresh"):
            raise Untraceable(
                "The step applies a custom Function that reads a tensor that is none of its arguments; pass it as one."
            )
        if any(target.untyped_storage()._cdata in arguments for target in written_to(func, args, kwargs)):
            raise Untraceable("The step applies a custom Function that changes a weight in place; return a new tensor.")
        result = func(*args, **kwargs)
        results = [result] if isinstance(result, Tensor) else result
        if not isinstance(results, list | tuple):
            raise Untraceable("The step reads the value of a tensor.")
        for tensor in tensors_in(results):
            created.add(tensor.untyped_storage()._cdata)
            self._keep_alive.append(tensor)
        return result

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
            if torch.Tag.nondeterministic_seeded in func.tags and not draws_nothing(func, args, kwargs):
                return self._draw(func, name, args, kwargs)
            target = self._check(func, args, kwargs)
            sharing = self._sharing(target)
            # Looked up before the call: what is written in place still has its old value.
            values = mapped(args, self.value, name)
            # What is written to, out=y, is no operand.
            options = mapped({key: each for key, each in kwargs.items() if key != "out"}, self.value, name)
            result = call(func, args, kwargs)
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
        node = autograd_node() if self.backward else None
        place = "" if self.backward else users_line()
        if node is not None:
            text, place = GRADIENT_REMEDIES.get(node.name(), text), f" in the gradient of {node.name()}"
        return f"{text.removesuffix('.')} [aten.{name}{place}]."

    def _check(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Refuse a side effect before it happens; return the tensor that the call writes to, if any."""
        if not func._schema.is_mutable:
            return None
        written = written_to(func, args, kwargs)
        for target in written:
            if not isinstance(target, Tensor):
                raise Untraceable("The step writes to several tensors at once. Write to them one after the other.")
            if isinstance(self.value(target), Unsupported) and not self.is_known(target):
                raise Untraceable(
                    f"The step changes in place a tensor of shape {tuple(target.shape)} that is neither made in the "
                    "step nor a parameter, buffer or attribute of the cell; compute a new tensor, and return it as a "
                    "state if it is to be there at the next step."
                )
            if target.untyped_storage()._cdata in self._fixed:
                raise Untraceable(of_write(target, self.sources.values()))
        if len(written) != 1:
            raise Untraceable("The step writes to several tensors at once. Write to them one after the other.")
        only: Tensor = written[0]
        return only

    def _draw(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Record a draw as an input of the graph; drawn once in a trace, its numbers would be constants."""
        if self._generator is None or self.backward:
            raise Untraceable(_RANDOM)
        arguments = named_arguments(func, args, kwargs)
        method, numbers = form_of(name, arguments)
        target = self._check(func, args, kwargs)
        tensor = new_tensor(name, arguments) if target is None else target
        key = key_of(tensor)
        sharing = [other for other in self._by_storage.get(key[0], ()) if other != key and other in self._values]
        fill(tensor, method, numbers, self._generator)
        rows = self.writer.rows
        axes = [axis for axis, size in enumerate(tensor.shape) if size and size % rows == 0]
        if len(axes) > 1:
            raise Untraceable(
                "The step draws a tensor with several dimensions as long as the batch. Draw it in Cell.draw."
            )
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
            raise Untraceable(READS_VALUES)
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
            result_values = self._values_of_call(func, op, args, values, options, results, operands)
            result_values = [
                self._as_truth(tensor, value) for tensor, value in zip(results, result_values, strict=True)
            ]
            for tensor, value in zip(results, result_values, strict=True):
                if tensor is not None and value is not None:
                    self._check_result(tensor, value, op)
        except Untraceable as refusal:
            if target is not None or self.backward:
                raise
            # Refused only where the step's results need it: statistics for a log are left out.
            reason = self._located(refusal, name)
            result_values = [Unsupported(tuple(r.shape), reason) if isinstance(r, Tensor) else None for r in results]
        self._know_results(name, op, args, options, zip(results, result_values, strict=True), target)

    def _know_results(
        self,
        name: str,
        op: str,
        args: tuple[Any, ...],
        options: dict[str, Any],
        results: Iterable[tuple[Any, Any]],
        target: Tensor | None,
    ) -> None:
        """Set the values of the tensors that a call has returned; ``op`` is its name without an underscore."""
        for tensor, value in results:
            if tensor is None:
                continue
            if value is None:
                value = Unsupported(tuple(tensor.shape), f"The step uses a result of {name} that has no rule.")
            if target is None and isinstance(value, Weight) and self.is_known(tensor):
                continue  # a view of all of it, such as detach: the same weight
            self.know(tensor, value)
            if isinstance(value, Row) and not self.backward and tensor.dtype in INTEGERS:
                self.whole_numbers.note(op, args, options.get("alpha", 1), tensor)

    def _values_of_call(self, func: Any, name: str, args: tuple[Any, ...], *rest: Any) -> Any:
        """Return the values of a call's results; without elements many operations have no rule."""
        try:
            return self._result_values(func, name, args, *rest)
        except (ValueError, CompilerError):
            shapes = [tuple(tensor.shape) for tensor in tensors_in(args) if not tensor.numel()]
            if not shapes:
                raise
            shape = (
                "(N, " + ", ".join(map(str, shapes[0][1:])) + ")" if self.writer.rows in shapes[0][:1] else shapes[0]
            )
            raise Untraceable(
                f"The step computes with a tensor of shape {shape}, which has no elements; leave it out where a size "
                "is 0."
            ) from None

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
            if not are_joined(self.writer, gradient):
                for half, part in zip(self._halves[slot], (gradient.real, gradient.imaginary), strict=True):
                    self.collect(half.slot, part)
                return
            with without_torch_functions(), disable_current_modes():
                slot, gradient = self._parts[slot].slot, sum_of_pairs(self.writer, gradient)
        if not isinstance(gradient, Sum):
            raise Untraceable(f"The gradient of {self.weights.slots[slot].name} is no sum over rows. {AS_INPUT}")
        so_far = self.gradients.get(slot)
        self.gradients[slot] = gradient if not isinstance(so_far, Sum) else self.writer.total(so_far, gradient)
