"""What was compiled, kept by all that it depends on, and how often a cell may be compiled for its numbers alone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from fusecell.compiler.frontend.signature import Key, signature, split_numbers, without_attributes
from fusecell.compiler.program_registry import register_cache
from fusecell.compiler.programs.autograd import compile_trainable
from fusecell.compiler.programs.inference import compile_step
from fusecell.compiler.refusal import Refusal
from fusecell.execution.options import State
from fusecell.execution.runners import no_collection
from fusecell.forks import new_lock

if TYPE_CHECKING:
    import torch

    from fusecell.cell import Cell

__all__ = ["TRAINABLE_STEPS", "PROGRAMS", "ProgramCache"]

Made = TypeVar("Made")

_MOST_KEPT = 256
_MOST_NUMBERS = 3
_MOST_CHANGES = 3
"""Traces of a cell that its step has changed: one that makes something at its first call alone is compiled after it."""
_LOCK = new_lock()


class ProgramCache(Generic[Made]):
    """What was made of cells, by all that it depends on; the oldest goes first.

    Arguments:
        build: makes it of a cell, the feature shape of each input and a dtype.
    """

    def __init__(self, build: Callable[[Cell, Sequence[tuple[int, ...]], torch.dtype], Made | Refusal]) -> None:
        self._build = build
        self._made: OrderedDict[Key, Made | Refusal] = OrderedDict()
        # Of each cell, the values of each number it was compiled with, by all else that it depends on.
        self._numbers: WeakKeyDictionary[Cell, dict[Key, dict[str, set[Any]]]] = WeakKeyDictionary()
        # Of each cell that its step changes, why it was refused.
        self._changing: WeakKeyDictionary[Cell, list[_Changing]] = WeakKeyDictionary()
        register_cache(self.forget)

    def find(self, cell: Cell, inputs: State) -> Made | Refusal:
        """What was made for a cell as it is now; made on first use, for the target of that moment."""
        key = (signature(cell), tuple([value.shape[2:] for value in inputs]), inputs[0].dtype)
        return self._made.get(key) or self._new(key, cell, inputs)

    def forget(self, kinds: Collection[type] | None = None) -> None:
        """Drop what was made for cells of some classes, or that hold one, or for all."""
        with _LOCK:
            for key in [key for key in self._made if kinds is None or _holds(key[0], kinds)]:
                del self._made[key]
            for table in (self._numbers, self._changing):
                for cell in list(table):
                    if kinds is None or any(type(module) in kinds for module in cell.modules()):
                        del table[cell]

    def _new(self, key: Key, cell: Cell, inputs: State) -> Made | Refusal:
        with _LOCK:
            changing = self._known_change(key, cell)
            if changing is not None and changing.count >= _MOST_CHANGES:
                return self._made.get(key) or changing.refusal
            found = self._made.get(key) or self._too_often(key, cell)
            if found is None:
                features = [tuple(value.shape[2:]) for value in inputs]
                with no_collection():
                    found = self._build(cell, features, inputs[0].dtype)
                if isinstance(found, Refusal):
                    found = self._refused(key, cell, found, changing)
                self._made[key] = found
                if len(self._made) > _MOST_KEPT:
                    self._made.popitem(last=False)
            return found

    def _known_change(self, key: Key, cell: Cell) -> _Changing | None:
        """The refusal of a cell that its step changes, if it is as it was then in all that the step doesn't change."""
        for changing in self._changing.get(cell, ()):
            if (without_attributes(key[0], changing.refusal.changes), *key[1:]) == changing.rest:
                return changing
        return None

    def _refused(self, key: Key, cell: Cell, found: Refusal, changing: _Changing | None) -> Refusal:
        """Why a cell is refused: what its step changes says more than what comes of it at a later call."""
        if changing is not None:
            changing.count += 1
            return changing.refusal
        if found.changes:
            rest = (without_attributes(key[0], found.changes), *key[1:])
            self._changing.setdefault(cell, []).append(_Changing(rest, found))
        return found

    def _too_often(self, key: Key, cell: Cell) -> Refusal | None:
        """Why a cell with a number that keeps changing isn't compiled once more, or None if it is."""
        rest, numbers = split_numbers(key[0])
        tried = self._numbers.setdefault(cell, {}).setdefault((rest, *key[1:]), {name: set() for name in numbers})
        names = [name for name, value in numbers.items() if value not in tried[name]]
        names = [name for name in names if len(tried[name]) >= _MOST_NUMBERS]
        if not names:
            for name, value in numbers.items():
                tried[name].add(value)
            return None
        name = names[0].rpartition(".")[2].partition("[")[0]
        what = f"attribute {names[0]} changes" if len(names) == 1 else f"attributes {', '.join(names)} change"
        return Refusal(
            (
                f"Its {what} again, after {_MOST_NUMBERS} values that it was compiled for. Make it a buffer without "
                f'dimensions, self.register_buffer("{name}", torch.tensor(value)): its value is read at every call.',
            )
        )


@dataclass
class _Changing:
    """A refusal of a cell that its step changes, all that it depends on beside what changes, and how often it was."""

    rest: Key
    refusal: Refusal
    count: int = 1


def _holds(key: Key, kinds: Collection[type]) -> bool:
    """Whether a module of some classes has a part in a signature."""
    return any(_holds(entry, kinds) if type(entry) is tuple else entry in kinds for entry in key if _nameable(entry))


def _nameable(entry: object) -> bool:
    return isinstance(entry, type | tuple)


PROGRAMS = ProgramCache(compile_step)
TRAINABLE_STEPS = ProgramCache(compile_trainable)
