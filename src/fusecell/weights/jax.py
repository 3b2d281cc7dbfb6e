"""JAX's libraries: Flax (linen and nnx), Equinox and Haiku. Trees of arrays, of any kind that NumPy reads.

===========  ==========================================================================================
Flax linen   a dense layer for each gate, kernels (I, H): ``ir iz in hr hz hn``, ``ii if ig io hi hf hg ho``
             or ``i h``
Flax nnx     ``dense_i`` and ``dense_h``, kernels (I, gates H); its GRU lacks the bias b_hn
Equinox      ``weight_ih``, ``weight_hh``, ``bias``, and a GRU's ``bias_n``
Haiku        a GRU ``w_i w_h b`` that resets before its product, z and 1 - z exchanged; an LSTM ``w b`` whose
             gates are i g f o
===========  ==========================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fusecell.weights.cell_weights import Array, CellWeights, reordered

__all__ = ["TO_JAX", "from_tree", "is_equinox"]

_LINEN = {"GRU": "rzn", "LSTM": "ifgo"}
_HAIKU_LSTM = (0, 2, 1, 3)
"""The places of torch.nn's gates i, f, g, o among Haiku's i, g, f, o, and back."""
_EQUINOX = ("weight_ih", "weight_hh", "bias", "bias_n")


def is_equinox(source: Any) -> bool:
    """Whether a source is a cell of Equinox."""
    return hasattr(source, "weight_ih") and hasattr(source, "weight_hh") and not hasattr(source, "parameters")


def from_tree(tree: Any, path: str = "") -> Iterator[CellWeights]:
    """Iterate over the cells in a tree of dicts, in its order.

    Raises:
        ValueError: for arrays that belong to no cell that is known.
    """
    if is_equinox(tree) and not isinstance(tree, Mapping):
        tree = {name: getattr(tree, name) for name in _EQUINOX if getattr(tree, name, None) is not None}
    if hasattr(tree, "to_pure_dict"):  # flax.nnx.State
        tree = tree.to_pure_dict()
    if not isinstance(tree, Mapping):
        raise ValueError(f"weights.load: {path or 'the source'} is no cell of Flax, Equinox or Haiku.")
    name = path or "the source"
    for matches, read in _READERS:
        if matches(set(tree)):
            yield read({key: _array(value) for key, value in tree.items()}, name)
            return
    # Layers without weights, such as a Flax carry's random state, are empty.
    for key, value in tree.items():
        yield from from_tree(value, f"{path}.{key}" if path else str(key))


def _array(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _array(each) for key, each in value.items()}
    return np.asarray(value)


# Flax linen


def _gate(tree: Any, prefix: str, gates: str) -> tuple[Array, Array | None]:
    """Return a weight and a bias of the dense layers of some gates; zeros for a bias that only some have."""
    parts = [tree[prefix + gate] for gate in gates]
    weight = np.concatenate([part["kernel"].T for part in parts])
    if not any("bias" in part for part in parts):
        return weight, None
    return weight, np.concatenate([part.get("bias", np.zeros(part["kernel"].shape[1], weight.dtype)) for part in parts])


def _from_linen(kind: str) -> Any:
    def read(tree: Any, name: str) -> CellWeights:
        gates = _LINEN.get(kind, "")
        of_input, of_state = (_gate(tree, prefix, gates) if gates else _gate(tree, prefix, [""]) for prefix in "ih")  # type: ignore[arg-type]
        return CellWeights(kind, of_input[0], of_state[0], of_input[1], of_state[1], name=name)

    return read


def _to_linen(weights: CellWeights) -> dict[str, Any]:
    if weights.kind == "GRU" and not weights.reset_after:
        raise ValueError(f"{weights.name} resets before its product, Flax's GRUCell after it.")
    gates = _LINEN.get(weights.kind, " ")
    of_input, of_state = (np.split(value, len(gates)) for value in (weights.weight_ih, weights.weight_hh))
    b_i, b_h = (np.split(value, len(gates)) for value in weights.biases())
    tree: dict[str, Any] = {}
    for place, gate in enumerate(gates):
        gate = gate.strip()
        tree["i" + gate], tree["h" + gate] = {"kernel": of_input[place].T}, {"kernel": of_state[place].T}
        if weights.kind == "GRU":
            is_new = gate == "n"
            tree["i" + gate]["bias"] = b_i[place] if is_new else b_i[place] + b_h[place]
            if is_new:
                tree["h" + gate]["bias"] = b_h[place]
        else:
            tree[("h" if weights.kind == "LSTM" else "i") + gate]["bias"] = b_i[place] + b_h[place]
    return tree


# Flax nnx


def _from_nnx(tree: Any, name: str) -> CellWeights:
    of_input, of_state = tree["dense_i"], tree["dense_h"]
    weight_ih, weight_hh = of_input["kernel"].T, of_state["kernel"].T
    kind = {1: "RNN", 3: "GRU", 4: "LSTM"}[len(weight_hh) // weight_hh.shape[1]]
    return CellWeights(kind, weight_ih, weight_hh, of_input.get("bias"), of_state.get("bias"), name=name)


def _to_nnx(weights: CellWeights) -> dict[str, Any]:
    b_i, b_h = weights.biases()
    size = weights.hidden_size
    tree: dict[str, Any] = {"dense_i": {"kernel": weights.weight_ih.T}, "dense_h": {"kernel": weights.weight_hh.T}}
    if weights.kind != "GRU":
        tree["dense_h" if weights.kind == "LSTM" else "dense_i"]["bias"] = b_i + b_h
        return tree
    if not weights.reset_after or b_h[2 * size :].any():
        raise ValueError(
            f"{weights.name}: flax.nnx.GRUCell resets after its product and has no bias b_hn, which is not 0 here; use "
            'format="flax", of flax.linen.GRUCell.'
        )
    tree["dense_i"]["bias"] = b_i + b_h
    return tree


# Equinox


def _from_equinox(tree: Any, name: str) -> CellWeights:
    weight_hh = tree["weight_hh"]
    kind = {1: "RNN", 3: "GRU", 4: "LSTM"}[len(weight_hh) // weight_hh.shape[1]]
    bias_n = tree.get("bias_n")
    bias_hh = None
    if bias_n is not None:
        bias_hh = np.concatenate((np.zeros(2 * len(bias_n), bias_n.dtype), bias_n))
    return CellWeights(kind, tree["weight_ih"], weight_hh, tree.get("bias"), bias_hh, name=name)


def _to_equinox(weights: CellWeights) -> dict[str, Array]:
    if weights.kind == "RNN" or not weights.reset_after:
        raise ValueError(f"{weights.name}: Equinox has a GRUCell that resets after its product, and an LSTMCell.")
    values = {"weight_ih": weights.weight_ih, "weight_hh": weights.weight_hh}
    if weights.bias_ih is None:
        return values
    b_i, b_h = weights.biases()
    if weights.kind == "LSTM":
        return {**values, "bias": b_i + b_h}
    split = 2 * weights.hidden_size
    return {**values, "bias": np.concatenate((b_i[:split] + b_h[:split], b_i[split:])), "bias_n": b_h[split:]}


# Haiku


def _from_haiku_gru(tree: Any, name: str) -> CellWeights:
    # z of a GRU is 1 - z here: the sigmoid of what is negated.
    weight_ih, weight_hh, bias = (
        reordered(_signed(value), (1, 0, 2)) for value in (tree["w_i"].T, tree["w_h"].T, tree["b"])
    )
    return CellWeights("GRU", weight_ih, weight_hh, bias, reset_after=False, name=name)


def _signed(value: Array) -> Array:
    """Negate the first of three gates."""
    first, *others = np.split(value, 3)
    return np.concatenate((-first, *others))


def _from_haiku_lstm(tree: Any, name: str) -> CellWeights:
    inner = tree.get("linear", tree)
    weight, bias = reordered(inner["w"].T, _HAIKU_LSTM), reordered(inner["b"], _HAIKU_LSTM)
    size = len(weight) // 4
    i, f, g, o = np.split(bias, 4)
    split = weight.shape[1] - size
    return CellWeights("LSTM", weight[:, :split], weight[:, split:], np.concatenate((i, f + 1, g, o)), name=name)


def _to_haiku(weights: CellWeights) -> dict[str, Array]:
    b_i, b_h = weights.biases()
    if weights.kind == "GRU":
        if weights.reset_after:
            raise ValueError(f"{weights.name} resets after its product, Haiku's GRU before it: reset_after=False.")
        parts = [_signed(reordered(value, (1, 0, 2))) for value in (weights.weight_ih, weights.weight_hh, b_i + b_h)]
        return {"w_i": parts[0].T, "w_h": parts[1].T, "b": parts[2]}
    if weights.kind == "LSTM":
        i, f, g, o = np.split(b_i + b_h, 4)
        both = np.concatenate((weights.weight_ih, weights.weight_hh), 1)
        return {"w": reordered(both, _HAIKU_LSTM).T, "b": np.concatenate((i, g, f - 1, o))}
    raise ValueError(f"{weights.name}: Haiku's GRU and LSTM are written, no {weights.kind}.")


_READERS: list[tuple[Any, Any]] = [
    (lambda keys: {"ir", "iz", "in", "hr", "hz", "hn"} == keys, _from_linen("GRU")),
    (lambda keys: {"ii", "if", "ig", "io", "hi", "hf", "hg", "ho"} == keys, _from_linen("LSTM")),
    (lambda keys: {"i", "h"} == keys, _from_linen("RNN")),
    (lambda keys: {"dense_i", "dense_h"} <= keys <= {"dense_i", "dense_h", "rngs"}, _from_nnx),
    (lambda keys: {"weight_ih", "weight_hh"} <= keys <= set(_EQUINOX), _from_equinox),
    (lambda keys: {"w_i", "w_h", "b"} == keys, _from_haiku_gru),
    (lambda keys: {"w", "b"} == keys, _from_haiku_lstm),
]
TO_JAX = {"flax": _to_linen, "nnx": _to_nnx, "equinox": _to_equinox, "haiku": _to_haiku}
"""What writes a cell for each library."""
