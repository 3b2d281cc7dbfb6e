"""``wrap``: any module that computes one time step as a cell, its hidden state passed in, or kept in attributes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fusecell.cell import Cell
from fusecell.execution.options import State
from fusecell.module_snapshot import Snapshot, preserved
from fusecell.shapes import Outputs, OutputSize, Size, feature_shape

__all__ = ["WrappedCell", "wrap"]

_FORMS = (
    "a wrapped module takes (x, h) and returns h, or (output, h); or it takes (x, (h, c)) and returns (h, c), or "
    "(output, (h, c))"
)
# More rows than a step has states: ``h, c = state`` would take a tensor of two rows apart.
_ROWS = 7


def wrap(
    module: nn.Module,
    *,
    input_size: Size | None = None,
    state_sizes: int | Sequence[Size] | None = None,
    states: Sequence[str] | None = None,
) -> WrappedCell:
    r"""Make a cell of a module that computes one time step.

    .. math:: (y_t, s_t) = \mathrm{module}(x_t, s_{t-1})

    Where the state is passed in, the module's forward is one of ``(x, h) -> h``, ``(x, h) -> (output, h)``,
    ``(x, (h, c)) -> (h, c)`` and ``(x, (h, c)) -> (output, (h, c))``. Where the module keeps its state itself, as
    snntorch's neurons with ``init_hidden`` and spikingjelly's do, name its attributes as ``states``: each step then
    begins with them set to the state, and the module is left as it was. An output may be a tuple or dict of tensors.

    Example:
        >>> import torch, fusecell as fc
        >>> layer = fc.Recurrent(fc.wrap(torch.nn.LSTMCell(5, 10)))
        >>> y, (h, c) = layer(torch.randn(7, 3, 5))
        >>> y.shape, c.shape
        (torch.Size([7, 3, 10]), torch.Size([3, 10]))

        A neuron that keeps its potential in an attribute:

        >>> class Leaky(torch.nn.Module):
        ...     mem = 0.0
        ...     def forward(self, x):
        ...         self.mem = 0.9 * self.mem + x
        ...         return torch.relu(self.mem - 1)
        >>> cell = fc.wrap(Leaky(), input_size=4, states=("mem",))
        >>> cell.states, cell.state_sizes
        (('mem',), (4,))

    Arguments:
        module: any module; it is a submodule of the cell, ``cell.module``, not a copy.
        input_size: features of x, or the shape of a row of it, ``()`` for ids; by default the module's ``input_size``
            or ``in_features``.
        state_sizes: features or shape of each state, in the order in which they are passed, ``((8, 16, 16),) * 2``; by
            default the module's ``hidden_size``, as many as it returns, or the sizes of the named attributes after one
            step.
        states: names of the attributes that are the state, with the path of their submodule: ``("0.mem", "2.mem")``.

    Raises:
        TypeError: if ``module`` is no module.
        ValueError: if a size can't be found out, or the module returns something else than a step does.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"wrap: expected an nn.Module, got {type(module).__name__}.")
    if isinstance(module, Cell):
        raise TypeError(f"wrap: {type(module).__name__} is a fusecell cell already; use it as it is.")
    features = _input_size(module, input_size)
    if states is not None:
        names = tuple(states)
        if not names:
            raise ValueError("wrap: states names no attribute; leave it out where the state is passed to forward.")
        sizes = _attribute_sizes(module, features, names) if state_sizes is None else _as_tuple(state_sizes)
        if len(sizes) != len(names):
            raise ValueError(f"wrap: {len(names)} states are named, and state_sizes has {len(sizes)} sizes.")
        return WrappedCell(module, features, sizes, names)
    return WrappedCell(module, features, _passed_sizes(module, features, state_sizes), None)


class WrappedCell(Cell):
    """Cell whose step is a module's forward; made by :func:`wrap`.

    Arguments:
        module: computes one time step.
        input_size: features or shape of x.
        sizes: features or shape of each state.
        attributes: the module's attributes that are the state; None where it is passed to forward.
    """

    def __init__(
        self, module: nn.Module, input_size: Size, sizes: tuple[Size, ...], attributes: tuple[str, ...] | None
    ) -> None:
        super().__init__(input_size, sizes[0])
        self.module = module
        self.attributes = attributes
        if attributes is None:
            names = ("h", "c")[: len(sizes)] if len(sizes) < 3 else tuple(f"h{i}" for i in range(len(sizes)))
        else:
            names = tuple(name.replace(".", "_") for name in attributes)
            names = tuple(f"state_{name}" if name[0].isdigit() else name for name in names)
        self.states = names  # type: ignore[misc]  # a class attribute of cells that are written, not made
        self.sizes = self.state_sizes = sizes
        try:
            self.output_size = _output_size(_probed(self))
        except Exception as error:  # the module's own, in a form that it doesn't take
            if attributes is not None or str(error).startswith("wrap: "):
                raise
            raise ValueError(
                f"wrap: {type(module).__name__} is no step: {_FORMS}. With an input of {input_size} and states of "
                f"{', '.join(map(str, sizes))} features it raises {type(error).__name__}: {error}"
            ) from error

    def step(self, x: Tensor, state: State) -> tuple[Outputs, State]:
        if self.attributes is not None:
            # Modules keep more than their state: counters, records, what the last step has made of it.
            before = Snapshot(self.module)
            try:
                owners = _owners(self.module, self.attributes)
                for (owner, name), value in zip(owners, state, strict=True):
                    setattr(owner, name, value)
                output = self.module(x)
                after = tuple([getattr(owner, name) for owner, name in owners])
            finally:
                before.restore()
            return _only_tensor(output), after
        return _split(self.module(x, state[0] if len(state) == 1 else tuple(state)), len(state))

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.state_sizes}"


def _input_size(module: nn.Module, input_size: Size | None) -> Size:
    for value in (input_size, getattr(module, "input_size", None), getattr(module, "in_features", None)):
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, tuple | list) and all(isinstance(size, int) for size in value):
            return tuple(value)
    raise ValueError(f"wrap: {type(module).__name__} has no input_size; pass wrap(module, input_size=...).")


def _as_tuple(sizes: int | Sequence[Size]) -> tuple[Size, ...]:
    return (sizes,) if isinstance(sizes, int) else tuple(sizes)


def _size(value: Tensor) -> Size:
    """Return the features or the shape of a row of a tensor."""
    return int(value.shape[1]) if value.dim() == 2 else tuple(value.shape[1:])


def _output_size(output: Outputs) -> OutputSize:
    if isinstance(output, Tensor):
        return _size(output)
    if isinstance(output, Mapping):
        return {name: _size(value) for name, value in output.items()}
    return tuple(tuple(value.shape[1:]) for value in output)


def _passed_sizes(module: nn.Module, input_size: Size, state_sizes: int | Sequence[Size] | None) -> tuple[Size, ...]:
    """Return the sizes of states that are passed in, found by a step with one state, and then with two."""
    if state_sizes is not None:
        return _as_tuple(state_sizes)
    hidden = getattr(module, "hidden_size", None)
    if not isinstance(hidden, int):
        raise ValueError(
            f"wrap: {type(module).__name__} has no hidden_size; pass wrap(module, state_sizes=...), or the names of "
            "its attributes as states if it keeps its state itself."
        )
    failures = []
    for count in (1, 2):
        sizes = (hidden,) * count

        def stepped(x: Tensor, count: int = count, sizes: tuple[int, ...] = sizes) -> State:
            state = _zeros(module, sizes)
            return _split(module(x, state[0] if count == 1 else state), count)[1]

        try:
            with _for_probe(module):
                after = _of_probe(module, input_size, stepped)
        except Exception as error:  # the module's own, in a form that it doesn't take
            failures.append(f"with {count} state{'s' * (count > 1)}: {type(error).__name__}: {error}")
            continue
        if [tuple(value.shape) for value in after] == [(_ROWS, size) for size in sizes]:
            return sizes
        failures.append(f"with {count} state{'s' * (count > 1)} it returns {[tuple(value.shape) for value in after]}")
    raise ValueError(f"wrap: {type(module).__name__} is no step: {_FORMS}. Tried {'; '.join(failures)}.")


def _attribute_sizes(module: nn.Module, input_size: Size, names: tuple[str, ...]) -> tuple[Size, ...]:
    """Return the sizes of named attributes, after a step of the module."""
    with _for_probe(module):
        _of_probe(module, input_size, module)
        values = [(name, getattr(owner, name, None)) for owner, name in _owners(module, names)]
    sizes = []
    for name, value in values:
        if not isinstance(value, Tensor) or value.dim() < 1 or value.shape[0] != _ROWS:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"wrap: after a step {name} is {shape}, expected a tensor of shape (N, size) or (N, ...).")
        sizes.append(_size(value))
    return tuple(sizes)


def _like(module: nn.Module) -> Tensor:
    """Return an empty tensor with the dtype and device that a module computes in."""
    like = next((value for value in (*module.parameters(), *module.buffers()) if value.is_floating_point()), None)
    return torch.empty(0) if like is None else like.detach().new_empty(0)


def _zeros(module: nn.Module, sizes: Sequence[Size]) -> State:
    like = _like(module)
    return tuple(like.new_zeros(_ROWS, *feature_shape(size)) for size in sizes)


@contextmanager
def _for_probe(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and leave it as it was: not every module can be copied."""
    with preserved(module):
        module.eval()
        yield


def _of_probe(module: nn.Module, input_size: Size, stepped: Callable[[Tensor], Any]) -> Any:
    """Return what a step makes of zeros; where it takes none that are floating-point numbers, of ids."""
    (x,) = _zeros(module, (input_size,))
    with torch.no_grad():
        try:
            return stepped(x)
        except Exception as error:
            try:
                return stepped(x.long())
            except Exception:  # the first error says more, but where ids are expected
                raise error from None


def _probed(cell: WrappedCell) -> Outputs:
    """Return the output of a step, which shows that the module is one."""
    with _for_probe(cell):
        output, after = _of_probe(cell.module, cell.input_size, lambda x: cell.step(x, _zeros(cell.module, cell.sizes)))
    expected = [(_ROWS, *feature_shape(size)) for size in cell.sizes]
    if not _is_output(output) or [tuple(getattr(value, "shape", ())) for value in after] != expected:
        shapes = [tuple(getattr(value, "shape", ())) for value in after]
        raise ValueError(f"wrap: {type(cell.module).__name__} returns states {shapes}, expected {expected}; {_FORMS}.")
    return output


def _is_output(value: Any) -> bool:
    """Whether a value is a tensor, or a tuple or dict of tensors."""
    if isinstance(value, Tensor):
        return True
    parts = list(value.values()) if isinstance(value, Mapping) else value
    return isinstance(parts, tuple | list) and bool(parts) and all(isinstance(part, Tensor) for part in parts)


def _split(result: Any, count: int) -> tuple[Outputs, State]:
    """Return what a module returns as the output and the new state."""
    if isinstance(result, Tensor):
        if count == 1:
            return result, (result,)
    elif isinstance(result, tuple | list):
        if len(result) == 2 and isinstance(result[1], tuple | list) and len(result[1]) == count:
            return result[0], tuple(result[1])
        if count == 1 and len(result) == 2 and _is_output(result[0]) and isinstance(result[1], Tensor):
            return result[0], (result[1],)
        if count > 1 and len(result) == count and all(isinstance(value, Tensor) for value in result):
            return result[0], tuple(result)
        if count > 1 and len(result) == count + 1 and all(isinstance(value, Tensor) for value in result):
            return result[0], tuple(result[1:])
    raise ValueError(f"wrap: the module returns {type(result).__name__} for {count} states; {_FORMS}.")


def _only_tensor(output: Any) -> Tensor:
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    if not isinstance(output, Tensor):
        raise ValueError(f"wrap: the module returns {type(output).__name__}, expected a tensor, its output.")
    return output


def _owners(module: nn.Module, names: Sequence[str]) -> list[tuple[nn.Module, str]]:
    return [(module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
