"""What ``explain`` says of kernels: their stages, tiles and costs, and why there are none."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fusecell.compiler.codegen.tile_cost import TileReport
from fusecell.compiler.ir.affine import affine_parts
from fusecell.compiler.programs.training import Training
from fusecell.compiler.refusal import Refusal
from fusecell.compiler.runtime.kernel import Kernel
from fusecell.compiler.schedule.plan import Stage

__all__ = ["describe_kernel", "describe_refusal", "describe_training"]

# Titles of the plan's phases, in the order in which a chunk of steps goes through them.
_PHASES = {
    "once": "once per call",
    "hoisted": "before the loop, a chunk of steps at once",
    "loop": "in the loop",
    "post": "after the loop, a chunk of steps at once",
}


def describe_kernel(kernel: Kernel) -> list[str]:
    """Describe a kernel in lines: its stages in order, its costs, and its machine code."""
    graph, emitted, plan = kernel.plan.graph, kernel.emitted, kernel.plan
    lines = []
    for phase, when in _PHASES.items():
        stages = [stage for stage in plan.stages if stage.phase == phase]
        lines += [f"    {when}"] if stages else []
        for stage in stages:
            lines.append(f"      {_describe_stage(kernel, stage)}")
            if stage.affines:
                lines.append(f"        {_describe_tiles(emitted.tiles[stage.name])}")
    if plan.sums:
        # A dict, as an ordered set: a weight used twice has a sum for each use.
        sums = {each.label.removeprefix("grad.weight."): None for each in plan.sums}
        paired = {each.label for each in plan.sums if each.pairs}
        names = [f"{name} (by pairs)" if f"grad.weight.{name}" in paired else name for name in sums]
        lines.append(f"    after the loop, summed over all rows and steps: {', '.join(names)}")
    weights = sum(math.prod(graph[index].type.shape) for index in graph.leaves("weight")) * kernel.itemsize
    scratch = emitted.scratch
    lines.append(f"    {2 * kernel.macs:,} FLOPs in matrix products per row and step; {weights:,} bytes of weights")
    lines.append(
        f"    scratch memory: {scratch.fixed:,} bytes, {scratch.per_row:,} per row, "
        f"{scratch.per_chunk_row:,} per row and step of a chunk"
    )
    loaded = kernel.loaded
    how = "read from the cache" if loaded.from_cache else "compiled"
    how += "" if loaded.effort else " without LLVM's optimiser, FUSECELL_OPTIMISE=0"
    lines.append(f"    {loaded.object_size:,} bytes of machine code for {loaded.target.name}, {how}")
    if not loaded.target.isa.flushes_denormals:
        lines.append(f"    {loaded.target.isa.about_denormals}")
    return lines


def _describe_stage(kernel: Kernel, stage: Stage) -> str:
    graph = kernel.plan.graph
    parts = []
    products = [graph[index].name for index in stage.affines]
    if products:
        # The innermost dimension of a microkernel is a vector of 16 numbers, whatever the CPU's own vectors.
        tiles = f"microkernels of rows x vectors {kernel.emitted.tiles[stage.name].tiles}"
        parts.append(f"products {', '.join(products)}{_describe_pairs(kernel, stage)} by {tiles}")
    for what, indices in (("", stage.pointwise), ("reductions ", stage.reductions)):
        if indices:
            parts.append(what + ", ".join(graph[index].name for index in indices))
    features = "feature" if stage.width == 1 else "features"
    return f"{stage.width} {features}: {'; '.join(parts) or 'copies'}"


def _describe_pairs(kernel: Kernel, stage: Stage) -> str:
    """Say which products of a stage are computed by pairs: all, or those with a term that is."""
    graph = kernel.plan.graph
    paired = [
        graph[index].name
        for index in stage.affines
        if any(stage.operands[row].buffer.in_pairs for row, _, _ in affine_parts(graph[index])[1])
    ]
    if not paired:
        return ""
    names = "" if len(paired) == len(stage.affines) else f"{', '.join(paired)} "
    return f" ({names}by pairs of bfloat16 numbers)"


def _describe_tiles(report: TileReport) -> str:
    at_once = "one product" if report.fused == 1 else f"{report.fused} products"
    return (
        f"{at_once} at a time; by the model {report.rows} rows take {report.cycles:,.0f} cycles, "
        f"{report.share:.0%} of them multiply-adds"
    )


def describe_refusal(program: object, trainable: Refusal) -> list[str]:
    """Describe why a cell is eager with gradients, without repeating the reasons that it has anyway."""
    if isinstance(program, Refusal) and program.reasons == trainable.reasons:
        return ["  with gradients: eager, for the same reasons"]
    return ["  with gradients: eager", *(f"    {reason}" for reason in trainable.reasons)]


def describe_training(training: Training) -> Iterator[str]:
    """Describe in lines what training adds: what the forward saves, and the backward kernel."""
    saved = ", ".join(name.removeprefix("saved.") for name, _ in training.graphs.saved)
    size = training.saved_numbers * training.forward.kernel.itemsize
    yield f"  with gradients, the forward also saves {saved}: {size:,} bytes per row and step"
    yield "  the backward kernel, from the last step to the first"
    yield from describe_kernel(training.backward.kernel)
