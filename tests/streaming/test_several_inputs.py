"""Streams of cells with several inputs and outputs: the bits of the layer, in memory, from files and by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

import fusecell as fc
from fusecell.errors import StreamFileError
from fusecell.streaming.file import digest
from fusecell.streaming.row_layout import split_row
from tests.several_inputs import CELLS, NamedOutputs, by_name

STEPS, ROWS = 5, 3


def run(cell, inputs):
    """Run the step over a sequence, one call after the other; what a cell draws is among the inputs."""
    with torch.no_grad():
        state, steps = cell.initial_state(ROWS), []
        for t in range(STEPS):
            output, state = cell.step(tuple(value[t] for value in inputs), state)
            steps.append(by_name(output))
    return {name: torch.stack([step[name] for step in steps]).numpy() for name in steps[0]}, state


def assert_equal(actual, expected):
    actual = by_name(actual)
    assert list(actual) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, atol=2e-6, rtol=2e-5)


@pytest.fixture(params=CELLS)
def case(request):
    return CELLS[request.param]


def test_steps_and_chunks_are_those_of_the_cell(case):
    cell, inputs = case.cell(), case.inputs(STEPS, ROWS)
    expected, state = run(cell, inputs)
    stream = fc.Stream(cell, ROWS, input_sizes=case.sizes)
    chunk = stream.push(inputs)
    assert_equal(chunk, expected)
    for actual, value in zip(stream.state, state, strict=True):
        np.testing.assert_allclose(actual, value.numpy(), atol=2e-6, rtol=2e-5)
    stream.reset()
    for t in range(STEPS):
        one = by_name(stream.step(tuple(value[t] for value in inputs)))
        assert all(np.array_equal(one[name], value[t]) for name, value in by_name(chunk).items())


def test_bits_are_those_of_the_layer(case):
    cell, inputs = case.cell(), case.inputs(STEPS, ROWS)
    if cell.draw(1, 1):
        pytest.skip("A layer draws its own noise.")
    with torch.no_grad():
        expected, state = fc.scan(cell, inputs)
    stream = fc.Stream(fc.Recurrent(cell), ROWS, input_sizes=case.sizes)
    actual = by_name(stream.push(tuple(value.numpy() for value in inputs)))
    assert all(np.array_equal(actual[name], value.numpy()) for name, value in by_name(expected).items())
    state = state if isinstance(state, tuple) else (state,)
    assert all(np.array_equal(one, other.numpy()) for one, other in zip(stream.state, state, strict=True))


def test_one_row_goes_without_its_dimension(case):
    cell, inputs = case.cell(), case.inputs(STEPS, 1)
    both = [fc.Stream(cell, input_sizes=case.sizes) for _ in range(2)]
    expected, actual = by_name(both[0].push(inputs)), by_name(both[1].push(tuple(value[:, 0] for value in inputs)))
    assert all(np.array_equal(actual[name], value[:, 0]) for name, value in expected.items())
    both[1].reset()
    step = by_name(both[1].step(tuple(value[0, 0] for value in inputs)))
    both[1].step(tuple(value[1, 0] for value in inputs))  # which leaves the outputs of the step before alone
    assert all(np.array_equal(step[name], value[0, 0]) for name, value in expected.items())


@pytest.mark.parametrize("name", ["dict", "tuple", "attention"])
@pytest.mark.parametrize("trusted", [False, True])
def test_a_file_comes_back_with_bits_and_names(name, trusted, tmp_path):
    case = CELLS[name]
    stream, inputs = fc.Stream(case.cell(), ROWS, input_sizes=case.sizes), case.inputs(STEPS, ROWS)
    stream.save(tmp_path / "it", code_for=["x86-64-v3"] if trusted else ())
    loaded = fc.load_stream(tmp_path / "it", ROWS, trusted=trusted)
    actual, expected = by_name(loaded.push(inputs)), by_name(stream.push(inputs))
    assert list(actual) == list(expected)
    assert all(np.array_equal(actual[name], value) for name, value in expected.items())
    assert repr(loaded) == repr(stream)


def test_rows_that_take_no_part_keep_their_state_and_give_zeros():
    case = CELLS["dict"]
    stream, inputs = fc.Stream(case.cell(), ROWS, input_sizes=case.sizes), case.inputs(2, ROWS)
    everything = stream.step(tuple(value[0] for value in inputs))
    before = stream.state
    some = stream.step(tuple(value[1] for value in inputs), rows=np.array([True, False, True]))
    assert all(not value[1].any() for value in some.values())
    assert all(np.array_equal(old[1], new[1]) for old, new in zip(before, stream.state, strict=True))
    out = {name: np.full_like(value, np.nan) for name, value in everything.items()}
    stream.reset()
    assert stream.step(tuple(value[0] for value in inputs), out=out) is out
    assert all(np.array_equal(out[name], value) for name, value in everything.items())


def test_small_weights_and_refresh():
    case = CELLS["dict"]
    cell, inputs = case.cell(), case.inputs(STEPS, ROWS)
    report = fc.weight_error(cell, inputs, "int8", input_sizes=case.sizes)
    names = ["output['read']", "output['the state']", "output['memory']", "output['norm']", "0.h", "0.memory"]
    assert [value.name for value in report.values] == names
    assert 0 < report.values[1].rms < 0.01
    assert report.values[2].rms == 0  # no product is in it
    stream = fc.Stream(cell, ROWS, input_sizes=case.sizes)
    with torch.no_grad():
        cell.rec.weight.mul_(2)
    stream.refresh()
    assert np.array_equal(
        stream.push(inputs)["the state"], fc.Stream(cell, ROWS, input_sizes=case.sizes).push(inputs)["the state"]
    )


def test_side_by_side_is_another_form_of_several():
    case = CELLS["dict"]
    stream = fc.Stream(case.cell(), ROWS, input_sizes=case.sizes)
    row = np.random.default_rng(0).normal(size=(ROWS, 6)).astype(np.float32)
    one = stream.step(row)
    stream.reset()
    several = stream.step(split_row(row, ((3,), (2,), ())))
    assert all(np.array_equal(one[name], value) for name, value in several.items())


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda: fc.Stream(NamedOutputs()),
            TypeError,
            r"3 inputs \(key, value, strength\), whose sizes",
        ),
        (lambda: fc.Stream(NamedOutputs(), input_sizes=(3, 2)), ValueError, "got 2 input_sizes: pass one for each"),
        (lambda: fc.Stream(fc.cells.RSSMCell(2, 5, 9, 3)), TypeError, "draws random inputs, noise; eval"),
        (
            lambda: fc.Stream(fc.Sequential(fc.Recurrent(NamedOutputs()), nn.Linear(2, 2)), input_sizes=(3, 2, ())),
            TypeError,
            "Linear above a cell of several outputs",
        ),
        (
            lambda: fc.Stream(fc.Sequential(fc.GRU(3, 3), fc.Recurrent(NamedOutputs()))),
            TypeError,
            "only the bottom cell may have several inputs",
        ),
    ],
)
def test_what_is_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        ((np.zeros((2, 3)), np.zeros((2, 2))), TypeError, "takes a tuple of 3 arrays, got 2 of them"),
        ((np.zeros((2, 3)), np.zeros((2, 2)), np.zeros(3)), ValueError, r"with the same dimensions in front; got"),
        ((np.zeros((2, 2)), np.zeros((2, 2)), np.zeros(2)), ValueError, r"\(\.\.\., 3\), \(\.\.\., 2\), \(\.\.\.\)"),
        (np.zeros((2, 3)), ValueError, r"a tuple of 3 inputs, or an array of shape \(2, 6\), got \(2, 3\)"),
        ((np.zeros((2, 3)), np.zeros((2, 2)), np.zeros(2, complex)), TypeError, "real numbers"),
        ("abc", TypeError, "takes a tuple of 3 arrays, got str"),
    ],
)
def test_inputs_that_do_not_fit(x, error, text):
    stream = fc.Stream(NamedOutputs(), 2, input_sizes=(3, 2, ()))
    with pytest.raises(error, match=text):
        stream.step(x)


@pytest.mark.parametrize(
    ("where", "entry", "text"),
    [
        ("input", [[3], [2]], "shapes of its inputs are .* expected 3"),
        ("input", [3], "shapes of its inputs are"),
        ("input", [[3], [2], [2]], "expected dimensions of 1 features"),
        ("output", {"read": [2]}, "expected 16 features in all"),
        ("output", {"read": [2], "more": [True]}, "the shape of a row is"),
        ("output", [[8], [4], [4, -1]], "the shape of a row is"),
        ("output", [[1]] * 17, "17 outputs of 16 features"),
        ("output", [[1 << 40], [2]], "the shape of a row is"),
        ("output", "read", "the shape of a row is"),
    ],
)
def test_shapes_in_a_file_that_do_not_fit(where, entry, text, tmp_path):
    fc.Stream(NamedOutputs(), input_sizes=(3, 2, ())).save(tmp_path / "it")
    tensors = load_file(tmp_path / "it")
    (part,) = json.loads(_metadata(tmp_path / "it")["parts"])
    part["shapes"][where] = entry
    text_of_parts = json.dumps([part])
    about = {"format": "fusecell stream 1", "parts": text_of_parts, "sha256": digest(text_of_parts, tensors)}
    save_file(tensors, tmp_path / "it", about)
    with pytest.raises(StreamFileError, match=text):
        fc.load_stream(tmp_path / "it")


def _metadata(path):
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
