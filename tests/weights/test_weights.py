"""Weights of other frameworks, against the equations in their documentation, written here in NumPy.

``python scripts/weights_of_peers.py`` compares with the frameworks themselves.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fusecell as fc

I, H, T, N = 5, 6, 7, 3  # noqa: E741  # as in the equations
RNG = np.random.default_rng(0)
X = RNG.standard_normal((T, N, I))


def random(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape) * 0.5


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def run(step: Any, *states: Any) -> Any:
    outputs = []
    for x in X:
        *states, y = step(x, *states)
        outputs.append(y)
    return np.stack(outputs)


def zeros() -> Any:
    return np.zeros((N, H))


def keras_gru(kernel: Any, recurrent: Any, bias: Any, reset_after: bool) -> Any:
    def step(x: Any, h: Any) -> Any:
        of_x = x @ kernel + (bias[0] if reset_after else bias)
        x_z, x_r, x_h = np.split(of_x, 3, 1)
        if reset_after:
            h_z, h_r, h_h = np.split(h @ recurrent + bias[1], 3, 1)
            z, r = sigmoid(x_z + h_z), sigmoid(x_r + h_r)
            candidate = np.tanh(x_h + r * h_h)
        else:
            of_z, of_r, of_h = np.split(recurrent, 3, 1)
            z, r = sigmoid(x_z + h @ of_z), sigmoid(x_r + h @ of_r)
            candidate = np.tanh(x_h + (r * h) @ of_h)
        h = z * h + (1 - z) * candidate
        return h, h

    return run(step, zeros())


def keras_lstm(kernel: Any, recurrent: Any, bias: Any) -> Any:
    def step(x: Any, h: Any, c: Any) -> Any:
        i, f, g, o = np.split(x @ kernel + h @ recurrent + bias, 4, 1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        return h, c, h

    return run(step, zeros(), zeros())


def dense(tree: Any, name: str, x: Any) -> Any:
    return x @ tree[name]["kernel"] + tree[name].get("bias", 0)


def linen_gru(p: Any) -> Any:
    def step(x: Any, h: Any) -> Any:
        r = sigmoid(dense(p, "ir", x) + dense(p, "hr", h))
        z = sigmoid(dense(p, "iz", x) + dense(p, "hz", h))
        n = np.tanh(dense(p, "in", x) + r * dense(p, "hn", h))
        h = (1 - z) * n + z * h
        return h, h

    return run(step, zeros())


def linen_lstm(p: Any) -> Any:
    def step(x: Any, h: Any, c: Any) -> Any:
        i, f, g, o = (dense(p, "i" + gate, x) + dense(p, "h" + gate, h) for gate in "ifgo")
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        return h, c, h

    return run(step, zeros(), zeros())


def nnx_gru(p: Any) -> Any:
    def step(x: Any, h: Any) -> Any:
        x_r, x_z, x_n = np.split(dense(p, "dense_i", x), 3, 1)
        h_r, h_z, h_n = np.split(dense(p, "dense_h", h), 3, 1)
        r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
        h = (1 - z) * np.tanh(x_n + r * h_n) + z * h
        return h, h

    return run(step, zeros())


def equinox_gru(p: Any) -> Any:
    def step(x: Any, h: Any) -> Any:
        x_r, x_z, x_n = np.split(x @ p["weight_ih"].T + p["bias"], 3, 1)
        h_r, h_z, h_n = np.split(h @ p["weight_hh"].T, 3, 1)
        r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
        n = np.tanh(x_n + r * (h_n + p["bias_n"]))
        h = n + z * (h - n)
        return h, h

    return run(step, zeros())


def haiku_gru(p: Any) -> Any:
    def step(x: Any, h: Any) -> Any:
        of_zr, of_a = np.split(p["w_h"], [2 * H], 1)
        zr_x, a_x = np.split(x @ p["w_i"], [2 * H], 1)
        b_zr, b_a = np.split(p["b"], [2 * H])
        z, r = np.split(sigmoid(zr_x + h @ of_zr + b_zr), 2, 1)
        a = np.tanh(a_x + (r * h) @ of_a + b_a)
        h = (1 - z) * h + z * a
        return h, h

    return run(step, zeros())


def haiku_lstm(p: Any) -> Any:
    def step(x: Any, h: Any, c: Any) -> Any:
        i, g, f, o = np.split(np.concatenate((x, h), 1) @ p["w"] + p["b"], 4, 1)
        c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        return h, c, h

    return run(step, zeros(), zeros())


def gate(of_input: bool, bias: bool = True) -> dict[str, Any]:
    return {"kernel": random(I if of_input else H, H), **({"bias": random(H)} if bias else {})}


CASES: dict[str, tuple[Any, Any, str, Any]] = {
    "keras gru": (
        [random(I, 3 * H), random(H, 3 * H), random(2, 3 * H)],
        lambda p: keras_gru(*p, True),
        "keras",
        lambda: fc.GRU(I, H),
    ),
    "keras gru, reset before": (
        [random(I, 3 * H), random(H, 3 * H), random(3 * H)],
        lambda p: keras_gru(*p, False),
        "keras",
        lambda: fc.GRU(I, H, reset_after=False),
    ),
    "keras lstm": (
        [random(I, 4 * H), random(H, 4 * H), random(4 * H)],
        lambda p: keras_lstm(*p),
        "keras",
        lambda: fc.LSTM(I, H),
    ),
    "linen gru": (
        {name: gate(name[0] == "i", name[0] == "i" or name == "hn") for name in ["ir", "iz", "in", "hr", "hz", "hn"]},
        linen_gru,
        "flax",
        lambda: fc.Recurrent(fc.GRUCell(I, H)),
    ),
    "linen lstm": (
        {name: gate(name[0] == "i", name[0] == "h") for name in ["ii", "if", "ig", "io", "hi", "hf", "hg", "ho"]},
        linen_lstm,
        "flax",
        lambda: fc.LSTM(I, H),
    ),
    "nnx gru": (
        {
            "dense_i": {"kernel": random(I, 3 * H), "bias": random(3 * H)},
            "dense_h": {"kernel": random(H, 3 * H)},
        },
        nnx_gru,
        "nnx",
        lambda: fc.GRU(I, H),
    ),
    "equinox gru": (
        {
            "weight_ih": random(3 * H, I),
            "weight_hh": random(3 * H, H),
            "bias": random(3 * H),
            "bias_n": random(H),
        },
        equinox_gru,
        "equinox",
        lambda: fc.GRU(I, H),
    ),
    "haiku gru": (
        {"w_i": random(I, 3 * H), "w_h": random(H, 3 * H), "b": random(3 * H)},
        haiku_gru,
        "haiku",
        lambda: fc.GRU(I, H, reset_after=False),
    ),
    "haiku lstm": ({"w": random(I + H, 4 * H), "b": random(4 * H)}, haiku_lstm, "haiku", lambda: fc.LSTM(I, H)),
}


@pytest.mark.parametrize("name", CASES)
def test_numbers_there_and_back(name: str) -> None:
    params, equations, format, make = CASES[name]
    layer = make().double()
    fc.weights.load(layer, params)
    y = layer(torch.from_numpy(X))[0].detach().numpy()
    np.testing.assert_allclose(y, equations(params), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(equations(fc.weights.dump(layer, format)), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("format", fc.weights.FORMATS)
@pytest.mark.parametrize("kind", [fc.GRU, fc.LSTM, fc.RNN])
def test_what_is_written_is_read(kind: Any, format: str) -> None:
    torch.manual_seed(0)
    options = {"reset_after": False} if kind is fc.GRU and format == "haiku" else {}
    one, other = (kind(I, H, num_layers=2, bidirectional=format != "rtneural", **options) for _ in range(2))
    if format == "nnx":
        with torch.no_grad():
            for name, value in one.named_parameters():
                value[2 * H :] *= 0 if name.startswith("bias_hh") and kind is fc.GRU else 1
    if kind is fc.RNN and format in ("equinox", "haiku", "rtneural"):
        with pytest.raises(ValueError, match="GRU"):
            fc.weights.dump(one, format)
        return
    fc.weights.load(other, fc.weights.dump(one, format))
    x = torch.randn(T, N, I)
    torch.testing.assert_close(other(x)[0], one(x)[0], rtol=1e-5, atol=1e-6)


def test_a_file_of_rtneural_with_several_layers(tmp_path) -> None:
    torch.manual_seed(0)

    def make() -> nn.Module:
        return fc.Sequential(fc.LSTM(I, H), fc.Recurrent(fc.GRUCell(H, 4)), nn.Linear(4, 2))

    one, other = make(), make()
    path = tmp_path / "model.json"
    path.write_text(json.dumps(fc.weights.dump(one, "rtneural")), encoding="utf-8")
    content = json.loads(path.read_text(encoding="utf-8"))
    assert [layer["type"] for layer in content["layers"]] == ["lstm", "gru", "dense"]
    assert np.shape(content["layers"][1]["weights"][2]) == (2, 12)
    fc.weights.load(other, path)
    x = torch.randn(T, N, I)
    torch.testing.assert_close(other(x)[0], one(x)[0], rtol=1e-5, atol=1e-6)


def test_a_tree_with_several_cells_and_a_single_cell() -> None:
    one = fc.GRU(I, H, num_layers=2)
    first, second = fc.weights.dump(one, "flax")
    other = fc.Sequential(fc.GRU(I, H), fc.Recurrent(fc.GRUCell(H, H)))
    fc.weights.load(other, {"params": {"encoder": {"cell": first}, "decoder": second}})
    x = torch.randn(T, N, I)
    torch.testing.assert_close(other(x)[0], one(x)[0], rtol=1e-5, atol=1e-6)


GRU = [random(I, 3 * H), random(H, 3 * H), random(2, 3 * H)]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fc.weights.load(fc.LSTM(I, H), GRU), ValueError, "the source is a GRU, LSTM, layer 0 a LSTM"),
        (lambda: fc.weights.load(fc.GRU(I, H + 1), GRU), ValueError, "hidden_size=6, GRU, layer 0 5 and 7"),
        (lambda: fc.weights.load(fc.GRU(I, H, reset_after=False), GRU), ValueError, "reset_after=True"),
        (lambda: fc.weights.load(fc.GRU(I, H, bias=False), GRU), ValueError, "make the layer with bias=True"),
        (
            lambda: fc.weights.load(fc.GRU(I, H, num_layers=2), GRU),
            ValueError,
            "has cell in this order, GRU cell, cell",
        ),
        (lambda: fc.weights.load(fc.GRU(I, H), {"a": {"b": np.ones(3)}}), ValueError, "a.b is no cell of Flax"),
        (lambda: fc.weights.load(fc.GRU(I, H), GRU[:1]), ValueError, r"\[kernel, recurrent_kernel, bias\]"),
        (lambda: fc.weights.load(fc.GRU(I, H), "model.h5"), ValueError, "pass the layer or the parameters"),
        (lambda: fc.weights.load(fc.GRU(I, H), 3), TypeError, "got int"),
        (lambda: fc.weights.load(fc.LSTM(I, H, proj_size=2), GRU), TypeError, "proj_size=2"),
        (
            lambda: fc.weights.load(fc.Recurrent(fc.cells.MGUCell(I, H)), GRU),
            TypeError,
            "MGUCell: weights are converted",
        ),
        (lambda: fc.weights.dump(fc.GRU(I, H, activation="relu"), "keras"), TypeError, "relu and sigmoid"),
        (lambda: fc.weights.dump(fc.GRU(I, H), "nnx"), ValueError, "has no bias b_hn"),
        (lambda: fc.weights.dump(fc.GRU(I, H), "haiku"), ValueError, "reset_after=False"),
        (lambda: fc.weights.dump(fc.GRU(I, H), "onnx"), ValueError, "writes keras, flax"),
        (
            lambda: fc.weights.load(fc.GRU(I, H), {"layers": [{"type": "conv1d", "weights": [[1.0]]}]}),
            ValueError,
            "layer 0 .conv1d. has no counterpart",
        ),
    ],
)
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_nothing_is_written_where_something_does_not_fit() -> None:
    layer = fc.GRU(I, H, num_layers=2)
    before = [value.clone() for value in layer.parameters()]
    wrong = [random(I, 3 * H), random(H, 3 * H), random(2, 3 * H)]
    with pytest.raises(ValueError, match="input_size=5"):
        fc.weights.load(layer, [GRU, wrong])
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))


class _KerasLayer:
    """What is read of Keras's layers."""

    def __init__(self, values: Any = (), **attributes: Any) -> None:
        self.name, self.values = "layer", list(values)
        vars(self).update(attributes)

    def get_weights(self) -> list[Any]:
        return self.values

    def get_config(self) -> dict[str, Any]:
        return {}


def test_what_a_layer_of_keras_does_besides_is_told() -> None:
    def tanh() -> None: ...
    def sigmoid() -> None: ...

    kind = type("GRU", (_KerasLayer,), {})
    functions = {"activation": tanh, "recurrent_activation": sigmoid}
    backwards = kind(GRU, go_backwards=True, **functions)
    layer = fc.Recurrent(fc.GRUCell(I, H), reverse=True)
    with pytest.warns(UserWarning, match=r"goes backwards, as Recurrent\(cell, reverse=True\)") as warned:
        fc.weights.load(layer, backwards)
    assert warned[0].filename == __file__
    both = type("Bidirectional", (_KerasLayer,), {})
    layers = {"forward_layer": kind(GRU, **functions), "backward_layer": backwards}
    with pytest.warns(UserWarning, match="by merge_mode='sum'"):
        fc.weights.load(fc.GRU(I, H, bidirectional=True), both(merge_mode="sum", **layers))
    other = fc.GRU(I, H, bidirectional=True)
    fc.weights.load(other, both(merge_mode="concat", **layers))  # whose second layer goes backwards as it should
    assert torch.equal(other.weight_hh_l0_reverse, layer.cell.weight_hh)
