"""The compiler's texts for three cells, as files to read and to compare; UPDATE_GOLDEN=1 writes them anew.

Graphs and plans are of every cell, the LLVM text, which is the longest by far, of the smallest.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import fusecell as fc
from fusecell.compiler.backend.isa import instruction_set
from fusecell.compiler.backend.target import target_of
from fusecell.compiler.codegen import emit
from fusecell.compiler.frontend import Traced, trace
from fusecell.compiler.schedule.scheduler import plan
from fusecell.compiler.transforms.passes import optimise
from tests.compiler.traced_cells import partitioned

GOLDEN = Path(__file__).parent / "golden"
TRIPLE = "x86_64-unknown-linux-gnu"
FEATURES = instruction_set(TRIPLE).features_of("x86-64-v3")
TARGET = target_of("x86-64-v3", ",".join(f"+{name}" for name in FEATURES), TRIPLE, frozenset(FEATURES))
"""Texts are written for a CPU, not run on it: it needn't be this machine's."""
CELLS = {
    "leaky": lambda: fc.cells.LeakyCell(3, 5),
    "gru": lambda: fc.GRUCell(3, 5),
    "gru_layer_norm": lambda: fc.cells.LayerNormGRUCell(3, 5),
}


@pytest.mark.parametrize("name", CELLS)
def test_texts(name):
    traced = trace(CELLS[name](), [(3,)], torch.float32, gradients=True)
    assert isinstance(traced, Traced)
    graphs = partitioned(traced)
    texts = {"joint graph": traced.graph.text}
    for title, graph in (("forward", graphs.forward), ("backward", graphs.backward)):
        optimised = optimise(graph)[-1][1]
        schedule = plan(optimised, backward=title == "backward")
        texts |= {f"{title} graph, optimised": optimised.text, f"{title} plan": schedule.text}
        if title == "forward" and name == "leaky":
            texts["LLVM"] = emit(schedule, TARGET).text
    actual = "\n".join(f"==== {title} ====\n{text}" for title, text in texts.items())
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(actual, encoding="utf-8")
    for number, (line, golden) in enumerate(
        zip(actual.splitlines(), path.read_text("utf-8").splitlines(), strict=True)
    ):
        assert line == golden, f"line {number + 1} of {path.name} differs; if that is meant: UPDATE_GOLDEN=1 make test"
