"""Objects touch nothing but the caller's memory, inputs and outputs: each ends at a page that may not be touched.

In a process of its own, which the system ends at the first byte too far. What a stream's memory holds before it is
initialised is NaN, and what lies before each piece is looked at afterwards. Here a few cells; all of the zoo and those
that compute along axes by ``python -m tests.exporting.test_memory all``.
"""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys

import numpy as np
import pytest
import torch

import fusecell as fc
from fusecell.compiler.backend import llvm
from fusecell.exporting.program import build_program
from fusecell.exporting.targets import target_named
from tests.compiler.axis_cells import AXES, AxisCell
from tests.exporting.models import EveryFunction, four_cells
from tests.paths import ROOT

PAGE = mmap.PAGESIZE


class Guarded:
    """Bytes that end at a guard page, all 0xFF, as NaN is."""

    def __init__(self, size: int) -> None:
        usable = -(-(size + 1) // PAGE) * PAGE
        self._map = mmap.mmap(-1, usable + PAGE)
        pages = np.frombuffer(self._map, np.uint8)
        pages[:usable] = 0xFF
        first = pages.ctypes.data
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(first + usable), PAGE, 0) == 0
        self.address, self.bytes, self._before = (
            first + usable - size,
            pages[usable - size : usable],
            pages[: usable - size],
        )

    def check(self) -> None:
        assert (self._before == 0xFF).all(), "bytes before a piece of memory were written"


def run_guarded(module: torch.nn.Module, rows: int, target: str) -> None:
    """Run ten steps and compare them with the stream's."""
    stream = fc.Stream(module, rows)
    program = build_program(stream.parts, "m", target_named(target))
    library = llvm.link(program.code, ["m_init", "m_step"])
    memory = Guarded(program.memory.bytes)
    x, y = (
        Guarded(rows * stream.input_size * stream.dtype.itemsize),
        Guarded(rows * stream.output_size * stream.dtype.itemsize),
    )
    init = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(library.addresses["m_init"])
    step = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(library.addresses["m_step"])
    assert init(memory.address) == 0
    for values in np.random.default_rng(0).standard_normal((10, rows, stream.input_size)).astype(stream.dtype):
        x.bytes[:] = np.frombuffer(values.tobytes(), np.uint8)
        step(memory.address, x.address, y.address)
        assert y.bytes.tobytes() == stream.step(values).tobytes()
    for piece in (memory, x, y):
        piece.check()


def models(kind: str) -> dict[str, torch.nn.Module]:
    """Return the models of a run, by name: ``few`` or ``all``."""
    torch.manual_seed(0)
    zoo = {member.name: fc.Recurrent(member.make(5, 13)) for member in fc.CELLS}
    axes = {name: fc.Recurrent(AxisCell(body)) for name, body in AXES.items()}
    others = {"four cells": four_cells(), "functions": fc.Recurrent(EveryFunction()), "wide": fc.GRU(33, 70)}
    every = {**zoo, **axes, **others}
    few = ("lstm_projected", "gru_layer_norm", "scrn", "conv1d", "topk", "functions")
    return every if kind == "all" else {name: every[name] for name in few}


if __name__ == "__main__":
    for name, module in models(sys.argv[1]).items():
        print(name, flush=True)
        for rows, dtype in ((1, torch.float32), (3, torch.float64)) if sys.argv[1] == "all" else ((2, torch.float32),):
            run_guarded(module.to(dtype).eval(), rows, "host")


@pytest.mark.skipif(sys.platform != "linux", reason="forbids pages by mprotect")
def test_nothing_beyond_is_touched():
    done = subprocess.run(
        [sys.executable, "-m", "tests.exporting.test_memory", "few"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"{last}: status {done.returncode}, {done.stderr[-2000:]}"
    assert done.stdout.splitlines() == list(models("few"))
