"""torchrecurrent's layers: whichever cell they have is wrapped, and runs over the sequence before the next one does."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fusecell.layers import scan
from fusecell.other_libraries.loops import Loop, draws, is_plain, time_major
from fusecell.wrapped_module import WrappedCell, wrap

__all__ = ["OneState", "TwoStates"]


class _Layers(Loop):
    """A layer of torchrecurrent: ``cells``, one for each of its layers."""

    overrides: ClassVar[tuple[str, ...]] = ("forward",)
    count: ClassVar[int]
    cells: nn.ModuleList
    hidden_size: int
    batch_first: bool

    def forward(self, inp: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        module: Any = self
        states = (state,) if state is None or isinstance(state, Tensor) else tuple(state)
        fits = all(value is None or (is_plain(value, 3) and len(value) == len(self.cells)) for value in states)
        if not is_plain(inp, 3) or not fits or draws(module):
            return super().forward(inp, state)  # type: ignore[misc, no-any-return]
        x = time_major(inp, self.batch_first)
        after = []
        for index, cell in enumerate(self.cells):
            start = None if state is None else tuple([value[index] for value in states])
            wrapped = self.cell_around(self._wrapped, cell, index=index)
            x, new = scan(wrapped, x, start[0] if start is not None and self.count == 1 else start)
            after.append((new,) if isinstance(new, Tensor) else new)
        stacked = tuple([torch.stack(values) for values in zip(*after, strict=True)])
        return time_major(x, self.batch_first), stacked[0] if self.count == 1 else stacked

    def _wrapped(self, cell: nn.Module) -> WrappedCell:
        return wrap(cell, state_sizes=(self.hidden_size,) * self.count)


class OneState(_Layers):
    """In the place of ``SingleStateRecurrentLayerBase`` and ``DecoupledSingleStateRecurrentLayerBase``."""

    count = 1


class TwoStates(_Layers):
    """In the place of ``DoubleStateRecurrentLayerBase`` and ``DecoupledDoubleStateRecurrentLayerBase``."""

    count = 2
