"""Compare converted weights with the frameworks that they are of: ``python scripts/weights_of_peers.py``.

Needs ``pip install keras flax equinox dm-haiku``; Keras runs on torch. Prints for each layer how far its outputs are
from fusecell's, with its weights read, and again with ours written to it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import equinox
import flax.linen
import haiku
import jax
import jax.numpy as jnp
import keras
import numpy as np
import torch
from flax import nnx

import fusecell as fc

STEPS, ROWS, INPUTS, SIZE = 7, 3, 5, 6
RNG = np.random.default_rng(0)
X = RNG.standard_normal((ROWS, STEPS, INPUTS)).astype(np.float32)


def ours(layer: Any) -> Any:
    return layer(torch.from_numpy(X))[0].detach().numpy()


def make(kind: Any, **options: Any) -> Any:
    return kind(INPUTS, SIZE, batch_first=True, **options)


def shaken(tree: Any) -> Any:
    """Return parameters with noise, as zeros would hide a bias in the wrong place."""
    return jax.tree.map(lambda value: value + 0.1 * RNG.standard_normal(value.shape).astype(np.float32), tree)


def compare(
    name: str, run: Callable[[Any], Any], params: Any, layer: Any, format: str, pack: Any = lambda d: d
) -> None:
    """Print the distance after reading weights, and after writing those of a new layer."""
    fc.weights.load(layer, params)
    apart = [np.abs(ours(layer) - np.asarray(run(params))).max()]
    with torch.no_grad():
        for value in layer.parameters():
            value.mul_(0.9)
        if format == "nnx" and isinstance(layer, fc.GRU):
            layer.bias_hh_l0.zero_()
    apart.append(np.abs(ours(layer) - np.asarray(run(pack(fc.weights.dump(layer, format))))).max())
    print(f"{name:24} read {apart[0]:.1e}, written {apart[1]:.1e}")
    if max(apart) > 1e-5:
        raise SystemExit(f"{name}: apart by {max(apart):.1e}")


def of_keras() -> None:
    for name, peer, layer in (
        ("GRU", keras.layers.GRU(SIZE, return_sequences=True), make(fc.GRU)),
        (
            "GRU, reset before",
            keras.layers.GRU(SIZE, return_sequences=True, reset_after=False),
            make(fc.GRU, reset_after=False),
        ),
        ("LSTM", keras.layers.LSTM(SIZE, return_sequences=True), make(fc.LSTM)),
        ("SimpleRNN", keras.layers.SimpleRNN(SIZE, return_sequences=True), make(fc.RNN)),
    ):
        peer(X)

        def run(values: Any, peer: Any = peer) -> Any:
            peer.set_weights(values)
            return peer(X).detach().numpy()

        compare(f"Keras {name}", run, shaken(peer.get_weights()), layer, "keras")
    both = keras.layers.Bidirectional(keras.layers.LSTM(SIZE, return_sequences=True))
    expected = both(X).detach().numpy()
    layer = make(fc.LSTM, bidirectional=True)
    fc.weights.load(layer, both)
    print(f"{'Keras Bidirectional':24} read {np.abs(ours(layer) - expected).max():.1e}")


def of_flax() -> None:
    for name, cell, layer in (
        ("GRUCell", flax.linen.GRUCell(SIZE), make(fc.GRU)),
        ("OptimizedLSTMCell", flax.linen.OptimizedLSTMCell(SIZE), make(fc.LSTM)),
        ("SimpleCell", flax.linen.SimpleCell(SIZE), make(fc.RNN)),
    ):
        peer = flax.linen.RNN(cell)
        (inner,) = shaken(peer.init(jax.random.key(0), X)["params"]).items()

        def run(values: Any, peer: Any = peer, key: str = inner[0]) -> Any:
            return peer.apply({"params": {key: values}}, X)

        compare(f"Flax linen {name}", run, inner[1], layer, "flax")
    for kind, layer in (
        (nnx.GRUCell, make(fc.GRU)),
        (nnx.OptimizedLSTMCell, make(fc.LSTM)),
        (nnx.SimpleCell, make(fc.RNN)),
    ):
        cell = kind(INPUTS, SIZE, rngs=nnx.Rngs(0))

        def run(values: Any, cell: Any = cell) -> Any:
            state = nnx.state(cell, nnx.Param)
            state.replace_by_pure_dict(jax.tree.map(jnp.asarray, values))
            nnx.update(cell, state)
            return nnx.RNN(cell)(X)

        params = shaken(nnx.state(cell, nnx.Param).to_pure_dict())
        compare(f"Flax nnx {kind.__name__}", run, params, layer, "nnx")


def of_equinox() -> None:
    for kind, layer in ((equinox.nn.GRUCell, make(fc.GRU)), (equinox.nn.LSTMCell, make(fc.LSTM))):
        cell = kind(INPUTS, SIZE, key=jax.random.key(1))
        zeros = jnp.zeros(SIZE)
        start = (zeros, zeros) if kind is equinox.nn.LSTMCell else zeros

        def run(values: Any, cell: Any = cell, start: Any = start) -> Any:
            names = list(values)
            own = equinox.tree_at(
                lambda c: [getattr(c, n) for n in names], cell, [jnp.asarray(values[n]) for n in names]
            )

            def step(state: Any, x: Any) -> Any:
                state = own(x, state)
                return state, state[0] if isinstance(state, tuple) else state

            return jax.vmap(lambda x: jax.lax.scan(step, start, x)[1])(X)

        params = {
            name: getattr(cell, name) for name in ("weight_ih", "weight_hh", "bias", "bias_n") if hasattr(cell, name)
        }
        compare(f"Equinox {kind.__name__}", run, shaken(params), layer, "equinox")


def of_haiku() -> None:
    for kind, layer in ((haiku.GRU, make(fc.GRU, reset_after=False)), (haiku.LSTM, make(fc.LSTM))):
        zeros = jnp.zeros((ROWS, SIZE))
        start = haiku.LSTMState(zeros, zeros) if kind is haiku.LSTM else zeros
        peer = haiku.transform(
            lambda x, kind=kind, start=start: haiku.dynamic_unroll(kind(SIZE), x, start, time_major=False)[0]
        )
        (inner,) = shaken(peer.init(jax.random.key(0), X)).items()

        def run(values: Any, peer: Any = peer, key: str = inner[0]) -> Any:
            return peer.apply({key: jax.tree.map(jnp.asarray, values)}, None, X)

        compare(f"Haiku {kind.__name__}", run, inner[1], layer, "haiku")


if __name__ == "__main__":
    of_keras()
    of_flax()
    of_equinox()
    of_haiku()
