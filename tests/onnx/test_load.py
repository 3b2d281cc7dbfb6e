"""Recurrent nodes of ONNX models as layers, against ONNX Runtime's results of the same models."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fusecell as fc

onnx = pytest.importorskip("onnx")
from onnx import helper, numpy_helper  # noqa: E402


@pytest.mark.parametrize(
    "make",
    [
        lambda: fc.GRU(5, 7, bidirectional=True),
        lambda: fc.GRU(5, 7, reset_after=False, bias=False),
        lambda: fc.LSTM(5, 7, bidirectional=True),
        lambda: fc.RNN(5, 7, nonlinearity="relu"),
    ],
)
def test_there_and_back(make) -> None:
    torch.manual_seed(0)
    layer, x = make(), torch.randn(4, 3, 5)
    (loaded,) = fc.onnx.load(fc.onnx.export(layer)).values()
    assert type(loaded) is type(layer)
    torch.testing.assert_close(loaded(x)[0], layer(x)[0], rtol=0, atol=1e-6)
    loaded(x)[0].sum().backward()
    assert all(value.grad is not None for value in loaded.parameters())


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_torchs_own_export(kind, tmp_path) -> None:
    """Its weights are made of others by nodes of the model."""
    torch.manual_seed(0)
    layer, x = kind(5, 7, bidirectional=True), torch.randn(4, 3, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(layer, (x,), tmp_path / "model.onnx", dynamo=False)
    (loaded,) = fc.onnx.load(tmp_path / "model.onnx").values()
    torch.testing.assert_close(loaded(x)[0], layer(x)[0], rtol=0, atol=1e-6)


def _gru_node(**attributes):
    w, r = np.ones((1, 6, 3), dtype=np.float32), np.ones((1, 6, 2), dtype=np.float32)
    node = helper.make_node("GRU", ["x", "w", "r"], ["y"], name="gates", hidden_size=2, **attributes)
    constants = [numpy_helper.from_array(value, name) for value, name in ((w, "w"), (r, "r"))]
    inputs = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["T", "N", 3])]
    outputs = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["T", 1, "N", 2])]
    return helper.make_model(helper.make_graph([node], "g", inputs, outputs, constants))


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (4, np.array([4, 2], dtype=np.int32), r"constant sequence_lens, more of shape \(2,\).* as lengths with"),
        (5, np.ones((1, 2, 2), dtype=np.float32), "constant initial_h.* as hx with each call"),
    ],
)
def test_constants_that_a_layer_takes_with_each_call_are_told(at: int, value, reason: str) -> None:
    model = _gru_node()
    (node,) = model.graph.node
    node.input.extend([*[""] * (at - len(node.input)), "more"])
    model.graph.initializer.append(numpy_helper.from_array(value, "more"))
    with pytest.warns(UserWarning, match=reason) as warned:
        fc.onnx.load(model)
    assert warned[0].filename == __file__


def test_nodes_of_one_name_are_both_there() -> None:
    model = _gru_node()
    other = helper.make_node("GRU", ["x", "w", "r"], ["z"], name="gates", hidden_size=2, linear_before_reset=1)
    model.graph.node.append(other)
    layers = fc.onnx.load(model)
    assert list(layers) == ["gates", "gates.1"]
    assert [layer.reset_after for layer in layers.values()] == [False, True]


def test_a_gru_without_biases_that_resets_before_its_product() -> None:
    (layer,) = fc.onnx.load(_gru_node()).values()
    assert not layer.bias
    assert layer.reset_after is False


def _without_layers() -> onnx.ModelProto:
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in "xy")
    return onnx.helper.make_model(onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "it", [x], [y]))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: _gru_node(activations=["Swish", "Tanh"]), "has the activation 'Swish'"),
        (_without_layers, "no GRU, LSTM, RNN or Scan; it has Relu"),
    ],
)
def test_what_no_layer_computes_is_refused(model, reason: str) -> None:
    with pytest.raises(fc.ExportError, match=reason):
        fc.onnx.load(model())


@pytest.mark.packages
def test_the_recurrent_part_of_a_published_model() -> None:
    ort = pytest.importorskip("onnxruntime")
    found = importlib.util.find_spec("silero_vad")  # not imported, as it wants torchaudio
    if found is None or found.origin is None:
        pytest.skip("silero_vad is not installed")
    path = Path(found.origin).parent / "data" / "silero_vad_16k_sequence.onnx"
    model = onnx.load(path)
    (node,) = [node for node in model.graph.node if node.op_type == "LSTM"]
    for name in (node.input[0], node.output[0]):
        model.graph.output.append(helper.make_empty_tensor_value_info(name))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    feeds = {
        name: generator.standard_normal(shape).astype(np.float32) * 0.3
        for name, shape in (("input", (9, 576)), ("h", (1, 1, 128)), ("c", (1, 1, 128)))
    }
    x, expected = session.run([node.input[0], node.output[0]], feeds)
    (layer,) = fc.onnx.load(path).values()
    y, _ = layer(torch.from_numpy(x), (torch.from_numpy(feeds["h"]), torch.from_numpy(feeds["c"])))
    np.testing.assert_allclose(y.detach().numpy(), expected[:, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"direction": "sideways"}, "has the direction 'sideways' and weights of 1"),
        ({"direction": "bidirectional"}, "has the direction 'bidirectional' and weights of 1"),
        ({"gates": 3}, "has the attribute gates=3, which these nodes don't have"),
        ({"layout": "1"}, "has the attribute layout='1', expected int"),
        ({"direction": b"\xff"}, "which is no text"),
    ],
)
def test_attributes_that_say_something_else_are_refused(attributes, reason) -> None:
    with pytest.raises(fc.ExportError, match=reason):
        fc.onnx.load(_gru_node(**attributes))


@pytest.mark.parametrize(("tensor", "shape"), [("w", (1, 5, 3)), ("r", (1, 6, 3)), ("w", (6, 3)), ("r", (2, 6, 2))])
def test_weights_that_do_not_belong_together_are_refused(tensor, shape) -> None:
    model = _gru_node()
    for stored in model.graph.initializer:
        if stored.name == tensor:
            stored.CopyFrom(numpy_helper.from_array(np.ones(shape, dtype=np.float32), tensor))
    with pytest.raises(fc.ExportError, match=r"gates has hidden_size 2 and weights W \("):
        fc.onnx.load(model)


def test_another_hidden_size_is_refused_and_lower_case_taken() -> None:
    model = _gru_node(activations=["sigmoid", "tanh"])
    assert isinstance(next(iter(fc.onnx.load(model).values())), fc.GRU)
    size = next(each for each in model.graph.node[0].attribute if each.name == "hidden_size")
    size.i = 7
    with pytest.raises(fc.ExportError, match="has hidden_size 7"):
        fc.onnx.load(model)


def test_files_and_tensors_that_cannot_be_read(tmp_path) -> None:
    model = _gru_node()
    model.graph.initializer[0].data_type = 99
    with pytest.raises(fc.ExportError, match="the model's tensor w can't be read"):
        fc.onnx.load(model)
    (tmp_path / "model.onnx").write_bytes(_gru_node().SerializeToString()[:-5])
    with pytest.raises(fc.ExportError, match="is no ONNX model, or a part of one"):
        fc.onnx.load(tmp_path / "model.onnx")
