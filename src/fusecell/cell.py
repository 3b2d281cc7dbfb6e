"""The contract: a cell is one time step, written in plain PyTorch.

Everything else, layers, stacks, streams, the compiler, needs nothing of a cell but what stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Generic, TypeVar, overload

import torch
from torch import Tensor, nn

from fusecell.notes import noted, noting, rewriting
from fusecell.runner import Manner, Options, State, autocasting, remember, repeated, run, steps_of

__all__ = [
    "Cell",
    "StateLike",
    "all_inputs",
    "bare",
    "check_count",
    "check_dtype",
    "check_state",
    "compute_dtype",
    "noting",
    "one_step",
    "rewriting",
    "start_state",
    "state_tuple",
    "step",
    "weights_dtype",
]

T = TypeVar("T")
StateLike = Tensor | Sequence[Tensor]
"""A state as users hand it over: the tensor where a cell has one state, else a sequence of tensors."""


class _Default(Generic[T]):
    """A computed attribute that a subclass may override by property, or an instance by plain assignment."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute = compute
        self.__doc__ = compute.__doc__

    @overload
    def __get__(self, cell: None, owner: type) -> _Default[T]: ...
    @overload
    def __get__(self, cell: object, owner: type) -> T: ...
    def __get__(self, cell: object | None, owner: type) -> _Default[T] | T:
        return self if cell is None else self.compute(cell)


class Cell(nn.Module):
    r"""One time step of a recurrent network: subclass it, write ``step``, and it runs over whole sequences.

    .. math:: (y_t, s_t) = \mathrm{step}(x_t, s_{t-1})

    Example:
        >>> import torch, fusecell as fc
        >>> from torch import nn
        >>> class LeakyCell(fc.Cell):
        ...     def __init__(self, input_size, hidden_size, alpha=0.2):
        ...         super().__init__(input_size, hidden_size)
        ...         self.inp = nn.Linear(input_size, hidden_size)
        ...         self.rec = nn.Linear(hidden_size, hidden_size, bias=False)
        ...         self.alpha = alpha
        ...     def step(self, x, state):
        ...         (h,) = state
        ...         h = (1 - self.alpha) * h + self.alpha * torch.relu(self.inp(x) + self.rec(h))
        ...         return h, (h,)
        >>> y, h = fc.Recurrent(LeakyCell(5, 10))(torch.randn(7, 3, 5))
        >>> y.shape, h.shape
        (torch.Size([7, 3, 10]), torch.Size([3, 10]))

    Arguments:
        input_size: features of the input x.
        hidden_size: features of each state and of the output, unless ``state_sizes`` or ``output_size`` say otherwise.

    Attributes:
        states: the names of the states, in order.
        inputs: the names of the inputs, in order; with more than one, ``step`` gets x as a tuple.
        state_sizes: the features of each state; override by property or assign in ``__init__``.
        output_size: the features of the output; likewise.
        gates: what the blocks of rows of ``weight_ih``, ``weight_hh`` and the biases belong to, in order.
        keeps, updates: the gate that keeps the old state as it opens, and the one that lets the new in; "" for none.
            :mod:`fusecell.init` goes by these three.
    """

    states: ClassVar[tuple[str, ...]] = ("h",)
    inputs: ClassVar[tuple[str, ...]] = ("x",)
    gates: ClassVar[tuple[str, ...]] = ()
    keeps: ClassVar[str] = ""
    updates: ClassVar[str] = ""

    input_size: int
    hidden_size: int

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.input_size = input_size
        self.hidden_size = hidden_size

    @_Default
    def state_sizes(self) -> tuple[int, ...]:
        """The features of each state: ``hidden_size`` each."""
        return (self.hidden_size,) * len(self.states)

    @_Default
    def output_size(self) -> int:
        """The features of the output: ``hidden_size``."""
        size: int = self.hidden_size
        return size

    def step(self, x: Any, state: State) -> tuple[Tensor, State]:
        """Compute one time step; the only definition of the cell's maths.

        It must be pure in x, state, parameters and buffers, and must not branch on a tensor's value.

        Arguments:
            x: (N, input_size), or a tuple in the order of ``inputs`` where there are several.
            state: a tuple of (N, size) tensors in the order of ``states``.

        Returns:
            The output, (N, output_size), and the new state, a tuple like ``state``.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no step. Write step(self, x, state) -> (output, new_state), "
            "for example:  def step(self, x, state): (h,) = state; h = torch.tanh(self.lin(x) + h); return h, (h,)"
        )

    def initial_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> State:
        """The state a sequence begins with, and goes back to at a reset: zeros, (batch_size, size) each."""
        return tuple([torch.zeros(batch_size, size, dtype=dtype, device=device) for size in self.state_sizes])

    def draw(
        self,
        steps: int,
        batch_size: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> State:
        """Random inputs of a call, such as dropout masks and noise: appended to the inputs, once per call.

        Returns:
            Tensors (steps, batch_size, ...), or (1, batch_size, ...) for what is constant over time. None by default.
        """
        return ()

    def note(self, name: str, value: Tensor) -> Tensor:
        """Name an intermediate value of ``step``, for :func:`fusecell.record` and wrappers such as RecurrentDropout.

        A new state that the same step goes on with, such as an LSTM's c, is noted under the state's own name: then its
        gradient on a tape has the ways through the rest of the step too.

        Returns:
            ``value``, or what a wrapper makes of it: go on with that, ``n = self.note("n", n)``.
        """
        return noted(self, name, value)

    def forward(self, input: Tensor | State, hx: StateLike | None = None) -> Tensor | State:
        """One step, as torch.nn's cells do it.

        Arguments:
            input: (N, input_size) or (input_size,); a tuple of such where the cell has several inputs.
            hx: the state, (N, size) or (size,), a tuple where there are several; ``initial_state`` if left out.

        Returns:
            The new state: the tensor where there is one, else a tuple.
        """
        return bare(one_step(self, input, hx, False, _checked_step)[1])

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}"


def step(cell: Cell, input: Tensor | State, state: StateLike | None = None) -> tuple[Tensor, State]:
    """Run one step of a cell and return its output beside its state.

    Example:
        >>> import torch, fusecell as fc
        >>> output, (h,) = fc.step(fc.GRUCell(5, 10), torch.randn(3, 5))
        >>> output.shape
        torch.Size([3, 10])

    Arguments:
        cell: any cell.
        input: (N, input_size) or (input_size,); a tuple of such where the cell has several inputs.
        state: the state, like the input with or without N; ``cell.initial_state`` if left out.

    Returns:
        The output, (N, output_size), and the new state, always a tuple; without N if the input had none.

    Raises:
        ValueError: where a shape doesn't fit, naming it.
    """
    output, after = one_step(cell, input, state, True, _checked_step)
    assert output is not None
    return output, after


_BOTH = (False, True)
_STEP = {(1 + batched, wanted): Manner(batched=batched, outputs=wanted) for batched in _BOTH for wanted in _BOTH}
LongWay = Callable[["Cell", Any, Any], tuple[Tensor | None, State]]


def one_step(cell: Cell, input: Any, state: Any, outputs: bool, long_way: LongWay) -> tuple[Tensor | None, State]:
    """One step by the way of an earlier one that was like it, if there is one, else by ``long_way``.

    Arguments:
        input, state: as a user hands them over.
        outputs: whether the output is wanted; where it isn't, None may take its place.
        long_way: checks what it is given, and runs the step.
    """
    if torch.compiler.is_compiling() or not isinstance(input, Tensor):
        return long_way(cell, input, state)
    manner = _STEP.get((input.dim(), outputs))
    if state is None:
        given: State = (input,)
    elif isinstance(state, Tensor):
        given = (input, state)
    elif isinstance(state, tuple | list):
        given = (input, *state)
    else:
        manner = None
    if manner is None:
        return long_way(cell, input, state)
    found = repeated(cell, manner, given)
    if found is None:
        found = long_way(cell, input, state)
        remember(cell, manner, given)
    return found


def _checked_step(cell: Cell, input: Tensor | State, state: StateLike | None) -> tuple[Tensor | None, State]:
    given = (input,) if isinstance(input, Tensor) else tuple(input)
    unbatched = check_step_input(cell, given)
    inputs = tuple(value[None, None] if unbatched else value[None] for value in given)
    check_dtype(cell, f"input {cell.inputs[0]}", inputs[0])
    start = start_state(cell, state, inputs, unbatched=unbatched)
    outputs, after = run(cell, all_inputs(cell, inputs, start), start, Options())
    if unbatched:
        return outputs[0, 0], tuple(value[0] for value in after)
    return outputs[0], after


def bare(state: State) -> Tensor | State:
    """One state comes and goes bare, several as a tuple."""
    return state[0] if len(state) == 1 else state


def state_tuple(cell: Cell, state: StateLike) -> State:
    """The state as a tuple, from what a user hands over.

    Raises:
        TypeError, ValueError: if it is not as many tensors as the cell has states.
    """
    found = (state,) if isinstance(state, Tensor) else tuple(state)
    names = ", ".join(cell.states)
    if not all(isinstance(value, Tensor) for value in found):
        kinds = ", ".join(type(value).__name__ for value in found)
        raise TypeError(f"{_name(cell)} takes a state of tensors ({names}), got ({kinds}).")
    if len(found) != len(cell.state_sizes):
        raise ValueError(
            f"{_name(cell)} has {len(cell.state_sizes)} states ({names}), got {len(found)}. "
            "One state comes and goes bare, several as a tuple in that order."
        )
    return found


def start_state(cell: Cell, state: StateLike | None, inputs: State, *, unbatched: bool) -> State:
    """The state that time-major inputs start from, (N, size) each: the one given, checked, or the cell's own."""
    first = inputs[0]
    rows, dtype = first.shape[1], compute_dtype(cell, first)
    if state is None:
        return first_state(cell, rows, dtype=dtype, device=first.device)
    found = state_tuple(cell, state)
    if unbatched:
        found = tuple(value[None] if value.dim() == 1 else value for value in found)
    check_state(cell, found, rows)
    if weights_dtype(cell) is None:
        return found
    for name, value in zip(cell.states, found, strict=True):
        check_dtype(cell, f"state {name}", value)
    return _cast(found, dtype)


def first_state(cell: Cell, rows: int, *, dtype: torch.dtype | None, device: torch.device | str) -> State:
    """``cell.initial_state``, held to the shapes it promises: machine code reads as much as it was told.

    Raises:
        TypeError, ValueError: if it is not (rows, its size) for each state.
    """
    found = cell.initial_state(rows, dtype=dtype, device=device)
    if type(cell).initial_state is not Cell.initial_state or "initial_state" in vars(cell):
        found = state_tuple(cell, found)
        check_state(cell, found, rows)
    return found


def all_inputs(cell: Cell, given: State, start: State) -> State:
    """Time-major inputs with what the cell draws, in the dtype of its state.

    Raises:
        ValueError: if given and drawn together are not what the cell takes.
    """
    first = given[0]
    like = start[0] if start else first
    steps = steps_of(given)
    drawn = cell.draw(steps, first.shape[1], dtype=like.dtype, device=first.device)
    check_count(cell, len(given), len(drawn))
    for value in drawn:
        if value.shape[1:2] != first.shape[1:2] or value.shape[0] not in (1, steps):
            raise ValueError(
                f"{_name(cell)}.draw returned a tensor of shape {tuple(value.shape)} for {steps} steps of "
                f"{first.shape[1]} rows, expected ({steps}, {first.shape[1]}, ...), or (1, {first.shape[1]}, ...) for "
                "what is constant over time."
            )
    return _cast(given + drawn, like.dtype)


def check_count(cell: Cell, given: int, drawn: int) -> None:
    """Raise ValueError unless so many inputs given and drawn are all the cell has."""
    names = cell.inputs
    if given + drawn != len(names):
        raise ValueError(
            f"{_name(cell)} takes the inputs ({', '.join(names)}) and draws {drawn} of them: it must be given "
            f"{len(names) - drawn}, got {given}. Several go in as a tuple; in a Stack only the bottom cell is given "
            "any, those above must draw theirs."
        )


def weights_dtype(cell: nn.Module) -> torch.dtype | None:
    """The dtype a cell computes in: its first floating-point parameter's, None for a cell without any."""
    weight = _first_weight(cell)
    return None if weight is None else weight.dtype


def _first_weight(cell: nn.Module) -> Tensor | None:
    # The order of cell.parameters(), whose generators would take longer than a small cell's step.
    for parameter in cell._parameters.values():
        if parameter is not None and (parameter.is_floating_point() or parameter.is_complex()):
            return parameter
    for part in cell._modules.values():
        found = None if part is None else _first_weight(part)
        if found is not None:
            return found
    return None


def compute_dtype(cell: Cell, first: Tensor) -> torch.dtype:
    """The dtype of a cell's states: its weights', else that of its first input, else the default."""
    fallback = first.dtype if first.is_floating_point() else torch.get_default_dtype()
    return weights_dtype(cell) or fallback


def check_dtype(cell: Cell, label: str, value: Tensor) -> None:
    """Raise ValueError where an input or state is not on the weights' device, or not in their dtype.

    Autocast may cast; whole numbers and booleans are for the step to take or not.
    """
    weight = _first_weight(cell)
    if weight is None:
        return
    if not (weight.is_cpu and value.is_cpu) and weight.device != value.device:
        raise ValueError(
            f"{_name(cell)}'s weights are on {weight.device} and {label} is on {value.device}. "
            f"Move it with .to('{weight.device}'), or the model: model.to('{value.device}')."
        )
    expected, kind = weight.dtype, value.dtype
    if kind is expected or not (value.is_floating_point() or value.is_complex() or value.is_quantized):
        return
    if autocasting(value.device.type):
        return
    raise ValueError(
        f"{_name(cell)}'s weights are {expected} and {label} is {value.dtype}. "
        f"Convert it with .to({expected}), or the model: model.to({value.dtype})."
    )


def _cast(values: State, dtype: torch.dtype) -> State:
    for value in values:
        if value.dtype is not dtype:
            return tuple(value.to(dtype) if value.is_floating_point() else value for value in values)
    return values


def check_state(cell: Cell, state: State, batch_size: int) -> None:
    """Raise ValueError unless each state is (batch_size, its size)."""
    for name, size, value in zip(cell.states, cell.state_sizes, state, strict=True):
        if value.is_nested:
            raise TypeError(f"{_name(cell)} takes no nested tensor as state {name}: its rows are all of one size.")
        if tuple(value.shape) != (batch_size, size):
            raise ValueError(
                f"{_name(cell)} expected state {name} of shape ({batch_size}, {size}), got {tuple(value.shape)}. "
                "A state has a row for each row of the input and is never batch-first or broadcast."
            )


def check_step_input(cell: Cell, given: State) -> bool:
    """Raise ValueError unless ``given`` fits one step of the cell; return whether it lacks the batch dimension."""
    if not given or not all(isinstance(value, Tensor) for value in given):
        kinds = ", ".join(type(value).__name__ for value in given)
        raise TypeError(f"{_name(cell)} takes tensors for its inputs ({', '.join(cell.inputs)}), got ({kinds}).")
    first = given[0]
    if first.dim() not in (1, 2):
        raise ValueError(
            f"{_name(cell)} expected an input of shape (N, {cell.input_size}) or ({cell.input_size},) for one step, "
            f"got {tuple(first.shape)}. For a whole sequence use fusecell.Recurrent(cell)."
        )
    if first.shape[-1] != cell.input_size:
        raise ValueError(
            f"{_name(cell)} expected {cell.input_size} input features, got {first.shape[-1]} "
            f"in an input of shape {tuple(first.shape)}."
        )
    unbatched = first.dim() == 1
    for name, value in zip(cell.inputs[1:], given[1:], strict=False):
        if not unbatched and (value.dim() < 1 or value.shape[0] != first.shape[0]):
            raise ValueError(
                f"{_name(cell)} expected input {name} with {first.shape[0]} rows, as {cell.inputs[0]} has, "
                f"got {tuple(value.shape)}."
            )
    return unbatched


def _name(cell: Cell) -> str:
    return type(cell).__name__
