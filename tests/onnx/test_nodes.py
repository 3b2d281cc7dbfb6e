"""Recurrent nodes with all that ONNX lets them have, loaded, against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import fusecell as fc
from fusecell.onnx.node_cells import activations_of

ort = pytest.importorskip("onnxruntime")
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
T, N, FEATURES, H = 7, 3, 5, 4


def node(kind: str, *, peepholes: bool = False, bias: bool = True, **attributes: Any) -> onnx.ModelProto:
    """Return a model of one node with random weights, whose inputs are x, h, for an LSTM c, and lengths."""
    directions = 2 if attributes.get("direction") == "bidirectional" else 1
    generator, gates = np.random.default_rng(1), GATES[kind]
    shapes = {"w": (directions, gates * H, FEATURES), "r": (directions, gates * H, H)}
    if bias:
        shapes["b"] = (directions, 2 * gates * H)
    if peepholes:
        shapes["p"] = (directions, 3 * H)
    stored = {name: generator.standard_normal(shape).astype(np.float32) * 0.6 for name, shape in shapes.items()}
    inputs = ["x", "w", "r", "b" if bias else "", "lengths", "h", *(["c"] if kind == "LSTM" else [])]
    inputs += ["p"] if peepholes else []
    outputs = ["y", "h_n", *(["c_n"] if kind == "LSTM" else [])]
    states = ["h", "c"][: len(outputs) - 1]
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [T, N, FEATURES])]
    values += [helper.make_tensor_value_info("lengths", TensorProto.INT32, [N])]
    values += [helper.make_tensor_value_info(name, TensorProto.FLOAT, [directions, N, H]) for name in states]
    results = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [T, directions, N, H])]
    results += [helper.make_tensor_value_info(f"{name}_n", TensorProto.FLOAT, [directions, N, H]) for name in states]
    graph = helper.make_graph(
        [helper.make_node(kind, inputs, outputs, name="it", hidden_size=H, **attributes)],
        "one",
        values,
        results,
        [numpy_helper.from_array(value, name) for name, value in stored.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)


RNN_ACTIVATIONS: dict[str, dict[str, Any]] = {
    **{key: {} for key in ("Relu", "Tanh", "Sigmoid", "LeakyRelu", "HardSigmoid", "Elu", "Softsign", "Softplus")},
    # ONNX Runtime's defaults of these are not the operators'.
    **{key: {"activation_alpha": [0.7], "activation_beta": [0.3]} for key in ("Affine", "ScaledTanh")},
    "ThresholdedRelu": {"activation_alpha": [0.7]},
}
NODES: dict[str, Any] = {
    **{f"RNN {name}": ("RNN", {"activations": [name], **numbers}) for name, numbers in RNN_ACTIVATIONS.items()},
    "RNN both ways": (
        "RNN",
        {"direction": "bidirectional", "activations": ["LeakyRelu", "Elu"], "activation_alpha": [0.3, 0.7]},
    ),
    "RNN clip": ("RNN", {"clip": 0.4}),
    "RNN reverse": ("RNN", {"direction": "reverse"}),
    "GRU reverse": ("GRU", {"direction": "reverse"}),
    "GRU reverse, linear before reset": ("GRU", {"direction": "reverse", "linear_before_reset": 1}),
    "GRU hard": (
        "GRU",
        {"activations": ["HardSigmoid", "Tanh"], "activation_alpha": [0.25], "activation_beta": [0.4]},
    ),
    "GRU hard, linear before reset": ("GRU", {"activations": ["HardSigmoid", "Relu"], "linear_before_reset": 1}),
    "GRU both ways": ("GRU", {"direction": "bidirectional", "activations": ["Sigmoid", "Relu", "Sigmoid", "Tanh"]}),
    "GRU clip": ("GRU", {"clip": 0.5, "direction": "reverse"}),
    "LSTM reverse": ("LSTM", {"direction": "reverse"}),
    "LSTM peepholes": ("LSTM", {"peepholes": True}),
    "LSTM peepholes, both ways": ("LSTM", {"peepholes": True, "direction": "bidirectional", "bias": False}),
    "LSTM coupled": ("LSTM", {"input_forget": 1}),
    "LSTM clip": ("LSTM", {"clip": 0.3, "peepholes": True}),
    "LSTM hard": ("LSTM", {"activations": ["HardSigmoid", "Relu", "Softsign"], "direction": "reverse"}),
    "LSTM affine": ("LSTM", {"activations": ["Sigmoid", "Affine", "Tanh"], "activation_alpha": [0.7], "clip": 2.0}),
}


@pytest.mark.parametrize("name", NODES)
def test_nodes(name):
    kind, attributes = NODES[name]
    model = node(kind, **attributes)
    (layer,) = fc.onnx.load(model).values()
    generator = np.random.default_rng(2)
    directions = 2 if attributes.get("direction") == "bidirectional" else 1
    feeds: dict[str, Any] = {
        "x": generator.standard_normal((T, N, FEATURES)).astype(np.float32),
        "lengths": np.array([T, 2, 5], np.int32),
        "h": generator.standard_normal((directions, N, H)).astype(np.float32) * 0.5,
    }
    if kind == "LSTM":
        feeds["c"] = generator.standard_normal((directions, N, H)).astype(np.float32)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected, *expected_states = session.run(None, feeds)

    states = [torch.from_numpy(feeds[each]) for each in ("h", "c") if each in feeds]
    if isinstance(layer, fc.Recurrent):
        state: Any = tuple(value[0] for value in states)
    elif isinstance(layer, fc.Bidirectional):
        state = tuple(tuple(value[at] for value in states) for at in (0, 1))
    else:
        state = tuple(states)
    state = state[0] if isinstance(state, tuple) and len(state) == 1 else state
    with fc.runner("compiled"), torch.no_grad():
        y, after = layer(torch.from_numpy(feeds["x"]), state, lengths=torch.from_numpy(feeds["lengths"]).long())
    np.testing.assert_allclose(y.numpy(), expected.transpose(0, 2, 1, 3).reshape(T, N, -1), atol=2e-6)
    if isinstance(layer, fc.Bidirectional):
        flat = [each if isinstance(each, tuple) else (each,) for each in after]
        stacked = [torch.stack(values) for values in zip(*flat, strict=True)]
    else:
        each = after if isinstance(after, tuple) else (after,)
        stacked = [value[None] if isinstance(layer, fc.Recurrent) else value for value in each]
    for value, of in zip(stacked, expected_states, strict=True):
        np.testing.assert_allclose(value.numpy(), of, atol=2e-6)


@pytest.mark.parametrize("name", ["GRU hard", "LSTM clip", "LSTM coupled", "RNN both ways"])
def test_they_are_trained(name):
    kind, attributes = NODES[name]
    (layer,) = fc.onnx.load(node(kind, **attributes)).values()
    layer.double()
    x = torch.randn(T, N, FEATURES, dtype=torch.float64)
    weights = list(layer.parameters())
    gradients = []
    for runner in ("compiled", "eager"):
        with fc.runner(runner):
            gradients.append(torch.autograd.grad(layer(x)[0].square().sum(), weights, allow_unused=True))
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=1e-10)


def test_a_reversed_node_is_a_cell_that_is_exported_as_one():
    (layer,) = fc.onnx.load(node("GRU", direction="reverse")).values()
    assert isinstance(layer, fc.Recurrent)
    assert layer.reverse
    assert isinstance(layer.cell, fc.GRUCell)
    assert [each.op_type for each in fc.onnx.export(layer).graph.node if each.op_type in GATES] == ["GRU"]


def test_the_numbers_of_activations_are_consumed_in_order():
    first, second, third = activations_of(["LeakyRelu", "HardSigmoid", "Elu"], [0.5, 0.1], [0.9])
    assert (first.alpha, second.alpha, second.beta, third.alpha) == (0.5, 0.1, 0.9, 1.0)
    (cell,) = [fc.onnx.load(node("GRU", clip=0.5, activations=["HardSigmoid", "Tanh"]))["it"].cell]
    assert "activations=[hardsigmoid(0.2, 0.5), tanh], clip=0.5, linear_before_reset=False" in repr(cell)


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        ({"activations": ["Sigmoid", "Swish"]}, "the activation 'Swish', which is none of relu"),
        ({"activations": ["Sigmoid"]}, "the activations Sigmoid, expected 2 for each direction"),
    ],
)
def test_what_is_refused(attributes, text):
    with pytest.raises(fc.ExportError, match=text):
        fc.onnx.load(node("GRU", **attributes))


def test_peepholes_of_another_size_are_refused():
    model = node("LSTM", peepholes=True)
    for stored in model.graph.initializer:
        if stored.name == "p":
            stored.CopyFrom(numpy_helper.from_array(np.ones((1, 5), np.float32), "p"))
    with pytest.raises(fc.ExportError, match=r"peepholes \(1, 5\), expected \(1, 12\)"):
        fc.onnx.load(model)
