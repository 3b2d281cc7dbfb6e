"""Code generation: from a plan to LLVM text.

A kernel's functions, callers first; each module's docstring has the loop nest that it writes::

    @run, @team                         work_sharing       entries: a call on one thread, or one thread of a team
    @gather, @join, @barrier            work_sharing       the threads of a team start, and wait for each other
    @work                               main_loop          packing, chunks of steps, the loop over time
    @pack.<panel>                       pack_weights       weights into the order in which microkernels read them
    @<stage>, .start, .epilogue         stage              tiles of products, and their epilogue of pointwise values
    @tile.<rows>x<products>x<groups>    microkernel        multiply-adds in registers
    @<stage of a nest>                  nests              contractions, moves and reductions along axes
    @<gradient>, @outer.<...>           weight_gradients   sums over rows and steps
    @fc.<op>.<dtype>                    vector_math        tanh, exp, ... of 16 lanes

`shared_functions` then makes one of those that are the same but for the buffers that they work on.

The text is written as it should run, loops rotated and common values computed once: LLVM's passes could do that too,
but take as long as generating the machine code (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fusecell.compiler.backend.target import Target
from fusecell.compiler.codegen.kernel_abi import Layout, Size, fixed_stride, slack
from fusecell.compiler.codegen.llvm_module import Module
from fusecell.compiler.codegen.main_loop import emit_main_loop
from fusecell.compiler.codegen.microkernel import ProductKind, StaticStrides
from fusecell.compiler.codegen.nests import emit_nest
from fusecell.compiler.codegen.pack_weights import emit_packing
from fusecell.compiler.codegen.panel import Panel
from fusecell.compiler.codegen.shared_functions import share_functions
from fusecell.compiler.codegen.stage import FusedProducts, StageEmitter, fused_products
from fusecell.compiler.codegen.tile_cost import TileCost, TileReport
from fusecell.compiler.codegen.work_sharing import MIN_ROWS_PER_THREAD, emit_barrier, emit_entries
from fusecell.compiler.schedule.plan import Plan

__all__ = ["MIN_ROWS_PER_THREAD", "Emitted", "Layout", "Panel", "Size", "emit"]


@dataclass(frozen=True)
class Emitted:
    """Text of a kernel, and the layout of its argument block and of its scratch memory.

    Attributes:
        slots: names of the argument block's slots, in order.
        pointers: the slots that must be filled: addresses of inputs, weights, states and outputs.
        buffers: the parts of the scratch memory, in order, each with some slack behind it.
        slack: bytes behind a buffer that may be read past its end, and are never written.
        tiles: the tiles of each stage that has products, as text.
    """

    text: str
    slots: tuple[str, ...]
    pointers: tuple[str, ...]
    scratch: Size
    buffers: dict[str, Size]
    slack: int
    tiles: dict[str, TileReport]


def emit(plan: Plan, target: Target, *, share: bool = False) -> Emitted:
    """Write a plan as LLVM text; it exports ``run``, and ``team`` for threads that run a call together.

    Arguments:
        share: write functions that differ in slots of the argument block alone once. Programs in which the slots become
            constants are better off without.
    """
    module = Module(plan.graph.title, plan.graph.dtype, target)
    products, tilings = {}, {}
    for stage in plan.stages:
        products[stage.name], tilings[stage.name] = fused_products(plan, stage, module)
    panels = {each.panel: stage.phase for stage in plan.stages for each in products[stage.name]}
    layout = Layout(module, plan, list(panels))
    strides = _static_strides(module, (each for of_stage in products.values() for each in of_stage))
    for stage in plan.stages:
        if stage.nest is not None:
            emit_nest(module, layout, plan, stage)
            continue
        StageEmitter(module, layout, plan, stage, products[stage.name], strides, tilings[stage.name]).emit()
    cost = TileCost(target, module.dtype)
    tiles = {
        stage.name: cost.describe(
            tilings[stage.name],
            [each.product for each in products[stage.name]],
            module.groups(stage.width),
        )
        for stage in plan.stages
        if stage.affines
    }
    emit_packing(module, layout, panels)
    emit_barrier(module)
    emit_main_loop(module, layout, plan, panels)
    emit_entries(module)
    if share:
        module.functions, module.tables = share_functions(module.functions, module.tables)
    return Emitted(module.text(), layout.slots, layout.pointers, layout.scratch, layout.sizes, slack(module), tiles)


def _static_strides(module: Module, products: Iterable[FusedProducts]) -> dict[ProductKind, StaticStrides]:
    """Return the strides that are constant in a kernel's microkernels, by what these multiply."""
    # As constants they are part of a load's address; as parameters they cost an addition or a register each.
    strides: dict[ProductKind, tuple[set[int | None], set[int]]] = {}
    for each in products:
        rows, depths = strides.setdefault(each.kind, (set(), set()))
        rows.add(fixed_stride(module, each.operand.buffer))
        depths.add(each.panel.words)
    return {
        kind: StaticStrides(*(values.pop() if len(values) == 1 else None for values in both))
        for kind, both in strides.items()
    }
