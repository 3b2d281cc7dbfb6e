"""What RNN, GRU and LSTM share: torch.nn's arguments brought to scans of the cells.

Constructor, parameters, initialisation, repr and attributes are inherited from torch.nn; only ``forward`` is ours. A
layer owns its parameters under torch's names. Its cells are made anew in every call, around the weights the layer has
at that moment, so that functional_call, parametrizations, replicas and ``.data`` are seen and nothing refers to a
weight afterwards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence

from fusecell.cells.torch_nn import GRUCell, LSTMCell, RNNCell, layer_keys
from fusecell.drop_in.checks import check_hidden, check_input
from fusecell.execution.call_cache import cached_call, store_call
from fusecell.execution.call_form import CallForm, CellFactory
from fusecell.execution.natively import natively
from fusecell.execution.options import Options, State
from fusecell.execution.results import swap_time_and_batch, with_dim, without_dim
from fusecell.execution.runners import traced_as_operator, traced_runner
from fusecell.execution.torchscript import is_tracing, refuse_script, refuse_trace
from fusecell.layers.arguments import Form, Lengths, Packing, check_packed
from fusecell.layers.scan import scan_cell
from fusecell.layers.scan_wrappers import PLAIN, Extras, MaskedOutput, check_extras, describe
from fusecell.validation import StateLike, bare

__all__ = ["Scanned"]

_CONTAINERS = tuple((name, type(value)) for name, value in vars(nn.Module()).items() if isinstance(value, dict | set))
_CONSTANTS = {name: value for name, value in vars(nn.Module()).items() if not isinstance(value, dict | set)}
_PLAIN = {recompute: Options(recompute=recompute) for recompute in (False, True)}


# What a cell is made of, beside weights and what its class adds.
_VIEWED = ("training", "input_size", "hidden_size", "num_layers", "bias", "bidirectional", "proj_size")


@natively
def _given(input: Any, hx: Any) -> State:
    """The input and the states, as they were handed over."""
    if hx is None:
        return (input,)
    return (input, hx) if isinstance(hx, Tensor) else (input, *hx)


@functools.cache
@natively
def _call_form(batched: bool, batch_first: bool, recompute: bool) -> CallForm:
    return CallForm(True, batched, batch_first, layered=True, recompute=recompute)


class Scanned:
    """The part that is the same for all three; torch.nn's class stands behind it."""

    cell_type: ClassVar[type[RNNCell | GRUCell | LSTMCell]]
    cell_attributes: ClassVar[tuple[str, ...]] = ()

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
        self.masked_output, self.tbptt, self.clip_state_grad = masked_output, tbptt, clip_state_grad
        self._extras()  # checked where it is made

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: StateLike | None = None,
        *unset: None,
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
            unset: None, for the arguments by name: torch's older ONNX exporter writes them all out, in order.
            mask: bool of the shape of ``resets``, False where a row takes no part in a step, as in
                :func:`fusecell.scan`.

        Returns:
            The last layer's outputs in the form of the input, directions side by side, and the last states in the
            form of ``hx``. With T = 0, no outputs and the state given.

        Raises:
            ValueError, RuntimeError: with torch.nn's texts, where a rank, a size, a dtype or a device doesn't fit.
            TypeError: where an argument is of another kind.
        """
        if unset:
            self._check_unset(unset)
        # Where torch.compile breaks its graph for this frame, what it calls runs natively, mark by mark.
        usual = lengths is None and resets is None and mask is None
        if not usual or torch.compiler.is_compiling() or not self._one_plain_cell(input, hx):
            return self._forward(input, hx, lengths=lengths, resets=resets, mask=mask)
        given = _given(input, hx)
        call_form = _call_form(given[0].dim() == 3, self.batch_first, self.recompute)
        found = cached_call(self, call_form, given)  # type: ignore[arg-type]  # with torch.nn's class a module
        if found is None:
            result = self._forward(input, hx)
            store_call(self, call_form, given, self._view())  # type: ignore[arg-type]
            return result
        outputs: Any = found[0]
        return outputs, bare(found[1])

    def _check_unset(self, unset: tuple[object, ...]) -> None:
        if len(unset) > 3 or any(value is not None for value in unset):
            raise TypeError(
                f"{type(self).__name__}.forward takes input and hx by position, got {2 + len(unset)} arguments. "
                "Name the others: lengths=, resets=, mask=."
            )

    @natively
    def _one_plain_cell(self, input: Any, hx: Any) -> bool:
        """Whether a call is one plain scan of one cell: this is asked in every call."""
        if not isinstance(input, Tensor) or self.num_layers > 1 or self.bidirectional:
            return False
        return (hx is None or isinstance(hx, Tensor | tuple | list)) and self._extras() is PLAIN

    @natively
    def _view(self) -> CellFactory:
        """The one cell, and what it is made of."""
        weights = {name: f"{name}_l0" for name in self._weight_names()}
        return CellFactory(lambda: self.leaf_cells()[0][2], (*_VIEWED, *self.cell_attributes), weights)

    def _weight_names(self) -> list[str]:
        """The weights of each cell."""
        names = ["weight_ih", "weight_hh"] + (["bias_ih", "bias_hh"] if self.bias else [])
        return names + (["weight_hr"] if self.proj_size else [])

    @natively
    def _forward(
        self,
        input: Tensor | PackedSequence,
        hx: StateLike | None = None,
        *,
        lengths: Lengths | None = None,
        resets: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor | State]:
        """``forward`` with all its checks."""
        usual = lengths is None and resets is None and mask is None
        if is_tracing():
            return self._forward_jit(input, hx, usual)
        weight = self._weight("weight_ih_l0")
        x = check_input(self, input, weight)
        packed = input if isinstance(input, PackedSequence) else None
        if packed is not None and not usual:
            raise ValueError(
                f"{type(self).__name__}: a PackedSequence carries its own lengths and takes neither lengths nor "
                "resets nor a mask. Pass the padded tensor with lengths=, in any order."
            )
        unbatched = packed is None and x.dim() == 2
        if packed is not None:
            check_packed(packed)
        else:
            x = x[:, None] if unbatched else x.transpose(0, 1) if self.batch_first else x
        rows = x.shape[1] if packed is None else int(packed.batch_sizes[0])
        given = None if hx is None else check_hidden(self, hx, x, rows, unbatched, packed is not None)
        extras = self._extras()
        if usual and (extras is PLAIN or not torch.is_grad_enabled()) and self._leave_to_torch(x):
            result: tuple[Tensor | PackedSequence, Tensor | State] = super().forward(input, hx)  # type: ignore[misc]
            return result
        if packed is not None:
            return self._forward_packed(Packing.open(packed), x, given, weight, extras)
        options = _PLAIN[self.recompute]
        if not usual:
            form = Form(x.shape[0], rows, x.device, self.batch_first, unbatched)
            options = Options(form.lengths(lengths), form.resets(resets), recompute=self.recompute)
            extras = extras if mask is None else replace(extras, mask=form.mask(mask))
        outputs, after = self._scan(x, self._start(weight, given, None, rows), options, None, extras)
        if unbatched:
            return without_dim(outputs, 1), bare(tuple(without_dim(value, 1) for value in after))
        return swap_time_and_batch(outputs) if self.batch_first else outputs, bare(after)

    def _forward_jit(self, input: Any, hx: Any, usual: bool) -> tuple[Tensor | PackedSequence, Tensor | State]:
        """torch.nn's own layer, for torch.jit to record."""
        name = type(self).__name__
        if not usual:
            refuse_trace(name, "torch.nn's layer, which is what is recorded, takes no lengths, resets and mask.")
        if (self.tbptt is not None or self.clip_state_grad is not None) and torch.is_grad_enabled():
            refuse_trace(name, "torch.nn's layer, which is what is recorded, has no tbptt and clip_state_grad.")
        if not self._is_torchs():
            refuse_trace(name, f"torch.nn can't compute {self}.")
        result: tuple[Tensor | PackedSequence, Tensor | State] = super().forward(input, hx)  # type: ignore[misc]
        return result

    def _forward_packed(
        self, packing: Packing, data: Tensor, given: State | None, weight: Tensor, extras: Extras
    ) -> tuple[PackedSequence, Tensor | State]:
        """The same for a PackedSequence's data."""
        options = Options(packing.lengths, recompute=self.recompute)
        start = self._start(weight, given, packing, packing.lengths.shape[0])
        outputs, after = self._scan(packing.padded(data), start, options, packing, extras)
        return packing.repack(outputs), bare(tuple(packing.unsort(value, 1) for value in after))

    def _extras(self) -> Extras:
        """How the layer answers and trains."""
        return check_extras(type(self).__name__, self.masked_output, self.tbptt, self.clip_state_grad)

    def state_sizes(self) -> tuple[int, ...]:
        """The features of each state."""
        return (self.proj_size or self.hidden_size, self.hidden_size)[: len(self.cell_type.states)]

    def leaf_cells(self) -> list[tuple[int, int, RNNCell | GRUCell | LSTMCell]]:
        """The cells as (layer, direction, cell), bottom first, in the order of the states.

        Each is a view: an ordinary cell around the weights that the layer has now, in no module's tree. Take new ones
        for every call.
        """
        directions = 2 if self.bidirectional else 1
        names = self._weight_names()
        constants = {**_CONSTANTS, "training": self.training, "hidden_size": self.hidden_size, "bias": self.bias}
        for name in self.cell_attributes:
            constants[name] = getattr(self, name)
        if not self.bias:
            constants["bias_ih"] = constants["bias_hh"] = None
        found = []
        for layer in range(self.num_layers):
            constants["input_size"] = directions * (self.proj_size or self.hidden_size) if layer else self.input_size
            for direction in range(directions):
                suffix = f"_l{layer}_reverse" if direction else f"_l{layer}"
                cell = self.cell_type.__new__(self.cell_type)
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
        if torch.compiler.is_compiling() and extras is PLAIN and traced_as_operator():
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
            return x, tuple([with_dim(value) for value in after[0]])
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
            sizes = self.state_sizes()
            return [tuple([weight.new_zeros(rows, size) for size in sizes]) for _ in range(count)]
        if packing is not None:
            given = tuple(packing.sort(value, 1) for value in given)
        given = tuple(value.to(weight.dtype) for value in given)
        return [tuple([value[index] for value in given]) for index in range(count)]

    def _leave_to_torch(self, x: Tensor) -> bool:
        """Whether torch's own kernels (cuDNN and its like) compute this layer, for want of ours on the device."""
        return not x.is_cpu and x.numel() > 0 and self._is_torchs()

    def _is_torchs(self) -> bool:
        """Whether the cells' equation is the one that torch.nn's layer has."""
        return True

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks for first."""
        refuse_script(type(self).__name__)

    def extra_repr(self) -> str:
        text: str = super().extra_repr()  # type: ignore[misc]
        extras = describe(self._extras())
        return ", ".join([text, *(["recompute=True"] if self.recompute else []), *extras])

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if self.num_layers == 1 and not self.bidirectional:
            state_dict = layer_keys(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]
