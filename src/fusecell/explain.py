"""``explain``: what was compiled, what left the loop, what it costs, and why the rest runs as a Python loop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusecell.cell import Cell, weights_dtype
from fusecell.compiler.program import Program
from fusecell.compiler.runner import find_program
from fusecell.compiler.trace import Refusal
from fusecell.drop_in import GRU, LSTM, RNN
from fusecell.layers.stack import Stack
from fusecell.runner import active_runner

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    """How a layer or cell runs; printed, the plan.

    Attributes:
        runner: what a call without gradient on the CPU does under the runner in force, ``"compiled"`` or ``"eager"``;
            "compiled" only if every cell inside is.
        training_runner: the same for a call with gradient.
        reasons: why it is eager, a sentence each; empty if compiled.
        text: the plan, cell by cell.
    """

    runner: str
    training_runner: str
    reasons: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return self.text


def explain(module: nn.Module) -> Explanation:
    """Say how a layer or cell runs, tracing and compiling it if need be.

    Example:
        >>> import fusecell as fc
        >>> fc.explain(fc.GRU(5, 10)).runner
        'compiled'

    Arguments:
        module: a cell, or any module with cells inside: Recurrent, Stack, Bidirectional, Sequential, GRU, LSTM, RNN.

    Returns:
        An :class:`Explanation`; print it to read the plan.

    Raises:
        TypeError: if there is no cell in the module.
    """
    cells = _leaves(module)
    if not cells:
        raise TypeError(f"explain takes a layer or a cell of fusecell, got {type(module).__name__}, which has none.")
    reasons: list[str] = []
    lines: list[str] = []
    for name, cell in cells:
        found = _program(cell)
        title = f"{name}{type(cell).__name__}({cell.input_size}, {cell.hidden_size})"
        if isinstance(found, Refusal):
            reasons += [f"{type(cell).__name__}: {reason}" for reason in found.reasons]
            lines += [f"{title}: eager", *(f"  {reason}" for reason in found.reasons)]
        else:
            lines += [f"{title}: compiled", *_describe(found)]
    if active_runner() == "eager":
        reasons.insert(0, "The eager runner is in force.")
    lines.append("with gradients: eager, torch's autograd over the Python loop")
    return Explanation("eager" if reasons else "compiled", "eager", tuple(reasons), "\n".join(lines))


def _leaves(module: nn.Module, name: str = "") -> list[tuple[str, Cell]]:
    """The cells inside, by the path to them; those of a drop-in layer are its views."""
    if isinstance(module, GRU | LSTM | RNN):
        return [(f"{name}[layer {layer}, direction {way}] ", cell) for layer, way, cell in module.leaf_cells()]
    if isinstance(module, Cell) and not isinstance(module, Stack):
        return [(f"{name} " if name else "", module)]
    found: list[tuple[str, Cell]] = []
    for child, part in module.named_children():
        found += _leaves(part, f"{name}.{child}" if name else child)
    return found


def _program(cell: Cell) -> Program | Refusal:
    dtype = weights_dtype(cell) or _view_dtype(cell) or torch.get_default_dtype()
    if dtype not in (torch.float32, torch.float64):
        return Refusal((f"Its weights are {dtype}; float32 and float64 are compiled.",))
    drawn = cell.draw(1, 1, dtype=dtype, device="cpu")
    given = len(cell.inputs) - len(drawn)
    if given != 1:
        return Refusal((f"The widths of its inputs ({', '.join(cell.inputs)}) are known at a call only.",))
    return find_program(cell, (torch.zeros(1, 1, cell.input_size, dtype=dtype), *drawn))


def _view_dtype(cell: Cell) -> torch.dtype | None:
    """The dtype of a cell whose weights are a layer's."""
    tensors = (value for value in vars(cell).values() if isinstance(value, Tensor))
    return next((value.dtype for value in tensors if value.is_floating_point()), None)


_WHEN = {
    "once": "once per call",
    "lift": "before the loop, all steps of a chunk at once",
    "loop": "in the loop",
    "post": "after the loop, all steps of a chunk at once",
}


def _describe(program: Program) -> list[str]:
    graph, emitted = program.plan.graph, program.emitted
    lines = []
    for stage in program.plan.stages:
        names = [graph[index].name for index in (*stage.affines, *stage.pointwise, *stage.reductions)]
        tile = f", tiles of rows x blocks {emitted.tiles[stage.name]}" if stage.affines else ""
        lines.append(f"  {_WHEN[stage.phase]}: {', '.join(names)}  [{stage.width} wide{tile}]")
    weights = sum(_count(graph[index].type.shape) for index in graph.leaves("weight"))
    size = 4 if graph.dtype == "f32" else 8
    lines.append(f"  {program.macs:,} multiply-adds a row and step; {weights * size:,} bytes of weights")
    loaded = program.loaded
    how = "read from the cache" if loaded.from_cache else "compiled"
    lines.append(
        f"  scratch {emitted.scratch.bytes(1, 1):,} bytes for one row and step; {loaded.object_size:,} bytes of "
        f"machine code for {loaded.target.name}, {how} in {program.seconds * 1e3:.0f} ms"
    )
    return lines


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
