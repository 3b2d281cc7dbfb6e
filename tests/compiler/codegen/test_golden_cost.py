"""Executed instructions of a few cells' kernels against stored counts: added work is seen without a clock.

``UPDATE_GOLDEN=1 make test ARGS="-k golden"`` writes the figures anew.
"""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from pathlib import Path

import pytest
import torch

import fusecell as fc
from fusecell.compiler.backend import llvm
from fusecell.compiler.backend.target import host_target
from fusecell.compiler.runtime import kernel
from tests.compiler.codegen.instruction_counts import KINDS, Counted

GOLDEN = Path(__file__).parent / "golden"
CELLS = {
    "gru": lambda: fc.GRUCell(64, 128),
    "lstm": lambda: fc.LSTMCell(64, 128),
    "leaky": lambda: fc.cells.LeakyCell(64, 128),
    "gru_layer_norm": lambda: fc.cells.LayerNormGRUCell(64, 128),
}
LEVELS = ["x86-64-v3", "x86-64-v4"]
SHAPES = [(32, 1), (8, 37)]
"""Steps and rows; 37 rows leave a rest of every tile."""
# What a figure may grow or shrink by before it is to be looked at, and what no figure is too small for.
MORE = 1.03
SLACK = 20
HOW = 'If that is meant: UPDATE_GOLDEN=1 make test ARGS="-k golden"'

LOOPS = "innermost loops that spill"
"""The figure that stands alone: of loops around fused multiply-adds, and it should be none."""

Figures = dict[str, Counter[str]]


@pytest.fixture
def level(request, monkeypatch):
    """Compile for one CPU level; forget programs before and after."""
    monkeypatch.setenv("FUSECELL_TARGET", request.param)
    try:
        host_target()
    except ValueError as error:
        pytest.skip(str(error))
    fc.refresh()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a crew's waiting is not counted, nor are its increments one at a time
    yield request.param
    torch.set_num_threads(threads)
    fc.refresh()


def measured(cell, monkeypatch) -> Figures:
    """Return the instruction counts of forward and backward at each shape, by name."""
    programs: list[Counted] = []

    def load(*args):
        programs.append(Counted(*args))
        return programs[-1]

    monkeypatch.setattr(kernel, "load", load)
    figures: Figures = {}
    for steps, rows in SHAPES:
        x = torch.zeros(steps, rows, cell.input_size, requires_grad=True)
        y, _ = fc.scan(cell, x)
        for title in ("forward", "backward"):
            if title == "backward":
                y.sum().backward()
            figures[f"{title} T{steps} N{rows}"] = sum((each.take() for each in programs), Counter())
    return figures | {LOOPS: Counter(spills=sum(len(each.spilling_loops()) for each in programs))}


def as_text(figures: Figures) -> str:
    """A table: the compiler's versions, the kinds, a line of counts for each call."""
    lines = [("", *KINDS), *((name, *(str(row[kind]) for kind in KINDS)) for name, row in figures.items())]
    padded = (f"{name:<{len(LOOPS)}}" + "".join(f"{word:>13}" for word in words) for name, *words in lines)
    return "\n".join((llvm.VERSIONS, *padded)) + "\n"


def from_text(text: str) -> Figures:
    """The figures of such a table."""
    figures = {}
    for line in text.splitlines()[2:]:
        *name, _, _, _, _, _, _, _ = words = line.split()
        numbers = map(int, words[len(name) :])
        figures[" ".join(name)] = Counter(dict(zip(KINDS, numbers, strict=True)))
    return figures


def complaints(where: str, actual: Figures, stored: Figures) -> list[str]:
    """Return a sentence for every figure that has changed."""
    messages = [f"{where} a call changed its name: {sorted(actual)}, stored {sorted(stored)}."] * (
        actual.keys() != stored.keys()
    )
    for name, row in stored.items():
        for kind in KINDS:
            now, before = actual.get(name, row)[kind], row[kind]
            if max(now, before) > MORE * min(now, before) + (name != LOOPS) * SLACK:
                change = f"{abs(now / before - 1):.0%}" if before else str(now)
                messages.append(
                    f"{where} {name}: {change} {'more' if now > before else 'fewer'} {kind}, {before} -> {now}."
                )
    return messages


@pytest.mark.parametrize("level", LEVELS, indirect=True)
@pytest.mark.parametrize("name", CELLS)
def test_instruction_counts(name, level, monkeypatch):
    path = GOLDEN / f"{name}.{level}.txt"
    torch.manual_seed(0)
    figures = measured(CELLS[name](), monkeypatch)
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(as_text(figures), encoding="utf-8")
    text = path.read_text("utf-8")
    versions = text.splitlines()[0]
    if versions != llvm.VERSIONS:
        pytest.skip(f"the figures are of {versions}, this is {llvm.VERSIONS}")
    messages = complaints(f"{name} on {level},", figures, from_text(text))
    assert not messages, "\n".join((*messages, HOW))


def test_a_changed_count_is_reported():
    stored = {"backward T8 N37": Counter(instructions=1000, fma=500, loads=400), LOOPS: Counter()}
    assert from_text(as_text(stored)) == {
        name: Counter({kind: row[kind] for kind in KINDS}) for name, row in stored.items()
    }
    assert complaints("gru,", stored, stored) == []
    actual = {"backward T8 N37": Counter(instructions=1040, fma=500, loads=480), LOOPS: Counter(spills=1)}
    assert complaints("gru,", actual, stored) == [
        "gru, backward T8 N37: 20% more loads, 400 -> 480.",
        f"gru, {LOOPS}: 1 more spills, 0 -> 1.",
    ]
    assert "17% fewer loads" in complaints("gru,", stored, actual)[0]


@pytest.mark.parametrize("level", ["x86-64-v3"], indirect=True)
def test_counts_are_exact(level):
    """Count a loop with known counts, on the lowest CPU level with fused multiply-add."""
    text = """
define void @run(ptr %p, i64 %n) {
entry:
  %x = load <8 x float>, ptr %p, align 4
  br label %head
head:
  %i = phi i64 [ 0, %entry ], [ %j, %head ]
  %sum = phi <8 x float> [ %x, %entry ], [ %next, %head ]
  %at = getelementptr <8 x float>, ptr %p, i64 %i
  %y = load <8 x float>, ptr %at, align 4
  %next = call <8 x float> @llvm.fma.v8f32(<8 x float> %x, <8 x float> %y, <8 x float> %sum)
  %j = add i64 %i, 1
  %more = icmp slt i64 %j, %n
  br i1 %more, label %head, label %done
done:
  %q = fdiv <8 x float> %next, %x
  store <8 x float> %q, ptr %p, align 4
  ret void
}
declare <8 x float> @llvm.fma.v8f32(<8 x float>, <8 x float>, <8 x float>)
"""
    code = Counted(text, ["run"], host_target())
    memory = (ctypes.c_float * 88)()
    run = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(code.address("run"))
    for times in (1, 11):
        run(ctypes.addressof(memory), times)
        counts = code.take()
        assert (counts["fma"], counts["loads"], counts["stores"], counts["divisions"]) == (times, times + 1, 1, 1)
        assert counts["broadcasts"] == counts["spills"] == 0
    assert code.take()["instructions"] == 0
    assert [block.kinds["fma"] for block in code.blocks if block.repeats] == [1]
    assert code.spilling_loops() == []
