"""The layers in JAX: ``lax.scan`` under ``jit``, as good users write it, with x's product before the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, nn

from benchmarks.problem import Array, Call, Problem
from benchmarks.shapes import Mode

__all__ = ["arrays", "gru_outputs", "jax_scan"]

Weights = dict[str, Any]
Step = Callable[[Weights, Any, Any], Any]


def _norm(weights: Weights, name: str, value: Any) -> Any:
    mean = value.mean(-1, keepdims=True)
    variance = ((value - mean) ** 2).mean(-1, keepdims=True)
    return (value - mean) / jnp.sqrt(variance + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _linear(weights: Weights, x: Any) -> Any:
    return x @ weights["weight_ih"] + weights["bias_ih"]


def _gru(weights: Weights, h: Any, x: Any) -> Any:
    x_r, x_z, x_n = jnp.split(x, 3, -1)
    h_r, h_z, h_n = jnp.split(h @ weights["weight_hh"] + weights["bias_hh"], 3, -1)
    r, z = nn.sigmoid(x_r + h_r), nn.sigmoid(x_z + h_z)
    return (1 - z) * jnp.tanh(x_n + r * h_n) + z * h


def gru_outputs(parameters: list[Any], x: Any) -> Any:
    """Run a GRU over (T, N, features), from zeros.

    Arguments:
        parameters: torch.nn.GRUCell's, in their order.
    """
    w_ih, w_hh, b_ih, b_hh = parameters
    weights = {"weight_ih": w_ih.T, "weight_hh": w_hh.T, "bias_ih": b_ih, "bias_hh": b_hh}

    def step(h: Any, of_x: Any) -> Any:
        h = _gru(weights, h, of_x)
        return h, h

    return lax.scan(step, jnp.zeros((x.shape[1], w_hh.shape[1])), _linear(weights, x))[1]


def _lstm(weights: Weights, state: Any, x: Any) -> Any:
    h, c = state
    i, f, g, o = jnp.split(x + h @ weights["weight_hh"] + weights["bias_hh"], 4, -1)
    c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
    return nn.sigmoid(o) * jnp.tanh(c), c


def _rnn(weights: Weights, h: Any, x: Any) -> Any:
    return jnp.tanh(x + h @ weights["weight_hh"] + weights["bias_hh"])


def _leaky(weights: Weights, h: Any, x: Any) -> Any:
    return 0.8 * h + 0.2 * nn.relu(x + h @ weights["weight_hh"])


def _layer_norm_gru_input(weights: Weights, x: Any) -> Any:
    gates, n = jnp.split(x @ weights["weight_ih"], [weights["weight_hh"].shape[1] // 3 * 2], -1)
    gates, n = _norm(weights, "norm_ih_gates", gates), _norm(weights, "norm_ih_candidate", n)
    return jnp.concatenate([gates, n], -1)


def _layer_norm_gru(weights: Weights, h: Any, x: Any) -> Any:
    split = [2 * h.shape[-1]]
    x_gates, x_n = jnp.split(x, split, -1)
    h_gates, h_n = jnp.split(h @ weights["weight_hh"], split, -1)
    r, z = jnp.split(nn.sigmoid(x_gates + _norm(weights, "norm_hh_gates", h_gates)), 2, -1)
    return (1 - z) * jnp.tanh(x_n + r * _norm(weights, "norm_hh_candidate", h_n)) + z * h


def _ligru_input(weights: Weights, x: Any) -> Any:
    return _norm(weights, "norm_ih", x @ weights["weight_ih"])


def _ligru(weights: Weights, h: Any, x: Any) -> Any:
    z, n = jnp.split(x + h @ weights["weight_hh"], 2, -1)
    z = nn.sigmoid(z)
    return z * h + (1 - z) * nn.relu(n)


# For each cell, a function of all of x before the loop, and the step.
_CELLS: dict[str, tuple[Callable[[Weights, Any], Any], Step]] = {
    "gru": (_linear, _gru),
    "lstm": (_linear, _lstm),
    "rnn_tanh": (_linear, _rnn),
    "leaky": (_linear, _leaky),
    "gru_layer_norm": (_layer_norm_gru_input, _layer_norm_gru),
    "ligru": (_ligru_input, _ligru),
}


def jax_scan(problem: Problem) -> Call | None:
    """Return a call of the layer, or of the gradient of its loss, compiled as one function, on arrays already JAX's."""
    if problem.mode.single or problem.mode is Mode.STREAM:
        return None
    before, step = _CELLS[problem.shape.cell]
    several = problem.shape.cell == "lstm"

    def body(weights: Weights, state: Any, x: Any) -> tuple[Any, Any]:
        state = step(weights, state, x)
        return state, state[0] if several else state

    def layer(weights: Weights, x: Any) -> Any:
        h = jnp.zeros((x.shape[1], problem.shape.hidden), x.dtype)
        projected = before(weights, x)
        return lax.scan(lambda state, x: body(weights, state, x), (h, h) if several else h, projected)[::-1]

    def loss(weights: Weights, x: Any, weight: Any) -> Any:
        return (layer(weights, x)[0] * weight).sum()

    weights = {name: jnp.asarray(_transposed(value)) for name, value in problem.weights().items()}
    x, weight = jnp.asarray(problem.inputs[0].numpy()), jnp.asarray(problem.weight.numpy())
    if problem.mode.training:
        gradient = jax.jit(jax.grad(loss))
        return lambda: jax.block_until_ready(gradient(weights, x, weight))  # type: ignore[no-untyped-call]  # as shipped
    forward = jax.jit(layer)
    return lambda: jax.block_until_ready(forward(weights, x))  # type: ignore[no-untyped-call]  # as JAX ships it


def arrays(problem: Problem, returned: Any) -> dict[str, Array]:
    """Return y (T, N, H) of a result (y, the last state), or the gradients, by name and in torch's layout."""
    if problem.mode.training:
        return {name: _transposed(np.asarray(value)) for name, value in returned.items()}
    return {"y": np.asarray(returned[0])}


def _transposed(value: Array) -> Array:
    """Transpose a matrix: JAX's users keep the input features first, torch the output features."""
    return value.T if value.ndim == 2 else value
