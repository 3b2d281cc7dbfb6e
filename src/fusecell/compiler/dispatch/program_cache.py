"""What was compiled, kept by all that it depends on, and how often a cell may be compiled for its numbers alone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from fusecell.compiler.frontend.signature import Key, signature, split_numbers
from fusecell.compiler.locks import new_lock
from fusecell.compiler.programs.autograd import compile_trainable
from fusecell.compiler.programs.inference import compile_step
from fusecell.compiler.refusal import Refusal
from fusecell.execution.options import State
from fusecell.execution.runners import no_collection

if TYPE_CHECKING:
    import torch

    from fusecell.cell import Cell

__all__ = ["TRAINABLE_STEPS", "PROGRAMS", "ProgramCache"]

Made = TypeVar("Made")

_MOST_KEPT = 256
_MOST_NUMBERS = 3
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

    def find(self, cell: Cell, inputs: State) -> Made | Refusal:
        """What was made for a cell as it is now; made on first use, for the target of that moment."""
        key = (signature(cell), tuple([value.shape[2:] for value in inputs]), inputs[0].dtype)
        return self._made.get(key) or self._new(key, cell, inputs)

    def forget(self, kinds: Collection[type] | None = None) -> None:
        """Drop what was made for cells of some classes, or of all."""
        with _LOCK:
            for key in [key for key in self._made if kinds is None or key[0][0] in kinds]:
                del self._made[key]
            for cell in [cell for cell in self._numbers if kinds is None or type(cell) in kinds]:
                del self._numbers[cell]

    def _new(self, key: Key, cell: Cell, inputs: State) -> Made | Refusal:
        with _LOCK:
            found = self._made.get(key) or self._too_often(key, cell)
            if found is None:
                features = [tuple(value.shape[2:]) for value in inputs]
                with no_collection():
                    found = self._made[key] = self._build(cell, features, inputs[0].dtype)
                if len(self._made) > _MOST_KEPT:
                    self._made.popitem(last=False)
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


PROGRAMS = ProgramCache(compile_step)
TRAINABLE_STEPS = ProgramCache(compile_trainable)
