"""``scan``: run a cell over a whole sequence. Every layer is a thin class around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fusecell.cell import Cell
from fusecell.execution.call_form import sequence_form
from fusecell.execution.call_path import call
from fusecell.execution.natively import natively
from fusecell.execution.options import Options, Recompute, State, check_recompute, steps_of
from fusecell.execution.results import public_state, swap_time_and_batch, without_dim
from fusecell.execution.runners import run
from fusecell.execution.symbolic_trace import is_proxy, refuse_proxy
from fusecell.layers.arguments import Lengths, SequenceShape, check_inputs
from fusecell.layers.packed import Packing, check_packed
from fusecell.layers.scan_wrappers import PLAIN, MaskedOutput, WrapOptions, run_wrapped, wrap_options
from fusecell.layers.stack import Stack
from fusecell.shapes import Outputs, map_outputs
from fusecell.validation import StateLike, all_inputs, start_state

__all__ = ["Input", "not_a_cell", "scan", "scan_time_major"]

Input = Tensor | PackedSequence | tuple[Tensor, ...]


def scan(
    cell: Cell,
    input: Input,
    state: StateLike | None = None,
    *,
    lengths: Lengths | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    batch_first: bool = False,
    recompute: Recompute = False,
    mask: Tensor | None = None,
    masked_output: MaskedOutput = "hold",
    tbptt: int | None = None,
    clip_state_grad: float | None = None,
) -> tuple[Outputs, Tensor | State]:
    r"""Run a cell over a whole sequence.

    .. math:: (y_t, s_t) = \mathrm{step}(x_t, s_{t-1}), \quad t = 0 \ldots T-1

    Example:
        >>> import torch, fusecell as fc
        >>> y, h = fc.scan(fc.GRUCell(5, 10), torch.randn(7, 3, 5), lengths=[7, 2, 0])
        >>> y.shape, h.shape
        (torch.Size([7, 3, 10]), torch.Size([3, 10]))

    Arguments:
        cell: any :class:`fusecell.Cell`.
        input: (T, N, input_size), (N, T, input_size) if ``batch_first``, (T, input_size), or a PackedSequence, where an
            ``input_size`` that is a shape stands for as many dimensions: (T, N, C, H, W). A tuple of such where the
            cell has several inputs, of any rank. A T of 1 next to longer inputs means constant over time.
        state: the state before the first step, (N, size) each and never batch-first: the tensor where the cell has one
            state, else a tuple. ``cell.initial_state`` if left out.
        lengths: (N,) integers on any device, in any order: row n is valid for t < lengths[n]. Outputs beyond are 0 and
            the state returned is that of the last valid step; the padding's values are never read.
        resets: bool (T, N), (N, T) if ``batch_first``, (T,) without a batch: where True, the row goes back to
            ``cell.initial_state`` before the step that consumes ``input[t, n]``.
        reverse: run from the last step to the first, each row within its own length; outputs stay in input time.
        recompute: save only the states for the backward, which computes everything else again: less memory, about a
            third more arithmetic. ``"chunk"``: save only the states before each of about the square root of T chunks,
            for the arithmetic of another forward.
        mask: bool of the shape of ``resets``: where False, the row takes no part in the step. Its state is held, a
            reset does nothing, and the input's value there is never read.
        masked_output: the output where the mask is False: ``"hold"``, that of the row's last valid step (0 before the
            first), or ``"zero"``.
        tbptt: truncate backpropagation: cut the gradient every ``tbptt`` steps, as if the sequence were run in chunks
            of that length with :func:`fusecell.detach` on the state between them. Steps are counted for each row from
            the first one it runs.
        clip_state_grad: bound each element of the gradient that a step passes to the state before it to
            [-clip_state_grad, clip_state_grad].

    Returns:
        The outputs, in the form of the input, and the state after the last step. A cell whose ``output_size`` is a
        tuple or dict gives a tuple or dict of outputs.

    Raises:
        TypeError, ValueError: where an argument doesn't fit, naming it.
    """
    if not isinstance(cell, Cell):
        raise TypeError(not_a_cell(cell))
    if type(input) is not Tensor and is_proxy(input):
        refuse_proxy("fusecell.scan")
    wrap = wrap_options("scan", masked_output, tbptt, clip_state_grad)
    recompute = check_recompute("scan", recompute)
    has_data = lengths is not None or resets is not None or mask is not None
    if isinstance(input, PackedSequence):
        if has_data:
            raise ValueError(
                "A PackedSequence carries its own lengths and takes neither lengths nor resets nor a mask. "
                "Pass the padded tensor with lengths=, in any order: nothing needs packing here."
            )
        return _scan_packed(cell, input, state, reverse, recompute, wrap)
    if has_data or not is_one_kernel(cell, input, wrap, recompute) or torch.compiler.is_compiling():
        return _scan_padded(
            cell, input, state, reverse, recompute, batch_first, wrap, lengths=lengths, resets=resets, mask=mask
        )
    inputs: tuple[Any, ...] = tuple(input) if isinstance(input, tuple | list) else (input,)
    is_batched, count = inputs[0].dim() == 3, len(inputs)
    form = sequence_form(is_batched, bool(batch_first), False, bool(reverse), bool(recompute), count)
    options = reverse, recompute, batch_first
    return call(cell, inputs[0] if count == 1 else inputs, state, form, _scan_padded, options)


def is_one_kernel(cell: Cell, input: Any, wrap: WrapOptions, recompute: Recompute) -> bool:
    """Whether a scan without lengths, resets and masks can be a prepared kernel, whatever the shapes are."""
    # It runs one cell, so no Stack, over flat rows.
    if wrap is not PLAIN or recompute == "chunk" or isinstance(cell, Stack) or isinstance(cell.input_size, tuple):
        return False
    if isinstance(input, tuple | list):
        return bool(input) and all(isinstance(value, Tensor) for value in input)
    return isinstance(input, Tensor)


@natively
def _scan_padded(
    cell: Cell,
    input: Tensor | tuple[Tensor, ...],
    state: StateLike | None,
    reverse: bool,
    recompute: Recompute,
    batch_first: bool,
    wrap: WrapOptions = PLAIN,
    *,
    lengths: Lengths | None = None,
    resets: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Outputs, Tensor | State]:
    """Validate the arguments of a scan over padded sequences, and run it."""
    inputs, unbatched = check_inputs(cell, tuple(input) if isinstance(input, tuple | list) else (input,), batch_first)
    options = Options(reverse=reverse, recompute=recompute)
    if lengths is not None or resets is not None or mask is not None:
        shape = SequenceShape(steps_of(inputs), inputs[0].shape[1], inputs[0].device, batch_first, unbatched)
        options = Options(shape.lengths(lengths), shape.resets(resets), reverse, recompute)
        wrap = wrap if mask is None else replace(wrap, mask=shape.mask(mask))
    start = start_state(cell, state, inputs, unbatched=unbatched)
    outputs, after = scan_time_major(cell, inputs, start, options, wrap)
    if unbatched:
        outputs = map_outputs(lambda value: without_dim(value, 1), outputs)
        return outputs, public_state(tuple(without_dim(value, 0) for value in after))
    return (map_outputs(swap_time_and_batch, outputs) if batch_first else outputs), public_state(after)


@natively
def _scan_packed(
    cell: Cell, packed: PackedSequence, state: StateLike | None, reverse: bool, recompute: Recompute, wrap: WrapOptions
) -> tuple[Outputs, Tensor | State]:
    """Validate the arguments of a scan over a PackedSequence, and run it."""
    check_packed(packed)
    packing = Packing.open(packed)
    inputs, _ = check_inputs(cell, (packing.padded(packed.data),), batch_first=False)
    start = start_state(cell, state, inputs, unbatched=False)
    if state is not None:
        start = tuple(packing.sort(value) for value in start)
    options = Options(packing.lengths, reverse=reverse, recompute=recompute)
    outputs, after = scan_time_major(cell, inputs, start, options, wrap, packing)
    return _repacked(packing, outputs), public_state(tuple(packing.unsort(value) for value in after))


def _repacked(packing: Packing, outputs: Outputs) -> Outputs:
    """Return outputs (T, N, ...) as PackedSequences."""
    if isinstance(outputs, Tensor):
        return packing.repack(outputs)
    if isinstance(outputs, dict):
        return {name: packing.repack(value) for name, value in outputs.items()}
    return tuple(packing.repack(value) for value in outputs)


def scan_time_major(
    cell: Cell,
    inputs: State,
    state: State,
    options: Options,
    wrap: WrapOptions = PLAIN,
    packing: Packing | None = None,
) -> tuple[Outputs, State]:
    """Run a cell over validated inputs (T, N, ...), a Stack layer by layer.

    Arguments:
        packing: the layout of the PackedSequence that the user passed, None for padded input.
    """
    if isinstance(cell, Stack):
        return _scan_stack(cell, inputs, state, options, wrap, packing)
    inputs = all_inputs(cell, inputs, state)
    if wrap is PLAIN:
        return run(cell, inputs, state, options)
    if torch.compiler.is_compiling():
        # torch's graph breaks here, as it can't contain a module that is created in the call; between two of its graphs
        # the scan runs as without torch.compile.
        return torch.compiler.disable(run_wrapped)(cell, inputs, state, options, wrap)  # type: ignore[no-any-return, no-untyped-call]
    return run_wrapped(cell, inputs, state, options, wrap)


def _scan_stack(
    stack: Stack, inputs: State, state: State, options: Options, wrap: WrapOptions, packing: Packing | None
) -> tuple[Outputs, State]:
    """Run each cell of a stack over the whole sequence, then the next.

    Layer by layer rather than step by step: a cell's product with its input has no recurrence then, and becomes one
    large product outside the loop.
    """
    after: State = ()
    outputs, first = inputs[0], inputs[0]
    layer_outputs: list[Tensor] = []
    dropout: Callable[[Tensor], Tensor] = stack.drop
    if packing is not None:
        # As torch.nn draws it, over the packed entries: equal seeds then give equal masks.
        dropout = lambda value: packing.padded(stack.drop(packing.data(value)))  # noqa: E731
    for index, (cell, part) in enumerate(zip(stack.layers, stack.split(state), strict=True)):
        layer_inputs = inputs if index == 0 else (stack.feed(outputs, first),)
        below = layer_inputs[0]
        outputs, new = scan_time_major(cell, layer_inputs, part, options, wrap, packing)
        after += new
        layer_outputs.append(outputs)
        if index + 1 < len(stack.cells):
            outputs = dropout(outputs)
        if index == 0 and stack.residual and (options.lengths is not None or wrap.mask is not None):
            # Unlike outputs, the stack's input isn't 0 in the padding, nor held where it is masked.
            below = _as_output(below, options, wrap)
        outputs = stack.join(outputs, below)
    return stack.result(outputs, layer_outputs), after


def _as_output(value: Tensor, options: Options, wrap: WrapOptions) -> Tensor:
    """Apply lengths and mask to (T, N, size) values as if they were a cell's outputs: zeroed, or held if masked."""
    time = torch.arange(value.shape[0], device=value.device)[:, None]
    within = time < (value.shape[0] if options.lengths is None else options.lengths)
    valid = within if wrap.mask is None else within & wrap.mask
    if wrap.mask is None or not wrap.hold:
        return torch.where(_like_rows(valid, value), value, torch.zeros_like(value))
    # For each step the index of the last valid one in the order of running; out of range where there is none yet.
    if options.reverse:
        source = torch.where(valid, time, len(value)).flip(0).cummin(0).values.flip(0)
    else:
        source = torch.where(valid, time, -1).cummax(0).values
    exists = within & (source >= 0) & (source < len(value))
    held = value.gather(0, _like_rows(source.clamp(0, len(value) - 1), value).expand_as(value))
    return torch.where(_like_rows(exists, value), held, torch.zeros_like(value))


def _like_rows(flags: Tensor, value: Tensor) -> Tensor:
    """Return (T, N) with a dimension of size 1 for each feature dimension of a (T, N, ...) value."""
    return flags.reshape(*flags.shape, *[1] * (value.dim() - 2))


def not_a_cell(value: object) -> str:
    """Return the message for a value that is not a fusecell cell."""
    name = type(value).__name__
    if type(value).__module__.startswith("torch.nn") and name in ("GRUCell", "LSTMCell", "RNNCell"):
        return f"expected a fusecell cell, got torch.nn.{name}. Use fusecell.{name}: it loads the same state_dict."
    return f"expected a fusecell cell, got {name}. Subclass fusecell.Cell and write step(self, x, state)."
