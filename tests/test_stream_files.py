"""Saved streams: the same bits in a process without torch, and files that are damaged or hostile refused."""

from __future__ import annotations

import json
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
from fusecell.streaming.file import StreamFileError, digest


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
    for mine, theirs in zip(loaded.state, stream.state, strict=True):
        assert np.array_equal(mine, theirs)
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
    subprocess.run([sys.executable, "-c", _ALONE, *arguments], check=True, timeout=120)
    assert np.array_equal(np.load(tmp_path / "y.npy"), fc.Stream(model()).push(x))


def test_a_loaded_stream_does_what_a_stream_does(saved):
    stream, x = fc.load_stream(saved, batch_size=4), np.ones((4, 5), np.float32)
    kept = stream.snapshot()
    first = stream.step(x, rows=np.array([True, False, True, True]))
    assert not first[1].any()
    stream.reset([0])
    stream.reorder([0, 0, 1, 3])
    stream.restore(kept)
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


HOSTILE = [
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
