"""Cache of compiled programs, by the signature of the cell, with a limit on recompilations for changing numbers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary

from fusecell.compiler.cache_registry import register_cache
from fusecell.compiler.frontend import Traced
from fusecell.compiler.frontend.signature import Key, signature, split_numbers, without_attributes
from fusecell.compiler.programs.autograd import compile_trainable
from fusecell.compiler.programs.inference import compile_step
from fusecell.compiler.programs.progress import told_if_slow
from fusecell.compiler.refusal import Refusal
from fusecell.execution.options import State
from fusecell.execution.runners import no_collection
from fusecell.forks import new_lock

if TYPE_CHECKING:
    import torch

    from fusecell.cell import Cell

__all__ = ["PROGRAMS", "TRAINABLE_STEPS", "ProgramCache"]

Compiled = TypeVar("Compiled", bound="_Compiled")

_MAX_PROGRAMS = 256
_MAX_VALUES = 3
"""Values of a number that a cell is compiled for, before it is refused as one that changes all the time."""
_MAX_CHANGES = 3
"""Refusals of a cell because its step changes it: one that builds something at its first call only is compiled then."""
_CHANGED = Refusal(
    (
        "The step reads the value of a buffer or another tensor of the cell, to decide what to compute, and it has "
        "another value than when it was compiled. fusecell.refresh(module) compiles it anew; for a value that changes "
        "all the time write torch.where(condition, a, b).",
    )
)
_LOCK = new_lock()


class _Compiled(Protocol):
    """What is compiled for a cell."""

    @property
    def traced(self) -> Traced: ...


class ProgramCache(Generic[Compiled]):
    """What was compiled for cells, by all that it depends on; first in, first out.

    Arguments:
        build: compiles a cell for the feature shape of each input and a dtype, and the dtype of each input where some
            have another.
    """

    def __init__(self, build: Callable[..., Compiled | Refusal]) -> None:
        self._build = build
        self._programs: OrderedDict[Key, Compiled | Refusal] = OrderedDict()
        # For each cell and all else that it depends on, the values of each number that it was compiled with.
        self._numbers: WeakKeyDictionary[Cell, dict[Key, dict[str, set[Any]]]] = WeakKeyDictionary()
        self._changing: WeakKeyDictionary[Cell, list[_ChangingCell]] = WeakKeyDictionary()
        self._leftovers: WeakKeyDictionary[Cell, tuple[str, ...]] = WeakKeyDictionary()
        register_cache(self.forget)

    def find(self, cell: Cell, inputs: State, dtype: torch.dtype | None = None) -> Compiled | Refusal:
        """Return what was compiled for a cell as it is now, or compile it, for the target that is in force.

        Arguments:
            dtype: that of the cell's states, where an input may be of integers.
        """
        first = inputs[0].dtype if dtype is None else dtype
        leftovers = self._leftovers.get(cell, ()) if self._leftovers else ()
        key: Key = (signature(cell, without=leftovers), tuple([value.shape[2:] for value in inputs]), first)
        for value in inputs:
            if value.dtype is not first:
                key = (*key, tuple([value.dtype for value in inputs]))
                break
        # Without the lock, as a dict's get is atomic: most calls find their program.
        program = self._programs.get(key) or self._new(key, cell, inputs)
        return program if isinstance(program, Refusal) or program.traced.weights.holds(cell) else _CHANGED

    def forget(self, kinds: Collection[type] | None = None) -> None:
        """Drop what was compiled for cells of some classes, or that contain a module of one, or for all."""
        with _LOCK:
            for key in [key for key in self._programs if kinds is None or _contains(key[0], kinds)]:
                del self._programs[key]
            for table in (self._numbers, self._changing, self._leftovers):
                for cell in list(table):
                    if kinds is None or any(type(module) in kinds for module in cell.modules()):
                        del table[cell]

    def _new(self, key: Key, cell: Cell, inputs: State) -> Compiled | Refusal:
        with _LOCK:
            changing = self._find_changing(key, cell)
            if changing is not None and changing.count >= _MAX_CHANGES:
                return self._programs.get(key) or changing.refusal
            program = self._programs.get(key) or self._too_many_values(key, cell)
            if program is None:
                features = [tuple(value.shape[2:]) for value in inputs]
                with no_collection(), told_if_slow(type(cell).__name__):
                    program = self._build(cell, features, *key[2:])
                    if isinstance(program, Refusal) and _evaluate(cell, program.changes):
                        key = (signature(cell, without=self._leftovers.get(cell, ())), *key[1:])
                        program = self._build(cell, features, *key[2:])
                if isinstance(program, Refusal):
                    program = self._refuse(key, cell, program, changing)
                elif program.traced.leftovers:
                    # The next call finds other tensors there, and the same program.
                    self._leftovers[cell] = tuple({*self._leftovers.get(cell, ()), *program.traced.leftovers})
                    key = (signature(cell, without=self._leftovers[cell]), *key[1:])
                self._programs[key] = program
                if len(self._programs) > _MAX_PROGRAMS:
                    self._programs.popitem(last=False)
            return program

    def _find_changing(self, key: Key, cell: Cell) -> _ChangingCell | None:
        """Find the refusal of a cell that its own step changes, if nothing else of the cell has changed since."""
        for changing in self._changing.get(cell, ()):
            if (without_attributes(key[0], changing.refusal.changes), *key[1:]) == changing.rest:
                return changing
        return None

    def _refuse(self, key: Key, cell: Cell, refusal: Refusal, changing: _ChangingCell | None) -> Refusal:
        """Return the refusal to give: the first, which names what the step changes, not what follows from that."""
        if changing is not None:
            changing.count += 1
            return changing.refusal
        if refusal.changes:
            rest = (without_attributes(key[0], refusal.changes), *key[1:])
            self._changing.setdefault(cell, []).append(_ChangingCell(rest, refusal))
        return refusal

    def _too_many_values(self, key: Key, cell: Cell) -> Refusal | None:
        """Refuse a cell that was compiled for several values of a number already, and has another one now.

        A schedule that sets a rate before each call would otherwise wait for the compiler each time.
        """
        rest, numbers = split_numbers(key[0])
        compiled = self._numbers.setdefault(cell, {}).setdefault((rest, *key[1:]), {name: set() for name in numbers})
        names = [name for name, value in numbers.items() if value not in compiled[name]]
        names = [name for name in names if len(compiled[name]) >= _MAX_VALUES]
        if not names:
            for name, value in numbers.items():
                compiled[name].add(value)
            return None
        name = names[0].rpartition(".")[2].partition("[")[0].rpartition(" ")[2]
        what = f"attribute {names[0]} changes" if len(names) == 1 else f"attributes {', '.join(names)} change"
        return Refusal(
            (
                f"Its {what} again, after {_MAX_VALUES} values that it was compiled for. Make it a buffer without "
                f'dimensions, self.register_buffer("{name}", torch.tensor(value)): its value is read at every call.',
            )
        )


@dataclass
class _ChangingCell:
    """The refusal of a cell that its own step changes.

    Arguments:
        rest: the key without the attributes that change.
        count: how often the cell was refused.
    """

    rest: Key
    refusal: Refusal
    count: int = 1


def _evaluate(cell: Cell, paths: Sequence[str]) -> bool:
    """Evaluate the cached properties of a cell whose first step would leave them on it; return whether all are such."""
    try:
        owners = [(cell.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in paths]
    except AttributeError:  # of no module
        return False
    if not owners or not all(isinstance(getattr(type(owner), name, None), cached_property) for owner, name in owners):
        return False
    for owner, name in owners:
        getattr(owner, name)
    return True


def _contains(key: Key, kinds: Collection[type]) -> bool:
    """Whether a signature contains one of some classes."""
    for entry in key:
        if _contains(entry, kinds) if type(entry) is tuple else isinstance(entry, type) and entry in kinds:
            return True
    return False


PROGRAMS = ProgramCache(compile_step)
TRAINABLE_STEPS = ProgramCache(compile_trainable)
