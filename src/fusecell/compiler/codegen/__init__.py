"""From a plan to LLVM text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fusecell.compiler.backend.target import Target
from fusecell.compiler.codegen.kernel_abi import Layout, Panel, Size, fixed_stride, slack
from fusecell.compiler.codegen.llvm_builder import Module
from fusecell.compiler.codegen.main_loop import emit_driver
from fusecell.compiler.codegen.microkernel import StaticStrides
from fusecell.compiler.codegen.pack_weights import emit_packing
from fusecell.compiler.codegen.stage import Segment, StageEmitter, segments
from fusecell.compiler.codegen.work_sharing import ROWS_EACH, emit_barrier, emit_entries
from fusecell.compiler.schedule.plan import Plan

__all__ = ["ROWS_EACH", "Emitted", "Layout", "Panel", "Size", "emit"]


@dataclass(frozen=True)
class Emitted:
    """A kernel's text, and what its caller needs to know: the words of its argument block and its scratch memory."""

    text: str
    words: tuple[str, ...]
    pointers: tuple[str, ...]
    """The words that must be given: addresses of inputs, weights, states and outputs."""
    scratch: Size
    buffers: dict[str, Size]
    """What the scratch memory is cut into, each with some slack behind it."""
    slack: int
    """Bytes behind a buffer that may be read past its end, and are never written."""
    tiles: dict[str, str]


def emit(plan: Plan, target: Target) -> Emitted:
    """The LLVM text of a plan, for a target; it exports ``run``, and ``team`` for threads that run a call together."""
    module = Module(plan.graph.title, plan.graph.dtype, target)
    products = {stage.name: segments(plan, stage, module) for stage in plan.stages}
    panels = {segment.panel: stage.phase for stage in plan.stages for segment in products[stage.name]}
    layout = Layout(module, plan, list(panels))
    walks = _known_walks(module, (segment for each in products.values() for segment in each))
    tiles = {}
    for stage in plan.stages:
        emitter = StageEmitter(module, layout, plan, stage, products[stage.name], walks)
        emitter.emit()
        if stage.affines:
            tiles[stage.name] = emitter.tiling.text
    emit_packing(module, layout, panels)
    emit_barrier(module)
    emit_driver(module, layout, plan, panels)
    emit_entries(module)
    return Emitted(module.text(), layout.words, layout.pointers, layout.scratch, layout.sizes, slack(module), tiles)


def _known_walks(module: Module, segments: Iterable[Segment]) -> dict[int, StaticStrides]:
    """What is the same wherever a kernel multiplies so many matrices at once: it stands in the tiles as a number."""
    found: dict[int, tuple[set[int | None], set[int]]] = {}
    for segment in segments:
        rows, depths = found.setdefault(segment.count, (set(), set()))
        rows.add(fixed_stride(module, segment.operand.buffer))
        depths.add(segment.panel.depth)
    return {
        products: StaticStrides(*(values.pop() if len(values) == 1 else None for values in both))
        for products, both in found.items()
    }
