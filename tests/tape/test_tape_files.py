"""Damaged and hostile tape files are refused with a sentence, and pages run no script of a tape."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fusecell as fc
from fusecell.errors import TapeFileError
from tests.tape.hostile_tapes import SCRIPT, changed, poisoned

REFUSED = "is not a tape that was saved, or is damaged"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tapes") / "it"
    tape = fc.record(fc.LSTM(5, 9), torch.randn(7, 3, 5), lengths=[7, 2, 4], labels="abcdefg", gradients=True)
    tape.outputs.sum().backward()
    tape.save(path)
    return path


@given(st.data())
def test_damage_is_refused_or_harmless(saved, tmp_path_factory, data):
    """Cut short, or with bytes changed, wherever: numbers may differ, all else is refused."""
    whole = bytearray(saved.read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    if data.draw(st.booleans()):
        whole = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        for place in data.draw(st.lists(st.integers(0, header + 20), min_size=1, max_size=4)):
            whole[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "it"
    path.write_bytes(whole)
    message, shapes = REFUSED, {(7, 3)}
    try:
        tape = fc.Tape.load(path)
        shapes = {tuple(tape.value(name).shape[:2]) for name in tape.names()}
    except ValueError as error:
        message = str(error)
    assert REFUSED in message
    assert shapes == {(7, 3)}


HOSTILE = {
    "another format": lambda tensors, tracks, about: about.update(format="fusecell tape 99"),
    "no tracks": lambda tensors, tracks, about: tracks.clear(),
    "a track that is none": lambda tensors, tracks, about: tracks.append(3),
    "nested without end": lambda tensors, tracks, about: about.update(tracks="[" * 100_000),
    "without a value": lambda tensors, tracks, about: tensors.pop("0.value.h"),
    "without a state": lambda tensors, tracks, about: tensors.pop("0.before.h"),
    "a value of another shape": lambda tensors, tracks, about: tensors.update({"0.value.i": torch.zeros(2, 3, 9)}),
    "a value of one axis": lambda tensors, tracks, about: tensors.update({"0.value.i": torch.zeros(7)}),
    "whole numbers": lambda tensors, tracks, about: tensors.update({"0.value.i": torch.zeros(7, 3, 9).long()}),
    "a state of another width": lambda tensors, tracks, about: tensors.update({"0.before.h": torch.zeros(7, 3, 2)}),
    "a gradient of another shape": lambda tensors, tracks, about: tensors.update({"0.gradient.h": torch.zeros(2)}),
    "a layer that is a word": lambda tensors, tracks, about: tracks[0].update(layer="top"),
    "an equation that is a list": lambda tensors, tracks, about: tracks[0].update(equation=["h"]),
    "names that are a number": lambda tensors, tracks, about: tracks[0].update(names=5),
    "lengths beyond the steps": lambda tensors, tracks, about: tensors.update(lengths=torch.tensor([7, 99, 4])),
    "lengths of fractions": lambda tensors, tracks, about: tensors.update(lengths=torch.ones(3)),
    "too few labels": lambda tensors, tracks, about: about.update(labels='["a"]'),
    "labels of infinity": lambda tensors, tracks, about: about.update(labels=json.dumps([float("inf")] * 7)),
    "labels by name": lambda tensors, tracks, about: about.update(labels='{"a": 1}'),
    "half a character": lambda tensors, tracks, about: about.update(labels=json.dumps(["\ud800"] * 7)),
    "more metadata": lambda tensors, tracks, about: about.update(more="1"),
    "a kind that steers terminals": lambda tensors, tracks, about: tracks[0].update(kind="\x1b[2J"),
    "a kind that is long": lambda tensors, tracks, about: tracks[0].update(kind="x" * 300),
    "a source of control characters": lambda tensors, tracks, about: tracks[0].update(source="\x1b[2J"),
    "a layer of true": lambda tensors, tracks, about: tracks[0].update(layer=False),
    "a layer from below": lambda tensors, tracks, about: tracks[0].update(layer=-1),
    "a layer left out": lambda tensors, tracks, about: tracks[0].update(layer=1),
    "reversed by a number": lambda tensors, tracks, about: tracks[0].update(reverse=1),
    "a name twice": lambda tensors, tracks, about: tracks[0]["names"].append("h"),
    "no names": lambda tensors, tracks, about: tracks[0].update(names=[], states=[], gradients=[]),
    "a state that is not named": lambda tensors, tracks, about: tracks[0]["states"].append("more"),
    "a key more": lambda tensors, tracks, about: tracks[0].update(more=1),
    "a tensor more": lambda tensors, tracks, about: tensors.update(more=torch.zeros(7, 3, 9)),
    "states in another dtype": lambda tensors, tracks, about: tensors.update(
        {"0.before.h": torch.zeros(7, 3, 9).double()}
    ),
    "labels that are lists": lambda tensors, tracks, about: about.update(labels=json.dumps([["a"]] * 7)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_tapes_are_refused(saved, tmp_path, kind):
    with pytest.raises(TapeFileError, match=REFUSED) as raised:
        fc.Tape.load(changed(saved, tmp_path / "it", HOSTILE[kind]))
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 600


def test_a_tape_may_be_as_long_as_its_reader_allows(saved):
    with pytest.raises(TapeFileError, match=r"it has [\d,]+ bytes, more than the 100 that it may have"):
        fc.Tape.load(saved, max_bytes=100)
    assert fc.Tape.load(saved, max_bytes=1 << 40).steps == 7


def test_a_page_runs_nothing_of_a_tape(saved, tmp_path):
    tape = fc.Tape.load(changed(saved, tmp_path / "it", poisoned))
    tape.save_html(tmp_path / "it.html", title=SCRIPT)
    page = (tmp_path / "it.html").read_text(encoding="utf-8")
    assert "window.harmed" in page
    assert "<img" not in page
    assert "<script>window" not in page
    assert page.lower().count("</script") == page.count("<script")
    assert page.count("function drawCell") == 1
