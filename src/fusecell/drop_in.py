"""RNN, GRU and LSTM: torch.nn's layers, computed by fusecell's cells.

Constructor, parameters, initialisation, repr and attributes are inherited; only ``forward`` is ours. A layer owns its
parameters under torch's names. Its cells are made anew in every call, around the weights the layer has at that moment,
so that functional_call, parametrizations, replicas and ``.data`` are seen and nothing refers to a weight afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence

from fusecell.cell import StateLike, bare
from fusecell.cells.activations import check_activation
from fusecell.cells.standard import GRUCell, LSTMCell, RNNCell, layer_keys, other_than
from fusecell.layers.arguments import Lengths, Packing, check_lengths, check_mask, check_resets
from fusecell.layers.scan import scan_cell
from fusecell.layers.sequence import PLAIN, Extras, MaskedOutput, check_extras, describe
from fusecell.runner import Options, State, autocasting, traced_runner

__all__ = ["GRU", "LSTM", "RNN"]

_CONTAINERS = tuple((name, type(value)) for name, value in vars(nn.Module()).items() if isinstance(value, dict | set))
_CONSTANTS = {name: value for name, value in vars(nn.Module()).items() if not isinstance(value, dict | set)}
_PLAIN = {recompute: Options(recompute=recompute) for recompute in (False, True)}


class _Scanned:
    """What RNN, GRU and LSTM share: torch.nn's arguments brought to scans of the cells."""

    _cell_type: ClassVar[type[RNNCell | GRUCell | LSTMCell]]
    _cell_attributes: ClassVar[tuple[str, ...]] = ()

    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
    training: bool
    _parameters: dict[str, nn.Parameter | None]
    recompute: bool = False
    masked_output: MaskedOutput = "hold"
    tbptt: int | None = None
    clip_state_grad: float | None = None

    def __init__(
        self,
        *args: Any,
        recompute: bool = False,
        masked_output: MaskedOutput = "hold",
        tbptt: int | None = None,
        clip_state_grad: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.recompute = recompute
        check_extras(type(self).__name__, masked_output, tbptt, clip_state_grad)
        self.masked_output, self.tbptt, self.clip_state_grad = masked_output, tbptt, clip_state_grad

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: StateLike | None = None,
        *,
        lengths: Lengths | None = None,
        resets: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor | State]:
        """Run the layers over a sequence.

        Arguments:
            input: (T, N, input_size), (N, T, input_size) if ``batch_first``, (T, input_size), or a PackedSequence.
            hx: (num_layers * directions, N, size), without N for an input without; a pair for an LSTM. Zeros if left
                out; never batch-first.
            lengths: (N,) whole numbers, in any order: row n is valid for t < lengths[n], outputs beyond are 0.
            resets: bool, True where a row's state goes back to zeros before the step at t: (T, N), (N, T) if
                ``batch_first``, (T,) without a batch.
            mask: bool of the shape of ``resets``, False where a row takes no part in a step, as in
                :func:`fusecell.scan`.

        Returns:
            The last layer's outputs in the form of the input, directions side by side, and the last states in the
            form of ``hx``. With T = 0, no outputs and the state given.

        Raises:
            ValueError, RuntimeError: with torch.nn's texts, where a rank, a size, a dtype or a device doesn't fit.
            TypeError: where an argument is of another kind.
        """
        weight = self._weight("weight_ih_l0")
        x = self._check_input(input, weight)
        packed = input if isinstance(input, PackedSequence) else None
        usual = lengths is None and resets is None and mask is None
        if packed is not None and not usual:
            raise ValueError(
                f"{type(self).__name__}: a PackedSequence carries its own lengths and takes neither lengths nor "
                "resets nor a mask. Pass the padded tensor with lengths=, in any order."
            )
        unbatched = packed is None and x.dim() == 2
        if packed is None:
            x = x[:, None] if unbatched else x.transpose(0, 1) if self.batch_first else x
        rows = x.shape[1] if packed is None else int(packed.batch_sizes[0])
        given = None if hx is None else self._check_hidden(hx, x, rows, unbatched, packed is not None)
        extras = check_extras(type(self).__name__, self.masked_output, self.tbptt, self.clip_state_grad)
        if usual and (extras is PLAIN or not torch.is_grad_enabled()) and self._leave_to_torch(x):
            result: tuple[Tensor | PackedSequence, Tensor | State] = super().forward(input, hx)  # type: ignore[misc]
            return result
        packing = None if packed is None else Packing.open(packed)
        if packing is not None:
            x, options = packing.padded(x), Options(packing.lengths, recompute=self.recompute)
        elif usual:
            options = _PLAIN[self.recompute]
        else:
            steps, device = x.shape[0], x.device
            form = {"batch_first": self.batch_first, "unbatched": unbatched}
            options = Options(
                check_lengths(lengths, steps, rows, device),
                check_resets(resets, steps, rows, device, **form),
                recompute=self.recompute,
            )
            if mask is not None:
                extras = replace(extras, mask=check_mask(mask, steps, rows, device, **form))
        outputs, after = self._scan(x, self._start(weight, given, packing, rows), options, packing, extras)
        if packing is not None:
            return packing.repack(outputs), bare(tuple(packing.unsort(value, 1) for value in after))
        if unbatched:
            return outputs[:, 0], bare(tuple(value[:, 0] for value in after))
        return outputs.transpose(0, 1) if self.batch_first else outputs, bare(after)

    def leaf_cells(self) -> list[tuple[int, int, RNNCell | GRUCell | LSTMCell]]:
        """The cells as (layer, direction, cell), bottom first, in the order of the states.

        Each is a view: an ordinary cell around the weights that the layer has now, in no module's tree. Take new ones
        for every call.
        """
        directions = 2 if self.bidirectional else 1
        names = ["weight_ih", "weight_hh"] + (["bias_ih", "bias_hh"] if self.bias else [])
        names += ["weight_hr"] if self.proj_size else []
        constants = {**_CONSTANTS, "training": self.training, "hidden_size": self.hidden_size, "bias": self.bias}
        for name in self._cell_attributes:
            constants[name] = getattr(self, name)
        if not self.bias:
            constants["bias_ih"] = constants["bias_hh"] = None
        found = []
        for layer in range(self.num_layers):
            constants["input_size"] = directions * (self.proj_size or self.hidden_size) if layer else self.input_size
            for direction in range(directions):
                suffix = f"_l{layer}_reverse" if direction else f"_l{layer}"
                cell = self._cell_type.__new__(self._cell_type)
                # Past nn.Module's constructor and __setattr__, which would cost more than a step.
                fields = cell.__dict__
                fields.update(constants)
                for name, kind in _CONTAINERS:
                    fields[name] = kind()
                for name in names:
                    fields[name] = self._weight(name + suffix)
                found.append((layer, direction, cell))
        return found

    def _weight(self, name: str) -> Tensor:
        """A weight as an attribute gives it, parametrized or swapped, but sooner where it is a parameter."""
        parameter = self._parameters.get(name)
        found: Tensor = getattr(self, name) if parameter is None else parameter
        return found

    def _runners(self, extras: Extras) -> Sequence[Callable[[State, State, Options], tuple[Tensor, State]]]:
        """What scans each cell, in the order of the states."""
        if torch.compiler.is_compiling() and extras is PLAIN:
            run: Any = traced_runner()
            count = self.num_layers * (2 if self.bidirectional else 1)
            return [partial(run, self, leaf=index) for index in range(count)]
        if extras is PLAIN:
            return [partial(scan_cell, cell) for _, _, cell in self.leaf_cells()]
        return [partial(scan_cell, cell, extras=extras) for _, _, cell in self.leaf_cells()]

    def _scan(
        self, x: Tensor, start: Sequence[State], options: Options, packing: Packing | None, extras: Extras
    ) -> tuple[Tensor, State]:
        """Scan every layer in every direction: outputs (T, N, features), states stacked."""
        runners = self._runners(extras)
        directions = [options]
        if self.bidirectional:
            directions.append(replace(options, reverse=True))
        after: list[State] = []
        for layer in range(self.num_layers):
            outputs = []
            for way in directions:
                output, state = runners[len(after)]((x,), start[len(after)], way)
                outputs.append(output)
                after.append(state)
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
            if self.dropout and self.training and layer + 1 < self.num_layers:
                x = self._drop(x, packing)
        if len(after) == 1:
            return x, tuple([value[None] for value in after[0]])
        return x, tuple([torch.stack(values) for values in zip(*after, strict=True)])

    def _drop(self, x: Tensor, packing: Packing | None) -> Tensor:
        """Dropout between layers; torch draws it over packed data, so that its masks come from the same numbers."""
        if packing is None:
            return dropout(x, self.dropout)
        return packing.padded(dropout(packing.data(x), self.dropout))

    def _start(self, weight: Tensor, given: State | None, packing: Packing | None, rows: int) -> list[State]:
        """The state each cell starts from, in the weights' dtype."""
        count = self.num_layers * (2 if self.bidirectional else 1)
        if given is None:
            sizes = self._state_sizes()
            return [tuple([weight.new_zeros(rows, size) for size in sizes]) for _ in range(count)]
        if packing is not None:
            given = tuple(packing.sort(value, 1) for value in given)
        given = tuple(value.to(weight.dtype) for value in given)
        return [tuple([value[index] for value in given]) for index in range(count)]

    def _check_input(self, input: Any, weight: Tensor) -> Tensor:
        """The input's tensor, a PackedSequence's data."""
        name, packed = type(self).__name__, isinstance(input, PackedSequence)
        x = input.data if packed else input
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} expected input as a tensor or a PackedSequence, got {type(input).__name__}.")
        if x.is_nested:
            raise TypeError(f"{name} takes no nested tensor. Pad it, input.to_padded_tensor(0.0), and pass lengths=.")
        if packed and x.dim() != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {x.dim()}")
        if x.dim() not in (2, 3):
            noun = " tensor" if self._cell_type is RNNCell else ""
            raise ValueError(f"{name}: Expected input to be 2D or 3D, got {x.dim()}D{noun} instead")
        if x.dtype != weight.dtype and not autocasting(x.device.type):
            raise ValueError(
                f"RNN input dtype ({x.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: model.to({x.dtype})"
            )
        if x.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {x.shape[-1]}"
            )
        _check_device(x, "parameter", weight)
        return x

    def _check_hidden(self, hx: Any, x: Tensor, rows: int, unbatched: bool, packed: bool) -> State:
        """The given state as a tuple of (num_layers * directions, N, size) tensors."""
        given = self._hidden_tensors(hx)
        rank = 2 if unbatched else 3
        if not packed and any(value.dim() != rank for value in given):
            kind = "unbatched" if unbatched else "batched"
            ranks = ", ".join(f"{value.dim()}-D" for value in given)
            got = f"hx should also be {rank}-D but got {ranks} tensor"
            if len(given) > 1:
                got = f"hx and cx should also be {rank}-D but got ({ranks}) tensors"
            raise RuntimeError(f"For {kind} {rank}-D input, {got}")
        if unbatched:
            given = tuple(value[:, None] for value in given)
        count = self.num_layers * (2 if self.bidirectional else 1)
        sizes = self._state_sizes()
        for index, value in enumerate(given):
            label = "hidden" if len(given) == 1 else f"hidden[{index}]"
            expected = (count, rows, sizes[index])
            if tuple(value.shape) != expected:
                raise RuntimeError(f"Expected {label} size {expected}, got {list(value.shape)}")
            _check_device(x, "hidden", value)
            if value.dtype != x.dtype and not autocasting(x.device.type):
                raise RuntimeError(
                    f"Input and hidden tensors are not the same dtype, found input tensor with {x.dtype} and {label} "
                    f"tensor with {value.dtype}. Convert it: .to({x.dtype})"
                )
        return given

    def _state_sizes(self) -> tuple[int, ...]:
        return (self.proj_size or self.hidden_size, self.hidden_size)[: len(self._cell_type.states)]

    def _hidden_tensors(self, hx: Any) -> State:
        name, states = type(self).__name__, self._cell_type.states
        found = (hx,) if isinstance(hx, Tensor) else tuple(hx) if isinstance(hx, tuple | list) else ()
        if len(states) == 1 and not isinstance(hx, Tensor):
            raise TypeError(f"{name} expected hx as one tensor h_0, got {type(hx).__name__}.")
        if len(states) == 1:
            return found
        if not isinstance(hx, tuple | list) or not all(isinstance(value, Tensor) for value in found):
            kinds = ", ".join(type(value).__name__ for value in found)
            raise TypeError(f"{name} expected hx as a pair of tensors (h_0, c_0), got {type(hx).__name__} ({kinds}).")
        if len(found) != len(states):
            raise ValueError(f"{name} expected hx as a pair of tensors (h_0, c_0), got {len(found)} of them.")
        return found

    def _leave_to_torch(self, x: Tensor) -> bool:
        """Whether torch's own kernels (cuDNN and its like) compute this layer, for want of ours on the device."""
        return not x.is_cpu and x.numel() > 0

    def extra_repr(self) -> str:
        text: str = super().extra_repr()  # type: ignore[misc]
        extras = describe(check_extras("", self.masked_output, self.tbptt, self.clip_state_grad))
        return ", ".join([text, *(["recompute=True"] if self.recompute else []), *extras])

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if self.num_layers == 1 and not self.bidirectional:
            state_dict = layer_keys(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]


def _check_device(x: Tensor, kind: str, other: Tensor) -> None:
    if not (x.is_cpu and other.is_cpu) and x.device != other.device:
        raise RuntimeError(
            f"Input and {kind} tensors are not at the same device, found input tensor at {x.device} "
            f"and {kind} tensor at {other.device}"
        )


class RNN(_Scanned, nn.RNN):  # type: ignore[misc]  # forward takes more than torch's
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

    _cell_type = RNNCell
    _cell_attributes = ("nonlinearity", "activation")
    activation: str | None = None

    def __init__(self, *args: Any, activation: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_activation("RNN", activation=activation or "tanh")
        self.activation = activation

    def _leave_to_torch(self, x: Tensor) -> bool:
        return self.activation is None and super()._leave_to_torch(x)

    def extra_repr(self) -> str:
        return super().extra_repr() + other_than(self, activation=None)


class GRU(_Scanned, nn.GRU):  # type: ignore[misc]  # forward takes more than torch's
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

    _cell_type = GRUCell
    _cell_attributes = ("reset_after", "activation", "gate_activation")
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

    def _leave_to_torch(self, x: Tensor) -> bool:
        usual = (self.activation, self.gate_activation) == ("tanh", "sigmoid")
        return usual and self.reset_after and super()._leave_to_torch(x)

    def extra_repr(self) -> str:
        return super().extra_repr() + other_than(self, reset_after=True, activation="tanh", gate_activation="sigmoid")


class LSTM(_Scanned, nn.LSTM):  # type: ignore[misc]  # forward takes more than torch's
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

    _cell_type = LSTMCell
    _cell_attributes = ("proj_size", "activation", "gate_activation")
    activation: str = "tanh"
    gate_activation: str = "sigmoid"

    def __init__(self, *args: Any, activation: str = "tanh", gate_activation: str = "sigmoid", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_activation("LSTM", activation=activation, gate_activation=gate_activation)
        self.activation, self.gate_activation = activation, gate_activation

    def _leave_to_torch(self, x: Tensor) -> bool:
        usual = (self.activation, self.gate_activation) == ("tanh", "sigmoid")
        return usual and super()._leave_to_torch(x)

    def extra_repr(self) -> str:
        return super().extra_repr() + other_than(self, activation="tanh", gate_activation="sigmoid")
