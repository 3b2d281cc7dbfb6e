"""Scan nodes of ONNX models as layers: those exported here, and those written by hand, against the reference."""

from __future__ import annotations

import random

import numpy as np
import onnx
import pytest
import torch
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import fusecell as fc
from fusecell.errors import ExportError
from fusecell.onnx.operators import OPERATORS

NODES = ("rnn_tanh", "rnn_relu", "gru", "gru_reset_before", "lstm", "lstm_projected")


def flat(values):
    tensors = values.values() if isinstance(values, dict) else values if isinstance(values, tuple) else (values,)
    return [each.flatten(2) if each.dim() > 2 else each for each in tensors]


def both(entry, dtype):
    """A cell's layer and what its ONNX model is loaded as, with their inputs and first states."""
    torch.manual_seed(0)
    if hasattr(entry, "inputs"):
        cell, x = entry.make(8, 16), entry.inputs(5, 3, 8)
    else:
        cell, x = entry.make(5, 7), torch.randn(5, 3, 5)
    cell = cell.to(dtype).eval()
    inputs = tuple(each.to(dtype) for each in (x if isinstance(x, tuple) else (x,)))
    shapes = [tuple(each.shape[2:]) for each in inputs]
    layer = fc.Recurrent(cell)
    model = fc.onnx.export(layer, input_shapes=shapes if len(shapes) > 1 else None)
    (loaded,) = fc.onnx.load(model).values()
    state = tuple(torch.rand_like(each) for each in cell.initial_state(3, dtype=dtype))
    torch.manual_seed(1)
    drawn = cell.draw(5, 3, dtype=dtype) if len(cell.inputs) > len(inputs) else ()  # inputs of the model
    rows = tuple(each.flatten(2) for each in (*inputs, *drawn)), tuple(each.flatten(1) for each in state)
    torch.manual_seed(1)
    return layer, loaded, (inputs, state), rows


def call(layer, inputs, state):
    return layer(inputs if len(inputs) > 1 else inputs[0], state if len(state) > 1 else state[0])


CELLS = [each for each in (*fc.CELLS, *fc.cells.STRUCTURED_CELLS) if each.name not in NODES]


@pytest.mark.parametrize("entry", CELLS, ids=lambda each: each.name)
def test_a_cell_that_was_exported_comes_back_and_learns(entry):
    layer, loaded, (inputs, state), rows = both(entry, torch.float64)
    assert isinstance(loaded, fc.Recurrent)
    leaves = [each.detach().requires_grad_() for each in (*inputs, *state)]
    others = [each.detach().requires_grad_() for each in (*rows[0], *rows[1])]
    y, after = call(layer, tuple(leaves[: len(inputs)]), tuple(leaves[len(inputs) :]))
    y2, after2 = call(loaded, tuple(others[: len(rows[0])]), tuple(others[len(rows[0]) :]))
    assert loaded.cell.states
    y, y2 = (torch.cat(flat(each), 2) for each in (y, y2))  # several outputs are one of the model
    for one, other in zip((y, *flat(after)), (y2, *flat(after2)), strict=True):
        torch.testing.assert_close(other.reshape(one.shape), one, atol=1e-10, rtol=0)
    if entry.name in ("lif", "alif"):  # the gradient of their steps stands for one: a model has no word for that
        return
    sum(each.square().sum() for each in flat(y)).backward()
    sum(each.square().sum() for each in flat(y2)).backward()
    of_both = (*zip(leaves[: len(inputs)], others, strict=False), *zip(leaves[::-1], others[::-1], strict=False))
    for one, other in of_both[: len(inputs) + len(state)]:
        if one.grad is not None or other.grad is not None:
            torch.testing.assert_close(other.grad.reshape(one.shape), one.grad, atol=1e-9, rtol=0)
    used = sum(each.grad is not None and bool(each.grad.any()) for each in loaded.parameters())
    assert used > 0


def test_it_is_compiled():
    _, loaded, *_ = both(CELLS[0], torch.float32)
    assert fc.explain(loaded).training_runner == "compiled"


def value(name, *shape):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def stored(name, array):
    return numpy_helper.from_array(np.asarray(array, np.float32), name)


def by_hand(*, direction=0, axis=0, opset=18, body_nodes=None, state=("N", 4), extra=()):
    """A model with a Scan of two states, two inputs and two outputs, and weights inside and outside of its body."""
    rng = np.random.default_rng(0)
    nodes = body_nodes or [
        helper.make_node("MatMul", ["x_t", "W"], ["of_x"]),
        helper.make_node("Gemm", ["h_t", "U", "b"], ["of_h"], transB=1, alpha=0.5),
        helper.make_node("Add", ["of_x", "of_h"], ["both"]),
        helper.make_node("Split", ["both"], ["left", "right"], axis=1, num_outputs=2),
        helper.make_node("Sigmoid", ["left"], ["gate"]),
        helper.make_node("Concat", ["gate", "gate"], ["gates"], axis=-1),
        helper.make_node("Sub", ["h_t", "both"], ["apart"]),
        helper.make_node("Mul", ["gates", "apart"], ["kept"]),
        helper.make_node("LeakyRelu", ["kept"], ["h_next"], alpha=0.2),
        helper.make_node("Mul", ["c_t", "decay"], ["old"]),
        helper.make_node("Add", ["old", "z_t"], ["c_next"]),
        helper.make_node("ReduceMean", ["h_next", "one"], ["mean"], keepdims=1),
        helper.make_node("Softmax", ["h_next"], ["y_t"], axis=-1),
    ]
    body = helper.make_graph(
        nodes,
        "body",
        [value("h_t", *state), value("c_t", "N", 3), value("x_t", "N", 5), value("z_t", "N", 3)],
        [value("h_next", *state), value("c_next", "N", 3), value("y_t", "N", 4), value("mean", "N", 1)],
        [
            stored("W", rng.standard_normal((5, 4))),
            stored("decay", [[0.9]]),
            numpy_helper.from_array(np.array([1]), "one"),
        ],
    )
    scan = helper.make_node(
        "Scan",
        ["h", "c", "x", "z"],
        ["h_last", "c_last", "y", "means"],
        name="loop",
        body=body,
        num_scan_inputs=2,
        scan_input_directions=[direction] * 2,
        scan_output_directions=[direction] * 2,
        scan_input_axes=[axis] * 2,
        scan_output_axes=[axis] * 2,
    )
    order = ("T", "N") if axis == 0 else ("N", "T")
    graph = helper.make_graph(
        [scan, *extra],
        "model",
        [value("h", *state), value("c", "N", 3), value("x", *order, 5), value("z", *order, 3)],
        [value("h_last", *state), value("c_last", "N", 3), value("y", *order, 4), value("means", *order, 1)],
        [stored("U", rng.standard_normal((4, 4))), stored("b", rng.standard_normal(4))],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def in_reference(feeds, direction, axis):
    """What the model computes, by turning round and transposing for a reference that only goes forward along axis 0."""

    def turned(each):
        each = each.swapaxes(0, 1) if axis else each
        return each[::-1] if direction else each

    feeds = {name: turned(each) if each.ndim == 3 else each for name, each in feeds.items()}
    h, c, y, means = ReferenceEvaluator(by_hand()).run(None, feeds)
    back = [each[::-1] if direction else each for each in (y, means)]
    return h, c, *(each.swapaxes(0, 1) if axis else each for each in back)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("direction", [0, 1])
def test_one_written_by_hand(direction, axis):
    model = by_hand(direction=direction, axis=axis)
    (layer,) = fc.onnx.load(model).values()
    assert fc.onnx.load(model).keys() == {"loop"}
    assert {name for name, _ in layer.cell.named_parameters()} == {"W", "U", "b"}
    rng = np.random.default_rng(1)
    shape = (6, 2) if axis == 0 else (2, 6)
    feeds = {
        "h": rng.standard_normal((2, 4)),
        "c": rng.standard_normal((2, 3)),
        "x": rng.standard_normal((*shape, 5)),
        "z": rng.standard_normal((*shape, 3)),
    }
    feeds = {name: each.astype(np.float32) for name, each in feeds.items()}
    h, c, y, means = in_reference(feeds, direction, axis)
    h_in, c_in, x, z = (torch.from_numpy(feeds[name]) for name in ("h", "c", "x", "z"))
    outputs, (h_out, c_out) = layer((x, z), (h_in, c_in))
    for actual, expected in zip((h_out, c_out, outputs["y_t"], outputs["mean"]), (h, c, y, means), strict=True):
        np.testing.assert_allclose(actual.detach().numpy(), expected, atol=1e-5)


def changed(change):
    model = by_hand()
    change(model.graph)
    return model


def set_attribute(name, values):
    def change(graph):
        (node,) = graph.node
        (attribute,) = [each for each in node.attribute if each.name == name]
        del attribute.ints[:]
        attribute.ints.extend(values)

    return change


def of_body(change):
    def apply(graph):
        (node,) = graph.node
        (attribute,) = [each for each in node.attribute if each.name == "body"]
        change(attribute.g)

    return apply


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: changed(set_attribute("scan_input_axes", [0, 1])), r"scan_input_axes \[0, 1\]"),
        (lambda: changed(set_attribute("scan_output_directions", [1, 1])), "they are all the same"),
        (lambda: changed(lambda graph: graph.node[0].input.pop()), "its body 4 inputs"),
        (lambda: by_hand(state=(4,)), r"without a dimension for rows|can't compute"),
        (lambda: by_hand(state=("N", "H")), r"of shape \(N, H\)"),
        (
            lambda: by_hand(body_nodes=[helper.make_node("NonZero", ["h_t"], ["h_next"])]),
            r"the operator NonZero \(h_next\)",
        ),
        (
            lambda: changed(of_body(lambda body: body.node[0].input.__setitem__(1, "x"))),
            "reads x, which is computed of the model's inputs",
        ),
        (lambda: changed(of_body(lambda body: body.input[0].type.tensor_type.ClearField("shape"))), "infer_shapes"),
        (
            lambda: changed(of_body(lambda body: body.node[11].input.__setitem__(1, "h_t"))),
            "can't compute|can't be run by ONNX's reference",
        ),
        (
            lambda: changed(of_body(lambda body: body.input[2].type.tensor_type.__setattr__("elem_type", 7))),
            "as INT64; layers take float32 and float64",
        ),
    ],
)
def test_what_no_layer_computes_is_refused(model, message):
    with pytest.raises(ExportError, match=message):
        fc.onnx.load(model())


def test_beside_other_nodes_one_that_is_refused_is_left_out_with_a_word():
    model = by_hand(body_nodes=[helper.make_node("NonZero", ["h_t"], ["h_next"])])
    gru = fc.onnx.export(fc.GRU(3, 4))
    (node,) = [each for each in gru.graph.node if each.op_type == "GRU"]
    model.graph.node.append(node)
    model.graph.initializer.extend(gru.graph.initializer)
    with pytest.warns(UserWarning, match="NonZero.*left out"):
        layers = fc.onnx.load(model)
    assert [type(each) for each in layers.values()] == [fc.GRU]


def test_inputs_of_another_shape_are_refused():
    (layer,) = fc.onnx.load(by_hand()).values()
    with fc.runner("eager"), pytest.raises(ValueError, match=r"z_t of shape \(N, 3\), got \(2, 7\)"):
        layer((torch.randn(6, 2, 5), torch.randn(6, 2, 7)), (torch.zeros(2, 4), torch.zeros(2, 3)))


UNARY = [
    *("Abs", "Atan", "Ceil", "Cos", "Cosh", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish"),
    *("Identity", "LeakyRelu", "LogSoftmax", "Mish", "Neg", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign"),
    *("Sin", "Sinh", "Softmax", "Softplus", "Softsign", "Tan", "Tanh", "ThresholdedRelu"),
]


@pytest.mark.parametrize("kind", UNARY)
def test_operators_are_the_reference_s(kind):
    x = np.random.default_rng(2).standard_normal((3, 5)).astype(np.float32)
    graph = helper.make_graph([helper.make_node(kind, ["x"], ["y"])], "one", [value("x", 3, 5)], [value("y", 3, 5)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    (expected,) = ReferenceEvaluator(model).run(None, {"x": x})
    np.testing.assert_allclose(OPERATORS[kind]({}, torch.from_numpy(x)).numpy(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", [0, 1])
def test_damaged_models_are_refused_or_read(seed):
    content, rng, read = by_hand().SerializeToString(), random.Random(seed), 0
    for _ in range(120):
        changed = bytearray(content)
        for _ in range(rng.randrange(1, 5)):
            changed[rng.randrange(len(changed))] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
        model = onnx.ModelProto()
        try:
            model.ParseFromString(bytes(changed))
        except DecodeError:
            continue
        try:
            fc.onnx.load(model)
            read += 1
        except ExportError:
            continue
    assert read


def test_a_model_that_onnx_itself_accepts():
    onnx.checker.check_model(by_hand())
