"""The stages of the compiler are shown in Python and by FUSECELL_DEBUG."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

import fusecell as fc
from fusecell.compiler.backend.target import host_target
from fusecell.compiler.ir.graph import Graph
from fusecell.compiler.runtime.debug_output import STAGES, debug_stages
from fusecell.compiler.transforms.passes import PASSES


class Branches(fc.Cell):
    def step(self, x, state):
        (h,) = state
        return (h + x if h.sum() > 0 else h), (h,)


def test_every_stage_of_a_cell() -> None:
    explained = fc.explain(fc.Recurrent(fc.cells.LeakyCell(3, 5)))
    assert Graph.parse(explained.graph).text == explained.graph
    assert list(explained.passes) == [*(rewrite.__name__ for rewrite in PASSES), "restore_names"]
    for text in explained.passes.values():
        assert Graph.parse(text).text == text
    assert "current.input = affine(bias_ih, x, weight_ih)" in list(explained.passes.values())[-1]
    assert re.match(r"hoisted0\.5: 5 wide\n  current\.input = affine", explained.plan)
    assert "define internal void @loop0.5(" in explained.llvm
    assert explained.llvm.startswith(f"; step, f32, for {host_target().name}")
    assert re.search(r"^run:", explained.assembly, re.MULTILINE)


def test_the_stages_with_gradients() -> None:
    explained = fc.explain(fc.cells.LeakyCell(3, 5))
    assert "return grad.weight.weight_hh = grad.weight_hh" in explained.joint
    assert "return saved.current = current" in explained.forward.graph
    assert explained.backward.graph.startswith("graph gradient f32")
    assert "grad.weight.weight_hh at [0, 0] += where.1 x saved.h" in explained.backward.plan
    assert str(explained.forward) == explained.forward.plan
    assert "define void @run(" in explained.backward.llvm
    assert re.search(r"^run:", explained.backward.assembly, re.MULTILINE)
    assert explained.backward.passes["fold_constants"].startswith("graph gradient f32")


def test_several_cells_have_their_stages_each() -> None:
    explained = fc.explain(fc.Recurrent(fc.Stack(fc.GRUCell(5, 8), fc.LSTMCell(8, 3))))
    first, second = explained.cells
    assert first.name.endswith("GRUCell(5, 8)")
    assert "z.input" in first.plan
    assert "c.new.tanh" in second.plan
    assert explained.text == f"{first.text}\n{second.text}"
    for name in ("graph", "passes", "plan", "llvm", "assembly", "joint", "forward", "backward"):
        with pytest.raises(ValueError, match=r"2 cells .*GRUCell\(5, 8\).*LSTMCell\(8, 3\).*cells\[0\]"):
            getattr(explained, name)


def test_an_eager_cell_has_reasons_instead_of_stages() -> None:
    explained = fc.explain(Branches(4, 4))
    for name in ("graph", "passes", "plan", "llvm", "assembly", "joint", "forward", "backward"):
        with pytest.raises(fc.NotCompilable, match=r"if h\.sum"):
            getattr(explained, name)
    frozen = fc.GRUCell(5, 10).requires_grad_(False)
    with pytest.raises(fc.NotCompilable, match="No parameter requires a gradient"):
        _ = fc.explain(frozen).backward
    assert "z.input" in fc.explain(frozen).plan


@pytest.mark.parametrize("stage", STAGES)
def test_stage_by_name(stage: str) -> None:
    (cell,) = fc.explain(fc.cells.LeakyCell(3, 5)).cells
    text = cell.stage(stage)
    assert text.startswith("==== LeakyCell(3, 5) ====\n")
    expected = {"graph": cell.graph, "plan": cell.plan, "llvm": cell.llvm, "asm": cell.assembly}
    if stage in expected:
        assert text.partition("\n")[2] == expected[stage]
    else:
        assert "-- fold_constants: unchanged\n" in text
        assert "-- gather_affines\ngraph step f32\n" in text
    headlines = re.findall(r"^==== LeakyCell\(3, 5\), (\w+) ====$", cell.stage(stage, gradients=True), re.MULTILINE)
    assert headlines == ["joint", "forward", "backward"][stage != "graph" :]


def test_an_unknown_stage_is_an_error() -> None:
    (cell,) = fc.explain(fc.cells.LeakyCell(3, 5)).cells
    with pytest.raises(ValueError, match="no stage 'plans'; the stages are graph, passes, plan, llvm, asm"):
        cell.stage("plans")


class Debugged(fc.Cell):
    def step(self, x, state):
        (h,) = state
        h = torch.tanh(self.u(h) + x)
        return h, (h,)

    def __init__(self, size: int) -> None:
        super().__init__(size, size)
        self.u = torch.nn.Linear(size, size)


def test_debug_prints_what_is_compiled(monkeypatch, capfd) -> None:
    monkeypatch.setenv("FUSECELL_DEBUG", "graph, plan")
    cell, x = Debugged(6), torch.randn(3, 2, 6)
    with torch.no_grad():
        fc.scan(cell, x)
        fc.scan(cell, x)
    output, error = capfd.readouterr()
    assert output == ""
    target = host_target().name
    headlines = re.findall(r"^==== fusecell: (.*) ====$", error, re.MULTILINE)
    assert headlines == [f"Debugged, without gradient, f32, {target}: {stage}" for stage in ("graph", "plan")]
    assert "h.hidden = affine" not in error.partition("plan ====")[0]
    assert "h.pre = affine" in error.partition("plan ====")[2]
    fc.scan(cell, x)[0].sum().backward()
    headlines = re.findall(r"^==== fusecell: (.*) ====$", capfd.readouterr().err, re.MULTILINE)
    assert headlines == [
        f"Debugged, {half}, f32, {target}: {stage}" for half in ("forward", "backward") for stage in ("graph", "plan")
    ]


def test_debug_words_are_checked(monkeypatch) -> None:
    monkeypatch.setenv("FUSECELL_DEBUG", "plan,assembler,plan")
    with pytest.raises(
        ValueError, match=r"names no stage by 'assembler'; expected a list of graph, passes, plan, llvm, asm"
    ):
        debug_stages()
    with torch.no_grad(), pytest.raises(ValueError, match="FUSECELL_DEBUG"):
        fc.scan(Debugged(7), torch.randn(3, 2, 7))
    with pytest.raises(ValueError, match="FUSECELL_DEBUG"):
        fc.show_config()
    monkeypatch.setenv("FUSECELL_DEBUG", "asm,plan,asm")
    assert debug_stages() == ("asm", "plan")
    assert fc.show_config().debug == "asm, plan"
    monkeypatch.delenv("FUSECELL_DEBUG")
    assert debug_stages() == ()
    assert fc.show_config().debug == "off"


def test_nothing_is_printed_without_being_asked() -> None:
    code = "import torch, fusecell as fc; fc.GRU(3, 4)(torch.randn(2, 1, 3))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("", "")
