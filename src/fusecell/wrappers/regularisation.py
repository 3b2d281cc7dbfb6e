"""Wrappers that regularise a cell; they draw their noise before the loop with torch's generator, so a seed fixes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fusecell.cell import Cell, capture_intermediates, rewrite_intermediates
from fusecell.execution.options import State
from fusecell.module_snapshot import preserved
from fusecell.shapes import Shape, Size, feature_shape
from fusecell.torch_transforms import in_functorch_transform
from fusecell.wrappers.base import Wrapper, check_probability

__all__ = ["RecurrentDropout", "VariationalDropout", "WeightDrop", "Zoneout"]


class Zoneout(Wrapper):
    r"""Let each unit keep its old state with probability p, drawn at each step; ``eval()`` uses the expectation.

    .. math::
        s_t = \begin{cases} m_t \odot s_{t-1} + (1-m_t) \odot s'_t, \quad m_t \sim \mathrm{Bernoulli}(p)
        & \text{training} \\ p\, s_{t-1} + (1-p)\, s'_t & \text{else} \end{cases}

    s' is the cell's new state. Where the cell returns one of its states as output, the output is that state after
    zoneout.

    Example:
        >>> import torch, fusecell as fc
        >>> layer = fc.Recurrent(fc.Zoneout(fc.LSTMCell(5, 10), (0.05, 0.5)))  # of h, of c
        >>> y, (h, c) = layer(torch.randn(7, 3, 5))

    Arguments:
        cell: any cell.
        p: the probability: one for all states, or one for each state in order.

    Raises:
        TypeError: if ``cell`` is not a cell.
        ValueError: for a p outside [0, 1), or a number of them other than that of the states.

    Paper: Krueger et al., "Zoneout: regularizing RNNs by randomly preserving hidden activations", 2017,
    arXiv:1606.01305.
    """

    def __init__(self, cell: Cell, p: float | Sequence[float] = 0.1) -> None:
        super().__init__(cell)
        each = [p] * len(cell.states) if isinstance(p, int | float) else list(p)
        if len(each) != len(cell.states):
            raise ValueError(
                f"Zoneout: {type(cell).__name__} has the states ({', '.join(cell.states)}), "
                f"got {len(each)} probabilities. Pass one for all, or one for each."
            )
        self.p = tuple(check_probability("Zoneout's p", value) for value in each)

    def noise_names(self) -> tuple[str, ...]:
        if not self.training:
            return ()
        return tuple(f"zoneout_{name}" for name, p in zip(self.states, self.p, strict=True) if p)

    def noise(
        self, steps: int, batch_size: int, *, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> State:
        if not self.training:
            return ()
        sizes = zip(self.state_sizes, self.p, strict=True)
        return tuple(
            [
                _bernoulli(p, steps, batch_size, *feature_shape(size), dtype=dtype, device=device)
                for size, p in sizes
                if p
            ]
        )

    def around(self, x: Any, state: State, noise: State) -> tuple[Tensor, State]:
        output, new = self.cell.step(x, state)
        masks, after = iter(noise), []
        for before, value, p in zip(state, new, self.p, strict=True):
            if p and self.training:
                zoned = torch.where(next(masks) > 0.5, before, value)
            else:
                zoned = p * before + (1 - p) * value if p else value
            after.append(zoned)
            # By identity: a GRU returns its new state as output, and must return the state after zoneout.
            if output is value:
                output = zoned
        return output, tuple(after)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class VariationalDropout(Wrapper):
    r"""Drop features of the input, state and output, with one mask for all steps of a sequence.

    .. math:: y_t = m_y \odot \mathrm{step}(m_x \odot x_t, s_{t-1}), \quad W_h h \to W_h (m_h \odot h)

    The first state is dropped where a product with a weight matrix (``linear``, ``@``, ``matmul``, ``mm``, ``addmm``)
    reads it, and nowhere else: an LSTM's memory and a GRU's ``z * h`` stay whole, as in Keras. A product of a tensor
    computed from the state, such as ``(r * h) @ w``, is left as it is. Each row has its own mask, of 0 and 1 / (1 - p).
    In ``eval()`` nothing is dropped.

    Example:
        >>> import torch, fusecell as fc
        >>> layer = fc.Recurrent(fc.VariationalDropout(fc.GRUCell(5, 10), input=0.2, state=0.3))
        >>> y, h = layer(torch.randn(7, 3, 5))

    Arguments:
        cell: any cell.
        input, state, output: the probability with which a feature of each is dropped.

    Raises:
        TypeError: if ``cell`` is not a cell.
        ValueError: for a probability outside [0, 1); for a ``state`` if no product in the cell's step reads its first
            state.

    Paper: Gal and Ghahramani, "A theoretically grounded application of dropout in recurrent neural networks", 2016,
    arXiv:1512.05287.
    """

    def __init__(self, cell: Cell, *, input: float = 0.0, state: float = 0.0, output: float = 0.0) -> None:
        super().__init__(cell)
        self.p_input = check_probability("VariationalDropout's input", input)
        self.p_state = check_probability("VariationalDropout's state", state)
        self.p_output = check_probability("VariationalDropout's output", output)
        if state:
            _check_product(cell)

    def _parts(self) -> list[tuple[str, float, Size]]:
        """List what is dropped now: name, probability and shape."""
        if not self.training:
            return []
        sizes = (self.input_size, self.state_sizes[0] if self.p_state else 0, self.output_size)
        parts = zip(("input", "state", "output"), (self.p_input, self.p_state, self.p_output), sizes, strict=True)
        return [part for part in parts if part[1]]

    def noise_names(self) -> tuple[str, ...]:
        return tuple(f"{name}_dropout" for name, *_ in self._parts())

    def noise(
        self, steps: int, batch_size: int, *, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> State:
        return tuple(
            [
                _dropout_mask(p, 1, batch_size, *feature_shape(size), dtype=dtype, device=device)
                for _, p, size in self._parts()
            ]
        )

    def around(self, x: Any, state: State, noise: State) -> tuple[Tensor, State]:
        masks = dict(zip([name for name, *_ in self._parts()], noise, strict=True))
        if "input" in masks:
            x = (x[0] * masks["input"], *x[1:]) if isinstance(x, tuple) else x * masks["input"]
        if "state" in masks:
            with _Products(state[0], masks["state"]):
                output, after = self.cell.step(x, state)
        else:
            output, after = self.cell.step(x, state)
        return (output * masks["output"] if "output" in masks else output), after

    def extra_repr(self) -> str:
        return f"input={self.p_input}, state={self.p_state}, output={self.p_output}"


class RecurrentDropout(Wrapper):
    r"""Drop units of the candidate that a step adds to its state, drawn at each step; the old state stays whole.

    .. math:: c_t = f_t \odot c_{t-1} + i_t \odot \mathrm{dropout}(g_t)

    The candidate is a value that the step names with ``self.note``: ``g`` in an LSTM, ``n`` in a GRU.

    Example:
        >>> import torch, fusecell as fc
        >>> layer = fc.Recurrent(fc.RecurrentDropout(fc.LSTMCell(5, 10), 0.25))
        >>> y, (h, c) = layer(torch.randn(7, 3, 5))

    Arguments:
        cell: a cell whose step names its candidate and goes on with what ``self.note(...)`` returns.
        p: the probability with which a unit is dropped.
        name: the candidate's name; by default ``"g"`` or ``"n"``, whichever the step uses.

    Raises:
        TypeError: if ``cell`` is not a cell.
        ValueError: for a p outside [0, 1), or where the step notes no value of that name.

    Paper: Semeniuta, Severyn and Barth, "Recurrent dropout without memory loss", 2016, arXiv:1603.05118.
    """

    def __init__(self, cell: Cell, p: float = 0.1, *, name: str | None = None) -> None:
        super().__init__(cell)
        self.p = check_probability("RecurrentDropout's p", p)
        sizes = _intermediate_shapes(cell)
        candidates = [each for each in ((name,) if name else ("g", "n")) if each in sizes]
        if not candidates:
            raise ValueError(
                f"RecurrentDropout found no {name or 'g or n'} among what {type(cell).__name__}'s step notes "
                f"({', '.join(sizes) or 'nothing'}). Pass name=, and name the candidate in the step: "
                'n = self.note("n", n).'
            )
        self.name, self._shape = candidates[0], sizes[candidates[0]]

    def noise_names(self) -> tuple[str, ...]:
        return (f"{self.name}_dropout",) if self.training and self.p else ()

    def noise(
        self, steps: int, batch_size: int, *, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> State:
        if not self.noise_names():
            return ()
        return (_dropout_mask(self.p, steps, batch_size, *self._shape, dtype=dtype, device=device),)

    def around(self, x: Any, state: State, noise: State) -> tuple[Tensor, State]:
        if not noise:
            return self.cell.step(x, state)
        # The step itself goes on with the value returned here, so no cell needs a dropout of its own.
        with rewrite_intermediates(lambda _, name, value: value * noise[0] if name == self.name else value):
            return self.cell.step(x, state)

    def extra_repr(self) -> str:
        return f"p={self.p}, name={self.name!r}"


class WeightDrop(Wrapper):
    r"""Drop single weights (DropConnect), with one mask per call for all steps and rows.

    .. math:: W \to m \odot W, \quad m \in \{0, 1 / (1-p)\}

    The parameters keep their names; a weight that is dropped gets no gradient. In ``eval()`` nothing is dropped.

    Example:
        >>> import torch, fusecell as fc
        >>> layer = fc.Recurrent(fc.WeightDrop(fc.LSTMCell(5, 10), "weight_hh", 0.5))
        >>> y, (h, c) = layer(torch.randn(7, 3, 5))

    Arguments:
        cell: any cell.
        names: one or several of its parameters; ``"part.weight"`` for one of a submodule.
        p: the probability with which a weight is dropped.

    Raises:
        TypeError: if ``cell`` is not a cell.
        ValueError: for a p outside [0, 1), or a name that is not a parameter of the cell.

    Paper: Merity, Keskar and Socher, "Regularizing and optimizing LSTM language models", 2017, arXiv:1708.02182.
    """

    def __init__(self, cell: Cell, names: str | Sequence[str] = "weight_hh", p: float = 0.5) -> None:
        super().__init__(cell)
        self.names = (names,) if isinstance(names, str) else tuple(names)
        self.p = check_probability("WeightDrop's p", p)
        parameters = dict(cell.named_parameters())
        for name in self.names:
            if name not in parameters:
                raise ValueError(
                    f"WeightDrop: {type(cell).__name__} has no parameter {name!r}; it has {list(parameters)}."
                )
        # Not inputs from noise(), which have a row for each row of the batch: these masks are the same for all rows.
        # A buffer is read as weights are, once per call.
        for index, name in enumerate(self.names):
            self.register_buffer(f"mask_{index}", torch.ones_like(parameters[name].detach()), persistent=False)

    def draw(
        self,
        steps: int,
        batch_size: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> State:
        if self.training and self.p:
            for index in range(len(self.names)):
                like: Tensor = getattr(self, f"mask_{index}")
                mask = _dropout_mask(self.p, *like.shape, dtype=like.dtype, device=like.device)
                # A new tensor each time: the backward of an earlier call still reads the old one.
                setattr(self, f"mask_{index}", mask)
        return super().draw(steps, batch_size, dtype=dtype, device=device)

    def around(self, x: Any, state: State, noise: State) -> tuple[Tensor, State]:
        if not (self.training and self.p):
            return self.cell.step(x, state)
        weights = dict(self.cell.named_parameters())
        dropped = {f"cell.{name}": weights[name] * getattr(self, f"mask_{i}") for i, name in enumerate(self.names)}
        # In a functional call the cell's own parameters stay leaves, and autograd sees the products with the masks.
        result: tuple[Tensor, State] = functional_call(_Stepper(self.cell), dropped, (x, state))
        return result

    def extra_repr(self) -> str:
        return f"{self.names}, p={self.p}"


class _Stepper(nn.Module):
    """A module whose ``forward`` is a cell's ``step``: torch's functional_call calls ``forward`` only."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Any, state: State) -> tuple[Tensor, State]:
        return self.cell.step(x, state)


_PRODUCTS = {
    F.linear,
    torch.matmul,
    torch.mm,
    torch.addmm,
    Tensor.matmul,
    Tensor.mm,
    Tensor.addmm,
    Tensor.__matmul__,
}


class _Products(TorchFunctionMode):
    """Replace ``value`` by ``value * mask`` in the matrix products that run inside; count them.

    The tensor is recognised by identity: one computed from it, even an equal copy, is left alone.
    """

    def __init__(self, value: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.value, self.masked = value, value * mask
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and any(arg is self.value for arg in args):
            args = tuple(self.masked if arg is self.value else arg for arg in args)
            self.count += 1
        return func(*args, **(kwargs or {}))


def _bernoulli(p: float, *shape: int, dtype: torch.dtype | None, device: torch.device | str | None) -> Tensor:
    """Draw a tensor of 1 with probability p, else 0."""
    # Two numbers from each 64 random bits, so p is exact to 2**-32: bernoulli_ takes three times as long.
    count = math.prod(shape)
    if in_functorch_transform():  # where members of a vmap draw numbers of their own, no memory can be drawn into
        return (torch.rand(shape, device=device) < p).to(torch.get_default_dtype() if dtype is None else dtype)
    bits = torch.empty(-(-count // 2), dtype=torch.int64, device=device).random_(-(2**63), None).view(torch.int32)
    below = bits[:count] < round(p * 2**32) - 2**31
    return below.reshape(shape).to(torch.get_default_dtype() if dtype is None else dtype)


def _dropout_mask(p: float, *shape: int, dtype: torch.dtype | None, device: torch.device | str | None) -> Tensor:
    """Draw a tensor of 0 with probability p, else 1 / (1 - p)."""
    return _bernoulli(1 - p, *shape, dtype=dtype, device=device) / (1 - p)


def _trial(cell: Cell) -> tuple[Any, State]:
    """Return an input of one row of zeros and an initial state, for a trial step of a cell."""
    like = next(cell.parameters(), torch.zeros(()))
    x = torch.zeros((1, *feature_shape(cell.input_size)), dtype=like.dtype, device=like.device)
    drawn = cell.draw(1, 1, dtype=like.dtype, device=like.device)
    if len(cell.inputs) != 1 + len(drawn):
        raise ValueError(
            f"{type(cell).__name__} has the inputs ({', '.join(cell.inputs)}), whose widths are known at a call only: "
            "VariationalDropout of the state and RecurrentDropout need a trial step, so a cell with one input."
        )
    state = cell.initial_state(1, dtype=like.dtype, device=like.device)
    return ((x, *(value[0] for value in drawn)) if drawn else x), state


def _intermediate_shapes(cell: Cell) -> dict[str, Shape]:
    """Run one step; return the shape of a row of each intermediate value that it notes, by name."""
    sizes: dict[str, Shape] = {}
    x, state = _trial(cell)
    collect = capture_intermediates(lambda _, name, value: sizes.__setitem__(name, tuple(value.shape[1:])))
    with torch.no_grad(), preserved(cell), collect:
        cell.step(x, state)
    return sizes


def _check_product(cell: Cell) -> None:
    """Raise ValueError if no matrix product in a cell's step reads its first state."""
    x, state = _trial(cell)
    with torch.no_grad(), preserved(cell), _Products(state[0], torch.ones_like(state[0])) as products:
        cell.step(x, state)
    if not products.count:
        raise ValueError(
            f"VariationalDropout: {type(cell).__name__} multiplies its state {cell.states[0]} with no weight matrix, "
            "so there is nowhere to drop it. Zoneout and RecurrentDropout need no product."
        )
