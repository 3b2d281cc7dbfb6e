"""Numbers that Keras and ONNX publish for their GRU, LSTM and simple RNN, their weights converted here by hand."""

import importlib

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import fusecell as fc

# ONNX orders its gates z r h and i o f c; ours are r z n and i f g o.
ONNX_BLOCKS = {"GRU": (1, 0, 2), "LSTM": (0, 2, 3, 1), "RNN": (0,)}
NODE_TESTS = [
    *(f"test_gru_{case}" for case in ("defaults", "with_initial_bias", "seq_length", "batchwise", "reverse")),
    "test_gru_bidirectional",
    *(f"test_lstm_{case}" for case in ("defaults", "with_initial_bias", "batchwise", "reverse", "bidirectional")),
    "test_rnn_seq_length",
    *(f"test_simple_rnn_{case}" for case in ("defaults", "with_initial_bias", "batchwise", "reverse", "bidirectional")),
]


@pytest.fixture(autouse=True)
def _eager():
    with fc.runner("eager"):
        yield


# Keras: keras/src/layers/rnn/{gru,lstm,simple_rnn}_test.py, test_correctness, test_statefulness,
# test_pass_initial_state and test_masking. Every entry of its kernel is 0.01, of the recurrent kernel 0.02, of the bias
# 0.03; a Keras GRU that resets after the product has that bias twice, and an LSTM adds 1 to the forget gate's.


def keras(name, input_size, units, *, use_bias=True, unit_forget_bias=True, **options):
    layer = getattr(fc, name)(input_size, units, batch_first=True, bias=use_bias, **options)
    with torch.no_grad():
        layer.weight_ih_l0.fill_(0.01)
        layer.weight_hh_l0.fill_(0.02)
        if use_bias:
            layer.bias_ih_l0.fill_(0.03)
            layer.bias_hh_l0.fill_(0.03 if name == "GRU" and options.get("reset_after", True) else 0.0)
            if name == "LSTM" and unit_forget_bias:
                layer.bias_ih_l0[units : 2 * units] = 1.0
    return layer


def counting(*shape):
    return torch.arange(float(np.prod(shape))).reshape(shape)


def last_state(result):
    after = result[1]
    return (after if isinstance(after, torch.Tensor) else after[0])[0].detach().numpy()


KERAS_CORRECTNESS = [
    ("GRU", {}, False, (0.5217289, 0.6371659, 0.3938496)),
    ("GRU", {}, True, (0.24406259, 0.611516, 0.3928808)),
    ("GRU", {"reset_after": False}, False, (0.51447755, 0.6426879, 0.40208298)),
    ("GRU", {"use_bias": False}, False, (0.49988455, 0.64701194, 0.4103359)),
    ("LSTM", {}, False, (0.6288687, 0.86899155, 0.9460773)),
    ("LSTM", {}, True, (0.35622165, 0.74789524, 0.8872726)),
    ("LSTM", {"unit_forget_bias": False}, False, (0.57019705, 0.8661914, 0.9459622)),
    ("LSTM", {"use_bias": False}, False, (0.54986924, 0.86226785, 0.9443936)),
    ("RNN", {}, False, (0.405432, 0.73605347)),
    ("RNN", {}, True, (0.11144729, 0.5528889)),
]


@pytest.mark.parametrize(("name", "options", "go_backwards", "expected"), KERAS_CORRECTNESS)
def test_kerass_last_outputs(name, options, go_backwards, expected):
    x, units = (counting(2, 3, 4), 4) if name == "RNN" else (counting(3, 6, 4), 3)
    actual = last_state(keras(name, 4, units, **options)(x.flip(1) if go_backwards else x))
    np.testing.assert_allclose(actual, np.repeat(np.array(expected)[:, None], units, 1), rtol=1e-5, atol=1e-5)


KERAS_CARRIED = [
    ("GRU", (0.29542392, 0.5885018)),
    ("LSTM", (0.3124785, 0.6863672)),
    ("RNN", (0.40559256, 0.7361247)),
]


@pytest.mark.parametrize(("name", "expected"), KERAS_CARRIED)
def test_kerass_state_carried_over(name, expected):
    x, layer = counting(2, 3, 4), keras(name, 4, 4)
    actual = last_state(layer(x, layer(x)[1]))
    np.testing.assert_allclose(actual, np.repeat(np.array(expected)[:, None], 4, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "go_backwards", "expected"),
    [
        ("GRU", False, [[0.23774096, 0.33508456], [0.83659905, 1.0227708]]),
        ("GRU", True, [[0.13486053, 0.23261218], [0.78257304, 0.9691353]]),
        ("LSTM", False, [[0.20574439, 0.3558822], [0.64930826, 0.66276]]),
        ("LSTM", True, [[0.13281618, 0.2790356], [0.5839337, 0.5992567]]),
    ],
)
def test_kerass_initial_state(name, go_backwards, expected):
    x, h = counting(2, 4, 3), counting(1, 2, 2)
    actual = last_state(keras(name, 3, 2)(x.flip(1) if go_backwards else x, h if name == "GRU" else (h, h)))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_kerass_mask_of_padding():
    outputs, (h, _) = keras("LSTM", 3, 2)(counting(2, 4, 3), lengths=[3, 2])
    columns = [[0.01588910, 0.05552048, 0.11755939, 0.0], [0.14185596, 0.28556206, 0.0, 0.0]]
    expected = np.repeat(np.array(columns)[..., None], 2, 2)
    np.testing.assert_allclose(outputs.detach(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(h[0].detach(), expected[[0, 1], [2, 1]], rtol=1e-5, atol=1e-5)


# ONNX: the vectors of its backend test suite, onnx/backend/test/case/node/{gru,lstm,rnn}.py, and its reference
# evaluator for what the suite leaves out.


def onnx_layer(op, w, r, b, **options):
    """Build a layer with ONNX's weights: W (D, GH, I), R (D, GH, H), B (D, 2GH) or None."""
    order = ONNX_BLOCKS[op]
    layer = getattr(fc, op)(w.shape[2], r.shape[2], bias=b is not None, bidirectional=len(w) == 2, **options)
    layer.to(torch.from_numpy(w).dtype)

    def blocks(value):
        return np.concatenate([np.split(value, len(order))[index] for index in order])

    state = {}
    for direction, suffix in zip(range(len(w)), ("_l0", "_l0_reverse"), strict=False):
        state[f"weight_ih{suffix}"] = blocks(w[direction])
        state[f"weight_hh{suffix}"] = blocks(r[direction])
        if b is not None:
            ih, hh = np.split(b[direction], 2)
            state[f"bias_ih{suffix}"], state[f"bias_hh{suffix}"] = blocks(ih), blocks(hh)
    layer.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    return layer


def run_like_onnx(layer, x, hx=None, *, layout=0, direction="forward"):
    """Return Y and the last states in ONNX's layout, (T, D, N, H) and (D, N, H); batch first with layout 1."""
    x = torch.from_numpy(x.copy())
    x = x.transpose(0, 1) if layout else x
    with torch.no_grad():
        outputs, after = layer(x.flip(0) if direction == "reverse" else x, hx)
    outputs = outputs.flip(0) if direction == "reverse" else outputs
    y = outputs.unflatten(-1, (2 if layer.bidirectional else 1, layer.hidden_size)).transpose(1, 2)
    states = [after] if isinstance(after, torch.Tensor) else list(after)
    if layout:
        return [y.permute(2, 0, 1, 3), *(value.transpose(0, 1) for value in states)]
    return [y, *states]


@pytest.fixture(scope="module")
def node_tests():
    """ONNX's vectors, which it computes when the module of an operator is imported; all operators' take a minute."""
    from onnx.backend.test.case import node

    for operator in ("gru", "lstm", "rnn"):
        importlib.import_module(f"{node.__name__}.{operator}")
    return {case.name: case for case in node._NodeTestCases}


@pytest.mark.parametrize("name", NODE_TESTS)
def test_onnxs_published_vectors(node_tests, name):
    case = node_tests[name]
    (node,) = case.model.graph.node
    attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
    (inputs, expected), *_ = case.data_sets
    tensors = dict(zip(node.input, inputs, strict=True))
    # What the helper leaves out it computes as reset before the product: linear_before_reset is 0 by default.
    options = {"reset_after": False} if node.op_type == "GRU" else {}
    layer = onnx_layer(node.op_type, tensors["W"], tensors["R"], tensors.get("B"), **options)
    outputs = run_like_onnx(
        layer,
        tensors["X"],
        layout=attributes.get("layout", 0),
        direction=attributes.get("direction", b"forward").decode(),
    )
    returned = [value for value, label in zip(outputs, node.output, strict=False) if label]
    assert len(returned) == len(expected)
    for actual, expected_value in zip(returned, expected, strict=True):
        np.testing.assert_allclose(actual, expected_value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("op", "attributes", "options"),
    [
        ("GRU", {"linear_before_reset": 0}, {"reset_after": False}),
        ("GRU", {"linear_before_reset": 1}, {"reset_after": True}),
        ("LSTM", {}, {}),
    ],
)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_onnxs_reference_evaluator(op, attributes, options, directions, bias):
    steps, rows, width, hidden = 6, 3, 5, 7
    rng = np.random.default_rng(0)
    gates, states = len(ONNX_BLOCKS[op]) * hidden, 2 if op == "LSTM" else 1
    shapes = {
        "X": (steps, rows, width),
        "W": (directions, gates, width),
        "R": (directions, gates, hidden),
        "B": (directions, 2 * gates),
        "initial_h": (directions, rows, hidden),
        "initial_c": (directions, rows, hidden),
    }
    tensors = {name: rng.standard_normal(shape) * 0.5 for name, shape in shapes.items()}
    inputs = ["X", "W", "R", "B" if bias else "", "", "initial_h", "initial_c"][: 5 + states]
    outputs = ["Y", "Y_h", "Y_c"][: 1 + states]
    direction = ("forward", "bidirectional")[directions - 1]
    node = onnx.helper.make_node(op, inputs, outputs, hidden_size=hidden, direction=direction, **attributes)
    values = {name: tensors[name] for name in inputs if name}
    expected = reference(node, values, outputs)
    layer = onnx_layer(op, tensors["W"], tensors["R"], tensors["B"] if bias else None, **options)
    hx = [torch.from_numpy(tensors[name]) for name in ("initial_h", "initial_c")[:states]]
    results = run_like_onnx(layer, tensors["X"], hx if states > 1 else hx[0])
    for actual, expected_value in zip(results, expected, strict=True):
        np.testing.assert_allclose(actual, expected_value, rtol=1e-12, atol=1e-12)


def reference(node, values, outputs):
    double = onnx.TensorProto.DOUBLE
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [onnx.helper.make_tensor_value_info(name, double, value.shape) for name, value in values.items()],
        [onnx.helper.make_tensor_value_info(name, double, None) for name in outputs],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 22)])
    return ReferenceEvaluator(model).run(None, values)
