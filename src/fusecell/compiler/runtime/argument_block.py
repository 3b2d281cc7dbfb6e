"""The argument block of a call: one array of 64-bit slots through which machine code gets everything it works on.

A kernel is a C function of one pointer, so that neither ctypes nor torch's dispatcher converts anything when it is
called. :mod:`fusecell.compiler.codegen.kernel_abi` decides the order of the slots; here they are found by name and
filled. Nothing here needs torch: a stream that was saved binds NumPy's memory.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fusecell.compiler.ir.graph import SAVED, Graph
from fusecell.compiler.ir.sizes import SLOT_BYTES
from fusecell.errors import CompilerError

if TYPE_CHECKING:
    from fusecell.compiler.codegen import Emitted
    from fusecell.compiler.schedule.plan import Plan

__all__ = ["ArgumentBlock", "NotPreparable", "Slots", "Strided"]

Strided = Any
"""A tensor, or anything else with its ``shape``, ``stride()`` in elements, ``data_ptr()`` and ``is_neg()``."""
_Indices = tuple[int, ...]
"""Slots of one tensor: of its address, then of its strides in bytes."""


class NotPreparable(Exception):
    """A tensor has to be copied before a kernel can read it, so writing addresses is not enough."""


class Slots:
    """Indices of the slots in a kernel's argument block, looked up by name once.

    Arguments:
        graph: what the kernel computes.
        states: the names of its states, in the kernel's order.
        names: of all slots, in order.
        pointers: the slots that must be filled.
        saved: the names of the values saved for the backward.

    Attributes:
        inputs, outputs: address, step and row slot of each (T, N, size) tensor, by name.
        weights, sums: address and stride slots of each weight and of each weight's gradient, by name.
        saved: the address slot of each value saved for the backward, by name.
        first, last, reset: address and row slot of each state before the first step, after the last one, and where
            resets go back to.
        indices: every slot, by name.
    """

    def __init__(
        self,
        graph: Graph,
        states: Iterable[str],
        names: Sequence[str],
        pointers: Collection[str],
        saved: Iterable[str] = (),
    ) -> None:
        self.itemsize = graph.dtype.itemsize
        self.indices = {name: index for index, name in enumerate(names)}
        states = list(states)
        sequence, matrix, rows = (".ptr", ".step", ".row"), (".ptr", ".stride0", ".stride1"), (".ptr", ".row")
        leaves = {op: [graph[index].name for index in graph.leaves(op)] for op in ("input", "weight")}
        self.steps, self.rows, self.reverse = self._find("", "steps", "rows", "reverse")
        self.chunk_steps, self.scratch, self.packed = self._find("", "chunk_steps", "scratch", "packed")
        self.ragged = self._find("", "caller.order", "counts", "offsets")
        self.resets = self._find("resets", "", ".step", ".row")
        self.inputs = {
            name: self._find(f"in.{name}", *sequence) for name in leaves["input"] if not name.startswith(SAVED)
        }
        self.weights = {name: self._find(f"weight.{name}", *matrix) for name in leaves["weight"]}
        self.first, self.last, self.reset = (
            [self._find(f"{kind}.{name}", *rows) for name in states] for kind in ("first", "last", "reset")
        )
        self.saved = {name: self.indices[f"{name}.ptr"] for name in saved}
        self.outputs: dict[str, _Indices] = {}
        self.sums: dict[str, _Indices] = {}
        for label, index in graph.outputs.items():
            if graph[index].type.kind == "sum":
                self.sums[label] = self._find(f"out.{label}", *matrix)
            elif not label.startswith(("state.", SAVED)):
                self.outputs[label] = self._find(f"out.{label}", *sequence)
        self._check(pointers)
        # Copied for each call: a slice of an array is one memcpy.
        self.empty = array("q", bytes(SLOT_BYTES * len(names)))

    @classmethod
    def of_kernel(cls, plan: Plan, emitted: Emitted) -> Slots:
        """Find the slots of a kernel that was emitted for a plan."""
        saved = [buffer.name for buffer in plan.saved()]
        return cls(plan.graph, plan.states, emitted.slots, emitted.pointers, saved)

    def _find(self, name: str, *parts: str) -> _Indices:
        return tuple([self.indices[name + part] for part in parts])

    def _check(self, pointers: Collection[str]) -> None:
        """Hold the names that code generation uses to those that are bound here: a null address would be read."""
        tables = (self.inputs, self.weights, self.outputs, self.sums)
        bound = {indices[0] for table in tables for indices in table.values()} | set(self.saved.values())
        bound |= {indices[0] for indices in (*self.first, *self.last)}
        missing = [name for name in pointers if self.indices[name] not in bound]
        if missing:
            raise CompilerError(f"a kernel would be called without {', '.join(missing)}")


class ArgumentBlock:
    """The arguments of one call; each call has a block of its own, so that a kernel can run in many threads at once.

    Arguments:
        values: the values of the slots, to bind more of them; by default a new block's.

    Attributes:
        copies: what :meth:`bind` had to copy. All that is bound must live until the kernel returns; these live as long
            as the block.
    """

    __slots__ = ("copies", "slots", "values")

    def __init__(self, slots: Slots, values: array[int] | None = None) -> None:
        self.slots, self.values = slots, slots.empty[:] if values is None else values
        self.copies: list[Strided] = []

    @property
    def address(self) -> int:
        """The argument of the kernel."""
        return self.values.buffer_info()[0]

    def bind(
        self,
        *,
        inputs: Iterable[Strided] | None = None,
        weights: Iterable[Strided] | None = None,
        first: Iterable[Strided] | None = None,
        last: Iterable[Strided] | None = None,
        reset: Iterable[Strided] | None = None,
        outputs: Iterable[Strided] | None = None,
        sums: Iterable[Strided] | None = None,
        resets: Strided | None = None,
        ragged: tuple[Strided, Strided, Strided] | None = None,
    ) -> None:
        """Write the addresses and strides of some of a call's tensors, in the order in which the kernel has them.

        Arguments:
            inputs: (T, N, ...), copied unless all features of a row are side by side; one of a single step is the same
                at all steps.
            weights: of any strides.
            first, last: (N, ...), each state before the first step and after the last one.
            reset: (N, size), the states that resets go back to; in a backward, their gradients.
            outputs: (T, N, ...), contiguous from the third dimension on, written by the kernel.
            sums: the memory for each weight's gradient.
            resets: (T, N) bool, which rows go back to ``reset``.
            ragged: order, counts and offsets of rows of different lengths.
        """
        slots, values = self.slots, self.values
        if inputs is not None:
            self.bind_sequences(slots.inputs.values(), inputs)
        if weights is not None:
            self._bind_matrices(slots.weights.values(), weights)
        if first is not None:
            self.bind_states(slots.first, first)
        if last is not None:
            self.bind_states(slots.last, last)
        if reset is not None:
            self.bind_states(slots.reset, reset)
        if outputs is not None:
            self.bind_sequences(slots.outputs.values(), outputs)
        if sums is not None:
            self._bind_matrices(slots.sums.values(), sums)
        if resets is not None:
            address, step, row = slots.resets
            values[address], (values[step], values[row]) = resets.data_ptr(), resets.stride()
        if ragged is not None:
            for slot, table in zip(slots.ragged, ragged, strict=True):
                values[slot] = table.data_ptr()

    def bind_sequences(self, table: Iterable[_Indices], tensors: Iterable[Strided]) -> None:
        """Bind a (T, N, ...) tensor for each entry of a table of slots."""
        values, itemsize = self.values, self.slots.itemsize
        for (address, step, row), tensor in zip(table, tensors, strict=True):
            strides = tensor.stride()
            # Kernels load whole vectors of features, so these must lie side by side.
            if len(strides) != 3 or (strides[2] != 1 and tensor.shape[2] > 1):
                tensor = self._flat(tensor, 2)
                strides = tensor.stride()
            values[address], values[row] = tensor.data_ptr(), strides[1] * itemsize
            # A stride of 0 repeats the only step of an input that is the same at all of them.
            values[step] = strides[0] * itemsize if tensor.shape[0] > 1 else 0

    def bind_states(self, table: Iterable[_Indices], tensors: Iterable[Strided]) -> None:
        """Bind a (N, ...) tensor for each entry of a table of slots."""
        values, itemsize = self.values, self.slots.itemsize
        for (address, row), tensor in zip(table, tensors, strict=True):
            strides = tensor.stride()
            if len(strides) != 2 or (strides[1] != 1 and tensor.shape[1] > 1):
                tensor = self._flat(tensor, 1)
                strides = tensor.stride()
            values[address], values[row] = tensor.data_ptr(), strides[0] * itemsize

    def _flat(self, tensor: Strided, leading: int) -> Strided:
        """Return a tensor with its features in one dimension, side by side: a view where its strides allow."""
        if not any(tensor.stride()[:leading]):  # one row that is repeated, as in the gradient of a sum: copied once
            row = tensor[(slice(0, 1),) * leading].reshape(*(1,) * leading, -1).contiguous()
            self.copies.append(row)
            return row.expand(*tensor.shape[:leading], row.shape[-1])
        flat = tensor.reshape(*tensor.shape[:leading], -1)
        flat = flat if flat.stride()[-1] == 1 or flat.shape[-1] == 1 else flat.contiguous()
        if flat.data_ptr() != tensor.data_ptr():
            self.copies.append(flat)
        return flat

    def _bind_matrices(self, table: Iterable[_Indices], tensors: Iterable[Strided]) -> None:
        """Bind a vector or matrix for each entry of a table of slots: kernels read weights with any strides."""
        values, itemsize = self.values, self.slots.itemsize
        for (address, stride0, stride1), tensor in zip(table, tensors, strict=True):
            if tensor.is_neg():  # the negation is a flag of the tensor, which the memory knows nothing of
                tensor = tensor.resolve_neg()
                self.copies.append(tensor)
            strides = tensor.stride()
            values[address], values[stride0] = tensor.data_ptr(), strides[0] * itemsize
            if len(strides) > 1:
                values[stride1] = strides[1] * itemsize

    def copy(self) -> ArgumentBlock:
        """Return a block with the same values, to be changed for one call."""
        block = ArgumentBlock(self.slots, self.values[:])
        block.copies += self.copies
        return block

    def freeze(self) -> array[int]:
        """Return the values as a template for calls with tensors of the same sizes and strides.

        Raises:
            NotPreparable: if a tensor had to be copied: its copy's address means nothing to another call.
        """
        if self.copies:
            raise NotPreparable
        return self.values
