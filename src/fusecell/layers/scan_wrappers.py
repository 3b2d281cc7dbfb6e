"""Masking, truncated backpropagation and gradient clipping: wrappers around a cell, so that they compile with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fusecell.cell import Cell
from fusecell.execution.options import Options, State, steps_of
from fusecell.execution.runners import run
from fusecell.shapes import Outputs, OutputSize, Size, in_order, is_size, map_outputs, tensors_of, zero_outputs
from fusecell.wrappers import Wrapper

__all__ = ["PLAIN", "MaskedOutput", "WrapOptions", "describe", "run_wrapped", "wrap_options", "unwrapped"]

MaskedOutput = Literal["hold", "zero"]
_MASKED_OUTPUTS = get_args(MaskedOutput)


@dataclass(frozen=True, slots=True)
class WrapOptions:
    """Options of a scan that wrappers around its cell carry out; runners know nothing of them.

    Arguments:
        mask: (T, N) bool, time-major and checked; False where a row takes no part in a step.
        hold: outputs at masked steps repeat the last valid one; else they are 0.
        tbptt: the number of steps after which the state's gradient is cut.
        clip: the bound of the state's gradient at every step.
    """

    mask: Tensor | None = None
    hold: bool = True
    tbptt: int | None = None
    clip: float | None = None


PLAIN = WrapOptions()
"""The one instance for a scan without any of them: compare by identity, as every call does."""


def wrap_options(
    where: str, masked_output: MaskedOutput, tbptt: int | None, clip_state_grad: float | None
) -> WrapOptions:
    """Validate a layer's options; return ``PLAIN`` itself where all are the defaults.

    Raises:
        TypeError, ValueError: naming the argument that doesn't fit; ``where`` is the class or function it belongs to.
    """
    if masked_output not in _MASKED_OUTPUTS:
        raise ValueError(f"{where}: masked_output must be 'hold' or 'zero', got {masked_output!r}.")
    if tbptt is not None:
        if isinstance(tbptt, bool) or not isinstance(tbptt, int):
            raise TypeError(f"{where}: tbptt is the number of steps a gradient goes back, an int, got {tbptt!r}.")
        if tbptt < 1:
            raise ValueError(f"{where}: tbptt must be 1 or more steps, got {tbptt}.")
        if tbptt >= 2**63:  # compared with positions, which are int64
            raise ValueError(f"{where}: tbptt must be less than 2**63 steps, got {tbptt}.")
    if clip_state_grad is not None:
        if isinstance(clip_state_grad, bool) or not isinstance(clip_state_grad, int | float):
            raise TypeError(f"{where}: clip_state_grad is a bound for a gradient, got {clip_state_grad!r}.")
        if not clip_state_grad > 0:  # NaN too
            raise ValueError(f"{where}: clip_state_grad must be above 0, got {clip_state_grad}.")
        clip_state_grad = float(clip_state_grad)
    if masked_output == "hold" and tbptt is None and clip_state_grad is None:
        return PLAIN
    return WrapOptions(None, masked_output == "hold", tbptt, clip_state_grad)


def describe(options: WrapOptions) -> list[str]:
    """Format the options that differ from their defaults, for a layer's ``repr``."""
    parts = [] if options.hold else ["masked_output='zero'"]
    if options.tbptt is not None:
        parts.append(f"tbptt={options.tbptt}")
    return parts if options.clip is None else [*parts, f"clip_state_grad={options.clip}"]


class Masked(Wrapper):
    """A cell whose state and output stay as they are in steps where the mask, an additional input, is 0."""

    def __init__(self, cell: Cell, hold: bool) -> None:
        super().__init__(cell)
        self.hold = hold

    # A held output is a state: each step gives the next the output that a masked step repeats.
    @property
    def states(self) -> tuple[str, ...]:  # type: ignore[override]
        if not self.hold:
            return self.cell.states
        size = self.output_size
        held = ("held",) if is_size(size) else tuple(f"held{place}" for place in range(len(size)))
        return (*self.cell.states, *held)

    @property
    def state_sizes(self) -> tuple[Size, ...]:
        sizes = self.cell.state_sizes
        return (*sizes, *_output_sizes(self.output_size)) if self.hold else sizes

    def noise_names(self) -> tuple[str, ...]:
        return ("mask",)

    def initial_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> State:
        start = self.cell.initial_state(batch_size, dtype=dtype, device=device)
        if not self.hold:
            return start
        held = zero_outputs(self.output_size, partial(torch.zeros, dtype=dtype, device=device), batch_size)
        return (*start, *tensors_of(held))

    def around(self, x: Any, state: State, noise: State) -> tuple[Outputs, State]:
        valid = noise[0] > 0.5
        # Selected before the step, never multiplied: masked input may hold NaN, which 0 * NaN and the step's own
        # gradient at NaN would spread.
        inputs = tuple(x) if isinstance(x, tuple) else (x,)
        inputs = tuple(_where(valid, value, torch.zeros_like(value)) for value in inputs)
        count = len(self.cell.state_sizes)
        before = state[:count]
        output, new = self.cell.step(inputs if len(inputs) > 1 else inputs[0], before)
        after = tuple(_where(valid, *pair) for pair in zip(new, before, strict=True))
        if not self.hold:
            return map_outputs(lambda value: _where(valid, value, torch.zeros_like(value)), output), after
        others = iter(state[count:])
        output = map_outputs(lambda value: _where(valid, value, next(others)), in_order(self.output_size, output))
        return output, (*after, *tensors_of(output))


def _where(rows: Tensor, value: Tensor, other: Tensor) -> Tensor:
    """Return ``value`` in rows of which the (N, 1) flag is set, ``other`` in the rest."""
    rows = rows if value.dim() == 2 else rows.reshape(-1, *[1] * (value.dim() - 1))
    return torch.where(rows, value, other)


def _output_sizes(size: OutputSize) -> tuple[Size, ...]:
    """Return the size of each output, in order."""
    if is_size(size):
        return (size,)
    return tuple(size.values()) if isinstance(size, Mapping) else tuple(size)


class GradientLimited(Wrapper):
    """A cell whose gradient for the incoming state is clipped, and 0 in steps where the cut, an input, is 1."""

    def __init__(self, cell: Cell, clip: float | None, has_cuts: bool) -> None:
        super().__init__(cell)
        self.clip, self.has_cuts = clip, has_cuts

    def noise_names(self) -> tuple[str, ...]:
        return ("cut",) if self.has_cuts else ()

    def around(self, x: Any, state: State, noise: State) -> tuple[Outputs, State]:
        cut = noise[0] if self.has_cuts else None
        return self.cell.step(x, tuple(_limit_gradient(value, cut, self.clip) for value in state))


class _LimitGradient(torch.autograd.Function):
    """The identity, with a gradient that is clipped and cut."""

    @staticmethod
    def forward(value: Tensor, cut: Tensor | None, clip: float | None) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, cut, ctx.clip = inputs
        ctx.save_for_backward(*(() if cut is None else (cut,)))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.clip is not None:
            gradient = gradient.clamp(-ctx.clip, ctx.clip)
        for cut in ctx.saved_tensors:
            # Selected, not multiplied: a cut must stop an infinite gradient too.
            gradient = _where(cut > 0.5, torch.zeros_like(gradient), gradient)
        return gradient, None, None


def _limit_gradient(value: Tensor, cut: Tensor | None, clip: float | None) -> Tensor:
    result: Tensor = _LimitGradient.apply(value, cut, clip)  # type: ignore[no-untyped-call]
    return result


def unwrapped(cell: Cell) -> Cell:
    """Return the user's cell inside the wrappers of :func:`run_wrapped`."""
    while isinstance(cell, Masked | GradientLimited):
        cell = cell.cell
    return cell


def run_wrapped(cell: Cell, inputs: State, state: State, options: Options, wrap: WrapOptions) -> tuple[Outputs, State]:
    """Run a cell inside the wrappers that ``wrap`` asks for.

    Arguments:
        inputs: time-major, those that the cell draws included.
        wrap: any but ``PLAIN``.

    Returns:
        The outputs (T, N, output_size) and the cell's own states after the last step.
    """
    count = len(state)
    # Without autograd there is no gradient to limit, and the wrapper would be compiled for nothing.
    if (wrap.tbptt or wrap.clip is not None) and torch.is_grad_enabled():
        cell = GradientLimited(cell, wrap.clip, wrap.tbptt is not None)
        if wrap.tbptt is not None:
            inputs = (*inputs, _cuts(wrap.tbptt, inputs, state, options))
    if wrap.mask is not None:
        cell = Masked(cell, wrap.hold)
        like = state[0] if state else inputs[0]
        inputs = (*inputs, wrap.mask[..., None].to(like.dtype))
        if wrap.hold:
            rows = like.shape[0] if state else like.shape[1]
            state = (*state, *tensors_of(zero_outputs(cell.output_size, like.new_zeros, rows)))
        if options.resets is not None:
            # A runner resets rows before the step, which the wrapper couldn't undo in a masked one.
            options = replace(options, resets=options.resets & wrap.mask)
    outputs, after = run(cell, inputs, state, options)
    return outputs, after[:count]


def _cuts(every: int, inputs: State, state: State, options: Options) -> Tensor:
    """Return (T, N or 1, 1): 1 before every ``every``-th step of a row, in the order in which it runs; else 0."""
    like = state[0] if state else inputs[0]
    time = torch.arange(steps_of(inputs), device=like.device)[:, None]
    if options.reverse:
        last = steps_of(inputs) if options.lengths is None else options.lengths
        time = last - 1 - time
    cuts = ((time % every == 0) & (time > 0)).to(like.dtype)
    return cuts.expand(-1, inputs[0].shape[1])[..., None].contiguous()
