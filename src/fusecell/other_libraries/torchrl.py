"""torchrl's LSTMModule and GRUModule: a row of several episodes is one call with resets.

torchrl has several backends for such a row; its ``"pad"`` cuts rows into episodes, pads and packs them. Here ``"pad"``
and ``"auto"`` take the way of ``"scan"``, which is given the rows as they are, and which is fusecell's.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fusecell.cell import Cell
from fusecell.drop_in import GRU, LSTM
from fusecell.execution.options import Options, State
from fusecell.layers.arguments import SequenceShape
from fusecell.layers.scan import scan_time_major
from fusecell.other_libraries.loops import Loop

__all__ = ["GruModule", "LstmModule"]


class _StatesOut(Cell):
    """A cell whose outputs are all of its states, as torchrl wants the states at the end of each episode."""

    def __init__(self, cell: Cell) -> None:
        super().__init__(cell.input_size, cell.hidden_size)
        self.cell = cell
        self.states = cell.states  # type: ignore[misc]  # a class attribute elsewhere
        self.state_sizes = cell.state_sizes
        self.output_size = tuple([(size,) for size in cell.state_sizes])

    def step(self, x: Tensor, state: State) -> tuple[State, State]:
        _, after = self.cell.step(x, state)
        return after, after


class _Module(Loop):
    """Base class of both, whose layer is ``self.lstm`` or ``self.gru``."""

    layer_name: ClassVar[str]

    @property
    def recurrent_backend(self) -> str:
        """The backend: ``"scan"`` in the place of ``"pad"`` and ``"auto"`` where fusecell runs it."""
        chosen: str = self.__dict__["recurrent_backend"]
        return "scan" if chosen in ("pad", "auto") and self._runs_in_one_call() else chosen

    @recurrent_backend.setter
    def recurrent_backend(self, backend: str) -> None:
        self.__dict__["recurrent_backend"] = backend

    def _runs_in_one_call(self) -> bool:
        layer: Any = getattr(self, self.layer_name)
        draws = layer.dropout and layer.training and layer.num_layers > 1
        plain = isinstance(layer, GRU | LSTM) and layer.is_torchs() and not layer.bidirectional and not layer.proj_size
        return plain and not draws

    def _scanned(self, input: Tensor, starts: tuple[Tensor, ...], is_init: Tensor) -> tuple[Tensor, ...] | None:
        """Run rows with resets; None where an episode begins with a state that isn't zeros.

        Arguments:
            input: (N, T, features).
            starts: for each state (N, T, layers, size), the state that is passed for each step.
            is_init: (N, T), True at the first step of an episode.

        Returns:
            The outputs (N, T, size), and for each state (N, T, layers, size), zeros but at the ends of episodes.
        """
        layer: Any = getattr(self, self.layer_name)
        begins = is_init.clone()
        begins[:, 0] = False  # a row begins with the state that is passed
        if begins.any() and any(value.requires_grad or value[begins].any() for value in starts):
            return None
        shape = SequenceShape(input.shape[1], input.shape[0], input.device, True, False)
        options = Options(resets=shape.resets(begins))
        x, states = input.transpose(0, 1), []
        for index, _, cell in layer.leaf_cells():
            start = tuple([value[:, 0, index].to(x.dtype) for value in starts])
            outputs, _ = scan_time_major(_StatesOut(cell), (x,), start, options)
            states.append(outputs)
            x = outputs[0]
        ends = torch.cat((begins[:, 1:], torch.ones_like(begins[:, :1])), 1)[..., None, None]
        every = [torch.stack(values, -2).transpose(0, 1) for values in zip(*states, strict=True)]
        return x.transpose(0, 1), *[torch.where(ends, value, 0.0) for value in every]


class GruModule(_Module):
    """In the place of ``torchrl.modules.GRUModule``."""

    overrides: ClassVar[tuple[str, ...]] = ("_gru_scan_with_resets", "_gru_pad_with_resets")
    layer_name = "gru"

    def _gru_scan_with_resets(self, input: Tensor, hidden_in: Tensor, initial_hidden: Tensor, is_init: Tensor) -> Any:
        module: Any = super()
        if not self._runs_in_one_call():
            return module._gru_scan_with_resets(input, hidden_in, initial_hidden, is_init)
        result = self._scanned(input, (hidden_in,), is_init)
        return module._gru_pad_with_resets(input, hidden_in, is_init) if result is None else result


class LstmModule(_Module):
    """In the place of ``torchrl.modules.LSTMModule``."""

    overrides: ClassVar[tuple[str, ...]] = ("_lstm_scan_with_resets", "_lstm_pad_with_resets")
    layer_name = "lstm"

    def _lstm_scan_with_resets(
        self, input: Tensor, hidden0_in: Tensor, hidden1_in: Tensor, initial_hidden: Any, is_init: Tensor
    ) -> Any:
        module: Any = super()
        if not self._runs_in_one_call():
            return module._lstm_scan_with_resets(input, hidden0_in, hidden1_in, initial_hidden, is_init)
        result = self._scanned(input, (hidden0_in, hidden1_in), is_init)
        return module._lstm_pad_with_resets(input, hidden0_in, hidden1_in, is_init) if result is None else result
