"""Cells without gates: leaky, independent, antisymmetric and structurally constrained RNNs."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusecell.cells.base import Device, WeightCell, one_of
from fusecell.execution.options import State

__all__ = ["AntisymmetricRNNCell", "IndRNNCell", "LeakyCell", "SCRNCell"]

_NONLINEARITIES = {"relu": torch.relu, "tanh": torch.tanh}


class LeakyCell(WeightCell):
    r"""The leaky (continuous-time) RNN of neuroscience, with ``alpha`` = dt / tau.

    .. math:: h' = (1-\alpha)\,h + \alpha\,f(W_{ih} x + W_{hh} h + b + \sqrt{2/\alpha}\,\sigma\,\xi),
        \quad \xi \sim \mathcal{N}(0, 1) \text{ in training, else } 0

    Example:
        >>> import torch, fusecell as fc
        >>> rates, h = fc.Recurrent(fc.cells.LeakyCell(5, 10, alpha=0.1, sigma=0.05))(torch.randn(7, 3, 5))
        >>> bool((rates >= 0).all())
        True

    Arguments:
        input_size, hidden_size: features of x and of h.
        alpha: the time step dt over the time constant tau, in (0, 1].
        nonlinearity: ``"relu"`` or ``"tanh"``.
        sigma: standard deviation of the recurrent noise, drawn for every step, row and unit; only in training.
        bias: learn b.

    Raises:
        ValueError: for an ``alpha`` outside (0, 1], an unknown ``nonlinearity`` or a negative ``sigma``.

    Paper: Yang et al., "Task representations in neural networks trained to perform many cognitive tasks",
    Nature Neuroscience 22 (2019).
    """

    options = ("alpha", "nonlinearity", "sigma")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        alpha: float = 0.2,
        *,
        nonlinearity: str = "relu",
        sigma: float = 0.0,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 0 < alpha <= 1:
            raise ValueError(f"LeakyCell: alpha is dt / tau and must be in (0, 1], got {alpha!r}.")
        if sigma < 0:
            raise ValueError(f"LeakyCell: sigma is a standard deviation and can't be negative, got {sigma!r}.")
        one_of("LeakyCell", "nonlinearity", nonlinearity, tuple(_NONLINEARITIES))
        super().__init__(
            input_size,
            hidden_size,
            weight_ih=(hidden_size, input_size),
            weight_hh=(hidden_size, hidden_size),
            bias_ih=(hidden_size,),
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.alpha = alpha
        self.nonlinearity = nonlinearity
        self.sigma = sigma

    @property
    def noisy(self) -> bool:
        """Whether the next call draws noise: in training, with ``sigma`` above 0."""
        return self.training and self.sigma > 0

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]  # follows the training mode
        return ("x", "noise") if self.noisy else ("x",)

    def draw(
        self,
        steps: int,
        batch_size: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> State:
        return (torch.randn(steps, batch_size, self.hidden_size, dtype=dtype, device=device),) if self.noisy else ()

    def step(self, x: Tensor | tuple[Tensor, Tensor], state: State) -> tuple[Tensor, State]:
        (h,) = state
        x, noise = (x, None) if isinstance(x, Tensor) else x
        current = F.linear(x, self.weight_ih, self.bias_ih) + F.linear(h, self.weight_hh)
        if noise is not None:
            # Times alpha, below, it is sqrt(2 * alpha): a variance per unit of time that doesn't depend on dt.
            current = current + math.sqrt(2 / self.alpha) * self.sigma * noise
        h = (1 - self.alpha) * h + self.alpha * _NONLINEARITIES[self.nonlinearity](self.note("current", current))
        return h, (h,)


class IndRNNCell(WeightCell):
    r"""The independently recurrent network: each unit reads only its own state, so the recurrent weight is a vector.

    .. math:: h' = \mathrm{relu}(W_{ih} x + b + u \odot h)

    Example:
        >>> import torch, fusecell as fc
        >>> y, h = fc.Recurrent(fc.cells.IndRNNCell(5, 10))(torch.randn(7, 3, 5))
        >>> y.shape
        torch.Size([7, 3, 10])

    Arguments:
        input_size, hidden_size: features of x and of h; u is ``weight_hh`` of shape (hidden_size,), initially
            from U(0, 1).
        nonlinearity: ``"relu"`` or ``"tanh"``.
        bias: learn b.

    Raises:
        ValueError: for another ``nonlinearity``.

    Paper: Li et al., "Independently recurrent neural network (IndRNN)", 2018, arXiv:1803.04831.
    """

    options = ("nonlinearity",)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        nonlinearity: str = "relu",
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        one_of("IndRNNCell", "nonlinearity", nonlinearity, tuple(_NONLINEARITIES))
        super().__init__(
            input_size,
            hidden_size,
            weight_ih=(hidden_size, input_size),
            weight_hh=(hidden_size,),
            bias_ih=(hidden_size,),
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.nonlinearity = nonlinearity

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.uniform_(self.weight_hh, 0, 1)  # above 1 a unit that reads only itself would grow without bound

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        (h,) = state
        h = _NONLINEARITIES[self.nonlinearity](F.linear(x, self.weight_ih, self.bias_ih) + self.weight_hh * h)
        return h, (h,)


class AntisymmetricRNNCell(WeightCell):
    r"""An Euler step of a stable differential equation: the recurrent matrix is antisymmetric, with some friction.

    .. math:: h' = h + \varepsilon \tanh\!\big(W_{ih} x + b + (W_{hh} - W_{hh}^\top - \gamma I)\,h\big)

    Example:
        >>> import torch, fusecell as fc
        >>> y, h = fc.Recurrent(fc.cells.AntisymmetricRNNCell(5, 10, epsilon=0.1))(torch.randn(7, 3, 5))
        >>> y.shape
        torch.Size([7, 3, 10])

    Arguments:
        input_size, hidden_size: features of x and of h.
        epsilon: the step size.
        gamma: the friction (diffusion in the paper), a small positive number.
        bias: learn b.

    Paper: Chang et al., "AntisymmetricRNN: a dynamical system view on recurrent neural networks", 2019,
    arXiv:1902.09689.
    """

    options = ("epsilon", "gamma")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        epsilon: float = 0.01,
        gamma: float = 0.01,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            weight_ih=(hidden_size, input_size),
            weight_hh=(hidden_size, hidden_size),
            bias_ih=(hidden_size,),
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.epsilon = epsilon
        self.gamma = gamma

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        (h,) = state
        # The compiler moves the difference of the weights out of the loop, as it depends on no state.
        spin = F.linear(h, self.weight_hh - self.weight_hh.t()) - self.gamma * h
        h = h + self.epsilon * torch.tanh(F.linear(x, self.weight_ih, self.bias_ih) + spin)
        return h, (h,)


class SCRNCell(WeightCell):
    r"""The structurally constrained RNN: a plain RNN and a slow context; the output is both, concatenated.

    .. math::
        s' &= (1-\alpha)\,W_{is} x + \alpha\,s \\
        h' &= \sigma(W_{ih} x + b + W_{hh} h + W_{sh} s') \\
        y  &= [h', s']

    Example:
        >>> import torch, fusecell as fc
        >>> y, (h, s) = fc.Recurrent(fc.cells.SCRNCell(5, 10, 4))(torch.randn(7, 3, 5))
        >>> y.shape, s.shape
        (torch.Size([7, 3, 14]), torch.Size([3, 4]))

    Arguments:
        input_size, hidden_size: features of x and of h.
        context_size: features of the context s; half of ``hidden_size`` if left out.
        alpha: the share of the context that a step keeps.
        bias: learn b; the paper has none.

    Paper: Mikolov et al., "Learning longer memory in recurrent neural networks", 2014, arXiv:1412.7753.
    """

    states = ("h", "s")
    options = ("context_size", "alpha")
    weight_is: Tensor
    weight_sh: Tensor

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        context_size: int | None = None,
        *,
        alpha: float = 0.95,
        bias: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        context_size = max(1, hidden_size // 2) if context_size is None else context_size
        super().__init__(
            input_size,
            hidden_size,
            weight_ih=(hidden_size, input_size),
            weight_hh=(hidden_size, hidden_size),
            weight_is=(context_size, input_size),
            weight_sh=(hidden_size, context_size),
            bias_ih=(hidden_size,),
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.context_size = context_size
        self.alpha = alpha
        self.state_sizes = (hidden_size, context_size)
        self.output_size = hidden_size + context_size

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        h, s = state
        s = self.note("s", (1 - self.alpha) * F.linear(x, self.weight_is) + self.alpha * s)
        h = F.linear(x, self.weight_ih, self.bias_ih) + F.linear(h, self.weight_hh) + F.linear(s, self.weight_sh)
        h = self.note("h", torch.sigmoid(h))
        return torch.cat((h, s), -1), (h, s)
