"""RNN, GRU and LSTM: the arguments and the cell that each adds to torch.nn's class of the same name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from fusecell.cells.activations import check_activation
from fusecell.cells.torch_nn import GATED, GRUCell, LSTMCell, RNNCell, other_than
from fusecell.drop_in.base import Scanned

__all__ = ["GRU", "LSTM", "RNN"]


class RNN(Scanned, nn.RNN):  # type: ignore[misc]  # forward takes more than torch's
    r"""Elman cells over whole sequences: torch.nn.RNN, with ``lengths`` and ``resets``.

    .. math:: h_t = \tanh(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    Example:
        >>> import torch, fusecell as fc
        >>> rnn = fc.RNN(5, 10, nonlinearity="relu")
        >>> y, h_n = rnn(torch.randn(7, 3, 5), lengths=[7, 2, 4])

    Arguments:
        input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout, bidirectional, device, dtype: as
            in torch.nn.RNN, in this order.
        activation: as in :class:`fusecell.RNNCell`.
        recompute, masked_output, tbptt, clip_state_grad: as in :class:`fusecell.Recurrent`.

    Raises:
        TypeError, ValueError: as torch.nn.RNN.

    Paper: J. L. Elman, Finding structure in time, 1990.
    """

    cell_type = RNNCell
    cell_attributes = ("nonlinearity", "activation")
    added_attributes: ClassVar[Mapping[str, object]] = {**Scanned.added_attributes, "activation": None}
    activation: str | None = None

    def __init__(self, *args: Any, activation: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_activation("RNN", activation=activation or "tanh")
        self.activation = activation

    def is_torchs(self) -> bool:
        return super().is_torchs() and self.activation is None

    def extra_repr(self) -> str:
        return super().extra_repr() + other_than(self, activation=None)


class GRU(Scanned, nn.GRU):  # type: ignore[misc]  # forward takes more than torch's
    r"""Gated recurrent units over whole sequences: torch.nn.GRU, with ``lengths``, ``resets`` and the original form.

    .. math::
        r_t &= \sigma(W_{ir} x_t + b_{ir} + W_{hr} h_{t-1} + b_{hr}) \\
        z_t &= \sigma(W_{iz} x_t + b_{iz} + W_{hz} h_{t-1} + b_{hz}) \\
        n_t &= \tanh(W_{in} x_t + b_{in} + r_t \odot (W_{hn} h_{t-1} + b_{hn})) \\
        h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    Example:
        >>> import torch, fusecell as fc
        >>> gru = fc.GRU(5, 10, num_layers=2, bidirectional=True)
        >>> y, h_n = gru(torch.randn(7, 3, 5), lengths=[7, 2, 4])
        >>> y.shape, h_n.shape
        (torch.Size([7, 3, 20]), torch.Size([4, 3, 10]))

    Arguments:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as in
            torch.nn.GRU, in this order.
        reset_after: False for the original equation, as in :class:`fusecell.GRUCell`.
        activation, gate_activation: as in :class:`fusecell.GRUCell`.
        recompute, masked_output, tbptt, clip_state_grad: as in :class:`fusecell.Recurrent`.

    Raises:
        TypeError, ValueError: as torch.nn.GRU.

    Paper: K. Cho et al., https://arxiv.org/abs/1406.1078.
    """

    cell_type = GRUCell
    cell_attributes = ("reset_after", "activation", "gate_activation")
    added_attributes: ClassVar[Mapping[str, object]] = {**Scanned.added_attributes, **GATED, "reset_after": True}
    reset_after: bool = True
    activation: str = "tanh"
    gate_activation: str = "sigmoid"

    def __init__(
        self,
        *args: Any,
        reset_after: bool = True,
        activation: str = "tanh",
        gate_activation: str = "sigmoid",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_activation("GRU", activation=activation, gate_activation=gate_activation)
        self.reset_after = reset_after
        self.activation, self.gate_activation = activation, gate_activation

    def is_torchs(self) -> bool:
        return (
            super().is_torchs() and self.reset_after and (self.activation, self.gate_activation) == ("tanh", "sigmoid")
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + other_than(self, reset_after=True, activation="tanh", gate_activation="sigmoid")


class LSTM(Scanned, nn.LSTM):  # type: ignore[misc]  # forward takes more than torch's
    r"""Long short-term memories over whole sequences: torch.nn.LSTM, with ``lengths`` and ``resets``.

    .. math::
        c_t = f_t \odot c_{t-1} + i_t \odot g_t, \quad h_t = o_t \odot \tanh(c_t)

    with the gates of :class:`fusecell.LSTMCell`; with ``proj_size > 0``, h_t is projected by W_hr.

    Example:
        >>> import torch, fusecell as fc
        >>> lstm = fc.LSTM(5, 10, batch_first=True, proj_size=4)
        >>> y, (h_n, c_n) = lstm(torch.randn(3, 7, 5), lengths=[7, 2, 4])
        >>> y.shape, c_n.shape
        (torch.Size([3, 7, 4]), torch.Size([1, 3, 10]))

    Arguments:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype: as in
            torch.nn.LSTM, in this order.
        activation, gate_activation: as in :class:`fusecell.LSTMCell`.
        recompute, masked_output, tbptt, clip_state_grad: as in :class:`fusecell.Recurrent`.

    Raises:
        TypeError, ValueError: as torch.nn.LSTM.

    Paper: S. Hochreiter, J. Schmidhuber, Long short-term memory, 1997; the projection: https://arxiv.org/abs/1402.1128.
    """

    cell_type = LSTMCell
    cell_attributes = ("proj_size", "activation", "gate_activation")
    added_attributes: ClassVar[Mapping[str, object]] = {**Scanned.added_attributes, **GATED}
    activation: str = "tanh"
    gate_activation: str = "sigmoid"

    def __init__(self, *args: Any, activation: str = "tanh", gate_activation: str = "sigmoid", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_activation("LSTM", activation=activation, gate_activation=gate_activation)
        self.activation, self.gate_activation = activation, gate_activation

    def is_torchs(self) -> bool:
        return super().is_torchs() and (self.activation, self.gate_activation) == ("tanh", "sigmoid")

    def extra_repr(self) -> str:
        return super().extra_repr() + other_than(self, activation="tanh", gate_activation="sigmoid")
