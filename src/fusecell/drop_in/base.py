"""The base class of RNN, GRU and LSTM: torch.nn's arguments, computed by scans of cells.

Constructor, parameters, initialisation, repr and attributes are inherited from torch.nn; only ``forward`` is
fusecell's. A layer owns its parameters under torch's names. Its cells are built anew in every call, around the weights
the layer has at that moment, so that functional_call, parametrizations, replicas and ``.data`` take effect and nothing
refers to a weight afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence

from fusecell.cells.torch_nn import GRUCell, LSTMCell, RNNCell, layer_keys, torch_class
from fusecell.drop_in.checks import check_hidden, check_input
from fusecell.execution.call_form import CallForm, CellFactory, PreparedArguments, sequence_form
from fusecell.execution.call_path import call
from fusecell.execution.natively import natively
from fusecell.execution.options import Options, Recompute, State, check_recompute
from fusecell.execution.results import public_state, swap_time_and_batch, with_dim, without_dim
from fusecell.execution.runners import traced_as_operator, traced_runner
from fusecell.execution.symbolic_trace import is_proxy, record_call
from fusecell.execution.torchscript import is_tracing, read_as, refuse_script, refuse_trace
from fusecell.layers.arguments import Lengths, SequenceShape
from fusecell.layers.packed import Packing, check_packed
from fusecell.layers.scan import scan_time_major
from fusecell.layers.scan_wrappers import PLAIN, MaskedOutput, WrapOptions, describe, wrap_options
from fusecell.torch_internals import in_onnx_export, is_expanded_weight
from fusecell.validation import StateLike

__all__ = ["Scanned"]

# The attributes of an nn.Module as its constructor makes them, for cells that are built without calling it.
_CONTAINERS = tuple((name, type(value)) for name, value in vars(nn.Module()).items() if isinstance(value, dict | set))
_CONSTANTS = {name: value for name, value in vars(nn.Module()).items() if not isinstance(value, dict | set)}
_PLAIN: dict[Recompute, Options] = {each: Options(recompute=each) for each in (False, True, "chunk")}


_TORCHS_CHECKS = ("check_input", "check_hidden_size", "check_forward_args")
_READ_BY_CELLS = ("training", "input_size", "hidden_size", "num_layers", "bias", "bidirectional", "proj_size")
"""The attributes of every layer from which ``leaf_cells`` builds a cell, besides its weights."""


class Scanned:
    """Base class of RNN, GRU and LSTM, before torch.nn's class in the order of method resolution.

    Attributes:
        cell_type: the class of the cells.
        cell_attributes: the attributes of its own that a layer passes on to its cells.
        added_attributes: those that torch.nn's class lacks, with the values at which both compute the same.
    """

    cell_type: ClassVar[type[RNNCell | GRUCell | LSTMCell]]
    cell_attributes: ClassVar[tuple[str, ...]] = ()
    added_attributes: ClassVar[Mapping[str, object]] = {
        "recompute": False,
        "masked_output": "hold",
        "tbptt": None,
        "clip_state_grad": None,
    }

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
    recompute: Recompute = False
    masked_output: MaskedOutput = "hold"
    tbptt: int | None = None
    clip_state_grad: float | None = None

    _has_own_checks: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        torchs: Any = torch_class(cls)  # type: ignore[arg-type]
        kind: Any = cls
        cls._has_own_checks = any(getattr(kind, name) is not getattr(torchs, name) for name in _TORCHS_CHECKS)

    def __init__(
        self,
        *args: Any,
        recompute: Recompute = False,
        masked_output: MaskedOutput = "hold",
        tbptt: int | None = None,
        clip_state_grad: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.recompute = check_recompute(type(self).__name__, recompute)
        self.masked_output, self.tbptt, self.clip_state_grad = masked_output, tbptt, clip_state_grad
        self._wrap_options()  # an invalid one is an error here, not at the first call

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
            unset: None in the place of lengths, resets and mask: torch's older ONNX exporter passes every argument by
                position.
            lengths: (N,) integers, in any order: row n is valid for t < lengths[n], outputs beyond are 0.
            resets: bool, True where a row's state goes back to zeros before the step at t: (T, N), (N, T) if
                ``batch_first``, (T,) without a batch.
            mask: bool of the shape of ``resets``, False where a row takes no part in a step, as in
                :func:`fusecell.scan`.

        Returns:
            The last layer's outputs in the layout of the input, directions concatenated, and the last states in that
            of ``hx``. With T = 0, empty outputs and the state passed.

        Raises:
            ValueError, RuntimeError: with torch.nn's texts, where a rank, a size, a dtype or a device doesn't fit.
            TypeError: where an argument has the wrong type.
        """
        if type(input) is not Tensor and is_proxy(input):
            return record_call(self, input, hx, lengths=lengths, resets=resets, mask=mask)  # type: ignore[arg-type, no-any-return]
        if unset:
            self._check_unset(unset)
        has_data = lengths is not None or resets is not None or mask is not None
        # Where torch.compile breaks its graph at this layer it compiles this frame, but none that @natively marks.
        if has_data or torch.compiler.is_compiling() or not self._is_one_scan(input):
            return self._checked_forward(input, hx, lengths=lengths, resets=resets, mask=mask)
        module: Any = self  # torch.nn's class makes it one
        return call(module, input, hx, self._form(input.dim()), Scanned._checked_forward, (), type(self)._cell_factory)

    def _form(self, dims: int) -> CallForm:
        """Return the form of a call, of the input's number of dimensions."""
        return sequence_form(dims == 3, self.batch_first, True, False, bool(self.recompute))

    @natively
    def prepared_call(self, input: Any, dims: int) -> PreparedArguments | None:
        """Return how a call without options is prepared, given the input's number of dimensions; None if it isn't.

        See :class:`fusecell.execution.call_form.PreparedArguments`.
        """
        module: Any = self
        if type(self).forward is not Scanned.forward or not self._is_one_scan(input):
            return None
        return PreparedArguments(module, self._form(dims), type(self)._cell_factory)

    def _check_unset(self, unset: tuple[object, ...]) -> None:
        if len(unset) > 3 or any(value is not None for value in unset):
            raise TypeError(
                f"{type(self).__name__}.forward takes input and hx by position, got {2 + len(unset)} arguments. "
                "Name the others: lengths=, resets=, mask=."
            )

    @natively
    def _is_one_scan(self, input: Any) -> TypeGuard[Tensor]:
        """Return whether a call on ``input`` is the scan of one cell over one tensor, which a kernel can do alone."""
        if not isinstance(input, Tensor) or self.num_layers > 1 or self.bidirectional or self._has_own_checks:
            return False
        if self.recompute == "chunk":
            return False
        return self._wrap_options() is PLAIN

    @natively
    def _cell_factory(self) -> CellFactory:
        """Return how to build the cell of a layer that has one."""
        weights = {name: f"{name}_l0" for name in self._weight_names()}
        return CellFactory(lambda: self.leaf_cells()[0][2], (*_READ_BY_CELLS, *self.cell_attributes), weights)

    def _weight_names(self) -> list[str]:
        """Return the names of each cell's weights."""
        names = ["weight_ih", "weight_hh"] + (["bias_ih", "bias_hh"] if self.bias else [])
        return names + (["weight_hr"] if self.proj_size else [])

    @natively
    def _checked_forward(
        self,
        input: Tensor | PackedSequence,
        hx: StateLike | None = None,
        *,
        lengths: Lengths | None = None,
        resets: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor | State]:
        """Validate the arguments of ``forward`` and run the layers."""
        has_data = lengths is not None or resets is not None or mask is not None
        if is_tracing():
            return self._traced_forward(input, hx, has_data)
        weight = self._weight("weight_ih_l0")
        # ONNX, and gradients per sample, are about torch.nn's operations.
        if not has_data and (in_onnx_export() or is_expanded_weight(weight)) and self._computes_as_torch():
            return self._torch_forward(input, hx)
        x = check_input(self, input, weight)
        packed = input if isinstance(input, PackedSequence) else None
        if packed is not None and has_data:
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
        states = None if hx is None else check_hidden(self, hx, x, rows, unbatched, packed is not None)
        if self._has_own_checks:
            self._run_own_checks(input, hx, rows)
        wrap = self._wrap_options()
        if not has_data and self._leave_to_torch(x):
            return self._torch_forward(input, hx)
        if packed is not None:
            return self._packed_forward(Packing.open(packed), x, states, weight, wrap)
        options = _PLAIN[self.recompute]
        if has_data:
            shape = SequenceShape(x.shape[0], rows, x.device, self.batch_first, unbatched)
            options = Options(shape.lengths(lengths), shape.resets(resets), recompute=self.recompute)
            wrap = wrap if mask is None else replace(wrap, mask=shape.mask(mask))
        outputs, after = self._scan(x, self._start(weight, states, None, rows), options, wrap, None)
        if unbatched:
            return without_dim(outputs, 1), public_state(tuple(without_dim(value, 1) for value in after))
        return swap_time_and_batch(outputs) if self.batch_first else outputs, public_state(after)

    def _run_own_checks(self, input: Any, hx: Any, rows: int) -> None:
        """Call the ``check_forward_args`` of a user's subclass as torch.nn's forward does, with a batch and a state."""
        module: Any = self
        packed = isinstance(input, PackedSequence)
        if packed and len(self.cell_type.states) > 1:  # torch.nn's LSTM doesn't there
            return
        data, batch_sizes = (input.data, input.batch_sizes) if packed else (input, None)
        if packed and hx is not None:
            hx = module.permute_hidden(hx, input.sorted_indices)
        states = hx if isinstance(hx, tuple) else (hx,)
        if not packed and data.dim() == 2:
            data = data[None] if self.batch_first else data[:, None]
            states = tuple([value if value is None else value[:, None] for value in states])
        if hx is None:
            count = self.num_layers * (2 if self.bidirectional else 1)
            states = tuple([data.new_zeros(count, rows, size) for size in self.state_sizes()])
        module.check_forward_args(data, states if len(states) > 1 else states[0], batch_sizes)

    def _torch_forward(self, input: Any, hx: Any) -> tuple[Tensor | PackedSequence, Tensor | State]:
        """Run torch.nn's own layer."""
        result: tuple[Tensor | PackedSequence, Tensor | State] = super().forward(input, hx)  # type: ignore[misc]
        return result

    def _traced_forward(self, input: Any, hx: Any, has_data: bool) -> tuple[Tensor | PackedSequence, Tensor | State]:
        """Run torch.nn's own layer for torch.jit to record, where it computes the same."""
        name = type(self).__name__
        if has_data:
            refuse_trace(name, "torch.nn's layer, which is what is recorded, takes no lengths, resets and mask.")
        if (self.tbptt is not None or self.clip_state_grad is not None) and torch.is_grad_enabled():
            refuse_trace(name, "torch.nn's layer, which is what is recorded, has no tbptt and clip_state_grad.")
        if not self.is_torchs():
            refuse_trace(name, f"torch.nn can't compute {self}.")
        return self._torch_forward(input, hx)

    def _packed_forward(
        self, packing: Packing, data: Tensor, states: State | None, weight: Tensor, wrap: WrapOptions
    ) -> tuple[PackedSequence, Tensor | State]:
        """Run the layers over a PackedSequence's data."""
        options = Options(packing.lengths, recompute=self.recompute)
        start = self._start(weight, states, packing, packing.lengths.shape[0])
        outputs, after = self._scan(packing.padded(data), start, options, wrap, packing)
        return packing.repack(outputs), public_state(tuple(packing.unsort(value, 1) for value in after))

    def _wrap_options(self) -> WrapOptions:
        """Validate recompute, masked_output, tbptt and clip_state_grad: attributes, which may have been set since."""
        if self.recompute not in _PLAIN:
            check_recompute(type(self).__name__, self.recompute)
        return wrap_options(type(self).__name__, self.masked_output, self.tbptt, self.clip_state_grad)

    def state_sizes(self) -> tuple[int, ...]:
        """Return the features of each state."""
        return (self.proj_size or self.hidden_size, self.hidden_size)[: len(self.cell_type.states)]

    def leaf_cells(self) -> list[tuple[int, int, RNNCell | GRUCell | LSTMCell]]:
        """Build the cells as (layer, direction, cell), bottom first, in the order of the states.

        Each is an ordinary cell around the weights that the layer has now, and no submodule of any module. Build new
        ones for every call.
        """
        directions = 2 if self.bidirectional else 1
        names = self._weight_names()
        constants = {**_CONSTANTS, "training": self.training, "hidden_size": self.hidden_size, "bias": self.bias}
        for name in self.cell_attributes:
            constants[name] = getattr(self, name)
        if not self.bias:
            constants["bias_ih"] = constants["bias_hh"] = None
        cells = []
        for layer in range(self.num_layers):
            constants["input_size"] = directions * (self.proj_size or self.hidden_size) if layer else self.input_size
            for direction in range(directions):
                suffix = f"_l{layer}_reverse" if direction else f"_l{layer}"
                cell = self.cell_type.__new__(self.cell_type)
                # Past nn.Module's constructor and __setattr__, which take longer than a step.
                fields = cell.__dict__
                fields.update(constants)
                for name, kind in _CONTAINERS:
                    fields[name] = kind()
                for name in names:
                    fields[name] = self._weight(name + suffix)
                cells.append((layer, direction, cell))
        return cells

    def _weight(self, name: str) -> Tensor:
        """Return the weight that ``getattr`` would, parametrized or swapped, but faster where it is a parameter."""
        parameter = self._parameters.get(name)
        weight: Tensor = getattr(self, name) if parameter is None else parameter
        return weight

    def _runners(self, wrap: WrapOptions) -> Sequence[Callable[[State, State, Options], tuple[Tensor, State]]]:
        """Return a function that scans each cell, in the order of the states."""
        if torch.compiler.is_compiling() and wrap is PLAIN and traced_as_operator():
            run: Any = traced_runner()
            count = self.num_layers * (2 if self.bidirectional else 1)
            # The layer and an index rather than a cell: torch knows the layer's parameters, and no module has the cell.
            return [partial(run, self, leaf=index) for index in range(count)]
        return [partial(scan_time_major, cell, wrap=wrap) for _, _, cell in self.leaf_cells()]

    def _scan(
        self, x: Tensor, start: Sequence[State], options: Options, wrap: WrapOptions, packing: Packing | None
    ) -> tuple[Tensor, State]:
        """Scan every layer in every direction; return the outputs (T, N, features) and the states, stacked."""
        runners = self._runners(wrap)
        directions = [options]
        if self.bidirectional:
            directions.append(replace(options, reverse=True))
        after: list[State] = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in directions:
                output, state = runners[len(after)]((x,), start[len(after)], direction)
                outputs.append(output)
                after.append(state)
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
            if self.dropout and self.training and layer + 1 < self.num_layers:
                x = self._drop(x, packing)
        if len(after) == 1:  # torch.stack would copy
            return x, tuple([with_dim(value) for value in after[0]])
        return x, tuple([torch.stack(values) for values in zip(*after, strict=True)])

    def _drop(self, x: Tensor, packing: Packing | None) -> Tensor:
        """Apply dropout between layers, over packed data where torch does: equal seeds then give equal masks."""
        if packing is None:
            return dropout(x, self.dropout)
        return packing.padded(dropout(packing.data(x), self.dropout))

    def _start(self, weight: Tensor, states: State | None, packing: Packing | None, rows: int) -> list[State]:
        """Return the state from which each cell starts, in the weights' dtype."""
        count = self.num_layers * (2 if self.bidirectional else 1)
        if states is None:
            sizes = self.state_sizes()
            return [tuple([weight.new_zeros(rows, size) for size in sizes]) for _ in range(count)]
        if packing is not None:
            states = tuple(packing.sort(value, 1) for value in states)
        states = tuple(value.to(weight.dtype) for value in states)
        return [tuple([value[index] for value in states]) for index in range(count)]

    def _leave_to_torch(self, x: Tensor) -> bool:
        """Return whether torch.nn computes this call: fusecell has no kernels for other devices, and cuDNN is fast."""
        return not x.is_cpu and x.numel() > 0 and self._computes_as_torch()

    def _computes_as_torch(self) -> bool:
        """Return whether torch.nn's layer would return the same in this thread now, gradients included."""
        return self.is_torchs() and (self._wrap_options() is PLAIN or not torch.is_grad_enabled())

    def is_torchs(self) -> bool:
        """Return whether the cells have the equation of torch.nn's layer; not those of a user's class."""
        return self.cell_type in (RNNCell, GRUCell, LSTMCell)

    def __prepare_scriptable__(self) -> Any:
        """Pass for torch.nn's layer while torch.jit.script runs, which calls this first."""
        module: Any = self
        own_forward = type(self).forward is not Scanned.forward
        if not own_forward:
            name = type(self).__name__
            if not self.is_torchs():
                refuse_script(name, f"torch.nn can't compute {self}.")
            if self.tbptt is not None or self.clip_state_grad is not None:
                refuse_script(name, "torch.nn's layer, which is what is scripted, has no tbptt and clip_state_grad.")
        read_as(module, torch_class(type(module)), self.added_attributes, own_forward=own_forward)
        return module

    def extra_repr(self) -> str:
        text: str = super().extra_repr()  # type: ignore[misc]
        options = describe(self._wrap_options())
        return ", ".join([text, *([f"recompute={self.recompute!r}"] if self.recompute else []), *options])

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if self.num_layers == 1 and not self.bidirectional:  # then a cell's state_dict can be loaded too
            state_dict = layer_keys(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]
