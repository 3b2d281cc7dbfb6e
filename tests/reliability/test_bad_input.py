"""Invalid arguments: each raises an error with a sentence, and later calls work."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import fusecell as fc
from tests.compiler.tuned import tuned

X = torch.randn(7, 3, 5)


def nested(_=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its nested tensors a prototype
        return torch.nested.nested_tensor([X[:, 0], X[:4, 1]])


def quantized(value=X):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch moves them to another package
        return torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)


INPUTS = {
    "meta": (lambda: X.to("meta"), "device|meta"),
    "complex": (lambda: X.to(torch.complex64), "complex64"),
    "half": (X.half, "float16"),
    "whole numbers": (X.long, "dtype"),
    "quantized": (quantized, "qint8"),
    "nested": (nested, r"takes no nested tensor. Pad it"),
    "nothing": (lambda: None, "tensor"),
    "a list": (lambda: [[1.0]], "tensor"),
    "a string": (lambda: "abc", "tensor"),
    "another width": (lambda: X[..., :4], "input_size|features"),
    "one axis": (lambda: X[0, 0], "2D or 3D|shape"),
    "four axes": (lambda: X[None], "2D or 3D|shape"),
}


@pytest.fixture(params=["GRU", "Recurrent"])
def layer(request):
    return fc.GRU(5, 9) if request.param == "GRU" else fc.Recurrent(fc.GRUCell(5, 9))


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.filterwarnings("ignore::fusecell.EagerWarning")
def test_inputs(layer, kind):
    make, text = INPUTS[kind]
    with pytest.raises((TypeError, ValueError, RuntimeError), match=text) as caught:
        layer(make())
    assert "Internal error" not in str(caught.value)
    assert layer(X)[0].isfinite().all()


DATA = {
    "lengths of fractions": ({"lengths": [1.5, 2, 3]}, TypeError, "integers, got torch.float32"),
    "lengths of booleans": ({"lengths": torch.ones(3, dtype=torch.bool)}, TypeError, "integers"),
    "lengths below 0": ({"lengths": [-1, 2, 3]}, ValueError, "got -1 to 3"),
    "lengths beyond T": ({"lengths": [8, 2, 3]}, ValueError, "between 0 and the 7 steps"),
    "lengths beyond 32 bits": ({"lengths": [2**40, 2, 3]}, ValueError, "to 1099511627776"),
    "lengths beyond 64 bits": ({"lengths": [2**65, 2, 3]}, TypeError, "integers"),
    "too few lengths": ({"lengths": [1, 2]}, ValueError, r"shape \(3,\), got \(2,\)"),
    "lengths in two axes": ({"lengths": [[1], [2], [3]]}, ValueError, r"got \(3, 1\)"),
    "lengths of a string": ({"lengths": "abc"}, TypeError, "integers, as a tensor, an array or a list, got 'abc'"),
    "lengths without values": (
        {"lengths": torch.ones(3, dtype=torch.long, device="meta")},
        ValueError,
        "no values",
    ),
    "resets of numbers": ({"resets": torch.ones(7, 3)}, TypeError, r"Pass resets.bool\(\)"),
    "resets the other way round": ({"resets": torch.ones(3, 7, dtype=torch.bool)}, ValueError, r"shape \(7, 3\)"),
    "resets of a string": ({"resets": "abc"}, TypeError, "booleans"),
    "resets without values": (
        {"resets": torch.ones(7, 3, dtype=torch.bool, device="meta")},
        ValueError,
        "no values",
    ),
    "sparse lengths": ({"lengths": torch.tensor([1, 2, 3]).to_sparse()}, TypeError, "plain tensor, got a sparse one"),
    "no number among lengths": ({"lengths": [1, None, 2]}, TypeError, "integers"),
    "lengths that are not a number": ({"lengths": [float("nan")] * 3}, TypeError, "integers, got torch.float32"),
    "unsigned lengths beyond 63 bits": ({"lengths": np.array([1, 2, 2**63], np.uint64)}, ValueError, "between 0 and"),
    "complex lengths": ({"lengths": torch.ones(3, dtype=torch.complex64)}, TypeError, "got torch.complex64"),
    "sparse resets": ({"resets": torch.ones(7, 3).bool().to_sparse()}, TypeError, "plain tensor, got a sparse one"),
    "a mask of another shape": ({"mask": torch.ones(7, 2).bool()}, ValueError, r"shape \(7, 3\)"),
    "a mask without values": ({"mask": torch.ones(7, 3).bool().to("meta")}, ValueError, "no values"),
    "a mask of numbers": ({"mask": torch.ones(7, 3)}, TypeError, "mask must be bool"),
}


@pytest.mark.parametrize("kind", DATA)
def test_data(layer, kind):
    data, error, text = DATA[kind]
    with pytest.raises(error, match=text):
        layer(X, **data)


STATES = {
    "meta": (lambda h: h.to("meta"), "device|meta"),
    "complex": (lambda h: h.to(torch.complex64), "complex64"),
    "half": (torch.Tensor.half, "float16"),
    "whole numbers": (torch.Tensor.long, "dtype"),
    "quantized": (quantized, "qint8"),
    "nested": (nested, "takes no nested tensor as"),
    "too few rows": (lambda h: h[..., :2, :], "2"),
    "another width": (lambda h: h[..., :8], "8"),
    "a number": (lambda h: 0.0, "tensor|iterable"),
}


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.filterwarnings("ignore::fusecell.EagerWarning")
def test_states(layer, kind):
    make, text = STATES[kind]
    h = torch.zeros((1, 3, 9) if isinstance(layer, fc.GRU) else (3, 9))
    with pytest.raises((TypeError, ValueError, RuntimeError), match=text) as caught:
        layer(X, make(h))
    assert "Internal error" not in str(caught.value)
    assert layer(X, h)[0].isfinite().all()


PACKED = {
    "rising": (5, [2, 3]),
    "less data than sizes": (5, [3, 3]),
    "more data than sizes": (9, [3, 3]),
    "negative": (2, [3, -1]),
    "no steps": (0, []),
    "beyond 32 bits": (5, [2**40, 2]),
}


@pytest.mark.parametrize("kind", PACKED)
def test_packed_sequences_that_contradict_themselves(layer, kind):
    """torch's constructor takes any."""
    rows, sizes = PACKED[kind]
    packed = nn.utils.rnn.PackedSequence(torch.randn(rows, 5), torch.tensor(sizes, dtype=torch.int64))
    with pytest.raises(ValueError, match=rf"add up to its {rows} rows of data, got \["):
        layer(packed)


@pytest.mark.parametrize("index", [[0, 1, 7], [0, 1, -7], [0, 0, 1], [0], []], ids=str)
def test_packed_sequences_with_invalid_indices(layer, index):
    """Regression: too few indices made a state of too few rows, and the kernel read beyond it."""
    order = torch.tensor(index, dtype=torch.int64)
    packed = nn.utils.rnn.PackedSequence(torch.randn(5, 5), torch.tensor([3, 2]), order, order)
    h = torch.zeros((1, 3, 9) if isinstance(layer, fc.GRU) else (3, 9))
    for state in (None, h):
        with pytest.raises(ValueError, match="must name each of its 3 rows once, got"):
            layer(packed, state)


GRADIENTS = {
    "another shape": (torch.zeros(7, 3, 8), "shape"),
    "complex": (torch.zeros(7, 3, 9, dtype=torch.complex64), "dtype"),
    "meta": (torch.zeros(7, 3, 9, device="meta"), "device"),
}


@pytest.mark.parametrize("kind", GRADIENTS)
def test_gradients_that_come_in(layer, kind):
    gradient, text = GRADIENTS[kind]
    y, _ = layer(X)
    with pytest.raises(RuntimeError, match=text):
        y.backward(gradient)


def test_integer_inputs_have_no_gradient():
    with pytest.raises(RuntimeError, match="floating point"):
        X.long().requires_grad_()


@pytest.mark.parametrize("sizes", [(5, 2**40), (2**31, 2**33), (2**63, 2), (5, 2**70)], ids=str)
@pytest.mark.parametrize("make", [fc.GRU, fc.GRUCell, fc.cells.MGUCell])
def test_weights_larger_than_memory(make, sizes):
    with pytest.raises((RuntimeError, MemoryError, TypeError), match=r"memory|allocat|overflow|Overflow"):
        make(*sizes)


@pytest.mark.parametrize("rows", [2**40, 2**62, 2**65])
def test_streams_beyond_memory(tmp_path, rows):
    layer = fc.GRU(5, 9)
    fc.Stream(layer).save(tmp_path / "it")
    for make in (lambda: fc.Stream(layer, rows), lambda: fc.load_stream(tmp_path / "it", rows)):
        with pytest.raises((MemoryError, RuntimeError, TypeError, ValueError, OverflowError), match=r"\w+ \w+ \w+"):
            make()


def test_tbptt_beyond_64_bits():
    for steps in (2**63, 2**70):
        with pytest.raises(ValueError, match=r"less than 2\*\*63"):
            fc.Recurrent(fc.GRUCell(5, 9), tbptt=steps)
    y, _ = fc.Recurrent(fc.GRUCell(5, 9), tbptt=2**63 - 1)(X)
    y.sum().backward()


ROW = np.zeros((3, 5), np.float32)
STREAMED = {
    "complex": (lambda s: s.step(ROW + 1j), TypeError, "real numbers for its input, got complex"),
    "objects": (lambda s: s.step(ROW.astype(object)), TypeError, "real numbers for its input, got object"),
    "words": (lambda s: s.step(ROW.astype(str)), TypeError, "real numbers"),
    "another shape": (lambda s: s.step(ROW[:2]), ValueError, r"shape \(3, 5\), got \(2, 5\)"),
    "meta": (lambda s: s.step(torch.zeros(3, 5, device="meta")), TypeError, "meta"),
    "sparse": (lambda s: s.step(torch.zeros(3, 5).to_sparse()), TypeError, "Sparse"),
    "a small out": (lambda s: s.step(ROW, out=np.zeros((2, 9), np.float32)), ValueError, "shape"),
    "an out of whole numbers": (lambda s: s.step(ROW, out=np.zeros((3, 9), np.int32)), TypeError, "cast"),
    "an out to read": (lambda s: s.step(ROW, out=np.broadcast_to(np.float32(0), (3, 9))), ValueError, "read-only"),
    "two flags": (lambda s: s.step(ROW, rows=np.ones(2, bool)), ValueError, "rows must be bool"),
    "flags of numbers": (lambda s: s.step(ROW, rows=np.ones(3)), ValueError, "rows must be bool"),
    "a complex chunk": (lambda s: s.push(ROW[None] + 1j), TypeError, "real numbers for its chunk"),
    "a chunk of another shape": (lambda s: s.push(ROW), ValueError, "shape"),
    "a row that there is not": (lambda s: s.reset([3]), IndexError, "out of bounds"),
    "an order that there is not": (lambda s: s.reorder([0, 1, -4]), IndexError, "out of bounds"),
    "an order of fractions": (lambda s: s.reorder([0.0, 1.0, 2.0]), IndexError, "integer"),
    "a complex state": (lambda s: setattr(s, "state", np.zeros((3, 9), complex)), TypeError, "real numbers"),
    "a state of another shape": (lambda s: setattr(s, "state", np.zeros((3, 8))), ValueError, "shapes"),
}


@pytest.mark.parametrize("kind", STREAMED)
def test_streams(kind):
    call, error, text = STREAMED[kind]
    stream = fc.Stream(fc.GRU(5, 9), 3)
    expected = stream.state
    with pytest.raises(error, match=text):
        call(stream)
    if not kind.startswith(("a small", "an out of", "an out to")):
        assert np.array_equal(stream.state, expected)


@pytest.mark.parametrize("shape", [(2**31 + 5, 1, 5), (1, 2**40, 5), (2**40, 2**22, 5)], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_sizes_beyond_memory(layer, shape, training):
    """The input is a small expanded tensor: allocating the results fails, and nothing has been written."""
    with torch.set_grad_enabled(training), pytest.raises((MemoryError, RuntimeError)) as caught:
        layer(torch.zeros(1, 1, 5).expand(shape))
    assert any(word in str(caught.value).lower() for word in ("memory", "allocate", "overflow"))
    assert layer(X)[0].isfinite().all()


def test_scratch_beyond_memory(monkeypatch):
    """Scratch memory that the system refuses inside a call: in a new thread, which has none from earlier calls."""
    layer = fc.GRU(5, 9)
    expected, _ = layer(X)

    def call():
        with torch.no_grad():
            return layer(X)[0]

    with ThreadPoolExecutor(1) as thread:
        with monkeypatch.context() as patch:
            tuned(patch, small_scratch_bytes=1 << 62, huge_scratch_bytes=1 << 63)
            with pytest.raises((MemoryError, RuntimeError), match="allocate"):
                thread.submit(call).result()
        assert torch.equal(thread.submit(call).result(), expected)


def test_parameters_that_are_not_numbers_go_through(layer):
    """As in torch: NaN in, NaN out, in the rows and units that it reaches."""
    weight = next(layer.parameters())
    with torch.no_grad():
        weight[4] = float("nan")  # of the reset gate of unit 4
    y, _ = layer(X)
    reached = y.isnan()
    assert reached[0, :, 4].all()
    assert not reached[0, :, :4].any()
    with fc.runner("eager"):
        assert torch.equal(layer(X)[0].isnan(), reached)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x[:1].expand(7, 3, 5),
        lambda x: torch.randn(40).as_strided((7, 3, 5), (2, 1, 3)),
        lambda x: x.flip(0)[::1].transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.to_sparse(),
    ],
    ids=["expanded", "overlapping", "transposed", "sparse"],
)
def test_unusual_layouts_are_as_their_copies(layer, make):
    x = make(X)
    dense = (x.to_dense() if x.is_sparse else x).clone(memory_format=torch.contiguous_format)
    torch.testing.assert_close(layer(x)[0], layer(dense)[0])


def test_moved_between_devices_and_dtypes_and_back(layer):
    expected, _ = layer(X)
    layer.double()
    torch.testing.assert_close(layer(X.double())[0].float(), expected, atol=1e-5, rtol=1e-5)
    layer.half().float()
    rounded, _ = layer(X)
    torch.testing.assert_close(rounded, expected, atol=1e-2, rtol=1e-2)
    assert layer.to("meta")(X.to("meta"))[0].shape == expected.shape
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(0.1)
    y, _ = layer(X)
    with fc.runner("eager"):
        torch.testing.assert_close(y, layer(X)[0])
