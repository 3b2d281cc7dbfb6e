"""The values of the tensors of a trace: which one each has in the graph, by its memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusecell.attribute_paths import global_path
from fusecell.compiler.frontend.aten_arguments import Key, key_of
from fusecell.compiler.frontend.custom_functions import is_custom_node
from fusecell.compiler.frontend.dtypes import casts_of, mixes_with
from fusecell.compiler.frontend.graph_writer import Writer
from fusecell.compiler.frontend.isolation import users_globals
from fusecell.compiler.frontend.prologue_recorder import Weights
from fusecell.compiler.frontend.shared_memory import Overwritten, overwritten
from fusecell.compiler.frontend.traced_values import Unsupported, Untraceable, Value, Weight
from fusecell.compiler.ir.graph import Builder
from fusecell.torch_internals import disable_current_modes, without_torch_functions
from fusecell.torch_transforms import is_wrapped

__all__ = ["TensorValues"]

_MOST_LITERALS = 1 << 16
"""Elements of a tensor that a step may spell out: its numbers are part of the text that two traces must agree in."""


class TensorValues:
    """The value of each tensor that a trace has met, and what is written with them.

    A tensor is recognised by its memory, not by its object: what autograd saved comes back as a new object. So that no
    memory is used twice, every tensor that has been met stays alive until the trace ends.

    Arguments:
        builder: the graph to write into.
        rows: the number of rows of the inputs; no other dimension has it.
        dtype: what the step computes in.
        sources: the path of each parameter, buffer and attribute of the cell, and the tensor, by its ``id``.
        leftovers: the same of what an earlier step has left on its module, which no step may read.
    """

    def __init__(
        self,
        builder: Builder,
        rows: int,
        dtype: torch.dtype,
        sources: dict[int, tuple[str, Tensor]],
        leftovers: Mapping[int, tuple[str, Tensor]],
    ) -> None:
        self.builder = builder
        self.dtype = dtype
        self._dtypes = mixes_with(dtype)
        self._casts = casts_of(dtype)
        self.sources = sources
        self._leftovers = leftovers
        self.weights = Weights(builder, dtype)
        self.writer = Writer(builder, rows, self.weights.leaf, self.weights.literal)
        self.backward = False
        self._values: dict[Key, Value | Overwritten] = {}
        self._by_storage: dict[int, set[Key]] = {}
        self._fixed: set[int] = {tensor.untyped_storage()._cdata for _, tensor in sources.values()}
        self._keep_alive: list[Tensor] = []
        # By slot: the tensors that have its value and a gradient, by their edge in autograd's graph.
        self._edges: dict[int, dict[tuple[Any, int], Tensor]] = {}
        self._prologue_nodes: set[Any] = set()
        """The autograd nodes of Functions and operators that the prologue applies as the step did."""

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
        if id(tensor) in self._leftovers:
            # Even where no result needs it: a counter, or a running mean, would have counted one step of all.
            raise Untraceable(
                f"The step reads self.{self._leftovers[id(tensor)][0]}, which the step before it has set."
            )
        path, source = self.sources.get(id(tensor), ("", tensor))
        if not path:
            path = self._global_path(tensor)
        if not path:
            shape = tuple(tensor.shape)
            return Unsupported(
                shape,
                f"The step uses a tensor of shape {shape} that is neither an input, a state, a parameter, a buffer or "
                "an attribute of the cell nor made in the step; keep it on the cell with register_buffer, and a module "
                "that has it as an attribute or in an nn.ModuleList.",
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

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor is made of weights alone."""
        return not is_wrapped(tensor) and isinstance(self.value(tensor), Weight)

    def is_known(self, tensor: Tensor) -> bool:
        return key_of(tensor) in self._values

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
