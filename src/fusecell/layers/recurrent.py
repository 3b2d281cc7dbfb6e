"""``Recurrent``, a cell as a layer over sequences, and ``Bidirectional``, two of them in opposite directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fusecell.cell import Cell
from fusecell.execution.call_form import PreparedArguments, sequence_form
from fusecell.execution.natively import natively
from fusecell.execution.options import Recompute, State, check_recompute
from fusecell.execution.symbolic_trace import is_proxy, record_call
from fusecell.layers.arguments import Lengths
from fusecell.layers.scan import Input, is_one_kernel, not_a_cell, scan
from fusecell.layers.scan_wrappers import MaskedOutput, describe, wrap_options
from fusecell.shapes import Outputs, OutputSize, Size, feature_shape, is_size
from fusecell.validation import StateLike
from fusecell.wrapped_module import wrap

__all__ = ["Bidirectional", "Recurrent"]


class Recurrent(nn.Module):
    r"""A cell as a layer over whole sequences.

    .. math:: (y_t, s_t) = \mathrm{step}(x_t, s_{t-1}), \quad t = 0 \ldots T-1

    Example:
        >>> import torch, fusecell as fc
        >>> layer = fc.Recurrent(fc.LSTMCell(5, 10), batch_first=True)
        >>> y, (h, c) = layer(torch.randn(3, 7, 5), lengths=[7, 4, 2])
        >>> y.shape, c.shape
        (torch.Size([3, 7, 10]), torch.Size([3, 10]))

    Arguments:
        cell: any :class:`fusecell.Cell`, a :class:`fusecell.Stack` of them included; or a cell of torch.nn's. Other
            modules become cells by :func:`fusecell.wrap`.
        batch_first: input and output are (N, T, features) instead of (T, N, features). States never are.
        reverse: run from the last step to the first.
        recompute: save only the states for the backward, which computes everything else again: less memory, about a
            third more arithmetic; ``"chunk"``: save still less. See :func:`fusecell.recompute`.
        masked_output, tbptt, clip_state_grad: as in :func:`fusecell.scan`.

    Raises:
        TypeError: if ``cell`` is not a fusecell cell, or an argument has the wrong type.
        ValueError: for a value that an argument doesn't take.
    """

    def __init__(
        self,
        cell: Cell | nn.RNNCellBase,
        *,
        batch_first: bool = False,
        reverse: bool = False,
        recompute: Recompute = False,
        masked_output: MaskedOutput = "hold",
        tbptt: int | None = None,
        clip_state_grad: float | None = None,
    ) -> None:
        super().__init__()
        if isinstance(cell, nn.RNNCellBase) and not isinstance(cell, Cell):
            cell = wrap(cell)
        if not isinstance(cell, Cell):
            raise TypeError(f"Recurrent: {not_a_cell(cell)}")
        self.cell = cell
        self.batch_first = batch_first
        self.reverse = reverse
        self.recompute = check_recompute("Recurrent", recompute)
        wrap_options("Recurrent", masked_output, tbptt, clip_state_grad)
        self.masked_output: MaskedOutput = masked_output
        self.tbptt = tbptt
        self.clip_state_grad = clip_state_grad

    @property
    def input_size(self) -> Size:
        size: Size = self.cell.input_size
        return size

    @property
    def output_size(self) -> OutputSize:
        return self.cell.output_size

    def forward(
        self,
        input: Input,
        state: StateLike | None = None,
        *,
        lengths: Lengths | None = None,
        resets: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Outputs, Tensor | State]:
        """Run the cell over a sequence; arguments and returns as in :func:`fusecell.scan`."""
        if type(input) is not Tensor and is_proxy(input):
            return record_call(self, input, state, lengths=lengths, resets=resets, mask=mask)  # type: ignore[no-any-return]
        return self.run(input, state, self.reverse, lengths=lengths, resets=resets, mask=mask)

    def run(self, input: Input, state: StateLike | None, reverse: bool, **data: Any) -> tuple[Outputs, Tensor | State]:
        """Run the cell in a given direction; otherwise as ``forward``."""
        return scan(
            self.cell,
            input,
            state,
            reverse=reverse,
            batch_first=self.batch_first,
            recompute=self.recompute,
            masked_output=self.masked_output,
            tbptt=self.tbptt,
            clip_state_grad=self.clip_state_grad,
            **data,
        )

    @natively
    def prepared_call(self, input: Any, dims: int) -> PreparedArguments | None:
        """Return how a call without options is prepared, given the input's number of dimensions; None if it isn't.

        See :class:`fusecell.execution.call_form.PreparedArguments`.
        """
        wrap = wrap_options("Recurrent", self.masked_output, self.tbptt, self.clip_state_grad)
        if type(self).forward is not Recurrent.forward or type(self).run is not Recurrent.run:
            return None
        if not is_one_kernel(self.cell, input, wrap, self.recompute):
            return None
        count = len(input) if isinstance(input, tuple | list) else 1
        form = sequence_form(dims == 3, bool(self.batch_first), False, self.reverse, bool(self.recompute), count)
        return PreparedArguments(self.cell, form)

    def extra_repr(self) -> str:
        flags = {"batch_first": self.batch_first, "reverse": self.reverse, "recompute": self.recompute}
        parts = [f"{name}={value!r}" for name, value in flags.items() if value]
        return ", ".join(parts + describe(wrap_options("", self.masked_output, self.tbptt, self.clip_state_grad)))


class Bidirectional(nn.Module):
    r"""Two layers over the same input, the second in reverse, with their outputs concatenated.

    .. math:: y_t = [\,\overrightarrow{y}_t,\ \overleftarrow{y}_t\,]

    Example:
        >>> import torch, fusecell as fc
        >>> both = fc.Bidirectional(fc.Recurrent(fc.GRUCell(5, 8)), fc.Recurrent(fc.LSTMCell(5, 6)))
        >>> y, (h, (h_back, c_back)) = both(torch.randn(7, 3, 5))
        >>> y.shape
        torch.Size([7, 3, 14])

    Arguments:
        forward_layer: a layer with ``reverse=False``.
        backward_layer: another; it is run reversed, each row within its own length, and its outputs are aligned to
            input time, so that its last state is that at t = 0.

    Raises:
        TypeError: if either is not a :class:`fusecell.Recurrent`.
        ValueError: if either has ``reverse=True``, or they disagree in ``batch_first``.
    """

    def __init__(self, forward_layer: Recurrent, backward_layer: Recurrent) -> None:
        super().__init__()
        for name, layer in (("forward_layer", forward_layer), ("backward_layer", backward_layer)):
            if not isinstance(layer, Recurrent):
                raise TypeError(f"Bidirectional: {name} must be a fusecell.Recurrent, got {type(layer).__name__}.")
            if layer.reverse:
                raise ValueError(
                    f"Bidirectional: {name} has reverse=True; give two forward-running layers, "
                    "the second is run reversed."
                )
        if forward_layer.batch_first != backward_layer.batch_first:
            raise ValueError(
                f"Bidirectional: both layers must agree in batch_first, got {forward_layer.batch_first} "
                f"and {backward_layer.batch_first}."
            )
        _concatenated_size(forward_layer.output_size, backward_layer.output_size)  # raises where they don't fit
        self.forward_layer = forward_layer
        self.backward_layer = backward_layer

    @property
    def batch_first(self) -> bool:
        return self.forward_layer.batch_first

    @property
    def input_size(self) -> Size:
        return self.forward_layer.input_size

    @property
    def output_size(self) -> OutputSize:
        return _concatenated_size(self.forward_layer.output_size, self.backward_layer.output_size)

    def forward(
        self,
        input: Input,
        state: Sequence[StateLike | None] | None = None,
        *,
        lengths: Lengths | None = None,
        resets: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Outputs, tuple[Any, Any]]:
        """Run both directions.

        Arguments:
            input: as in :func:`fusecell.scan`.
            state: the pair of states, each as its layer takes it; None for an initial state.
            lengths, resets, mask: as in :func:`fusecell.scan`, for both.

        Returns:
            The outputs, concatenated along their features, of a shape (C, H, W) along C, and the pair of states.

        Raises:
            TypeError, ValueError: where an argument doesn't fit, naming it.
        """
        if type(input) is not Tensor and is_proxy(input):
            return record_call(self, input, state, lengths=lengths, resets=resets, mask=mask)  # type: ignore[no-any-return]
        if state is None:
            state = (None, None)
        if not isinstance(state, tuple | list) or len(state) != 2:
            raise ValueError("Bidirectional takes its state as a pair: (forward state, backward state).")
        data = {"lengths": lengths, "resets": resets, "mask": mask}
        forward, forward_state = self.forward_layer(input, state[0], **data)
        backward, backward_state = self.backward_layer.run(input, state[1], True, **data)
        return _concatenated(forward, backward, self.forward_layer.output_size), (forward_state, backward_state)


def _concatenated(forward: Any, backward: Any, size: OutputSize) -> Any:
    """Concatenate two outputs along the first dimension of their features."""
    if isinstance(forward, PackedSequence):
        return forward._replace(data=_concatenated(forward.data, backward.data, size))
    if is_size(size):
        return torch.cat((forward, backward), -len(feature_shape(size)))
    if isinstance(size, Mapping):
        return {name: _concatenated(forward[name], backward[name], size[name]) for name in size}
    return tuple(_concatenated(*values) for values in zip(forward, backward, size, strict=True))


def _concatenated_size(forward: OutputSize, backward: OutputSize) -> OutputSize:
    """Return the size of two outputs concatenated.

    Raises:
        ValueError: if they differ in more than the first dimension of their features.
    """
    if isinstance(forward, int) and isinstance(backward, int):
        return forward + backward
    if is_size(forward) and is_size(backward):
        one, other = feature_shape(forward), feature_shape(backward)
        if one and other and one[1:] == other[1:]:
            return (one[0] + other[0], *one[1:])
    elif isinstance(forward, Mapping) and isinstance(backward, Mapping):
        if forward.keys() == backward.keys():
            return {name: _concatenated_size(size, backward[name]) for name, size in forward.items()}
    elif isinstance(forward, tuple) and isinstance(backward, tuple) and len(forward) == len(backward):
        return tuple(_concatenated_size(*sizes) for sizes in zip(forward, backward, strict=True))
    raise ValueError(
        f"Bidirectional concatenates the outputs of its layers along the first dimension of their features, which have "
        f"the sizes {forward} and {backward}: all other dimensions, and the names or number of outputs, must agree."
    )
