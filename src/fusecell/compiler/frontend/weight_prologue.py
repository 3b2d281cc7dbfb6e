"""Weight prologue: what a step computes from its weights alone, recorded once and computed by torch in every call.

It stays out of the graph because it is the same for all rows and steps, and because torch's autograd then goes on from
the gradients of the graph's weights to the parameters behind them, through any operation there is.

Every tensor that is read or computed has a *slot*; a step of the prologue reads some slots and fills others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusecell.attribute_paths import getter, is_plain
from fusecell.cell import Cell
from fusecell.compiler.frontend.dtypes import casts_of, kernel_dtype, mixes_with
from fusecell.compiler.frontend.traced_values import Matrix, Untraceable, Vector, Weight, arranged
from fusecell.compiler.ir.graph import Builder
from fusecell.compiler.ir.storage import Storage
from fusecell.errors import CompilerError
from fusecell.execution.forked_child import one_thread_after_fork
from fusecell.forks import in_forked_child

__all__ = ["CustomCall", "Prologue", "Ref", "Weights"]

# Views of a stored weight that the graph itself expresses, with their gradients, so that nothing is copied in a call:
# a part of a matrix, transposed or not, and elements of a vector. Any other view is computed by torch.
_MATRIX_VIEWS = ("t", "transpose", "permute", "slice", "split", "split_with_sizes")
_VECTOR_VIEWS = ("slice", "split", "split_with_sizes", "unsqueeze", "squeeze", "view", "select", "expand")


class Ref(NamedTuple):
    """Reference to a slot as an argument; detached where the step used it without its gradient."""

    slot: int
    detached: bool = False


@dataclass(frozen=True)
class Step:
    """One call on weights, of an ATen operation or a custom Function, and the slots of its results.

    Arguments:
        results: a slot for each result, -1 for one that is no tensor.
        differentiable: whether the step made the call with gradients on.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[int, ...]
    differentiable: bool = True

    def __str__(self) -> str:
        arguments = [_spelled(arg) for arg in self.args]
        arguments += [f"{key}={_spelled(arg)}" for key, arg in self.kwargs.items()]
        mode = "" if self.differentiable else " without gradients"
        return f"{', '.join(f'%{slot}' for slot in self.results)} = {self.func}({', '.join(arguments)}){mode}"

    def __call__(self, slots: dict[int, Tensor]) -> None:
        """Make the call again, with the present values of the slots."""
        args = [_resolved(arg, slots) for arg in self.args]
        kwargs = {key: _resolved(arg, slots) for key, arg in self.kwargs.items()}
        # As in the step: under no_grad it has frozen what it computes of a weight.
        if self.differentiable:
            result = self.func(*args, **kwargs)
        else:
            with torch.no_grad():
                result = self.func(*args, **kwargs)
        slots.update(zip(self.results, (result,) if isinstance(result, Tensor) else result, strict=True))


@dataclass(frozen=True)
class CustomCall:
    """Custom Function that is applied as in the step, so that its own backward computes its gradient."""

    function: type[torch.autograd.Function]

    def __str__(self) -> str:
        return f"{self.function.__module__}.{self.function.__qualname__}.apply"

    def __call__(self, *args: Any) -> Any:
        return self.function.apply(*args)  # type: ignore[no-untyped-call]  # torch's


@dataclass(frozen=True)
class Leaf:
    """Weight of a graph: a slot, reshaped or cast where the graph takes it in another form.

    Arguments:
        shape: what it is reshaped to; None where it has that shape.
        dtype: what it is cast to; None where it has that dtype.
    """

    slot: int
    shape: tuple[int, ...] | None
    dtype: torch.dtype | None

    def of(self, value: Tensor) -> Tensor:
        """Return the leaf's tensor, from that of its slot; a kernel reads its memory."""
        if not value.is_cpu or value._is_zerotensor():
            raise CompilerError(f"a weight is on {value.device}, where a kernel needs its memory")
        if self.dtype is not None:
            value = value.to(self.dtype)
        return value if self.shape is None else value.reshape(self.shape)


class Prologue:
    """Computation of the weight leaves of a graph from the attributes of a cell, in every call.

    Arguments:
        sources: path and slot of each parameter, buffer or tensor attribute that is read.
        steps: the calls on weights alone, in order.
        leaves: in the order of ``graph.leaves("weight")``.
        globals_: shape and dtype of the sources that are global variables.
        literals: the sources that the step spells out.
        assumed: slots whose values the step has read, and decided by: see :meth:`holds`.
    """

    def __init__(
        self,
        sources: Sequence[tuple[str, int]],
        steps: Sequence[Step],
        leaves: Sequence[Leaf],
        globals_: Mapping[str, tuple[tuple[int, ...], torch.dtype]] | None = None,
        literals: Mapping[str, Tensor] | None = None,
        assumed: Sequence[int] = (),
    ) -> None:
        self.assumed: dict[int, Tensor | None] = dict.fromkeys(assumed)
        self.sources = tuple(sources)
        self.steps = tuple(steps)
        self.globals, self.literals = dict(globals_ or {}), dict(literals or {})
        self.leaves = tuple(leaves)
        self._read_leaves = self._getter()

    @property
    def direct_paths(self) -> list[str] | None:
        """The path of each leaf, where each is an attribute unchanged; else None."""
        if self.steps or self.assumed or any(leaf.shape is not None or leaf.dtype is not None for leaf in self.leaves):
            return None
        paths = {slot: path for path, slot in self.sources}
        return [paths[leaf.slot] for leaf in self.leaves] if all(map(is_plain, paths.values())) else None

    @property
    def stored_leaves(self) -> list[tuple[str, Leaf]] | None:
        """Each leaf with its path, where each is an attribute, if in another shape or dtype; else None."""
        if self.steps or self.assumed or not all(is_plain(path) for path, _ in self.sources):
            return None
        paths = {slot: path for path, slot in self.sources}
        return [(paths[leaf.slot], leaf) for leaf in self.leaves]

    @property
    def source_paths(self) -> list[str]:
        """The path of each source that is none of the step's own numbers."""
        return [path for path, _ in self.sources if path not in self.literals]

    def _getter(self) -> Callable[[Cell], Any] | None:
        """Return one getter for all leaves, where each is an attribute unchanged."""
        paths = self.direct_paths
        if paths is None:
            return None
        if any("." in path for path in paths):
            getters = [attrgetter(path) for path in paths]
            return lambda cell: tuple([get(cell) for get in getters])
        return lambda cell: _tensors_of(cell, paths)

    def values(self, cell: Cell) -> tuple[Tensor, ...]:
        """Return the present weights, one for each weight leaf; with autograd where grad mode is on."""
        if self._read_leaves is not None:
            leaves: tuple[Tensor, ...] = self._read_leaves(cell)
            return leaves
        return self.computed(self.originals(cell))

    def computed(self, originals: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Compute the weights from the result of :meth:`originals`."""
        slots = self.slot_values(originals)
        return tuple(leaf.of(slots[leaf.slot]) for leaf in self.leaves)

    def computed_from(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Compute the weights from the tensors at :attr:`source_paths`."""
        rest = iter(tensors)
        originals = [self.literals[path] if path in self.literals else next(rest) for path, _ in self.sources]
        if in_forked_child():  # asked first, as to enter a context takes longer
            with one_thread_after_fork():
                return self.computed(originals)
        return self.computed(originals)

    def slot_values(self, originals: Sequence[Tensor]) -> dict[int, Tensor]:
        """Return the value of every slot, after all steps."""
        slots = {slot: value for (_, slot), value in zip(self.sources, originals, strict=True)}
        for step in self.steps:
            step(slots)
        return slots

    def assume(self, cell: Cell) -> None:
        """Take the present values of what the step has read as those that it was traced with."""
        if self.assumed:
            values = self._present(cell)
            self.assumed = {slot: values[slot].detach().clone() for slot in self.assumed}

    def holds(self, cell: Cell) -> bool:
        """Whether all that the step has read, and may have decided by, has the value that it was traced with."""
        if not self.assumed:
            return True
        values = self._present(cell)
        return all(value is not None and torch.equal(values[slot], value) for slot, value in self.assumed.items())

    def _present(self, cell: Cell) -> dict[int, Tensor]:
        with torch.no_grad():
            return self.slot_values(self.originals(cell))

    def originals(self, cell: Cell) -> tuple[Tensor, ...]:
        """Return the attributes that the leaves are computed from; none where each leaf is an attribute unchanged."""
        if self._read_leaves is not None:
            return ()
        return tuple(
            self.literals[path] if path in self.literals else self._checked(path, getter(path)(cell))
            for path, _ in self.sources
        )

    def _checked(self, path: str, value: Tensor) -> Tensor:
        """Return a tensor if it is what the graph was traced with, where no signature of the cell says so."""
        expected = self.globals.get(path)
        if expected is not None and (tuple(value.shape), value.dtype) != expected:
            raise ValueError(
                f"{path} has shape {tuple(value.shape)} and dtype {value.dtype}, where the cell was compiled with "
                f"{expected[0]} and {expected[1]}: a global tensor keeps its shape and dtype. Keep it on the cell, "
                "where a change compiles it anew."
            )
        return value

    def bindings(self, leaves: Sequence[Tensor], originals: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the attributes, by path, that an earlier call of :meth:`values` and :meth:`originals` returned."""
        if self._read_leaves is None:
            sources = zip(self.sources, originals, strict=True)
            return {path: value for (path, _), value in sources if path not in self.literals}
        paths = {slot: path for path, slot in self.sources}
        return {paths[leaf.slot]: value for leaf, value in zip(self.leaves, leaves, strict=True)}

    def describe(self) -> str:
        """Return the prologue as text, a line for each source, step and leaf; equal prologues have equal texts."""
        values = {path: f"{path}: {value.dtype} {value.tolist()}" for path, value in self.literals.items()}
        lines = [f"%{slot} = {values.get(path, path)}" for path, slot in self.sources]
        lines += [str(step) for step in self.steps]
        lines += [f"assumed %{slot}" for slot in self.assumed]
        for leaf in self.leaves:
            shape = "" if leaf.shape is None else f" as {list(leaf.shape)}"
            lines.append(f"leaf %{leaf.slot}{shape}" + ("" if leaf.dtype is None else f" in {leaf.dtype}"))
        return "\n".join(lines) + "\n"


def _tensors_of(cell: Cell, names: Sequence[str]) -> tuple[Tensor, ...]:
    """Return attributes of the cell."""
    # Parameters straight from their table: nn.Module's __getattr__ is slow, and every call comes here.
    table = cell._parameters
    tensors = [table.get(name) for name in names]
    return tuple([getattr(cell, name) if value is None else value for name, value in zip(names, tensors, strict=True)])


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
        refs = _refs((args, kwargs))
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
        base = self.slots[_refs(args)[0].slot].name + "_"
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
        if gradients and self._flows(_refs(args)):
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
                needed.update(ref.slot for ref in _refs((step.args, step.kwargs)))
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


def _refs(value: Any) -> list[Ref]:
    if isinstance(value, Ref):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [ref for item in value for ref in _refs(item)] if isinstance(value, list | tuple) else []


def _resolved(value: Any, slots: dict[int, Tensor]) -> Any:
    if isinstance(value, Ref):
        return slots[value.slot].detach() if value.detached else slots[value.slot]
    if isinstance(value, list):
        return [_resolved(item, slots) for item in value]
    if isinstance(value, tuple) and _refs(value):
        return tuple([_resolved(item, slots) for item in value])
    return value


def _spelled(value: Any) -> str:
    if isinstance(value, Ref):
        return f"%{value.slot}" + (".detach()" if value.detached else "")
    return "[" + ", ".join(map(_spelled, value)) + "]" if isinstance(value, list) else str(value)
