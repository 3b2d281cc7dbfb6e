"""Weight prologue: what a step computes from its weights alone, recorded once and computed by torch in every call.

It stays out of the graph because it is the same for all rows and steps, and because torch's autograd then goes on from
the gradients of the graph's weights to the parameters behind them, through any operation there is.

Every tensor that is read or computed has a *slot*; a step of the prologue reads some slots and fills others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusecell.attribute_paths import getter, is_plain
from fusecell.cell import Cell
from fusecell.errors import CompilerError
from fusecell.execution.forked_child import one_thread_after_fork
from fusecell.forks import in_forked_child

__all__ = ["CustomCall", "Leaf", "Prologue", "Ref", "Step", "refs_in"]


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


def refs_in(value: Any) -> list[Ref]:
    """List the references to slots among a call's arguments."""
    if isinstance(value, Ref):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [ref for item in value for ref in refs_in(item)] if isinstance(value, list | tuple) else []


def _resolved(value: Any, slots: dict[int, Tensor]) -> Any:
    if isinstance(value, Ref):
        return slots[value.slot].detach() if value.detached else slots[value.slot]
    if isinstance(value, list):
        return [_resolved(item, slots) for item in value]
    if isinstance(value, tuple) and refs_in(value):
        return tuple([_resolved(item, slots) for item in value])
    return value


def _spelled(value: Any) -> str:
    if isinstance(value, Ref):
        return f"%{value.slot}" + (".detach()" if value.detached else "")
    return "[" + ", ".join(map(_spelled, value)) + "]" if isinstance(value, list) else str(value)
