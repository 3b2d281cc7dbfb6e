"""Drop-in RNNCell, GRUCell and LSTMCell: torch.nn's signatures, parameters, errors and numbers, with one ``step``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fusecell.cell import Cell, one_step
from fusecell.cells.activations import ACTIVATIONS, check_activation
from fusecell.execution.options import Options, State
from fusecell.execution.results import public_state, without_dim
from fusecell.execution.runners import autocasting, run
from fusecell.execution.symbolic_trace import is_proxy, record_call
from fusecell.execution.torchscript import is_tracing, read_as, refuse_script, refuse_trace
from fusecell.torch_internals import any_autocast, in_onnx_export
from fusecell.validation import StateLike, all_inputs, first_state

__all__ = [
    "GATED",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "cell_keys",
    "dtype_name",
    "layer_keys",
    "other_than",
    "torch_class",
]

_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
_ONE_STEP = Options()
GATED: Mapping[str, object] = {"activation": "tanh", "gate_activation": "sigmoid"}
"""Attributes of the gated cells and layers that torch.nn's lack, with the values at which both compute the same."""


class _TorchCell(Cell):
    """Base class of the three cells: torch.nn's checks and state_dicts; all else comes from torch.nn's own class.

    Attributes:
        added_attributes: the attributes that torch.nn's class lacks, with the values at which both compute the same.
        adds_to_state: whether the step adds to its old state, rather than to products with it alone.
    """

    added_attributes: ClassVar[Mapping[str, object]] = {}
    adds_to_state: ClassVar[bool] = True

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    bias: bool

    def forward(self, input: Tensor | State, hx: StateLike | None = None) -> Tensor | State:
        """Run one step.

        Arguments:
            input: (N, input_size) or (input_size,), of the weights' dtype.
            hx: the state, (N, size) or (size,), a pair for an LSTM; zeros if left out.

        Returns:
            The new state, in the form of ``hx``.

        Raises:
            ValueError, RuntimeError: with torch.nn's texts, where a rank, a size or a dtype doesn't fit.
            TypeError: where an argument is not a tensor, or the state not of the cell's form.
        """
        if len(self.inputs) > 1:  # a subclass of the user's, which torch.nn's checks know nothing of
            return super().forward(input, hx)
        if type(input) is not Tensor and is_proxy(input):
            return record_call(self, input, hx)  # type: ignore[no-any-return]
        after: Tensor | State = one_step(self, input, hx, False, _torch_step)[1]
        return after

    def checked_step(self, input: Tensor, hx: StateLike | None) -> State:
        """Run one step with torch.nn's checks of the arguments; return the new state."""
        name = type(self).__name__
        if is_tracing():
            return self._traced_step(input, hx)
        if in_onnx_export() and self.is_torchs():
            return self._torch_step(input, hx)
        if not isinstance(input, Tensor):
            raise TypeError(f"{name} expected input as a tensor, got {type(input).__name__}.")
        unbatched = input.dim() == 1
        if not unbatched and input.dim() != 2:
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        state = None if hx is None else self._state_of(hx, input.dim())
        if unbatched:
            input = input[None]
            state = state and tuple(value[None] for value in state)
        passed = input.dtype if state is None else state[-1].dtype
        rows, width = input.shape
        if width != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {width} expected {self.input_size}")
        if state is None:
            state = first_state(self, rows, dtype=input.dtype, device=input.device)
        else:
            self._check_sizes(state, rows)
        input, state = self._in_dtype(input, state)
        after = run(self, all_inputs(self, (input[None],), state), state, _ONE_STEP)[1]
        if any_autocast():
            after = self._in_autocast_dtype(after, passed)
        return tuple([without_dim(value, 0) for value in after]) if unbatched else after

    def _traced_step(self, input: Tensor, hx: StateLike | None) -> State:
        """Run torch.nn's own cell for torch.jit to record."""
        if not self.is_torchs():
            refuse_trace(type(self).__name__, f"torch.nn can't compute {self}.")
        return self._torch_step(input, hx)

    def _torch_step(self, input: Tensor, hx: StateLike | None) -> State:
        """Run torch.nn's own cell."""
        after: Any = super(Cell, self).forward(input, hx)
        return (after,) if isinstance(after, Tensor) else after

    def is_torchs(self) -> bool:
        """Return whether the cell has the equation of torch.nn's cell; not with a step of a user's."""
        kinds = (RNNCell, GRUCell, LSTMCell)
        return len(self.inputs) == 1 and type(self).step in [kind.step for kind in kinds]

    def __prepare_scriptable__(self) -> nn.Module:
        """Pass for torch.nn's cell while torch.jit.script runs, which calls this first."""
        own_forward = type(self).forward is not _TorchCell.forward
        if not own_forward and not self.is_torchs():
            refuse_script(type(self).__name__, f"torch.nn can't compute {self}.")
        read_as(self, torch_class(type(self)), self.added_attributes, own_forward=own_forward)
        return self

    def _state_of(self, hx: StateLike, rank: int) -> State:
        """Return ``hx`` as a tuple of tensors, each checked to have ``rank`` dimensions."""
        name, count = type(self).__name__, len(self.states)
        names = ", ".join(self.states)
        if isinstance(hx, Tensor) != (count == 1):
            form = "one tensor" if count == 1 else f"a tuple of tensors ({names})"
            raise TypeError(f"{name} expected hx as {form}, got {type(hx).__name__}.")
        state = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        if len(state) != count:
            raise RuntimeError(f"lstm_cell expects two hidden states: {name} takes ({names}), got {len(state)}.")
        for index, value in enumerate(state):
            label = "hidden" if count == 1 else f"hx[{index}]"
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} expected {label} as a tensor, got {type(value).__name__}.")
            if value.dim() not in (1, 2):
                raise ValueError(f"{name}: Expected {label} to be 1D or 2D, got {value.dim()}D instead")
            if value.dim() != rank:
                raise RuntimeError(
                    f"{name}: Expected {label} to be {rank}D as the input is, got {value.dim()}D instead"
                )
        return state

    def _check_sizes(self, state: State, rows: int) -> None:
        # torch's texts, word for word: they are what users search for.
        for index, (value, size) in enumerate(zip(state, self.state_sizes, strict=True)):
            if value.shape[0] != rows:
                raise RuntimeError(f"Input batch size {rows} doesn't match hidden{index} batch size {value.shape[0]}")
            if value.shape[1] != size:
                raise RuntimeError(f"hidden{index} has inconsistent hidden_size: got {value.shape[1]}, expected {size}")

    def _in_dtype(self, input: Tensor, state: State) -> tuple[Tensor, State]:
        """Return input and state in the weights' dtype; only under autocast are they cast.

        Raises:
            RuntimeError: with torch.nn's text, for another dtype without autocast.
        """
        dtype = self.weight_ih.dtype
        other = next((value for value in (input, *state) if value.dtype != dtype), None)
        if other is None:
            return input, state
        if not autocasting(input.device.type):
            raise RuntimeError(
                f"mat1 and mat2 must have the same dtype, but got {dtype_name(other.dtype)} and {dtype_name(dtype)}"
            )
        return input.to(dtype), tuple(value.to(dtype) for value in state)

    def _in_autocast_dtype(self, after: State, passed: torch.dtype) -> State:
        """Return the new state in the dtype in which torch.nn's cell returns it under autocast.

        There the products are of autocast's dtype, and so is what is computed from them alone; a state that the step
        adds to widens it.

        Arguments:
            passed: the dtype of the last state, the one that is added to, or of the input where no state was passed.
        """
        device = after[0].device.type
        if not autocasting(device) or after[0].dtype == torch.float64:  # which autocast leaves alone
            return after
        dtype = torch.get_autocast_dtype(device)
        if self.adds_to_state:
            dtype = torch.promote_types(dtype, passed)
        return tuple([value.to(dtype) for value in after])

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(cell_keys(state_dict, prefix), prefix, *args)

    def extra_repr(self) -> str:
        return super(Cell, self).extra_repr()  # torch.nn's: Cell comes before it in the order of resolution


def _torch_step(cell: Any, input: Tensor, hx: StateLike | None) -> tuple[None, Tensor | State]:
    """Run one step with torch.nn's checks; None takes the place of the output, which these cells don't return."""
    return None, public_state(cell.checked_step(input, hx))


class RNNCell(_TorchCell, nn.RNNCell):  # type: ignore[misc]  # forward takes what Cell's takes
    r"""The Elman RNN cell: torch.nn.RNNCell as a fusecell cell.

    .. math:: h' = \tanh(W_{ih} x + b_{ih} + W_{hh} h + b_{hh})

    Example:
        >>> import torch, fusecell as fc
        >>> cell = fc.RNNCell(5, 10, nonlinearity="relu")
        >>> h = cell(torch.randn(3, 5), torch.randn(3, 10))

    Arguments:
        input_size, hidden_size: features of the input and of the state.
        bias: learn ``bias_ih`` and ``bias_hh``.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        device, dtype: of the parameters.
        activation: the name of any other activation, in place of ``nonlinearity``.

    Raises:
        ValueError: for another nonlinearity, or a negative size.

    Paper: J. L. Elman, Finding structure in time, 1990.
    """

    gates = ("h",)
    adds_to_state = False
    added_attributes: ClassVar[Mapping[str, object]] = {"activation": None}
    activation: str | None = None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
    ) -> None:
        _check_constructor(input_size=input_size, hidden_size=hidden_size)
        check_activation("RNNCell", activation=activation or "tanh")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        nn.RNNCell.__init__(self, input_size, hidden_size, bias, nonlinearity, device, dtype)
        self.activation = activation

    def is_torchs(self) -> bool:
        return super().is_torchs() and self.activation is None

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        (h,) = state
        total = linear(h, self.weight_hh, self.bias_hh) + linear(x, self.weight_ih, self.bias_ih)
        if self.activation is not None:
            h = ACTIVATIONS[self.activation](total)
        elif self.nonlinearity == "tanh":
            h = torch.tanh(total)
        elif self.nonlinearity == "relu":
            h = torch.relu(total)
        else:
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return h, (h,)

    def extra_repr(self) -> str:
        return super().extra_repr() + other_than(self, activation=None)


class GRUCell(_TorchCell, nn.GRUCell):  # type: ignore[misc]  # forward takes what Cell's takes
    r"""The gated recurrent unit: torch.nn.GRUCell as a fusecell cell, and the original GRU.

    .. math::
        r &= \sigma(W_{ir} x + b_{ir} + W_{hr} h + b_{hr}) \\
        z &= \sigma(W_{iz} x + b_{iz} + W_{hz} h + b_{hz}) \\
        n &= \tanh(W_{in} x + b_{in} + r \odot (W_{hn} h + b_{hn})) \\
        h' &= (1 - z) \odot n + z \odot h

    With ``reset_after=False``, :math:`n = \tanh(W_{in} x + b_{in} + W_{hn} (r \odot h) + b_{hn})`.

    Example:
        >>> import torch, fusecell as fc
        >>> cell = fc.GRUCell(5, 10)
        >>> h = cell(torch.randn(3, 5), torch.randn(3, 10))

    Arguments:
        input_size, hidden_size: features of the input and of the state.
        bias: learn ``bias_ih`` and ``bias_hh``.
        device, dtype: of the parameters.
        reset_after: apply the reset gate after the product with W_hn, as torch.nn and cuDNN do; False: before it.
        activation: the name of the candidate's activation.
        gate_activation: the name of that of the gates r and z.

    Raises:
        TypeError, ValueError: for a size that is not an integer, or negative; for an unknown activation.

    Paper: K. Cho et al., https://arxiv.org/abs/1406.1078; version 1 resets after, version 3 before the product.
    """

    gates = ("r", "z", "n")
    keeps = "z"
    added_attributes: ClassVar[Mapping[str, object]] = {**GATED, "reset_after": True}
    reset_after: bool = True
    activation: str = "tanh"
    gate_activation: str = "sigmoid"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
        activation: str = "tanh",
        gate_activation: str = "sigmoid",
    ) -> None:
        _check_constructor(input_size=input_size, hidden_size=hidden_size)
        check_activation("GRUCell", activation=activation, gate_activation=gate_activation)
        nn.GRUCell.__init__(self, input_size, hidden_size, bias, device, dtype)
        self.reset_after = reset_after
        self.activation, self.gate_activation = activation, gate_activation

    def is_torchs(self) -> bool:
        return (
            super().is_torchs() and self.reset_after and (self.activation, self.gate_activation) == ("tanh", "sigmoid")
        )

    # In torch's order of evaluation, for equal bits. r and z are split after the sum, so that torch's sigmoid runs
    # over each row by itself: where its vectors cross rows it rounds differently.
    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        (h,) = state
        parts = (2 * self.hidden_size, self.hidden_size)
        x_rz, x_n = linear(x, self.weight_ih, self.bias_ih).split_with_sizes(parts, 1)
        if self.reset_after:
            h_rz, h_n = linear(h, self.weight_hh, self.bias_hh).split_with_sizes(parts, 1)
        else:
            w_rz, w_n = self.weight_hh.split_with_sizes(parts)
            b_rz, b_n = (None, None) if self.bias_hh is None else self.bias_hh.split_with_sizes(parts)
            h_rz = linear(h, w_rz, b_rz)
        r, z = (h_rz + x_rz).chunk(2, 1)
        activation, gate = ACTIVATIONS[self.activation], ACTIVATIONS[self.gate_activation]
        r = self.note("r", gate(r))
        z = self.note("z", gate(z))
        n = activation(x_n + (h_n * r if self.reset_after else linear(r * h, w_n, b_n)))
        n = self.note("n", n)
        h = (h - n) * z + n  # as torch computes (1 - z) * n + z * h
        return h, (h,)

    def extra_repr(self) -> str:
        return super().extra_repr() + other_than(self, reset_after=True, activation="tanh", gate_activation="sigmoid")


class LSTMCell(_TorchCell, nn.LSTMCell):  # type: ignore[misc]  # forward takes what Cell's takes
    r"""The long short-term memory: torch.nn.LSTMCell as a fusecell cell, with torch.nn.LSTM's projection.

    .. math::
        i &= \sigma(W_{ii} x + b_{ii} + W_{hi} h + b_{hi}) \\
        f &= \sigma(W_{if} x + b_{if} + W_{hf} h + b_{hf}) \\
        g &= \tanh(W_{ig} x + b_{ig} + W_{hg} h + b_{hg}) \\
        o &= \sigma(W_{io} x + b_{io} + W_{ho} h + b_{ho}) \\
        c' &= f \odot c + i \odot g \\
        h' &= o \odot \tanh(c')

    With ``proj_size > 0``, :math:`h' = W_{hr} (o \odot \tanh(c'))`.

    Example:
        >>> import torch, fusecell as fc
        >>> cell = fc.LSTMCell(5, 10, proj_size=4)
        >>> h, c = cell(torch.randn(3, 5))
        >>> h.shape, c.shape
        (torch.Size([3, 4]), torch.Size([3, 10]))

    Arguments:
        input_size, hidden_size: features of the input and of the cell state c.
        bias: learn ``bias_ih`` and ``bias_hh``.
        device, dtype: of the parameters.
        proj_size: features of h and of the output; 0 for hidden_size, without ``weight_hr``.
        activation: the name of the activation of g, and of c in the output.
        gate_activation: the name of that of the gates i, f and o.

    Raises:
        TypeError, ValueError: for a size that is not an integer, or negative; for a proj_size not below hidden_size;
            for an unknown activation.

    Paper: S. Hochreiter, J. Schmidhuber, Long short-term memory, 1997; the projection: https://arxiv.org/abs/1402.1128.
    """

    states = ("h", "c")
    gates = ("i", "f", "g", "o")
    keeps, updates = "f", "i"
    added_attributes: ClassVar[Mapping[str, object]] = {**GATED, "proj_size": 0}
    proj_size: int = 0
    activation: str = "tanh"
    gate_activation: str = "sigmoid"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        proj_size: int = 0,
        activation: str = "tanh",
        gate_activation: str = "sigmoid",
    ) -> None:
        _check_constructor(input_size=input_size, hidden_size=hidden_size, proj_size=proj_size)
        if proj_size and proj_size >= hidden_size:
            raise ValueError(f"proj_size has to be smaller than hidden_size, got {proj_size} and {hidden_size}")
        check_activation("LSTMCell", activation=activation, gate_activation=gate_activation)
        self.activation, self.gate_activation = activation, gate_activation
        self.proj_size = proj_size  # reset_parameters, at the end of torch's constructor, needs it
        nn.LSTMCell.__init__(self, input_size, hidden_size, bias, device, dtype)

    @property
    def state_sizes(self) -> tuple[int, ...]:
        return (self.output_size, self.hidden_size)

    @property
    def output_size(self) -> int:
        return self.proj_size or self.hidden_size

    def reset_parameters(self) -> None:
        """Draw new values for the parameters, those that a one-layer torch.nn.LSTM draws with the same seed."""
        if self.proj_size and "weight_hr" not in self._parameters:
            like, proj = self.weight_hh, self.proj_size
            self.weight_hh = nn.Parameter(like.new_empty(4 * self.hidden_size, proj))
            self.weight_hr = nn.Parameter(like.new_empty(proj, self.hidden_size))
        nn.LSTMCell.reset_parameters(self)

    def is_torchs(self) -> bool:
        plain = not self.proj_size and (self.activation, self.gate_activation) == ("tanh", "sigmoid")
        return super().is_torchs() and plain

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        h, c = state
        gates = linear(h, self.weight_hh, self.bias_hh) + linear(x, self.weight_ih, self.bias_ih)
        i, f, g, o = gates.chunk(4, 1)
        activation, gate = ACTIVATIONS[self.activation], ACTIVATIONS[self.gate_activation]
        i = self.note("i", gate(i))
        f = self.note("f", gate(f))
        g = self.note("g", activation(g))
        o = self.note("o", gate(o))
        c = self.note("c", f * c + i * g)
        h = o * activation(c)
        if self.proj_size:
            h = linear(h, self.weight_hr)
        return h, (h, c)

    def extra_repr(self) -> str:
        return super().extra_repr() + other_than(self, proj_size=0, activation="tanh", gate_activation="sigmoid")


def torch_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class of torch.nn that a drop-in, or a subclass of one, inherits from."""
    return next(each for each in kind.__mro__ if each.__module__ == nn.RNNBase.__module__)


def other_than(module: nn.Module, **defaults: Any) -> str:
    """Format the attributes that differ from their defaults, for a ``repr``: ``", reset_after=False"``."""
    changed = ((name, getattr(module, name)) for name, value in defaults.items() if getattr(module, name) != value)
    return "".join(f", {name}={value!r}" for name, value in changed)


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype as torch's errors do: ``Float``, ``Double``, ``BFloat16``."""
    kind: str = torch.empty(0, dtype=dtype).type()
    return kind.removeprefix("torch.").removesuffix("Tensor")


def cell_keys(state_dict: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
    """Rename the keys of a one-layer, one-direction layer's state_dict to a cell's; return any other unchanged."""
    # With a second layer or direction it is not a cell's: its keys stay, and load_state_dict names them.
    others = ("weight_ih_l1", "weight_ih_l0_reverse")
    if f"{prefix}weight_ih_l0" not in state_dict or any(prefix + name in state_dict for name in others):
        return state_dict
    return _renamed(state_dict, {f"{prefix}{name}_l0": prefix + name for name in _WEIGHTS})


def layer_keys(state_dict: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
    """Rename the keys of a cell's state_dict to a one-layer layer's; return any other unchanged."""
    if f"{prefix}weight_ih" not in state_dict:
        return state_dict
    return _renamed(state_dict, {prefix + name: f"{prefix}{name}_l0" for name in _WEIGHTS})


def _renamed(state_dict: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in state_dict.items()}


def _check_constructor(**sizes: Any) -> None:
    """Raise TypeError or ValueError unless every size is a non-negative integer, of Python's or NumPy's."""
    for name, value in sizes.items():
        if not hasattr(value, "__index__"):  # int(3.5) would be accepted
            raise TypeError(f"{name} should be of type int, got: {type(value).__name__}")
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
