"""The structured cells in JAX, as good users write them: products of x before the loop, ``lax.scan`` under ``jit``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax, nn

import fusecell as fc

__all__ = ["jax_layer"]

Weights = dict[str, Any]


def _linear(w: Weights, name: str, x: Any) -> Any:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _heads(x: Any, heads: int) -> Any:
    return x.reshape(*x.shape[:-1], heads, -1)


def _unit(x: Any) -> Any:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _mlstm(cell: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def before(w: Weights, x: Any) -> Any:
        q, k, v, o = (_heads(part, cell.heads) for part in jnp.split(_linear(w, "maps", x), 4, -1))
        i, f = jnp.split(_linear(w, "gate_map", x), 2, -1)
        return q, k * k.shape[-1] ** -0.5, v, nn.sigmoid(o), i, nn.log_sigmoid(f)

    def step(w: Weights, state: Any, x: Any) -> tuple[Any, Any]:
        (C, n, m), (q, k, v, o, i, log_f) = state, x
        m_new = jnp.maximum(log_f + m, i)
        i, f = jnp.exp(i - m_new), jnp.exp(log_f + m - m_new)
        C = f[..., None, None] * C + i[..., None, None] * (v[..., :, None] * k[..., None, :])
        n = f[..., None] * n + i[..., None] * k
        size = jnp.maximum(jnp.abs((n * q).sum(-1)), jnp.exp(-m_new))
        h = o * jnp.einsum("nhvk,nhk->nhv", C, q) / size[..., None]
        return (C, n, m_new), h.reshape(h.shape[0], -1)

    return before, step


def _delta(cell: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def before(w: Weights, x: Any) -> Any:
        q, k, v = (_heads(part, cell.heads) for part in jnp.split(_linear(w, "maps", x), 3, -1))
        alpha, beta = jnp.split(nn.sigmoid(_linear(w, "gate_map", x)), 2, -1)
        return _unit(q), _unit(k), v, alpha, beta

    def step(w: Weights, state: Any, x: Any) -> tuple[Any, Any]:
        (S,), (q, k, v, alpha, beta) = state, x
        S = alpha[..., None, None] * S
        change = beta[..., None] * (v - jnp.einsum("nhvk,nhk->nhv", S, k))
        S = S + change[..., :, None] * k[..., None, :]
        return (S,), jnp.einsum("nhvk,nhk->nhv", S, q).reshape(S.shape[0], -1)

    return before, step


def _block_gru(cell: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def before(w: Weights, x: Any) -> Any:
        return _heads(_linear(w, "input", x), cell.blocks)

    def step(w: Weights, state: Any, x: Any) -> tuple[Any, Any]:
        (h,) = state
        gates = jnp.einsum("nbd,bde->nbe", _heads(h, cell.blocks), w["recurrent"]) + x
        gates = gates / jnp.sqrt((gates**2).mean(-1, keepdims=True) + 1e-4) * w["norm.weight"]
        r, n, u = (gate.reshape(h.shape) for gate in jnp.split(gates, 3, -1))
        n, u = jnp.tanh(nn.sigmoid(r) * n), nn.sigmoid(u - 1)
        h = u * n + (1 - u) * h
        return (h,), h

    return before, step


def _rg_lru(cell: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def before(w: Weights, x: Any) -> Any:
        u, r, i = jnp.split(_linear(w, "input", x), 3, -1)
        log_a = -8 * nn.sigmoid(r) * nn.softplus(w["log_decay"])
        return jnp.exp(log_a), jnp.sqrt(-jnp.expm1(2 * log_a)) * nn.sigmoid(i) * u

    def step(w: Weights, state: Any, x: Any) -> tuple[Any, Any]:
        h = x[0] * state[0] + x[1]
        return (h,), h

    return before, step


def _conv_gru(cell: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def conv(w: Weights, name: str, x: Any) -> Any:
        result = lax.conv_general_dilated(x, w[f"{name}.weight"], (1, 1), "SAME")
        return result + w[f"{name}.bias"][:, None, None]

    def step(w: Weights, state: Any, x: Any) -> tuple[Any, Any]:
        (h,) = state
        z, r = jnp.split(nn.sigmoid(conv(w, "gate_map", jnp.concatenate([x, h], 1))), 2, 1)
        n = jnp.tanh(conv(w, "candidate", jnp.concatenate([x, r * h], 1)))
        h = (1 - z) * h + z * n
        return (h,), h

    return lambda w, x: x, step


_CELLS = {
    "mlstm": _mlstm,
    "gated_delta_net": _delta,
    "block_gru": _block_gru,
    "rg_lru": _rg_lru,
    "conv_gru": _conv_gru,
}


def jax_layer(
    name: str, cell: fc.Cell, inputs: tuple[torch.Tensor, ...], *, training: bool
) -> Callable[[], Any] | None:
    """Return a call of a cell's layer, or of its gradient, on JAX's arrays; None where there is no such cell here."""
    if name not in _CELLS:
        return None
    before, step = _CELLS[name](cell)
    weights = {key: jnp.asarray(value.detach().numpy()) for key, value in cell.named_parameters()}
    start = tuple(jnp.asarray(value.numpy()) for value in cell.initial_state(inputs[0].shape[1]))
    x = jnp.asarray(inputs[0].numpy())

    def layer(w: Weights, x: Any) -> Any:
        return lax.scan(lambda state, value: step(w, state, value), start, before(w, x))[1]

    if training:
        gradient = jax.jit(jax.grad(lambda w, x: layer(w, x).sum(), argnums=(0, 1)))
        return lambda: jax.block_until_ready(gradient(weights, x))  # type: ignore[no-untyped-call]  # as JAX ships it
    forward = jax.jit(layer)
    return lambda: np.asarray(jax.block_until_ready(forward(weights, x)))  # type: ignore[no-untyped-call]  # as shipped
