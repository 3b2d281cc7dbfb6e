"""Recorder of the weight prologue, while a step is traced: what the step computes from its weights alone.

It also adds the graph's weight leaves, each a slot of the prologue in the form that the graph takes it in, and knows
which views of a weight the graph itself expresses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusecell.compiler.frontend.dtypes import casts_of, kernel_dtype, mixes_with
from fusecell.compiler.frontend.traced_values import Matrix, Untraceable, Vector, Weight, arranged
from fusecell.compiler.frontend.weight_prologue import CustomCall, Leaf, Prologue, Ref, Step, refs_in
from fusecell.compiler.ir.graph import Builder
from fusecell.compiler.ir.storage import Storage

__all__ = ["Weights", "weight_views"]

# Views of a stored weight that the graph itself expresses, with their gradients, so that nothing is copied in a call:
# a part of a matrix, transposed or not, and elements of a vector. Any other view is computed by torch.
_MATRIX_VIEWS = ("t", "transpose", "permute", "slice", "split", "split_with_sizes")
_VECTOR_VIEWS = ("slice", "split", "split_with_sizes", "unsqueeze", "squeeze", "view", "select", "expand")


@dataclass
class _Slot:
    """Tensor of the prologue while it is recorded."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    name: str
    path: str | None
    tensor: Tensor | None
    """The attribute itself; None for the result of a step."""
    storage: int
    differentiable: bool
    """Whether a gradient flows through it in a call, unless the step detaches it."""


class Weights:
    """Recorder of the prologue while a step is traced; it also adds the graph's weight leaves."""

    def __init__(self, builder: Builder, dtype: torch.dtype) -> None:
        self.builder = builder
        self.dtype = dtype
        self.slots: list[_Slot] = []
        self.steps: list[Step] = []
        self.literals: dict[str, Tensor] = {}
        self._assumed: list[int] = []
        self.leaves: dict[tuple[int, str], int] = {}
        """The weight node of a slot in each form that the graph takes it in: ``"matrix"`` or flat ``"vector"``."""
        self._gradients: bool | None = None

    @contextmanager
    def as_outside(self) -> Iterator[None]:
        """Record calls inside the block with the grad mode of the code around it."""
        self._gradients = torch.is_grad_enabled()
        try:
            yield
        finally:
            self._gradients = None

    def _with_gradients(self) -> bool:
        return torch.is_grad_enabled() if self._gradients is None else self._gradients

    def source(self, path: str, tensor: Tensor) -> Weight:
        """Add a slot for a parameter, buffer or attribute; return its value."""
        self.slots.append(
            _Slot(
                tuple(tensor.shape),
                tensor.dtype,
                re.sub(r"\W+", "_", path.rpartition("globals[")[2]).strip("_"),
                path,
                tensor,
                _storage(tensor),
                tensor.requires_grad,
            )
        )
        return _whole(tuple(tensor.shape), len(self.slots) - 1)

    def literal(self, tensor: Tensor) -> Weight:
        """Add a slot for a tensor whose numbers the step spells out; return its value."""
        path = f"literals[{len(self.literals)}]"
        self.literals[path] = tensor.detach().clone()
        return self.source(path, tensor)

    def record(
        self, func: Callable[..., Any], name: str, args: Any, kwargs: Any, results: Sequence[Tensor]
    ) -> list[Weight]:
        """Record a call on weights alone as a step of the prologue; ``args`` hold Refs for tensors."""
        refs = refs_in((args, kwargs))
        # Named after the weight that it begins with and the operation, such as w_relu: names appear in messages.
        base = self.slots[refs[0].slot].name + "_" if refs else ""
        gradients = self._with_gradients()
        flows = gradients and self._flows(refs)
        first = len(self.slots)
        for result in results:
            self.slots.append(
                _Slot(tuple(result.shape), result.dtype, base + name.strip("_"), None, None, _storage(result), flows)
            )
        slots = tuple(range(first, len(self.slots)))
        self.steps.append(Step(func, tuple(args), dict(kwargs), slots, gradients))
        return [_whole(self.slots[slot].shape, slot) for slot in slots]

    def record_function(self, func: CustomCall, args: Sequence[Any], results: Sequence[Tensor | None]) -> list[Weight]:
        """Record a custom Function as one step; ``args`` hold Refs for tensors, ``results`` None for None."""
        base = self.slots[refs_in(args)[0].slot].name + "_"
        slots: list[int] = []
        for result in results:
            if result is None:
                slots.append(-1)
                continue
            slots.append(len(self.slots))
            shape, name = tuple(result.shape), base + func.function.__name__
            storage = _storage(result)
            self.slots.append(_Slot(shape, result.dtype, name, None, None, storage, result.requires_grad))
        self.steps.append(Step(func, tuple(args), {}, tuple(slots), torch.is_grad_enabled()))
        return [_whole(self.slots[slot].shape, slot) for slot in slots if slot >= 0]

    def record_write(self, func: Callable[..., Any], args: Any, kwargs: Any, target: Weight) -> None:
        """Record a call that writes into the result of an earlier step."""
        # A leaf is read once, after all steps: an earlier use of it would see the new value.
        if target.slot in self.leaf_slots():
            raise Untraceable(
                "The step changes in place a weight that the step has already used; change a clone() of it."
            )
        gradients = self._with_gradients()
        self.steps.append(Step(func, tuple(args), dict(kwargs), (target.slot,), gradients))
        if gradients and self._flows(refs_in(args)):
            for slot in self.slots:
                slot.differentiable |= slot.storage == self.slots[target.slot].storage

    def _flows(self, refs: Sequence[Ref]) -> bool:
        return any(self.slots[ref.slot].differentiable and not ref.detached for ref in refs)

    def leaf(self, slot: int, form: str) -> int:
        """Return the weight node of a slot, as a "matrix", a flat "vector", or a "table" of flat entries."""
        leaf = self.leaves.get((slot, form))
        if leaf is not None:
            return leaf
        weight = self.slots[slot]
        # A narrower weight is promoted where it meets a value of the step.
        mixes = weight.dtype in (*mixes_with(self.dtype), *casts_of(self.dtype))
        mixes = mixes or not (weight.dtype.is_floating_point and weight.shape)
        if weight.dtype.is_complex or not mixes:
            raise Untraceable(
                f"The weight {weight.name} is {weight.dtype}, where the step computes in {self.dtype}. Convert the "
                f"cell, .to({self.dtype})."
            )
        if 0 in weight.shape:
            raise Untraceable(f"The weight {weight.name} has no elements; leave it out where a size is 0.")
        attrs: dict[str, Any] = {"shape": list(_leaf_shape(weight.shape, form))}
        if form == "matrix" and self.dtype == weight.dtype == torch.bfloat16:
            attrs["numbers"] = Storage.BF16.value
        node = self.builder.append("weight", (), attrs, weight.name)
        self.leaves[slot, form] = node
        return node

    def assume(self, slot: int) -> None:
        """Note that the step has read the value of a slot."""
        if slot not in self._assumed:
            self._assumed.append(slot)

    def leaf_slots(self) -> set[int]:
        """Return the slots that the graph takes, in whatever form."""
        return {slot for slot, _ in self.leaves}

    def prologue(self) -> Prologue:
        """Return the prologue of the leaves: the steps that they need, and no others."""
        needed = {*self.leaf_slots(), *self._assumed}
        steps: list[Step] = []
        for step in reversed(self.steps):
            # A write into a view changes what it is a view of.
            memory = {self.slots[slot].storage for slot in needed} if _writes(step.func) else set()
            if needed.intersection(step.results) or memory.intersection(self.slots[s].storage for s in step.results):
                steps.append(step)
                needed.update(ref.slot for ref in refs_in((step.args, step.kwargs)))
        sources = [(each.path, slot) for slot, each in enumerate(self.slots) if each.path and slot in needed]
        leaves = [self._leaf(slot, form) for slot, form in self.leaves]
        read = {path: self.slots[slot] for path, slot in sources if path.startswith("globals[")}
        globals_ = {path: (slot.shape, slot.dtype) for path, slot in read.items()}
        literals = {path: self.literals[path] for path, _ in sources if path in self.literals}
        return Prologue(sources, steps[::-1], leaves, globals_, literals, self._assumed)

    def _leaf(self, slot: int, form: str) -> Leaf:
        weight = self.slots[slot]
        shape = _leaf_shape(weight.shape, form)
        dtype = kernel_dtype(self.dtype)
        return Leaf(slot, None if shape == weight.shape else shape, None if weight.dtype == dtype else dtype)


def weight_views(
    func: Callable[..., Any], name: str, value: Weight, rest: Sequence[Any], results: Sequence[Weight]
) -> list[Weight]:
    """Return the results of an operation on one weight, as views of the stored one where the graph expresses them.

    Arguments:
        func: the operation.
        name: of it, without its namespace.
        value: its first argument.
        rest: its other arguments.
        results: as recorded, in slots of their own.
    """
    view = value.view
    if isinstance(view, Matrix) and name in _MATRIX_VIEWS and all(len(part.shape) == 2 for part in results):
        views = _matrix_views(name, view, value.shape, rest, results)
        if views is not None:
            return [Weight(part.shape, part.slot, each) for part, each in zip(results, views, strict=True)]
    if (
        isinstance(view, Vector)
        and name in _VECTOR_VIEWS
        and not (name == "slice" and tuple(rest[3:4]) not in ((), (1,)))
    ):
        # The operation itself, on the indices of the elements.
        index = func(torch.from_numpy(view.index), *rest)
        parts = [index] if isinstance(index, Tensor) else index
        return [Weight(w.shape, w.slot, Vector(view.slot, p.numpy())) for w, p in zip(results, parts, strict=True)]
    return list(results)


def _matrix_views(
    name: str, view: Matrix, shape: tuple[int, ...], rest: Sequence[Any], results: Sequence[Weight]
) -> list[Matrix] | None:
    """Return the views that an operation of `_MATRIX_VIEWS` makes of one; None for a slice with a step."""
    if name in ("t", "transpose", "permute"):
        order = list(rest[0]) if name == "permute" else [1, 0] if name == "t" or rest[0] % 2 != rest[1] % 2 else [0, 1]
        return [view if [dim % 2 for dim in order] == [0, 1] else view.transposed()]
    if name == "slice":
        arguments = [*rest, *[0, None, None, 1][len(rest) :]]
        dim, start, step = arguments[0], arguments[1], arguments[3]
        dim = dim % 2
        if step != 1:
            return None
        begin = 0 if start is None else start + shape[dim] if start < 0 else start
        return [view.narrowed(dim, begin, begin + results[0].shape[dim])]
    dim = rest[1] % 2 if len(rest) > 1 else 0
    views, begin = [], 0
    for part in results:
        views.append(view.narrowed(dim, begin, begin + part.shape[dim]))
        begin += part.shape[dim]
    return views


def _whole(shape: tuple[int, ...], slot: int) -> Weight:
    """Return all of a slot as a weight."""
    if len(shape) == 2:
        return Weight(shape, slot, Matrix(slot, (0, shape[0]), (0, shape[1])))
    return Weight(shape, slot, Vector(slot, arranged(shape)) if len(shape) < 2 else None)


def _leaf_shape(shape: tuple[int, ...], form: str) -> tuple[int, ...]:
    count = 1
    for size in shape:
        count *= size
    if form == "vector":
        return (count,)
    if form == "table":
        return shape[0], count // shape[0]
    if len(shape) < 2 or count != shape[-1] * shape[-2]:
        raise Untraceable(
            f"The step multiplies rows by a weight of shape {shape}: only matrices are compiled. Flatten it to one."
        )
    return shape[-2:]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _writes(func: Any) -> bool:
    return not isinstance(func, CustomCall) and bool(func._schema.is_mutable)
