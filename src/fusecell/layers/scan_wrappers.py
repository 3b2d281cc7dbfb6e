"""What a scan may ask of every step beside lengths and resets, each a cell around the cell, and so compiled with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fusecell.cell import Cell
from fusecell.execution.options import Options, State, steps_of
from fusecell.wrappers import Wrapper

__all__ = ["PLAIN", "Extras", "MaskedOutput", "asked_of", "check_extras", "describe", "wrapped"]

MaskedOutput = Literal["hold", "zero"]
_MASKED_OUTPUTS = get_args(MaskedOutput)


@dataclass(frozen=True, slots=True)
class Extras:
    """What is asked of a scan beside :class:`fusecell.execution.options.Options`; tensors are time-major and checked.

    Arguments:
        mask: (T, N) bool, False where a row takes no part in a step.
        hold: outputs at masked steps repeat the last valid one; else they are 0.
        tbptt: cut the state's gradient every so many steps.
        clip: bound of the state's gradient at every step.
    """

    mask: Tensor | None = None
    hold: bool = True
    tbptt: int | None = None
    clip: float | None = None


PLAIN = Extras()


def check_extras(where: str, masked_output: MaskedOutput, tbptt: int | None, clip_state_grad: float | None) -> Extras:
    """How a layer answers and trains, checked.

    Raises:
        TypeError, ValueError: where an argument is not what it may be.
    """
    if masked_output not in _MASKED_OUTPUTS:
        raise ValueError(f"{where}: masked_output must be 'hold' or 'zero', got {masked_output!r}.")
    if tbptt is not None:
        if isinstance(tbptt, bool) or not isinstance(tbptt, int):
            raise TypeError(f"{where}: tbptt is the number of steps a gradient goes back, an int, got {tbptt!r}.")
        if tbptt < 1:
            raise ValueError(f"{where}: tbptt must be 1 or more steps, got {tbptt}.")
        if tbptt >= 2**63:
            raise ValueError(f"{where}: tbptt must be less than 2**63 steps, got {tbptt}.")
    if clip_state_grad is not None:
        if isinstance(clip_state_grad, bool) or not isinstance(clip_state_grad, int | float):
            raise TypeError(f"{where}: clip_state_grad is a bound for a gradient, got {clip_state_grad!r}.")
        if not clip_state_grad > 0:
            raise ValueError(f"{where}: clip_state_grad must be above 0, got {clip_state_grad}.")
        clip_state_grad = float(clip_state_grad)
    if masked_output == "hold" and tbptt is None and clip_state_grad is None:
        return PLAIN
    return Extras(None, masked_output == "hold", tbptt, clip_state_grad)


def describe(extras: Extras) -> list[str]:
    """What of a layer's ``repr`` is not the default."""
    found = [] if extras.hold else ["masked_output='zero'"]
    if extras.tbptt is not None:
        found.append(f"tbptt={extras.tbptt}")
    return found if extras.clip is None else [*found, f"clip_state_grad={extras.clip}"]


class Masked(Wrapper):
    """A step that leaves the state as it is where the mask is 0."""

    def __init__(self, cell: Cell, hold: bool) -> None:
        super().__init__(cell)
        self.hold = hold

    @property
    def states(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*self.cell.states, "held") if self.hold else self.cell.states

    @property
    def state_sizes(self) -> tuple[int, ...]:
        return (*self.cell.state_sizes, self.output_size) if self.hold else self.cell.state_sizes

    def noise_names(self) -> tuple[str, ...]:
        return ("mask",)

    def initial_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> State:
        start = self.cell.initial_state(batch_size, dtype=dtype, device=device)
        if not self.hold:
            return start
        return (*start, torch.zeros(batch_size, self.output_size, dtype=dtype, device=device))

    def around(self, x: Any, state: State, noise: State) -> tuple[Tensor, State]:
        valid = noise[0] > 0.5
        # Selected before the step, never multiplied: what is masked may hold NaN.
        given = tuple(x) if isinstance(x, tuple) else (x,)
        given = tuple(torch.where(valid, value, torch.zeros_like(value)) for value in given)
        before = state[:-1] if self.hold else state
        output, new = self.cell.step(given if len(given) > 1 else given[0], before)
        after = tuple(torch.where(valid, *pair) for pair in zip(new, before, strict=True))
        other = state[-1] if self.hold else torch.zeros_like(output)
        output = torch.where(valid, output, other)
        return output, ((*after, output) if self.hold else after)


class Cut(Wrapper):
    """A step whose gradient for the state before it is clipped, and 0 where the flag is set."""

    def __init__(self, cell: Cell, clip: float | None, flagged: bool) -> None:
        super().__init__(cell)
        self.clip, self.flagged = clip, flagged

    def noise_names(self) -> tuple[str, ...]:
        return ("cut",) if self.flagged else ()

    def around(self, x: Any, state: State, noise: State) -> tuple[Tensor, State]:
        flag = noise[0] if self.flagged else None
        return self.cell.step(x, tuple(_bounded(value, flag, self.clip) for value in state))


class _Gradient(torch.autograd.Function):
    """A value as it is, its gradient clipped and cut."""

    @staticmethod
    def forward(value: Tensor, flag: Tensor | None, clip: float | None) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, flag, ctx.clip = inputs
        ctx.save_for_backward(*(() if flag is None else (flag,)))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.clip is not None:
            gradient = gradient.clamp(-ctx.clip, ctx.clip)
        for flag in ctx.saved_tensors:
            gradient = torch.where(flag > 0.5, torch.zeros_like(gradient), gradient)
        return gradient, None, None


def _bounded(value: Tensor, flag: Tensor | None, clip: float | None) -> Tensor:
    found: Tensor = _Gradient.apply(value, flag, clip)  # type: ignore[no-untyped-call]
    return found


def asked_of(cell: Cell) -> Cell:
    """The cell inside what a scan has put around it."""
    while isinstance(cell, Masked | Cut):
        cell = cell.cell
    return cell


@dataclass(frozen=True, slots=True)
class Wrapped:
    """A cell with what is asked around it, and the arguments it then takes."""

    cell: Cell
    inputs: State
    state: State
    options: Options
    kept: int
    """How many of its states are the cell's own."""


def wrapped(cell: Cell, inputs: State, state: State, options: Options, extras: Extras) -> Wrapped:
    """Put what ``extras`` ask around a cell; ``inputs`` hold what it draws."""
    kept = len(state)
    if (extras.tbptt or extras.clip is not None) and torch.is_grad_enabled():
        cell = Cut(cell, extras.clip, extras.tbptt is not None)
        if extras.tbptt is not None:
            inputs = (*inputs, _cuts(extras.tbptt, inputs, state, options))
    if extras.mask is not None:
        cell = Masked(cell, extras.hold)
        like = state[0] if state else inputs[0]
        inputs = (*inputs, extras.mask[..., None].to(like.dtype))
        if extras.hold:
            state = (*state, like.new_zeros(like.shape[0] if state else like.shape[1], cell.output_size))
        if options.resets is not None:
            options = replace(options, resets=options.resets & extras.mask)
    return Wrapped(cell, inputs, state, options, kept)


def _cuts(every: int, inputs: State, state: State, options: Options) -> Tensor:
    """(T, N or 1, 1): 1 where a row has gone ``every`` steps, counted in the order in which it goes them."""
    like = state[0] if state else inputs[0]
    time = torch.arange(steps_of(inputs), device=like.device)[:, None]
    if options.reverse:
        last = steps_of(inputs) if options.lengths is None else options.lengths
        time = last - 1 - time
    cuts = ((time % every == 0) & (time > 0)).to(like.dtype)
    return cuts.expand(-1, inputs[0].shape[1])[..., None].contiguous()
