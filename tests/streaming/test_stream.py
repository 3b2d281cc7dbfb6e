"""A stream against the layer over the whole sequence: the same bits, whatever is done to the state in between."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn

import fusecell as fc


def whole(layer, x):
    with torch.no_grad(), fc.runner("compiled"):
        return layer(x)[0].numpy()


def streamed(stream, x):
    return np.stack([stream.step(step) for step in x.numpy()])


@pytest.mark.parametrize("rows", [1, 3])
def test_steps_and_chunks_have_the_layers_bits(zoo_cell, rows):
    torch.manual_seed(0)
    cell = zoo_cell.make(5, 9).eval()
    x = torch.randn(11, rows, 5)
    expected = whole(fc.Recurrent(cell), x)
    stream = fc.Stream(cell, rows)
    assert np.array_equal(streamed(stream, x), expected)
    stream.reset()
    pieces = [stream.push(part.numpy()) for part in x.split([1, 4, 0, 6])]
    assert np.array_equal(np.concatenate(pieces), expected)


LAYERS = {
    "deep GRU": lambda: fc.GRU(5, 9, num_layers=3),
    "LSTM with a projection": lambda: fc.LSTM(5, 9, proj_size=4),
    "without bias": lambda: fc.RNN(5, 9, bias=False),
    "mixed stack": lambda: fc.Recurrent(fc.Stack(fc.GRUCell(5, 8), fc.Stack(fc.LSTMCell(8, 7), fc.RNNCell(7, 3)))),
    "sequential": lambda: fc.Sequential(
        fc.Recurrent(fc.LSTMCell(5, 8)), nn.LayerNorm(8), fc.GRU(8, 6), nn.Linear(6, 2), nn.Tanh()
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers(kind, dtype):
    torch.manual_seed(1)
    layer = LAYERS[kind]().to(dtype).eval()
    x = torch.randn(80, 2, 5, dtype=dtype)  # more steps than one chunk has room for
    with torch.no_grad():
        expected = layer(x)
    expected = (expected[0] if isinstance(expected, tuple) else expected).numpy()
    stream = fc.Stream(layer, 2)
    assert stream.dtype == expected.dtype
    outputs = streamed(stream, x)
    stream.reset()
    assert np.array_equal(stream.push(x), outputs)
    if kind == "sequential":  # torch's own operators round in their own way
        np.testing.assert_allclose(outputs, expected, rtol=1e-5 if dtype is torch.float32 else 1e-12, atol=1e-6)
    else:
        assert np.array_equal(outputs, expected)


def test_rows_may_pause_and_resume():
    torch.manual_seed(2)
    cell, x = fc.LSTMCell(5, 9), torch.randn(12, 4, 5)
    stream = fc.Stream(cell, 4)
    active = torch.rand(12, 4, generator=torch.Generator().manual_seed(3)) < 0.6
    outputs = np.stack([stream.step(step, rows=flags) for step, flags in zip(x, active, strict=True)])
    assert np.abs(outputs[~active.numpy()]).max() == 0
    for row in range(4):
        sequence = x[active[:, row], row : row + 1]
        assert np.array_equal(outputs[active[:, row].numpy(), row], whole(fc.Recurrent(cell), sequence)[:, 0])
    before = stream.state
    stream.step(x[0], rows=np.zeros(4, bool))
    assert all(np.array_equal(one, other) for one, other in zip(stream.state, before, strict=True))


def test_reset_reorder_and_the_state():
    torch.manual_seed(4)
    cell, x = fc.LSTMCell(5, 9), torch.randn(9, 3, 5).numpy()
    stream = fc.Stream(cell, 3)
    for step in x[:4]:
        stream.step(step)
    snapshot = stream.snapshot()
    stream.reset([1])
    h, c = stream.state
    assert np.abs(h[1]).max() == np.abs(c[1]).max() == 0
    assert np.array_equal(h[[0, 2]], snapshot[0][[0, 2]])
    stream.restore(snapshot)
    stream.reorder([2, 0, 0])
    assert np.array_equal(stream.state[1], snapshot[1][[2, 0, 0]])
    state = (torch.from_numpy(snapshot[0]), torch.from_numpy(snapshot[1]))
    with torch.no_grad(), fc.runner("compiled"):
        expected = fc.scan(cell, torch.from_numpy(x[4:]), state)[0].numpy()
    stream.state = state
    assert np.array_equal(stream.push(x[4:]), expected)
    snapshot[0][...] = 7  # a copy
    assert np.abs(stream.state[0]).max() < 7


def test_weights_are_frozen_until_refresh():
    torch.manual_seed(5)
    layer, x = fc.GRU(5, 9), torch.randn(6, 5)
    stream = fc.Stream(layer)
    first = stream.push(x)
    with torch.no_grad():
        layer.weight_hh_l0.mul_(2)
    stream.reset()
    assert np.array_equal(stream.push(x), first)
    state = stream.state
    stream.refresh()
    assert np.array_equal(stream.state[0], state[0])
    stream.reset()
    assert np.array_equal(stream.push(x), whole(layer, x))


class Started(fc.GRUCell):
    def __init__(self):
        super().__init__(5, 9)
        self.start = nn.Parameter(torch.randn(9))

    def initial_state(self, batch_size, **options):
        return (self.start.expand(batch_size, -1),)


def test_a_stream_starts_at_the_initial_state():
    torch.manual_seed(6)
    cell, x = Started(), torch.randn(6, 2, 5)
    stream = fc.Stream(cell, 2)
    for _ in range(2):
        assert np.array_equal(streamed(stream, x), whole(fc.Recurrent(cell), x))
        stream.reset()


def test_forms_of_inputs_and_outputs():
    stream = fc.Stream(fc.GRUCell(5, 9))
    x = np.random.default_rng(0).standard_normal((3, 5))  # float64, brought to the stream's float32
    alone = stream.step(x[0])
    assert alone.shape == (9,)
    stream.reset()
    assert np.array_equal(stream.step(x[:1])[0], alone)
    stream.reset()
    out = np.empty(9, np.float32)
    assert stream.step(torch.from_numpy(x[0]), out=out) is out
    assert np.array_equal(out, alone)
    again = stream.step(x[1])
    assert not np.array_equal(alone, again)  # not the same memory
    assert stream.push(np.empty((0, 5))).shape == (0, 9)


def allocated_by(steps, call):
    """Return the growth in bytes of Python's and NumPy's memory over ``steps`` calls, after a warmup."""
    tracemalloc.start()
    try:
        for _ in range(steps):
            call()
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(steps):
            call()
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("loaded", [False, True], ids=["made", "loaded"])
def test_streaming_allocates_no_memory_per_step(loaded, tmp_path):
    """No memory grows per step, and the machine code calls no function that could allocate."""
    stream = fc.Stream(fc.Sequential(fc.GRU(1, 16), nn.Linear(16, 2)))
    if loaded:
        stream.save(tmp_path / "it")
        stream = fc.load_stream(tmp_path / "it")
    x, out = np.zeros(1, np.float32), np.empty(2, np.float32)
    for call in (lambda: stream.step(x), lambda: stream.step(x, out=out), lambda: stream.push(x[None])):
        # The smallest object has more than 8 bytes. What other threads allocate is counted too, but not each time.
        assert any(allocated_by(2000, call) < 2000 * 8 for _ in range(3))
    for part in stream.parts:
        declared = re.findall(r"^declare .*@([\w.]+)\(", part.kernel.loaded.llvm, re.MULTILINE)
        assert all(name.startswith("llvm.") for name in declared), declared


def test_errors():
    with pytest.raises(ValueError, match="two directions"):
        fc.Stream(fc.GRU(5, 9, bidirectional=True))
    with pytest.raises(ValueError, match="reversed"):
        fc.Stream(fc.Recurrent(fc.GRUCell(5, 9), reverse=True))
    with pytest.raises(TypeError, match="got Linear"):
        fc.Stream(nn.Linear(5, 9))
    with pytest.raises(TypeError, match="got GRU"):
        fc.Stream(nn.GRU(5, 9))
    with pytest.raises(ValueError, match="batch_size of 1 or more, got 0"):
        fc.Stream(fc.GRUCell(5, 9), 0)
    stream = fc.Stream(fc.GRUCell(5, 9), 2)
    with pytest.raises(ValueError, match=r"expected an array of shape \(2, 5\), got \(5,\)"):
        stream.step(np.zeros(5))
    with pytest.raises(ValueError, match=r"an array of shape \(T, 2, 5\)"):
        stream.push(np.zeros((3, 5)))
    with pytest.raises(ValueError, match="rows must be bool"):
        stream.step(np.zeros((2, 5)), rows=np.array([0, 1]))
    with pytest.raises(ValueError, match="arrays of shapes"):
        stream.state = np.zeros((2, 8))


class Tagger(fc.Cell):
    """A cell of ids: it looks them up in a table."""

    def __init__(self, input_size):
        super().__init__(input_size, 7)
        self.table, self.rec = nn.Embedding(9, 7), nn.Linear(7, 7)

    def step(self, x, state):
        ids = self.table(x)
        h = torch.tanh((ids if ids.dim() == 2 else ids.sum(1)) + self.rec(state[0]))
        return h, (h,)


@pytest.mark.parametrize("size", [(), 2])
def test_a_stream_takes_ids(size, tmp_path):
    layer = fc.Recurrent(Tagger(size))
    x = torch.randint(0, 9, (5, 3) if size == () else (5, 3, size))
    stream = fc.Stream(layer, 3)
    stream.save(tmp_path / "tagger.safetensors")
    loaded = fc.load_stream(tmp_path / "tagger.safetensors", batch_size=3)
    with torch.inference_mode():
        expected = layer(x)[0].numpy()
    for step, y in zip(x, expected, strict=True):
        assert np.array_equal(stream.step(step), y)
        assert np.array_equal(loaded.step(step.numpy()), y)


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_a_copy_goes_on_by_itself(weights):
    stream = fc.Stream(fc.LSTM(3, 7, num_layers=2), 2, weights=weights)
    stream.push(np.random.default_rng(0).normal(size=(5, 2, 3)).astype(np.float32))
    before, x = stream.snapshot(), np.ones((4, 2, 3), np.float32)
    model = {"stream": stream}
    twins = [copy.copy(stream), copy.deepcopy(model)["stream"], pickle.loads(pickle.dumps(stream))]  # our own
    expected = stream.push(x)
    for twin in twins:
        assert repr(twin) == repr(stream)
        assert all((a == b).all() for a, b in zip(twin.state, before, strict=True))
        assert (twin.push(x) == expected).all()
    assert all((a == b).all() for twin in twins for a, b in zip(twin.state, stream.state, strict=True))


def test_a_deep_copy_has_a_module_of_its_own():
    layer = fc.GRU(3, 5)
    stream = fc.Stream(layer)
    shallow, deep = copy.copy(stream), copy.deepcopy(stream)
    with torch.no_grad():
        layer.weight_hh_l0.add_(1.0)
    for each in (shallow, deep):
        each.refresh()
    x = np.ones((6, 3), np.float32)
    before = stream.push(x)
    assert (deep.push(x) == before).all()  # of the module as it was
    assert (shallow.push(x) != before).any()


def test_a_loaded_stream_is_copied_too(tmp_path):
    fc.Stream(fc.GRU(3, 5)).save(tmp_path / "gru")
    stream = fc.load_stream(tmp_path / "gru")
    stream.step(np.ones(3, np.float32))
    twin = copy.deepcopy(stream)
    assert (twin.step(np.ones(3, np.float32)) == stream.step(np.ones(3, np.float32))).all()
