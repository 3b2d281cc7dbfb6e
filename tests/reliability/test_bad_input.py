"""What must not be computed on: each a sentence at the boundary, and the process goes on."""

from __future__ import annotations

import warnings

import pytest
import torch

import fusecell as fc

X = torch.randn(7, 3, 5)


def nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its nested tensors a prototype
        return torch.nested.nested_tensor([X[:, 0], X[:4, 1]])


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch moves them to another package
        return torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)


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
    "lengths of fractions": ({"lengths": [1.5, 2, 3]}, TypeError, "whole numbers, got torch.float32"),
    "lengths of booleans": ({"lengths": torch.ones(3, dtype=torch.bool)}, TypeError, "whole numbers"),
    "lengths below 0": ({"lengths": [-1, 2, 3]}, ValueError, "got -1 to 3"),
    "lengths beyond T": ({"lengths": [8, 2, 3]}, ValueError, "between 0 and the 7 steps"),
    "lengths beyond 32 bits": ({"lengths": [2**40, 2, 3]}, ValueError, "to 1099511627776"),
    "lengths beyond 64 bits": ({"lengths": [2**65, 2, 3]}, TypeError, "whole numbers"),
    "too few lengths": ({"lengths": [1, 2]}, ValueError, r"shape \(3,\), got \(2,\)"),
    "lengths in two axes": ({"lengths": [[1], [2], [3]]}, ValueError, r"got \(3, 1\)"),
    "lengths of a string": ({"lengths": "abc"}, TypeError, "whole numbers, as a tensor, an array or a list, got 'abc'"),
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
    "a mask of numbers": ({"mask": torch.ones(7, 3)}, TypeError, "mask must be bool"),
}


@pytest.mark.parametrize("kind", DATA)
def test_data(layer, kind):
    data, error, text = DATA[kind]
    with pytest.raises(error, match=text):
        layer(X, **data)


@pytest.mark.parametrize("shape", [(2**31 + 5, 1, 5), (1, 2**40, 5), (2**40, 2**22, 5)], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_sizes_beyond_memory(layer, shape, training):
    """Of an expanded tensor that itself is small: the results are refused, and nothing has been written."""
    with torch.set_grad_enabled(training), pytest.raises((MemoryError, RuntimeError)) as caught:
        layer(torch.zeros(1, 1, 5).expand(shape))
    assert any(word in str(caught.value).lower() for word in ("memory", "allocate", "overflow"))
    assert layer(X)[0].isfinite().all()


def test_scratch_beyond_memory(monkeypatch):
    """Memory that runs out inside a call."""
    from fusecell.compiler import call

    def none(size):
        raise RuntimeError(f"can't allocate memory: you tried to allocate {size} bytes")

    layer = fc.GRU(5, 9)
    expected, _ = layer(X)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(call, "_scratch", none)
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            layer(X)
    assert torch.equal(layer(X)[0], expected)


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
