"""Wrappers that regularise. Their noise is drawn before the loop, by torch's generator: a seed fixes it."""

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
from fusecell.module_snapshot import left_as_it_was
from fusecell.wrappers.base import Wrapper, check_probability

__all__ = ["RecurrentDropout", "VariationalDropout", "WeightDrop", "Zoneout"]


class Zoneout(Wrapper):
    r"""Each unit keeps its old state with probability p, drawn anew at each step; in ``eval()``, its expectation.

    .. math::
        s_t = \begin{cases} m_t \odot s_{t-1} + (1-m_t) \odot s'_t, \quad m_t \sim \mathrm{Bernoulli}(p)
        & \text{training} \\ p\, s_{t-1} + (1-p)\, s'_t & \text{else} \end{cases}

    s' is the cell's new state. Where the cell's output is one of its states, the output is the state zoned out.

    Example:
        >>> import torch, fusecell as fc
        >>> layer = fc.Recurrent(fc.Zoneout(fc.LSTMCell(5, 10), (0.05, 0.5)))  # of h, of c
        >>> y, (h, c) = layer(torch.randn(7, 3, 5))

    Arguments:
        cell: any cell.
        p: the probability, for all states or for each in order.

    Raises:
        TypeError: if ``cell`` is not a cell.
        ValueError: for a p outside [0, 1), or as many as there are not states.

    Paper: Krueger et al., "Zoneout: regularizing RNNs by randomly preserving hidden activations", 2017,
    arXiv:1606.01305.
    """

    def __init__(self, cell: Cell, p: float | Sequence[float] = 0.1) -> None:
        super().__init__(cell)
        given = [p] * len(cell.states) if isinstance(p, int | float) else list(p)
        if len(given) != len(cell.states):
            raise ValueError(
                f"Zoneout: {type(cell).__name__} has the states ({', '.join(cell.states)}), "
                f"got {len(given)} probabilities."
            )
        self.p = tuple(check_probability("Zoneout's p", value) for value in given)

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
        return tuple([_coins(p, steps, batch_size, size, dtype=dtype, device=device) for size, p in sizes if p])

    def around(self, x: Any, state: State, noise: State) -> tuple[Tensor, State]:
        output, new = self.cell.step(x, state)
        masks, after = iter(noise), []
        for before, value, p in zip(state, new, self.p, strict=True):
            if p and self.training:
                kept = torch.where(next(masks) > 0.5, before, value)
            else:
                kept = p * before + (1 - p) * value if p else value
            after.append(kept)
            if output is value:
                output = kept
        return output, tuple(after)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class VariationalDropout(Wrapper):
    r"""Dropout with one mask per sequence and row: on the input, on the state where it enters a product, on the output.

    .. math:: y_t = m_y \odot \mathrm{step}(m_x \odot x_t, s_{t-1}), \quad W_h h \to W_h (m_h \odot h)

    The first state is dropped where it is multiplied with a weight matrix (``linear``, ``@``, ``matmul``, ``mm``,
    ``addmm``), not where it is carried past it: an LSTM's memory and a GRU's ``z * h`` stay whole, as in Keras. Masks
    hold 0 and 1 / (1 - p). In ``eval()`` nothing is dropped.

    Example:
        >>> import torch, fusecell as fc
        >>> layer = fc.Recurrent(fc.VariationalDropout(fc.GRUCell(5, 10), input=0.2, state=0.3))
        >>> y, h = layer(torch.randn(7, 3, 5))

    Arguments:
        cell: any cell.
        input, state, output: probabilities with which a feature is dropped.

    Raises:
        TypeError: if ``cell`` is not a cell.
        ValueError: for a probability outside [0, 1); for a ``state`` where the cell multiplies its first state with no
            matrix.

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

    def _parts(self) -> list[tuple[str, float, int]]:
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
        return tuple([_dropped(p, 1, batch_size, size, dtype=dtype, device=device) for _, p, size in self._parts()])

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
    r"""Dropout of the candidate that a step adds to its state, drawn anew at each step: the state forgets nothing.

    .. math:: c_t = f_t \odot c_{t-1} + i_t \odot \mathrm{dropout}(g_t)

    The candidate is what the step notes under a name: ``g`` of an LSTM, ``n`` of a GRU.

    Example:
        >>> import torch, fusecell as fc
        >>> layer = fc.Recurrent(fc.RecurrentDropout(fc.LSTMCell(5, 10), 0.25))
        >>> y, (h, c) = layer(torch.randn(7, 3, 5))

    Arguments:
        cell: a cell that notes its candidate, and goes on with what ``self.note(...)`` returns.
        p: the probability.
        name: of the candidate; ``"g"`` or ``"n"``, whichever the step notes, if left out.

    Raises:
        TypeError: if ``cell`` is not a cell.
        ValueError: for a p outside [0, 1), or where the step notes no such name.

    Paper: Semeniuta, Severyn and Barth, "Recurrent dropout without memory loss", 2016, arXiv:1603.05118.
    """

    def __init__(self, cell: Cell, p: float = 0.1, *, name: str | None = None) -> None:
        super().__init__(cell)
        self.p = check_probability("RecurrentDropout's p", p)
        notes = _noted(cell)
        found = [each for each in ((name,) if name else ("g", "n")) if each in notes]
        if not found:
            raise ValueError(
                f"RecurrentDropout found no {name or 'g or n'} among what {type(cell).__name__}'s step notes "
                f"({', '.join(notes) or 'nothing'}). Pass name=, and name the candidate in the step: "
                'n = self.note("n", n).'
            )
        self.name, self._size = found[0], notes[found[0]]

    def noise_names(self) -> tuple[str, ...]:
        return (f"{self.name}_dropout",) if self.training and self.p else ()

    def noise(
        self, steps: int, batch_size: int, *, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> State:
        if not self.noise_names():
            return ()
        return (_dropped(self.p, steps, batch_size, self._size, dtype=dtype, device=device),)

    def around(self, x: Any, state: State, noise: State) -> tuple[Tensor, State]:
        if not noise:
            return self.cell.step(x, state)
        with rewrite_intermediates(lambda _, name, value: value * noise[0] if name == self.name else value):
            return self.cell.step(x, state)

    def extra_repr(self) -> str:
        return f"p={self.p}, name={self.name!r}"


class WeightDrop(Wrapper):
    r"""DropConnect on weights: a mask per call, the same for all steps and rows.

    .. math:: W \to m \odot W, \quad m \in \{0, 1 / (1-p)\}

    The parameters keep their names and get the gradient of what was not dropped; in ``eval()`` nothing is.

    Example:
        >>> import torch, fusecell as fc
        >>> layer = fc.Recurrent(fc.WeightDrop(fc.LSTMCell(5, 10), "weight_hh", 0.5))
        >>> y, (h, c) = layer(torch.randn(7, 3, 5))

    Arguments:
        cell: any cell.
        names: parameters of it, one or several; of a part of it as ``"part.weight"``.
        p: the probability.

    Raises:
        TypeError: if ``cell`` is not a cell.
        ValueError: for a p outside [0, 1), or a name that is none of its parameters.

    Paper: Merity, Keskar and Socher, "Regularizing and optimizing LSTM language models", 2017, arXiv:1708.02182.
    """

    def __init__(self, cell: Cell, names: str | Sequence[str] = "weight_hh", p: float = 0.5) -> None:
        super().__init__(cell)
        self.names = (names,) if isinstance(names, str) else tuple(names)
        self.p = check_probability("WeightDrop's p", p)
        known = dict(cell.named_parameters())
        for name in self.names:
            if name not in known:
                raise ValueError(f"WeightDrop: {type(cell).__name__} has no parameter {name!r}; it has {list(known)}.")
        # Masks are the same for all rows, which noise isn't; as buffers they are read like weights, once per call.
        for index, name in enumerate(self.names):
            self.register_buffer(f"mask_{index}", torch.ones_like(known[name].detach()), persistent=False)

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
                mask = _dropped(self.p, *like.shape, dtype=like.dtype, device=like.device)
                setattr(self, f"mask_{index}", mask)
        return super().draw(steps, batch_size, dtype=dtype, device=device)

    def around(self, x: Any, state: State, noise: State) -> tuple[Tensor, State]:
        if not (self.training and self.p):
            return self.cell.step(x, state)
        known = dict(self.cell.named_parameters())
        dropped = {f"cell.{name}": known[name] * getattr(self, f"mask_{i}") for i, name in enumerate(self.names)}
        found: tuple[Tensor, State] = functional_call(_Stepper(self.cell), dropped, (x, state))
        return found

    def extra_repr(self) -> str:
        return f"{self.names}, p={self.p}"


class _Stepper(nn.Module):
    """A cell whose forward is its step, which functional_call can call."""

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
    """Put ``value * mask`` where ``value`` enters a product."""

    def __init__(self, value: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.value, self.masked = value, value * mask
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and any(arg is self.value for arg in args):
            args = tuple(self.masked if arg is self.value else arg for arg in args)
            self.count += 1
        return func(*args, **(kwargs or {}))


def _coins(p: float, *shape: int, dtype: torch.dtype | None, device: torch.device | str | None) -> Tensor:
    """1 with probability p, else 0."""
    # Two coins of each 64 random bits, good to 2**-32: drawing with bernoulli_ takes three times as long.
    count = math.prod(shape)
    bits = torch.empty(-(-count // 2), dtype=torch.int64, device=device).random_(-(2**63), None).view(torch.int32)
    below = bits[:count] < round(p * 2**32) - 2**31
    return below.reshape(shape).to(torch.get_default_dtype() if dtype is None else dtype)


def _dropped(p: float, *shape: int, dtype: torch.dtype | None, device: torch.device | str | None) -> Tensor:
    """0 with probability p, else 1 / (1 - p)."""
    return _coins(1 - p, *shape, dtype=dtype, device=device) / (1 - p)


def _trial(cell: Cell) -> tuple[Any, State]:
    """One row of zeros for a cell to step on."""
    like = next(cell.parameters(), torch.zeros(()))
    x = torch.zeros(1, cell.input_size, dtype=like.dtype, device=like.device)
    drawn = cell.draw(1, 1, dtype=like.dtype, device=like.device)
    if len(cell.inputs) != 1 + len(drawn):
        raise ValueError(
            f"{type(cell).__name__} has the inputs ({', '.join(cell.inputs)}); what enters its products, and what it "
            "notes, can only be found of cells with one input."
        )
    state = cell.initial_state(1, dtype=like.dtype, device=like.device)
    return ((x, *(value[0] for value in drawn)) if drawn else x), state


def _noted(cell: Cell) -> dict[str, int]:
    """What a cell's step notes: names and features."""
    found: dict[str, int] = {}
    x, state = _trial(cell)
    collect = capture_intermediates(lambda _, name, value: found.__setitem__(name, value.shape[-1]))
    with torch.no_grad(), left_as_it_was(cell), collect:
        cell.step(x, state)
    return found


def _check_product(cell: Cell) -> None:
    x, state = _trial(cell)
    with torch.no_grad(), left_as_it_was(cell), _Products(state[0], torch.ones_like(state[0])) as products:
        cell.step(x, state)
    if not products.count:
        raise ValueError(
            f"VariationalDropout: {type(cell).__name__} multiplies its state {cell.states[0]} with no weight matrix, "
            "so there is nowhere to drop it. Zoneout and RecurrentDropout need no product."
        )
