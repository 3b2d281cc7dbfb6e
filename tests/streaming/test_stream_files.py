"""Saved streams: the same bits in a process without torch, and files that are damaged or hostile refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from torch import nn

import fusecell as fc
from fusecell.errors import StreamFileError
from fusecell.streaming import Limits
from fusecell.streaming.file import digest


def model():
    torch.manual_seed(0)
    return fc.Sequential(fc.GRU(5, 9, 2), fc.Recurrent(fc.LSTMCell(9, 7)), nn.Linear(7, 2), nn.Sigmoid()).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("streams") / "model.fusecell"
    fc.Stream(model()).save(path)
    return path


def test_every_cell_comes_back_with_its_bits(zoo_cell, tmp_path):
    cell = zoo_cell.make(5, 9).eval()
    stream, x = fc.Stream(cell, 3), np.random.default_rng(0).normal(size=(11, 3, 5)).astype(np.float32)
    stream.save(tmp_path / "it")
    loaded = fc.load_stream(tmp_path / "it", batch_size=3)
    assert np.array_equal(loaded.push(x), stream.push(x))
    for actual, expected in zip(loaded.state, stream.state, strict=True):
        assert np.array_equal(actual, expected)
    assert repr(loaded) == repr(stream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_first_states_and_parametrized_weights_are_saved(tmp_path, dtype):
    cell = fc.LearnedState(fc.GRUCell(5, 9)).to(dtype)
    nn.init.normal_(cell.initial_h)
    nn.utils.parametrizations.weight_norm(cell.cell, "weight_hh")
    x = torch.randn(6, 2, 5, dtype=dtype)
    fc.Stream(cell).save(tmp_path / "it")
    with torch.no_grad():
        expected, _ = fc.scan(cell, x)
    assert np.array_equal(fc.load_stream(tmp_path / "it", 2).push(x.numpy()), expected.numpy())


_ALONE = """
import sys, numpy as np, fusecell as fc
stream = fc.load_stream(sys.argv[1])
y = np.stack([stream.step(x) for x in np.load(sys.argv[2])])
assert "torch" not in sys.modules, "torch was imported"
np.save(sys.argv[3], y)
"""


def test_a_process_without_torch_gives_the_same_bits(saved, tmp_path):
    x = np.random.default_rng(1).normal(size=(9, 5)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    arguments = [str(saved), str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    subprocess.run([sys.executable, "-c", _ALONE, *arguments], check=True, timeout=600)
    assert np.array_equal(np.load(tmp_path / "y.npy"), fc.Stream(model()).push(x))


def test_a_loaded_stream_does_what_a_stream_does(saved):
    stream, x = fc.load_stream(saved, batch_size=4), np.ones((4, 5), np.float32)
    snapshot = stream.snapshot()
    first = stream.step(x, rows=np.array([True, False, True, True]))
    assert not first[1].any()
    stream.reset([0])
    stream.reorder([0, 0, 1, 3])
    stream.restore(snapshot)
    assert np.array_equal(stream.step(x)[0], first[0])
    with pytest.raises(ValueError, match="has no module to take weights from"):
        stream.refresh()


def test_errors_of_the_call(saved, tmp_path):
    with pytest.raises(FileNotFoundError):
        fc.load_stream(tmp_path / "nowhere")
    with pytest.raises(IsADirectoryError):
        fc.load_stream(tmp_path)
    with pytest.raises(ValueError, match="batch_size of 1 or more, got 0"):
        fc.load_stream(saved, batch_size=0)
    with pytest.raises(FileNotFoundError):
        fc.Stream(model()).save(tmp_path / "no" / "folder")


@given(st.data())
def test_damaged_files_are_refused_or_read_as_they_were(saved, tmp_path_factory, data):
    """Cut short, or with bytes changed, wherever."""
    untouched = saved.read_bytes()
    whole = bytearray(untouched)
    if data.draw(st.booleans()):
        whole = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        for place in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=4)):
            whole[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "it"
    path.write_bytes(whole)
    if whole == untouched:
        fc.load_stream(path)
        return
    with pytest.raises(StreamFileError, match=r"damaged|not a"):
        fc.load_stream(path)


def changed(saved, path, change):
    """A copy of a saved stream with something else in it."""
    from safetensors import safe_open

    tensors = load_file(saved)
    with safe_open(saved, framework="np") as file:
        about = file.metadata()
    parts = json.loads(about["parts"])
    change(tensors, parts, about)
    about.setdefault("parts", "")
    if about["parts"] != "broken":
        about["parts"] = json.dumps(parts)
    about["sha256"] = digest(about["parts"], tensors)
    save_file(tensors, path, about)
    return path


def drop_a_tensor(tensors, parts, about):
    del tensors["0.weight.0"]


def another_shape(tensors, parts, about):
    tensors["1.weight.0"] = tensors["1.weight.0"][:-1].copy()


def another_dtype(tensors, parts, about):
    tensors["0.start.0"] = tensors["0.start.0"].astype(np.float64)


def another_format(tensors, parts, about):
    about["format"] = "fusecell stream 99"


def no_parts(tensors, parts, about):
    parts.clear()


def broken_json(tensors, parts, about):
    about["parts"] = "broken"


def nonsense(tensors, parts, about):
    parts[0]["graph"] = "__import__('os').system('true')"


def missing_key(tensors, parts, about):
    del parts[0]["graph"]


def not_a_mapping(tensors, parts, about):
    parts[0] = 3


def unknown_primitive(tensors, parts, about):
    parts[0]["graph"] = parts[0]["graph"].replace("= tanh(", "= system(")


def another_type(tensors, parts, about):
    parts[0]["graph"] = parts[0]["graph"].replace("row[9]", "row[9999999999999]", 1)


def no_output(tensors, parts, about):
    lines = parts[0]["graph"].splitlines()
    parts[0]["graph"] = "\n".join(line for line in lines if not line.startswith("return output")) + "\n"


def out_of_order(tensors, parts, about):
    parts.reverse()


def another_kind(tensors, parts, about):
    parts[0]["kind"] = "\x1b]0;owned\x07"


def a_long_kind(tensors, parts, about):
    parts[0]["kind"] = "x" * 100_000


def a_number_for_a_graph(tensors, parts, about):
    parts[0]["graph"] = 3


def a_key_more(tensors, parts, about):
    parts[0]["more"] = 1


def a_tensor_more(tensors, parts, about):
    tensors["9.weight.0"] = np.zeros(3, np.float32)


def two_rows_of_first_states(tensors, parts, about):
    tensors["0.start.0"] = np.zeros((2, 9), np.float32)


def mixed_dtypes(tensors, parts, about):
    parts[1]["graph"] = parts[1]["graph"].replace(" f32", " f64")


def in_the_wrong_order(tensors, parts, about):
    """Swap parts and their tensors, so that only the sizes between them don't fit."""
    parts[0], parts[2] = parts[2], parts[0]
    for name in list(tensors):
        if name[0] in "02":
            tensors[f"moved{2 - int(name[0])}{name[1:]}"] = tensors.pop(name)
    for name in list(tensors):
        tensors[name.removeprefix("moved")] = tensors.pop(name)


HOSTILE = [
    (another_kind, r"its kind is '\\x1b\]0;owned\\x07', expected up to 256 characters that print"),
    (a_long_kind, r"its kind is 'x+\.\.\. \(100002 characters\)"),
    (a_number_for_a_graph, "its graph is 3, expected a text"),
    (a_key_more, "expected an object of kind and graph"),
    (a_tensor_more, "no step takes its tensor '9.weight.0'"),
    (two_rows_of_first_states, r"0.start.0 is float32 of shape \(2, 9\), expected float32 of shape \(1, 9\)"),
    (mixed_dtypes, "1.weight.0 is float32 of shape .* expected float64"),
    (in_the_wrong_order, "GRUCell above it takes 9 in f32"),
    (drop_a_tensor, "0.weight.0 is missing"),
    (another_shape, r"1.weight.0 is float32 of shape \(26, 9\), expected float32 of shape \(27, 9\)"),
    (another_dtype, "0.start.0 is float64"),
    (another_format, "its format is 'fusecell stream 99'"),
    (no_parts, "describes no steps"),
    (broken_json, "is damaged"),
    (nonsense, "not a graph"),
    (missing_key, "its step 0 can't be read"),
    (not_a_mapping, "its step 0 can't be read"),
    (unknown_primitive, "no primitive is called 'system'"),
    (another_type, "its step 0 can't be read"),
    (no_output, "the result 'output' is missing"),
    (out_of_order, "its step . can't be read|above it takes"),
]


@pytest.mark.parametrize(("change", "text"), HOSTILE, ids=[change.__name__ for change, _ in HOSTILE])
def test_hostile_files_are_refused(saved, tmp_path, change, text):
    with pytest.raises(StreamFileError, match=text):
        fc.load_stream(changed(saved, tmp_path / "it", change))


def rewritten(saved, path, edit, data=None):
    """Copy a saved stream with an edited header, JSON text or bytes."""
    whole = saved.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = edit(whole[8:end].decode())
    header = header if isinstance(header, bytes) else header.encode("utf-8", "surrogatepass")
    path.write_bytes(len(header).to_bytes(8, "little") + header + (whole[end:] if data is None else data))
    return path


def first(text, name, value):
    """Return a header with one field of tensor 0.weight.0 changed."""
    header = json.loads(text)
    header["0.weight.0"][name] = value
    return json.dumps(header)


CONTAINERS = {
    "another magic": (lambda text: b"\x80\x02}q\x00." + text.encode(), "JSON|UTF-8|Expecting"),
    "not UTF-8": (lambda text: b'{"\xff": 3}', "its header is no UTF-8"),
    "no JSON": (lambda text: "hello", "Expecting value"),
    "no object": (lambda text: "[]", r"its header is \[\], expected a JSON object"),
    "nested without end": (lambda text: text.rstrip()[:-1] + ', "a": ' + "[" * 100_000, "nests deeper than 3"),
    "a tensor twice": (lambda text: text.rstrip()[:-1] + ', "0.weight.0": {}}', "names '0.weight.0' twice"),
    "metadata twice": (lambda text: text.rstrip()[:-1] + ', "__metadata__": {}}', "names '__metadata__' twice"),
    "metadata that are numbers": (lambda text: '{"__metadata__": {"format": 3}}', "expected texts by name"),
    "half a character": (lambda text: '{"__metadata__": {"format": "\\ud800"}}', "expected texts by name"),
    "a name that steers terminals": (
        lambda text: text.replace('"0.weight.0"', '"\\u001b[2J"'),
        r"a tensor is called '\\x1b\[2J', expected up to 1024 characters that print",
    ),
    "a name of half a character": (lambda text: text.replace('"0.weight.0"', '"\\ud800"'), r"is called '\\ud800'"),
    "bfloat16": (lambda text: first(text, "dtype", "BF16"), "of dtype 'BF16', expected F16 or F32 or F64"),
    "whole numbers": (lambda text: first(text, "dtype", "I64"), "of dtype 'I64', expected F16 or F32 or F64"),
    "a dtype that is a number": (lambda text: first(text, "dtype", 7), "of dtype 7, expected"),
    "a negative size": (lambda text: first(text, "shape", [-27, -5]), r"has the shape \[-27, -5\]"),
    "a size of true": (lambda text: first(text, "shape", [True, 135]), r"has the shape \[True, 135\]"),
    "a size of a fraction": (lambda text: first(text, "shape", [27.0, 5]), r"has the shape \[27.0, 5\]"),
    "a size of infinity": (lambda text: first(text, "shape", [float("inf")]), r"has the shape \[inf\]"),
    "a size beyond memory": (lambda text: first(text, "shape", [10**30]), "has the shape"),
    "another size": (lambda text: first(text, "shape", [27, 6]), "takes 648 bytes, but lies at"),
    "a shape that is none": (lambda text: first(text, "shape", "27"), "has the shape '27'"),
    "offsets that are three": (lambda text: first(text, "data_offsets", [0, 1, 2]), "expected two offsets"),
    "a key more": (lambda text: first(text, "more", 1), "expected dtype, shape, data_offsets"),
    "no such keys": (lambda text: '{"a": 3}', "tensor 'a' is described by 3"),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_invalid_safetensors_files_are_refused(saved, tmp_path, kind):
    edit, text = CONTAINERS[kind]
    with pytest.raises(StreamFileError, match=text) as raised:
        fc.load_stream(rewritten(saved, tmp_path / "it", edit))
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 600


def test_overlapping_or_spaced_tensors_are_refused(saved, tmp_path):
    """Tensors overlap, have a gap between them, or bytes behind them."""

    def over(text):
        header = json.loads(text)
        one, other = [name for name in header if name.endswith(".start.0")][:2]
        size = header[other]["data_offsets"][1] - header[other]["data_offsets"][0]
        begin = header[one]["data_offsets"][0]
        header[other]["data_offsets"] = [begin, begin + size]
        return json.dumps(header)

    with pytest.raises(StreamFileError, match=r"begins at byte \d+, expected \d+|end at byte"):
        fc.load_stream(rewritten(saved, tmp_path / "it", over))
    end = 8 + int.from_bytes(saved.read_bytes()[:8], "little")
    for data in (saved.read_bytes()[end:] + b"more", saved.read_bytes()[end:-4]):
        with pytest.raises(StreamFileError, match=r"its tensors end at byte \d+ of \d+"):
            fc.load_stream(rewritten(saved, tmp_path / "it", lambda text: text, data))


LIMITS = {
    "file_bytes": r"bytes, more than the \d+ that it may have",
    "header_bytes": "its header has .* bytes, more than",
    "parts": "it has 5 steps, more than the 4",
    "nodes": "more lines than .* values|are more than",
    "features": "features together, more than",
    "multiply_adds": "more than .* multiply-adds",
    "code_bytes": "a step's code has .* bytes, more than",
    "scratch_bytes": "bytes of memory to run in, more than",
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits(saved, name):
    limits = Limits(**{name: 4})
    with pytest.raises(StreamFileError, match=LIMITS[name]):
        fc.load_stream(saved, limits=limits)
    assert fc.load_stream(saved, limits=Limits(**{name: 1 << 40})).input_size == 5


class Outer(fc.Cell):
    """A step without a product: 5 * 5 * 4 multiply-adds of its state."""

    def __init__(self):
        super().__init__(5, 20)

    def step(self, x, state):
        (h,) = state
        matrix = h.view(-1, 5, 4)
        h = torch.tanh((matrix @ matrix.mT @ matrix).flatten(1) + x.repeat(1, 4))
        return h, (h,)


def test_limits_count_contractions(tmp_path):
    fc.Stream(Outer()).save(tmp_path / "it")
    with pytest.raises(StreamFileError, match=LIMITS["multiply_adds"]):
        fc.load_stream(tmp_path / "it", limits=Limits(multiply_adds=150))
    assert fc.load_stream(tmp_path / "it", limits=Limits(multiply_adds=400)).input_size == 5


def test_limits_are_whole_numbers():
    for value in (0, -1, True, 1.5, "many"):
        with pytest.raises(ValueError, match="Limits takes integers of 1 or more; got parts="):
            Limits(parts=value)


def test_pipes_and_devices_are_refused_at_once(tmp_path):
    """A pipe, which would be waited for; and a device, which has no end."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(StreamFileError, match="it is a pipe or a device, expected a file"):
            fc.load_stream(path)


def test_a_new_state_of_another_size_is_refused(saved, tmp_path):
    """Regression: generated code read and wrote out of bounds."""

    def change(tensors, parts, about):
        lines = parts[0]["graph"].splitlines()
        place = next(place for place, line in enumerate(lines) if line.startswith("return state.h"))
        lines[place] = "return state.h = x"
        parts[0]["graph"] = "\n".join(lines) + "\n"

    with pytest.raises(StreamFileError, match=r"the new value of state h is row\[5\], expected row\[9\]"):
        fc.load_stream(changed(saved, tmp_path / "it", change))


def test_a_value_called_as_memory_of_the_kernels_own(saved, tmp_path):
    """Regression: two buffers of one name shared memory, so the order of rows was overwritten."""

    def change(tensors, parts, about):
        for name in ("order", "starts"):
            for part in parts[:2]:
                part["graph"] = re.sub(r"\bn\b" if name == "order" else r"\br\b", name, part["graph"])

    x = np.random.default_rng(2).normal(size=(9, 3, 5)).astype(np.float32)
    expected = fc.load_stream(saved, 3).push(x)
    assert np.array_equal(fc.load_stream(changed(saved, tmp_path / "it", change), 3).push(x), expected)


def test_a_pickle_is_no_stream(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "it")
    with pytest.raises(StreamFileError, match="is not a saved stream"):
        fc.load_stream(tmp_path / "it")


def test_stacks_with_residual_connections_stream(tmp_path):
    stack = fc.Stack(fc.GRUCell(5, 9), fc.LSTMCell(9, 9), fc.RNNCell(9, 9), residual=True).eval()
    x = torch.randn(8, 2, 5)
    with torch.no_grad():
        expected = fc.Recurrent(stack)(x)[0].numpy()
    stream = fc.Stream(stack, 2)
    assert np.array_equal(np.stack([stream.step(step) for step in x.numpy()]), expected)
