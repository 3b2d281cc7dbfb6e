"""``explain``: what was compiled, what left the loop, what it costs, and why the rest runs as a Python loop."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fusecell.cell import Cell
from fusecell.cell_tree import HasCells
from fusecell.compiler.dispatch.runner import find_program, find_trainable
from fusecell.compiler.ir.graph import Graph
from fusecell.compiler.programs.training import Training
from fusecell.compiler.refusal import Refusal
from fusecell.compiler.runtime.kernel import Kernel
from fusecell.compiler.runtime.stages import KernelStages, check_stage
from fusecell.compiler.schedule.plan import Stage
from fusecell.errors import NotCompilable
from fusecell.execution.context import active_runner, recomputing
from fusecell.inspection.recurrent_parts import named_recurrent_parts
from fusecell.validation import weights_dtype

__all__ = ["ExplainedCell", "Explanation", "explain"]


@dataclass(frozen=True)
class ExplainedCell:
    """How one cell runs, and what each stage of the compiler made of it.

    Without a gradient a cell is one kernel, whose stages ``graph``, ``passes``, ``plan``, ``llvm`` and ``assembly``
    show. With gradients it is two, ``forward`` and ``backward``, each with the same stages, made of a ``joint`` graph.

    Attributes:
        name: where in the layer it is, its class and its sizes.
        text: its part of what ``explain`` prints.
        reasons: why a call without gradient is eager; empty if it is compiled.
        training_reasons: the same for a call with the gradients of all parameters.
    """

    name: str
    text: str
    reasons: tuple[str, ...] = ()
    training_reasons: tuple[str, ...] = ()
    _inference: KernelStages | None = field(default=None, repr=False)
    _joint: Graph | None = field(default=None, repr=False)
    _training: tuple[KernelStages, KernelStages] | None = field(default=None, repr=False)

    @property
    def graph(self) -> str:
        """The step as it was traced."""
        return self._kernel().graph

    @property
    def passes(self) -> Mapping[str, str]:
        """The graph after each pass, by the pass's name, in the order in which they run."""
        return self._kernel().passes

    @property
    def plan(self) -> str:
        """The stages in the order in which they run, with what each computes and stores."""
        return self._kernel().plan

    @property
    def llvm(self) -> str:
        """The LLVM text."""
        return self._kernel().llvm

    @property
    def assembly(self) -> str:
        """The machine code as assembly, for the target in force."""
        return self._kernel().assembly

    @property
    def joint(self) -> str:
        """The step and its gradient as they were traced, before they are partitioned."""
        if self._joint is None:
            raise NotCompilable(self.name, self.training_reasons)
        return self._joint.text

    @property
    def forward(self) -> KernelStages:
        """The stages of the kernel that computes the step and saves values for the backward."""
        return self._both()[0]

    @property
    def backward(self) -> KernelStages:
        """The stages of the kernel that computes the gradients of all parameters that want one."""
        return self._both()[1]

    def stage(self, stage: str, *, gradients: bool = False) -> str:
        """Show one stage, of ``graph``, ``passes``, ``plan``, ``llvm`` and ``asm``, under a headline for each kernel.

        Arguments:
            gradients: of the kernels with gradients; the graph is then the joint one too.
        """
        check_stage(stage)
        if not gradients:
            return f"==== {self.name} ====\n{self._kernel().text(stage)}"
        parts = [("joint", self.joint)] if stage == "graph" else []
        parts += [("forward", self.forward.text(stage)), ("backward", self.backward.text(stage))]
        return "\n".join(f"==== {self.name}, {title} ====\n{text}" for title, text in parts)

    def _kernel(self) -> KernelStages:
        if self._inference is None:
            raise NotCompilable(self.name, self.reasons)
        return self._inference

    def _both(self) -> tuple[KernelStages, KernelStages]:
        if self._training is None:
            raise NotCompilable(self.name, self.training_reasons or ("No parameter wants a gradient.",))
        return self._training


@dataclass(frozen=True)
class Explanation:
    """How a layer or cell runs; printed, the plan.

    What each stage of the compiler made of a cell is in ``cells``. Of a layer with one cell, the explanation itself has
    ``graph``, ``passes``, ``plan``, ``llvm``, ``assembly``, ``joint``, ``forward`` and ``backward`` too; see
    :class:`ExplainedCell`.

    Attributes:
        runner: what a call without gradient on the CPU does under the runner in force, ``"compiled"`` or ``"eager"``;
            "compiled" only if every cell inside is.
        training_runner: the same for a call with the gradients of all parameters.
        reasons: why either is eager, a sentence each; empty if both are compiled.
        text: the plan, cell by cell.
        cells: each cell in turn, with its stages.
    """

    runner: str
    training_runner: str
    reasons: tuple[str, ...]
    text: str
    cells: tuple[ExplainedCell, ...] = field(repr=False)

    @property
    def graph(self) -> str:
        """The step of the only cell, as it was traced."""
        return self._cell().graph

    @property
    def passes(self) -> Mapping[str, str]:
        """The graph of the only cell after each pass, by the pass's name."""
        return self._cell().passes

    @property
    def plan(self) -> str:
        """The stages of the only cell, with what each computes and stores."""
        return self._cell().plan

    @property
    def llvm(self) -> str:
        """The LLVM text of the only cell."""
        return self._cell().llvm

    @property
    def assembly(self) -> str:
        """The machine code of the only cell, as assembly for the target in force."""
        return self._cell().assembly

    @property
    def joint(self) -> str:
        """The step of the only cell and its gradient, as they were traced."""
        return self._cell().joint

    @property
    def forward(self) -> KernelStages:
        """The stages of the only cell's forward with gradients."""
        return self._cell().forward

    @property
    def backward(self) -> KernelStages:
        """The stages of the only cell's backward."""
        return self._cell().backward

    def _cell(self) -> ExplainedCell:
        if len(self.cells) > 1:
            names = ", ".join(cell.name for cell in self.cells)
            raise ValueError(
                f"this layer has {len(self.cells)} cells ({names}), each with its own stages: "
                "say which by explain(...).cells[0]."
            )
        return self.cells[0]

    def _repr_html_(self) -> str:
        return f'<pre style="white-space: pre">{html.escape(str(self))}</pre>'

    def __str__(self) -> str:
        return self.text


def explain(module: nn.Module, *, input_sizes: Sequence[int] | None = None) -> Explanation:
    """Say how a layer or cell runs, tracing and compiling it if need be.

    Example:
        >>> import fusecell as fc
        >>> explained = fc.explain(fc.GRU(5, 10))
        >>> explained.runner
        'compiled'
        >>> list(explained.passes)[:3]
        ['fold_constants', 'spread_constants', 'split_concat_products']

    Arguments:
        module: a cell, or any module with cells inside: Recurrent, Stack, Bidirectional, Sequential, GRU, LSTM, RNN.
        input_sizes: the features of each input that a call gives, for cells that are given several.

    Returns:
        An :class:`Explanation`; print it to read the plan.

    Raises:
        TypeError: if there is no cell in the module.
        ValueError: if a cell takes several inputs and ``input_sizes`` doesn't say how wide each is.
    """
    cells = _leaves(module)
    if not cells:
        raise TypeError(f"explain takes a layer or a cell of fusecell, got {type(module).__name__}, which has none.")
    explained = tuple(_explain_cell(name, cell, input_sizes) for name, cell in cells)
    reasons = [reason for each in explained for reason in (*each.reasons, *each.training_reasons)]
    inference = not any(each.reasons for each in explained)
    training = not any(each.training_reasons for each in explained)
    if active_runner() == "eager":
        reasons.insert(0, "The eager runner is in force.")
        inference = training = False
    return Explanation(
        "compiled" if inference else "eager",
        "compiled" if training else "eager",
        tuple(dict.fromkeys(reasons)),
        "\n".join(each.text for each in explained),
        explained,
    )


def _explain_cell(name: str, cell: Cell, input_sizes: Sequence[int] | None) -> ExplainedCell:
    title = f"{name}{type(cell).__name__}({cell.input_size}, {cell.hidden_size})"
    dtype = weights_dtype(cell) or torch.get_default_dtype()
    if dtype not in (torch.float32, torch.float64):
        reason = f"{type(cell).__name__}: its weights are {dtype}; float32 and float64 are compiled."
        return ExplainedCell(title, f"{title}: eager\n  {reason}", (reason,), (reason,))
    inputs = _inputs(cell, input_sizes, dtype)
    lines = [title]
    reasons: tuple[str, ...] = ()
    training_reasons: tuple[str, ...] = ()
    inference: KernelStages | None = None
    both: tuple[KernelStages, KernelStages] | None = None
    with torch.inference_mode(False), torch.enable_grad():
        program, learner = find_program(cell, inputs), find_trainable(cell, inputs)
    if isinstance(program, Refusal):
        reasons = tuple(f"{type(cell).__name__}: {reason}" for reason in program.reasons)
        lines += ["  eager", *(f"    {reason}" for reason in program.reasons)]
    else:
        inference = KernelStages(program.kernel)
        lines += [f"  compiled in {program.seconds * 1e3:.0f} ms", *_describe(program.kernel)]
    if isinstance(learner, Refusal):
        training_reasons = tuple(f"{type(cell).__name__}, with gradients: {reason}" for reason in learner.reasons)
        lines += ["  with gradients: eager", *(f"    {reason}" for reason in learner.reasons)]
    elif not isinstance(program, Refusal):
        wanted = [False] * len(inputs) + [value.requires_grad for value in learner.traced.weights.values(cell)]
        training = learner.training(wanted, recomputing())
        if isinstance(training, Refusal):
            training_reasons = training.reasons
        elif any(wanted):
            both = KernelStages(training.forward.kernel), KernelStages(training.backward.kernel)
            lines += _describe_training(training)
    joint = None if isinstance(learner, Refusal) else learner.traced.graph
    return ExplainedCell(title, "\n".join(lines), reasons, training_reasons, inference, joint, both)


def _inputs(cell: Cell, sizes: Sequence[int] | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """One step of one row of each input."""
    drawn = cell.draw(1, 1, dtype=dtype, device="cpu")
    given = len(cell.inputs) - len(drawn)
    names = ", ".join(cell.inputs[:given])
    if sizes is None and given != 1:
        raise ValueError(
            f"{type(cell).__name__} is given {given} inputs ({names}), whose widths are known at a call only: say "
            "explain(..., input_sizes=(...)), a number of features for each."
        )
    if sizes is not None and len(sizes) != given:
        raise ValueError(f"{type(cell).__name__} is given {given} inputs ({names}), got {len(sizes)} input_sizes.")
    widths = (cell.input_size,) if sizes is None else tuple(sizes)
    return (*(torch.zeros(1, 1, width, dtype=dtype) for width in widths), *drawn)


def _leaves(module: nn.Module) -> list[tuple[str, Cell]]:
    """List the cells that a step of ``module`` runs, each with a title; a Stack's and a drop-in layer's one by one."""
    cells: list[tuple[str, Cell]] = []
    for name, part in named_recurrent_parts(module):
        if isinstance(part, HasCells):
            cells += [(f"{name}[layer {layer}, direction {way}] ", cell) for layer, way, cell in part.leaf_cells()]
        elif isinstance(part, Cell):
            cells.append((f"{name} " if name else "", part))
    return cells


_WHEN = {
    "once": "once per call",
    "hoisted": "before the loop, a chunk of steps at once",
    "loop": "in the loop",
    "post": "after the loop, a chunk of steps at once",
}


def _describe(kernel: Kernel) -> list[str]:
    """A kernel's stages in the order in which they run, and what it costs."""
    graph, emitted, plan = kernel.plan.graph, kernel.emitted, kernel.plan
    lines = []
    for phase, when in _WHEN.items():
        stages = [stage for stage in plan.stages if stage.phase == phase]
        lines += [f"    {when}"] if stages else []
        lines += [f"      {_describe_stage(kernel, stage)}" for stage in stages]
    if plan.sums:
        sums = {found.label.removeprefix("grad.weight."): None for found in plan.sums}
        lines.append(f"    after the loop, summed over all rows and steps: {', '.join(sums)}")
    weights = sum(math.prod(graph[index].type.shape) for index in graph.leaves("weight")) * kernel.itemsize
    scratch = emitted.scratch
    lines.append(
        f"    {2 * kernel.macs:,} FLOPs of products a row and step; {weights:,} bytes of weights; scratch "
        f"{scratch.fixed:,} bytes, {scratch.per_row:,} a row, {scratch.per_chunk_row:,} a row and step of a chunk"
    )
    loaded = kernel.loaded
    how = "read from the cache" if loaded.from_cache else "compiled"
    lines.append(f"    {loaded.object_size:,} bytes of machine code for {loaded.target.name}, {how}")
    if not loaded.target.isa.flushes_denormals:
        lines.append(f"    {loaded.target.isa.about_denormals}")
    return lines


def _describe_stage(kernel: Kernel, stage: Stage) -> str:
    graph = kernel.plan.graph
    parts = []
    products = [graph[index].name for index in stage.affines]
    if products:
        parts.append(f"products {', '.join(products)} in tiles of rows x blocks {kernel.emitted.tiles[stage.name]}")
    for what, indices in (("", stage.pointwise), ("reductions ", stage.reductions)):
        if indices:
            parts.append(what + ", ".join(graph[index].name for index in indices))
    return f"{stage.width} wide: {'; '.join(parts) or 'copies'}"


def _describe_training(training: Training) -> Iterator[str]:
    kept = ", ".join(name.removeprefix("saved.") for name, _ in training.graphs.saved)
    size = training.saved_numbers * training.forward.kernel.itemsize
    yield f"  with gradients, kept for the backward: {kept}; {size:,} bytes a row and step"
    yield "  the backward, from the last step to the first"
    yield from _describe(training.backward.kernel)
