"""``scan``: a cell over a whole sequence. Every layer is a thin class around it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fusecell.cell import Cell
from fusecell.execution.call_cache import cached_call, store_call
from fusecell.execution.call_form import CallForm
from fusecell.execution.natively import natively
from fusecell.execution.options import Options, State, steps_of
from fusecell.execution.results import swap_time_and_batch, without_dim
from fusecell.execution.runners import run
from fusecell.layers.arguments import Form, Lengths, Packing, check_inputs, check_packed
from fusecell.layers.scan_wrappers import PLAIN, Extras, MaskedOutput, check_extras, wrapped
from fusecell.layers.stack import Stack
from fusecell.validation import StateLike, all_inputs, bare, start_state

__all__ = ["Input", "scan", "scan_cell"]

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
    recompute: bool = False,
    mask: Tensor | None = None,
    masked_output: MaskedOutput = "hold",
    tbptt: int | None = None,
    clip_state_grad: float | None = None,
) -> tuple[Tensor | PackedSequence, Tensor | State]:
    r"""Run a cell over a whole sequence.

    .. math:: (y_t, s_t) = \mathrm{step}(x_t, s_{t-1}), \quad t = 0 \ldots T-1

    Example:
        >>> import torch, fusecell as fc
        >>> y, h = fc.scan(fc.GRUCell(5, 10), torch.randn(7, 3, 5), lengths=[7, 2, 0])
        >>> y.shape, h.shape
        (torch.Size([7, 3, 10]), torch.Size([3, 10]))

    Arguments:
        cell: any :class:`fusecell.Cell`.
        input: (T, N, input_size), (N, T, input_size) if ``batch_first``, (T, input_size), or a PackedSequence; a tuple
            of such where the cell has several inputs. A T of 1 beside longer ones means constant over time.
        state: the state before the first step, (N, size) each and never batch-first; ``cell.initial_state`` if left
            out. One state bare, several as a tuple.
        lengths: (N,) whole numbers on any device, in any order: row n is valid for t < lengths[n]. Outputs beyond are
            0 and the state returned is that of the last valid step; what the padding holds is never seen.
        resets: bool (T, N), (N, T) if ``batch_first``, (T,) without a batch: where True, the row goes back to
            ``cell.initial_state`` before the step that consumes ``input[t, n]``.
        reverse: run from the last step to the first, each row within its own length; outputs stay in input time.
        recompute: keep the states only for the backward, which computes everything else again: less memory, about a
            third more arithmetic.
        mask: bool of the shape of ``resets``: where False, the row takes no part in the step. Its state is held, a
            reset does nothing, and what the input holds there is never seen.
        masked_output: what the output is where the mask is False: ``"hold"``, that of the row's last valid step (0
            before the first), or ``"zero"``.
        tbptt: cut the gradient every so many steps, as if the sequence were run in chunks of ``tbptt`` steps with
            :func:`fusecell.detach` on the state between them. A row's steps count from the first that it goes.
        clip_state_grad: bound each element of the gradient that a step hands to the state before it to
            [-clip_state_grad, clip_state_grad].

    Returns:
        The outputs, in the form of the input, and the state after the last step.

    Raises:
        TypeError, ValueError: where an argument doesn't fit, naming it.
    """
    if not isinstance(cell, Cell):
        raise TypeError(not_a_cell(cell))
    extras = check_extras("scan", masked_output, tbptt, clip_state_grad)
    if isinstance(input, PackedSequence):
        if lengths is not None or resets is not None or mask is not None:
            raise ValueError(
                "A PackedSequence carries its own lengths and takes neither lengths nor resets nor a mask. "
                "Pass the padded tensor with lengths=, in any order: nothing needs packing here."
            )
        return _scan_packed(cell, input, state, Options(None, None, reverse, recompute), extras)
    usual = lengths is None and resets is None and mask is None and extras is PLAIN and isinstance(input, Tensor)
    if not usual or isinstance(cell, Stack) or torch.compiler.is_compiling():
        options = Options(None, None, reverse, recompute)
        return _scan(cell, input, state, options, batch_first, extras, lengths=lengths, resets=resets, mask=mask)
    given = _given(input, state)
    call_form = _call_form(given[0].dim() == 3, bool(batch_first), bool(reverse), bool(recompute))
    found = cached_call(cell, call_form, given)
    if found is None:
        result = _scan(cell, input, state, Options(None, None, reverse, recompute), batch_first, extras)
        store_call(cell, call_form, given)
        return result
    outputs: Any = found[0]
    return outputs, bare(found[1])


@natively
def _given(input: Any, state: StateLike | None) -> State:
    """The input and the states, as they were handed over."""
    if state is None:
        return (input,)
    return (input, state) if isinstance(state, Tensor) else (input, *state)


@functools.cache
@natively
def _call_form(batched: bool, batch_first: bool, reverse: bool, recompute: bool) -> CallForm:
    return CallForm(True, batched, batch_first, reverse=reverse, recompute=recompute)


@natively
def _scan(
    cell: Cell,
    input: Any,
    state: StateLike | None,
    options: Options,
    batch_first: bool,
    extras: Extras,
    *,
    lengths: Lengths | None = None,
    resets: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | State]:
    """A scan whose arguments are checked here."""
    given: State = tuple(input) if isinstance(input, tuple | list) else (input,)
    inputs, unbatched = check_inputs(cell, given, batch_first)
    form = Form(steps_of(inputs), inputs[0].shape[1], inputs[0].device, batch_first, unbatched)
    if lengths is not None or resets is not None:
        options = replace(options, lengths=form.lengths(lengths), resets=form.resets(resets))
    extras = extras if mask is None else replace(extras, mask=form.mask(mask))
    start = start_state(cell, state, inputs, unbatched=unbatched)
    outputs, after = scan_cell(cell, inputs, start, options, extras=extras)
    if unbatched:
        return without_dim(outputs, 1), bare(tuple(without_dim(value, 0) for value in after))
    return (swap_time_and_batch(outputs) if batch_first else outputs), bare(after)


@natively
def _scan_packed(
    cell: Cell, packed: PackedSequence, state: StateLike | None, options: Options, extras: Extras
) -> tuple[PackedSequence, Tensor | State]:
    check_packed(packed)
    packing = Packing.open(packed)
    inputs, _ = check_inputs(cell, (packing.padded(packed.data),), batch_first=False)
    start = start_state(cell, state, inputs, unbatched=False)
    if state is not None:
        start = tuple(packing.sort(value) for value in start)
    options = replace(options, lengths=packing.lengths)
    outputs, after = scan_cell(cell, inputs, start, options, packing, extras)
    return packing.repack(outputs), bare(tuple(packing.unsort(value) for value in after))


def scan_cell(
    cell: Cell,
    inputs: State,
    state: State,
    options: Options,
    packing: Packing | None = None,
    extras: Extras = PLAIN,
) -> tuple[Tensor, State]:
    """Scan checked, time-major arguments; a Stack goes layer by layer."""
    if isinstance(cell, Stack):
        return _scan_stack(cell, inputs, state, options, packing, extras)
    if extras is PLAIN:
        return run(cell, all_inputs(cell, inputs, state), state, options)
    if torch.compiler.is_compiling():
        # It takes no cell that is made in the call: it leaves its graph here, and machine code runs as ever.
        return torch.compiler.disable(_scan_wrapped)(cell, inputs, state, options, extras)  # type: ignore[no-any-return, no-untyped-call]
    return _scan_wrapped(cell, inputs, state, options, extras)


def _scan_wrapped(cell: Cell, inputs: State, state: State, options: Options, extras: Extras) -> tuple[Tensor, State]:
    call = wrapped(cell, all_inputs(cell, inputs, state), state, options, extras)
    outputs, after = run(call.cell, call.inputs, call.state, call.options)
    return outputs, after[: call.kept]


def _scan_stack(
    stack: Stack, inputs: State, state: State, options: Options, packing: Packing | None, extras: Extras
) -> tuple[Tensor, State]:
    """Each cell over the whole sequence, then the next: the large products leave the loop layer by layer."""
    after: State = ()
    outputs, first = inputs[0], inputs[0]
    each: list[Tensor] = []
    flow: Callable[[Tensor], Tensor] = stack.drop
    if packing is not None:
        flow = lambda value: packing.padded(stack.drop(packing.data(value)))  # noqa: E731  # torch drops packed data
    for index, (cell, part) in enumerate(zip(stack.layers, stack.split(state), strict=True)):
        given = inputs if index == 0 else (stack.feed(outputs, first),)
        below = given[0]
        outputs, new = scan_cell(cell, given, part, options, packing, extras)
        after += new
        each.append(outputs)
        if index + 1 < len(stack.cells):
            outputs = flow(outputs)
        if index == 0 and stack.residual and (options.lengths is not None or extras.mask is not None):
            below = _as_output(below, options, extras)
        outputs = stack.join(outputs, below)
    return stack.result(outputs, each), after


def _as_output(value: Tensor, options: Options, extras: Extras) -> Tensor:
    """(T, N, size) as a cell that passed it on would give it: 0 beyond lengths, held or 0 where it is masked."""
    time = torch.arange(value.shape[0], device=value.device)[:, None]
    within = time < (value.shape[0] if options.lengths is None else options.lengths)
    valid = within if extras.mask is None else within & extras.mask
    if extras.mask is None or not extras.hold:
        return torch.where(valid[..., None], value, torch.zeros_like(value))
    # The place of the last step that counted, in the order in which the steps run; out of reach where there is none.
    if options.reverse:
        place = torch.where(valid, time, len(value)).flip(0).cummin(0).values.flip(0)
    else:
        place = torch.where(valid, time, -1).cummax(0).values
    known = within & (place >= 0) & (place < len(value))
    held = value.gather(0, place.clamp(0, len(value) - 1)[..., None].expand_as(value))
    return torch.where(known[..., None], held, torch.zeros_like(value))


def not_a_cell(found: object) -> str:
    """The sentence for something that is no fusecell cell."""
    name = type(found).__name__
    if type(found).__module__.startswith("torch.nn") and name in ("GRUCell", "LSTMCell", "RNNCell"):
        return f"expected a fusecell cell, got torch.nn.{name}. Use fusecell.{name}: it loads the same state_dict."
    return f"expected a fusecell cell, got {name}. Subclass fusecell.Cell and write step(self, x, state)."
