"""The contract: a cell is one time step, written in plain PyTorch.

Layers, stacks, streams and the compiler use a cell through the attributes and methods of ``Cell`` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import getattr_static
from typing import Any, ClassVar, Generic, TypeVar, overload

import torch
from torch import Tensor, nn

from fusecell.execution.call_form import step_form
from fusecell.execution.call_path import SlowPath, call
from fusecell.execution.natively import natively
from fusecell.execution.options import Options, State
from fusecell.execution.results import public_state, without_dim
from fusecell.execution.runners import run
from fusecell.execution.symbolic_trace import is_proxy, record_call, refuse_proxy
from fusecell.execution.torchscript import refuse_script
from fusecell.intermediates import capture_intermediates, record_intermediate, rewrite_intermediates
from fusecell.shapes import Outputs, OutputSize, Size, feature_shape, map_outputs
from fusecell.validation import StateLike, all_inputs, check_dtype, check_step_input, start_state

__all__ = ["Cell", "capture_intermediates", "one_step", "rewrite_intermediates", "step"]

T = TypeVar("T")


class _Default(Generic[T]):
    """A computed attribute that a subclass may override by a property, or an instance by plain assignment."""

    # Not a property: that would make ``self.output_size = 3`` in a user's __init__ an error. A descriptor without
    # __set__ gives way to the instance's attribute of the same name.

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute = compute
        self.__doc__ = compute.__doc__

    @overload
    def __get__(self, cell: None, owner: type) -> _Default[T]: ...
    @overload
    def __get__(self, cell: object, owner: type) -> T: ...
    def __get__(self, cell: object | None, owner: type) -> _Default[T] | T:
        return self if cell is None else self.compute(cell)


class _Hint:
    """An attribute that helps to initialise weights, and gives way to a submodule of the same name."""

    def __init__(self, default: tuple[str, ...] | str) -> None:
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, cell: nn.Module | None, owner: type) -> Any:
        if cell is None:
            return self.default
        return cell._modules.get(self.name, self.default)


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
        input_size: features of the input x, or the shape of a row of it: with ``(3, 16, 16)`` a step gets
            (N, 3, 16, 16). ``()`` is one number per row, such as a token's id.
        hidden_size: features or shape of each state and of the output, unless ``state_sizes`` or ``output_size`` say
            otherwise.

    Attributes:
        states: the names of the states, in order.
        inputs: the names of the inputs, in order; with more than one, ``step`` gets x as a tuple.
        state_sizes: the features or shape of each state, ``((4, 16, 16), 128)``; override by property or assign in
            ``__init__``.
        output_size: the features or shape of the output; likewise. Of a step that returns several outputs, a dict of
            sizes, ``{"logits": 10, "map": (4, 4)}``, or a tuple of sizes with a shape among them, ``((10,), (4, 4))``.
        gates: the names of the blocks of rows in ``weight_ih``, ``weight_hh`` and the biases, in order.
        keeps, updates: the gate that keeps the old state where it is 1, and the one that lets the new one in; "" for
            none. :mod:`fusecell.init` uses these three.
    """

    states: ClassVar[tuple[str, ...]] = ("h",)
    inputs: ClassVar[tuple[str, ...]] = ("x",)
    # A cell may have a layer that is called gates; a tuple and two strings elsewhere.
    gates: ClassVar[Any] = _Hint(())
    keeps: ClassVar[Any] = _Hint("")
    updates: ClassVar[Any] = _Hint("")

    # A Size each; Any, so that a cell of flat rows may take them as the integers that they are there.
    input_size: Any
    hidden_size: Any

    def __init__(self, input_size: Size, hidden_size: Size) -> None:
        super().__init__()
        self.input_size = input_size
        self.hidden_size = hidden_size

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module keeps submodules where Python looks last: behind an attribute of the class they would never be seen.
        hides = isinstance(value, nn.Module | nn.Parameter) and hasattr(type(self), name)
        if hides and not (isinstance(value, nn.Module) and isinstance(getattr_static(type(self), name), _Hint)):
            raise TypeError(
                f"{type(self).__name__}.{name} is an attribute of fusecell.Cell, behind which this "
                f"{type(value).__name__} would not be found; give it another name."
            )
        super().__setattr__(name, value)

    @_Default
    def state_sizes(self) -> tuple[Size, ...]:
        """The features or shape of each state: ``hidden_size`` each."""
        return (self.hidden_size,) * len(self.states)

    @_Default
    def output_size(self) -> OutputSize:
        """The features or shape of the output: ``hidden_size``."""
        size: Size = self.hidden_size
        return size

    def step(self, x: Any, state: State) -> tuple[Outputs, State]:
        """Compute one time step; the only definition of the cell's maths.

        It must be pure in x, state, parameters and buffers, and must not branch on a tensor's value.

        Arguments:
            x: (N, input_size), or a tuple in the order of ``inputs`` where there are several.
            state: a tuple of (N, size) tensors in the order of ``states``; (N, d1, ..., dk) where a size is a shape.

        Returns:
            The output, (N, output_size), or a tuple or dict of such where ``output_size`` is one; and the new state, a
            tuple like ``state``.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no step. Write step(self, x, state) -> (output, new_state), "
            "for example:  def step(self, x, state): (h,) = state; h = torch.tanh(self.lin(x) + h); return h, (h,)"
        )

    def initial_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> State:
        """Return the state with which a sequence begins, and to which a reset goes back: zeros, (batch_size, size)."""
        return tuple(
            [torch.zeros((batch_size, *feature_shape(size)), dtype=dtype, device=device) for size in self.state_sizes]
        )

    def draw(
        self,
        steps: int,
        batch_size: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> State:
        """Draw the random inputs of a call, such as dropout masks and noise; they are appended to the user's inputs.

        It is called once per sequence, so a step itself is deterministic: it can be compiled, run again in the backward
        and compared with a reference.

        Returns:
            Tensors (steps, batch_size, ...), or (1, batch_size, ...) for one that is constant over time; by default no
            tensors.
        """
        return ()

    def note(self, name: str, value: Tensor) -> Tensor:
        """Name an intermediate value of ``step``, for :func:`fusecell.record` and wrappers such as RecurrentDropout.

        Note a new state that the same step reads again, such as an LSTM's c, under the state's own name: its gradient
        on a tape then includes the paths through the rest of the step.

        Arguments:
            name: unique within a step.
            value: a tensor of N rows.

        Returns:
            ``value``, or its replacement by a wrapper. Continue with that: ``n = self.note("n", n)``.
        """
        return record_intermediate(self, name, value)

    def forward(self, input: Tensor | State, hx: StateLike | None = None) -> Tensor | State:
        """Run one step and return the new state, as torch.nn's cells do.

        Arguments:
            input: (N, input_size) or (input_size,); a tuple of such where the cell has several inputs.
            hx: the state, (N, size) or (size,), a tuple where there are several; ``initial_state`` if left out.

        Returns:
            The new state: the tensor where there is one, else a tuple.

        Raises:
            TypeError, ValueError: where an argument doesn't fit, naming it.
        """
        if type(input) is not Tensor and is_proxy(input):
            return record_call(self, input, hx)  # type: ignore[no-any-return]
        after: Tensor | State = one_step(self, input, hx, False, _checked_step)[1]
        return after

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse torch.jit.script, which calls this first."""
        refuse_script(type(self).__name__, "only torch's own cells are in its language.")

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}"


def step(cell: Cell, input: Tensor | State, state: StateLike | None = None) -> tuple[Outputs, State]:
    r"""Run one step of a cell and return its output and its new state.

    .. math:: (y, s') = \mathrm{step}(x, s)

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
        TypeError, ValueError: where an argument doesn't fit, naming it.
    """
    if type(input) is not Tensor and is_proxy(input):
        refuse_proxy("fusecell.step")
    output, after = one_step(cell, input, state, True, _checked_step)
    return output, (after,) if isinstance(after, Tensor) else after


@natively
def one_step(cell: Cell, input: Any, state: Any, outputs: bool, slow_path: SlowPath) -> tuple[Any, Any]:
    """Run one step of a cell, through the cache of calls where that is possible.

    Arguments:
        input, state: as the user passed them.
        outputs: whether the caller reads the output; where not, None may take its place.
        slow_path: checks the arguments and runs the step.

    Returns:
        The output and the new state as users see it.
    """
    # A trace by torch.compile has no addresses that a prepared kernel could be launched with.
    if torch.compiler.is_compiling() or isinstance(cell.input_size, tuple):  # prepared calls are of flat rows
        return slow_path(cell, input, state)
    if isinstance(input, Tensor):
        return call(cell, input, state, step_form(input.dim() == 2, outputs), slow_path)
    if not isinstance(input, tuple) or not input or not all(isinstance(value, Tensor) for value in input):
        return slow_path(cell, input, state)
    return call(cell, input, state, step_form(input[0].dim() == 2, outputs, len(input)), slow_path)


def _checked_step(cell: Cell, input: Tensor | State, state: StateLike | None) -> tuple[Outputs, Tensor | State]:
    """Check the arguments of one step and run it."""
    inputs = (input,) if isinstance(input, Tensor) else tuple(input)
    unbatched = check_step_input(cell, inputs)
    inputs = tuple(value[None, None] if unbatched else value[None] for value in inputs)
    check_dtype(cell, f"input {cell.inputs[0]}", inputs[0])
    start = start_state(cell, state, inputs, unbatched=unbatched)
    outputs, after = run(cell, all_inputs(cell, inputs, start), start, Options())
    outputs = map_outputs(lambda value: without_dim(value, 0), outputs)
    if unbatched:
        return map_outputs(lambda value: without_dim(value, 0), outputs), public_state(
            tuple(without_dim(value, 0) for value in after)
        )
    return outputs, public_state(after)
