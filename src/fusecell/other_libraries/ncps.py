"""ncps' CfC and LTC, of regular time steps: their cell, and the LSTM of their mixed memory, are one cell's step."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from fusecell.cell import Cell
from fusecell.execution.options import State
from fusecell.layers import scan
from fusecell.other_libraries.loops import Loop, draws, is_plain, time_major

__all__ = ["Cfc", "Ltc"]


class _Step(Cell):
    """One pass of the loop in ``CfC.forward`` and ``LTC.forward``."""

    def __init__(self, cell: Any, memory: Any, input_size: int) -> None:
        units = memory.hidden_size if memory is not None else getattr(cell, "state_size", None) or cell.hidden_size
        super().__init__(input_size, units)
        self.rnn_cell, self.memory = cell, memory
        self.states = ("h",) if memory is None else ("h", "c")  # type: ignore[misc]  # a class attribute elsewhere
        self.output_size = getattr(cell, "output_size", units)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        rest: State = ()
        h = state[0]
        if self.memory is not None:
            h, c = self.memory(x, (h, state[1]))
            rest = (c,)
        output, h = self.rnn_cell.forward(x, h, 1.0)
        return output, (h, *rest)


class _Continuous(Loop):
    overrides: ClassVar[tuple[str, ...]] = ("forward",)
    batch_first: bool
    return_sequences: bool
    use_mixed: bool
    rnn_cell: nn.Module

    def forward(self, input: Tensor, hx: Any = None, timespans: Tensor | None = None) -> tuple[Tensor, Any]:
        module: Any = self
        states = () if hx is None else hx if self.use_mixed else (hx,)
        fits = isinstance(states, tuple | list) and all(is_plain(value, 2) for value in states)
        if timespans is not None or not is_plain(input, 3) or not fits or draws(module):
            return super().forward(input, hx, timespans)  # type: ignore[misc, no-any-return]
        memory = module.lstm if self.use_mixed else None
        features = input.shape[-1]
        cell = self.cell_around(lambda cell, memory: _Step(cell, memory, features), self.rnn_cell, memory)
        outputs: Any
        outputs, after = scan(cell, time_major(input, self.batch_first), None if hx is None else hx)
        outputs = self._readout(outputs if self.return_sequences else outputs[-1])
        return (time_major(outputs, self.batch_first) if self.return_sequences else outputs), after

    def _readout(self, outputs: Tensor) -> Tensor:
        return outputs


class Cfc(_Continuous):
    """In the place of ``ncps.torch.CfC``."""

    fc: nn.Module

    def _readout(self, outputs: Tensor) -> Tensor:
        result: Tensor = self.fc(outputs)
        return result


class Ltc(_Continuous):
    """In the place of ``ncps.torch.LTC``."""
