"""torch.nn's errors, kind and text; and sentences where torch.nn's own errors are raw."""

import re

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fusecell as fc
from fusecell.torch_internals import TAKES_MODULES_AS_CONSTANTS

pytestmark = pytest.mark.skipif(not TAKES_MODULES_AS_CONSTANTS, reason="torch 2.10 says less of wrong arguments")

CELLS = ("RNNCell", "GRUCell", "LSTMCell")
LAYERS = ("RNN", "GRU", "LSTM")


@pytest.fixture(autouse=True)
def _eager():
    with fc.runner("eager"):
        yield


def hx_for(name, *shape, dtype=torch.float32, **other):
    h = torch.zeros(*shape, dtype=dtype, **other)
    return (h, h) if name.startswith("LSTM") else h


def caught(call):
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    raise AssertionError("nothing was raised")


def assert_torchs_error(name, call, text):
    """Check that both libraries raise the same error, with this text."""
    expected = caught(lambda: call(getattr(nn, name)))
    assert caught(lambda: call(getattr(fc, name))) == expected
    assert text in expected[1]


CELL_CASES = {
    "input rank": (lambda n, m: m(torch.zeros(1, 2, 3)), "Expected input to be 1D or 2D, got 3D instead"),
    "input width": (lambda n, m: m(torch.zeros(2, 5)), "input has inconsistent input_size: got 5 expected 3"),
    "hidden rank": (lambda n, m: m(torch.zeros(2, 3), hx_for(n, 1, 2, 4)), "to be 1D or 2D, got 3D instead"),
    "hidden width": (
        lambda n, m: m(torch.zeros(2, 3), hx_for(n, 2, 5)),
        "hidden0 has inconsistent hidden_size: got 5, expected 4",
    ),
    "hidden rows": (
        lambda n, m: m(torch.zeros(2, 3), hx_for(n, 3, 4)),
        "Input batch size 2 doesn't match hidden0 batch size 3",
    ),
    "hidden row broadcast": (
        lambda n, m: m(torch.zeros(2, 3), hx_for(n, 1, 4)),
        "Input batch size 2 doesn't match hidden0 batch size 1",
    ),
    "unbatched hidden width": (
        lambda n, m: m(torch.zeros(3), hx_for(n, 5)),
        "hidden0 has inconsistent hidden_size: got 5, expected 4",
    ),
    "input dtype": (
        lambda n, m: m(torch.zeros(2, 3).double()),
        "mat1 and mat2 must have the same dtype, but got Double and Float",
    ),
    "whole numbers": (
        lambda n, m: m(torch.zeros(2, 3).long()),
        "mat1 and mat2 must have the same dtype, but got Long and Float",
    ),
    "hidden dtype": (
        lambda n, m: m(torch.zeros(2, 3), hx_for(n, 2, 4, dtype=torch.float64)),
        "mat1 and mat2 must have the same dtype, but got Double and Float",
    ),
}


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("case", CELL_CASES)
def test_a_cell_raises_what_torchs_raises(name, case):
    call, text = CELL_CASES[case]
    assert_torchs_error(name, lambda cls: call(name, cls(3, 4)), text)


def test_the_second_state_is_named():
    x, h = torch.zeros(2, 3), torch.zeros(2, 4)
    assert_torchs_error(
        "LSTMCell",
        lambda cls: cls(3, 4)(x, (h, torch.zeros(2, 5))),
        "hidden1 has inconsistent hidden_size: got 5, expected 4",
    )
    assert_torchs_error("LSTMCell", lambda cls: cls(3, 4)(x, (h, h[None])), "Expected hx[1] to be 1D or 2D")
    assert_torchs_error(
        "LSTM",
        lambda cls: cls(3, 4)(x[None], (h[None], torch.zeros(1, 2, 5))),
        "Expected hidden[1] size (1, 2, 4), got [1, 2, 5]",
    )


LAYER_CASES = {
    "input rank": (lambda n, m: m(torch.zeros(1, 2, 2, 3)), "Expected input to be 2D or 3D, got 4D"),
    "input width": (
        lambda n, m: m(torch.zeros(5, 2, 7)),
        "input.size(-1) must be equal to input_size. Expected 3, got 7",
    ),
    "unbatched width": (
        lambda n, m: m(torch.zeros(5, 7)),
        "input.size(-1) must be equal to input_size. Expected 3, got 7",
    ),
    "hidden width": (lambda n, m: m(torch.zeros(5, 2, 3), hx_for(n, 1, 2, 5)), "size (1, 2, 4), got [1, 2, 5]"),
    "hidden rows": (lambda n, m: m(torch.zeros(5, 2, 3), hx_for(n, 1, 1, 4)), "size (1, 2, 4), got [1, 1, 4]"),
    "hidden layers": (lambda n, m: m(torch.zeros(5, 2, 3), hx_for(n, 2, 2, 4)), "size (1, 2, 4), got [2, 2, 4]"),
    "unbatched hidden": (lambda n, m: m(torch.zeros(5, 3), hx_for(n, 1, 5)), "size (1, 1, 4), got [1, 1, 5]"),
    "rank of hx, batched": (lambda n, m: m(torch.zeros(5, 2, 3), hx_for(n, 2, 4)), "also be 3-D but got"),
    "rank of hx, unbatched": (lambda n, m: m(torch.zeros(5, 3), hx_for(n, 1, 2, 4)), "also be 2-D but got"),
    "dtype": (
        lambda n, m: m(torch.zeros(5, 2, 3).double()),
        "RNN input dtype (torch.float64) does not match weight dtype (torch.float32). Convert input: "
        "input.to(torch.float32), or convert model: model.to(torch.float64)",
    ),
    "input device": (
        lambda n, m: m(torch.zeros(5, 2, 3, device="meta")),
        "Input and parameter tensors are not at the same device, found input tensor at meta and parameter",
    ),
    "hidden device": (
        lambda n, m: m(torch.zeros(5, 2, 3), hx_for(n, 1, 2, 4, device="meta")),
        "Input and hidden tensors are not at the same device, found input tensor at cpu and hidden tensor at meta",
    ),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("case", LAYER_CASES)
def test_a_layer_raises_what_torchs_raises(name, case):
    call, text = LAYER_CASES[case]
    assert_torchs_error(name, lambda cls: call(name, cls(3, 4)), text)


@pytest.mark.parametrize("name", LAYERS)
def test_packed_arguments_are_checked(name):
    packed = pack_padded_sequence(torch.zeros(5, 2, 3), [5, 4])
    wide = pack_padded_sequence(torch.zeros(5, 2, 7), [5, 4])
    layer = getattr(fc, name)(3, 4)
    with pytest.raises(RuntimeError, match=re.escape("input.size(-1) must be equal to input_size. Expected 3, got 7")):
        layer(wide)
    for shape in ((1, 3, 4), (1, 2, 5), (2, 4)):
        with pytest.raises(RuntimeError, match=re.escape(f"size (1, 2, 4), got {list(shape)}")):
            layer(packed, hx_for(name, *shape))
    deep = pack_padded_sequence(torch.zeros(5, 2, 3, 3), [5, 4])
    with pytest.raises(RuntimeError, match="input must have 2 dimensions, got 3"):
        layer(deep)
    for data in ({"lengths": [5, 4]}, {"resets": torch.zeros(5, 2, dtype=torch.bool)}):
        with pytest.raises(ValueError, match="carries its own lengths"):
            layer(packed, **data)


def construct(**options):
    options = {"input_size": 3, "hidden_size": 4, **options}
    return lambda cls: cls(**options)


CONSTRUCTIONS = {
    "dropout": (construct(dropout=1.5), "dropout should be a number in range [0, 1]"),
    "dropout bool": (construct(dropout=True), "representing the probability of an element being zeroed"),
    "hidden_size 0": (construct(hidden_size=0), "hidden_size must be greater than zero"),
    "input_size 0": (construct(input_size=0), "input_size must be greater than zero"),
    "num_layers 0": (construct(num_layers=0), "num_layers must be greater than zero"),
    "bias int": (construct(bias=1), "bias should be of type bool, got: int"),
    "batch_first int": (construct(batch_first=1), "batch_first should be of type bool, got: int"),
    "hidden_size float": (construct(hidden_size=4.0), "hidden_size should be of type int, got: float"),
    "input_size float": (construct(input_size=3.0), "input_size should be of type int, got: float"),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("case", CONSTRUCTIONS)
def test_a_layers_constructor_raises_what_torchs_raises(name, case):
    make, text = CONSTRUCTIONS[case]
    assert_torchs_error(name, make, text)


@pytest.mark.parametrize(
    ("name", "make", "text"),
    [
        ("LSTM", construct(proj_size=4), "proj_size has to be smaller than hidden_size"),
        ("LSTM", construct(proj_size=-1), "proj_size should be a positive integer or zero to disable projections"),
        ("RNN", construct(proj_size=2), "proj_size argument is only supported for LSTM, not RNN or GRU"),
        ("GRU", construct(proj_size=2), "proj_size argument is only supported for LSTM, not RNN or GRU"),
        ("RNN", construct(nonlinearity="gelu"), "Unknown nonlinearity 'gelu'. Select from 'tanh' or 'relu'."),
        ("GRU", lambda cls: cls(3, 4, 1, "tanh"), "bias should be of type bool, got: str"),
    ],
)
def test_constructors_differ_as_torchs_do(name, make, text):
    assert_torchs_error(name, make, text)


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_on_one_layer_warns(name):
    text = "non-zero dropout expects num_layers greater than 1, but got dropout=0.5 and num_layers=1"
    with pytest.warns(UserWarning, match=text):
        getattr(fc, name)(3, 4, dropout=0.5)


# From here on torch.nn's own errors are raw: what it raises is left aside.


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize(
    ("sizes", "kind", "text"),
    [
        ((3, -1), ValueError, "hidden_size must not be negative, got -1"),
        ((-3, 4), ValueError, "input_size must not be negative, got -3"),
        ((3, 4.0), TypeError, "hidden_size should be of type int, got: float"),
        (("3", 4), TypeError, "input_size should be of type int, got: str"),
    ],
)
def test_a_cells_sizes_are_checked_where_it_is_made(name, sizes, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        getattr(fc, name)(*sizes)


def test_an_unknown_nonlinearity_is_refused_where_the_cell_is_made():
    with pytest.raises(ValueError, match=re.escape("Unknown nonlinearity 'gelu'. Select from 'tanh' or 'relu'.")):
        fc.RNNCell(3, 4, nonlinearity="gelu")
    cell = fc.RNNCell(3, 4)
    cell.nonlinearity = "gelu"
    with pytest.raises(RuntimeError, match="Unknown nonlinearity: gelu"):
        cell(torch.zeros(2, 3))


def test_a_cells_projection_is_checked():
    with pytest.raises(ValueError, match="proj_size has to be smaller than hidden_size, got 4 and 4"):
        fc.LSTMCell(3, 4, proj_size=4)
    with pytest.raises(RuntimeError, match="hidden0 has inconsistent hidden_size: got 4, expected 2"):
        fc.LSTMCell(3, 4, proj_size=2)(torch.zeros(1, 3), (torch.zeros(1, 4), torch.zeros(1, 4)))


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "RNN", "GRU"])
def test_one_state_is_not_a_pair(name):
    h = torch.zeros(1, 2, 4) if name in LAYERS else torch.zeros(2, 4)
    x = torch.zeros(5, 2, 3) if name in LAYERS else torch.zeros(2, 3)
    with pytest.raises(TypeError, match=r"expected hx as one tensor.*, got tuple"):
        getattr(fc, name)(3, 4)(x, (h, h))


def test_an_lstm_takes_a_pair():
    h, x = torch.zeros(1, 2, 4), torch.zeros(5, 2, 3)
    layer, cell = fc.LSTM(3, 4), fc.LSTMCell(3, 4)
    with pytest.raises(TypeError, match=r"pair of tensors \(h_0, c_0\), got Tensor"):
        layer(x, h)
    with pytest.raises(TypeError, match=r"got tuple \(Tensor, NoneType\)"):
        layer(x, (h, None))
    with pytest.raises(ValueError, match="got 1 of them"):
        layer(x, (h,))
    with pytest.raises(ValueError, match="got 3 of them"):
        layer(x, (h, h, h))
    with pytest.raises(TypeError, match=r"a tuple of tensors \(h, c\), got Tensor"):
        cell(x[0], h[0])
    with pytest.raises(TypeError, match=r"expected hx\[1\] as a tensor, got NoneType"):
        cell(x[0], (h[0], None))
    with pytest.raises(RuntimeError, match="lstm_cell expects two hidden states"):
        cell(x[0], (h[0],))


@pytest.mark.parametrize("name", CELLS + LAYERS)
def test_input_must_be_a_tensor(name):
    x = torch.zeros(5, 2, 3) if name in LAYERS else torch.zeros(2, 3)
    with pytest.raises(TypeError, match=f"{name} expected input as a tensor.*, got ndarray"):
        getattr(fc, name)(3, 4)(x.numpy())


@pytest.mark.parametrize("name", CELLS)
def test_the_state_has_the_inputs_rank(name):
    cell = getattr(fc, name)(3, 4)
    with pytest.raises(RuntimeError, match="to be 2D as the input is, got 1D instead"):
        cell(torch.zeros(2, 3), hx_for(name, 4))
    with pytest.raises(RuntimeError, match="to be 1D as the input is, got 2D instead"):
        cell(torch.zeros(3), hx_for(name, 1, 4))


@pytest.mark.parametrize("name", LAYERS)
def test_the_state_has_the_inputs_dtype(name):
    with pytest.raises(RuntimeError, match=r"not the same dtype, .*torch.float32 and hidden.* torch.float64"):
        getattr(fc, name)(3, 4)(torch.zeros(5, 2, 3), hx_for(name, 1, 2, 4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("data", "kind", "text"),
    [
        ({"lengths": [5]}, ValueError, "one entry per row"),
        ({"lengths": [6, 1]}, ValueError, "between 0 and the 5 steps"),
        ({"lengths": [5.0, 1.0]}, TypeError, "integers"),
        ({"resets": torch.zeros(5, 2)}, TypeError, r"\.bool\(\)"),
        ({"resets": torch.zeros(2, 5, dtype=torch.bool)}, ValueError, r"shape \(5, 2\)"),
    ],
)
def test_lengths_and_resets_are_checked(data, kind, text):
    with pytest.raises(kind, match=text):
        fc.GRU(3, 4)(torch.zeros(5, 2, 3), **data)
