"""``explain``: how each cell of a layer is compiled, stage by stage, and why a cell is not compiled."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fusecell.cell import Cell
from fusecell.cell_tree import HasCells
from fusecell.compiler.dispatch.runner import find_program, find_trainable
from fusecell.compiler.frontend.dtypes import COMPILED_DTYPES, has_16_bits
from fusecell.compiler.ir.graph import Graph
from fusecell.compiler.refusal import Refusal
from fusecell.compiler.runtime.debug_output import KernelStages, check_stage
from fusecell.errors import NotCompilable
from fusecell.execution.context import active_runner, recomputing
from fusecell.inspection.kernel_descriptions import describe_kernel, describe_refusal, describe_training
from fusecell.inspection.recurrent_parts import named_recurrent_parts
from fusecell.shapes import Size, feature_shape
from fusecell.validation import weights_dtype

__all__ = ["ExplainedCell", "Explanation", "explain"]


@dataclass(frozen=True)
class ExplainedCell:
    """How one cell runs, and the result of each stage of the compiler.

    Without gradients a cell is one kernel; ``graph``, ``passes``, ``plan``, ``llvm`` and ``assembly`` are its stages.
    With gradients it is two kernels, ``forward`` and ``backward``, each with the same stages, partitioned from one
    ``joint`` graph of the step and its gradient.

    Attributes:
        name: the path in the layer, the class and the sizes.
        text: the part of the printed explanation that is about this cell.
        reasons: why a call without gradients is eager; empty if it is compiled.
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
        """The graph of the step as traced, before any pass."""
        return self._kernel().graph

    @property
    def passes(self) -> Mapping[str, str]:
        """The graph after each pass, by name, in the order of the passes."""
        return self._kernel().passes

    @property
    def plan(self) -> str:
        """The schedule: the loop nest's stages in order, with what each computes and stores."""
        return self._kernel().plan

    @property
    def llvm(self) -> str:
        """The LLVM text."""
        return self._kernel().llvm

    @property
    def assembly(self) -> str:
        """The machine code, disassembled, for the target in force."""
        return self._kernel().assembly

    @property
    def joint(self) -> str:
        """The joint graph of the step and its gradient, before it is partitioned into forward and backward."""
        if self._joint is None:
            raise NotCompilable(self.name, self.training_reasons)
        return self._joint.text

    @property
    def forward(self) -> KernelStages:
        """The stages of the forward kernel, which computes the step and saves values for the backward."""
        return self._training_kernels()[0]

    @property
    def backward(self) -> KernelStages:
        """The stages of the backward kernel, which computes the gradients of all parameters that require one."""
        return self._training_kernels()[1]

    def stage(self, stage: str, *, gradients: bool = False) -> str:
        """Return the text of one stage, with a headline for each kernel.

        Arguments:
            stage: "graph", "passes", "plan", "llvm" or "asm".
            gradients: show the forward and backward kernels instead, for "graph" also the joint graph.

        Raises:
            ValueError: for any other stage.
            NotCompilable: if the cell has no such kernel; the message says why.
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

    def _training_kernels(self) -> tuple[KernelStages, KernelStages]:
        if self._training is None:
            raise NotCompilable(self.name, self.training_reasons or ("No parameter requires a gradient.",))
        return self._training


@dataclass(frozen=True)
class Explanation:
    """How a layer or cell runs; ``print`` shows a summary of each cell.

    The stages of the compiler are in ``cells``, for each cell. For a layer with one cell, the explanation itself also
    has ``graph``, ``passes``, ``plan``, ``llvm``, ``assembly``, ``joint``, ``forward`` and ``backward``; see
    :class:`ExplainedCell`.

    Attributes:
        runner: how a call without gradients runs on the CPU under the active runner: ``"compiled"`` if every cell is
            compiled, else ``"eager"``.
        training_runner: the same for a call with the gradients of all parameters.
        reasons: why either is eager, a sentence each; empty if both are compiled.
        text: the printed summary, cell by cell.
        cells: an :class:`ExplainedCell` for each cell, bottom first.
    """

    runner: str
    training_runner: str
    reasons: tuple[str, ...]
    text: str
    cells: tuple[ExplainedCell, ...] = field(repr=False)

    @property
    def graph(self) -> str:
        """:attr:`ExplainedCell.graph` of the only cell."""
        return self._cell().graph

    @property
    def passes(self) -> Mapping[str, str]:
        """:attr:`ExplainedCell.passes` of the only cell."""
        return self._cell().passes

    @property
    def plan(self) -> str:
        """:attr:`ExplainedCell.plan` of the only cell."""
        return self._cell().plan

    @property
    def llvm(self) -> str:
        """:attr:`ExplainedCell.llvm` of the only cell."""
        return self._cell().llvm

    @property
    def assembly(self) -> str:
        """:attr:`ExplainedCell.assembly` of the only cell."""
        return self._cell().assembly

    @property
    def joint(self) -> str:
        """:attr:`ExplainedCell.joint` of the only cell."""
        return self._cell().joint

    @property
    def forward(self) -> KernelStages:
        """:attr:`ExplainedCell.forward` of the only cell."""
        return self._cell().forward

    @property
    def backward(self) -> KernelStages:
        """:attr:`ExplainedCell.backward` of the only cell."""
        return self._cell().backward

    def _cell(self) -> ExplainedCell:
        if len(self.cells) > 1:
            names = ", ".join(cell.name for cell in self.cells)
            raise ValueError(
                f"this layer has {len(self.cells)} cells ({names}), each with its own stages: "
                "pick one, for example explain(...).cells[0]."
            )
        return self.cells[0]

    def _repr_html_(self) -> str:
        return f'<pre style="white-space: pre">{html.escape(str(self))}</pre>'

    def __str__(self) -> str:
        return self.text


def explain(
    module: nn.Module,
    *,
    input_sizes: Sequence[Size] | None = None,
    input_dtypes: Sequence[torch.dtype] | None = None,
) -> Explanation:
    """Explain how a layer or cell runs: trace and compile it, and describe each stage.

    Example:
        >>> import fusecell as fc
        >>> explained = fc.explain(fc.GRU(5, 10))
        >>> explained.runner
        'compiled'
        >>> list(explained.passes)[:3]
        ['fold_constants', 'spread_constants', 'split_concat_products']

    Arguments:
        module: a cell, or any module with cells inside: Recurrent, Stack, Bidirectional, Sequential, GRU, LSTM, RNN.
        input_sizes: the features or shape of each input, for a cell with several inputs.
        input_dtypes: the dtype of each input, for a cell that takes integers: ``(torch.int64,)`` for token ids.

    Returns:
        An :class:`Explanation`; print it.

    Raises:
        TypeError: if there is no cell in the module.
        ValueError: if a cell has several inputs and ``input_sizes`` doesn't give the features of each.
    """
    cells = _leaves(module)
    if not cells:
        raise TypeError(f"explain takes a layer or a cell of fusecell, got {type(module).__name__}, which has none.")
    explained = tuple(_explain_cell(name, cell, input_sizes, input_dtypes) for name, cell in cells)
    reasons = []
    for (_, cell), each in zip(cells, explained, strict=True):
        kind = type(cell).__name__
        reasons += [f"{kind}: {reason}" for reason in each.reasons]
        reasons += [f"{kind}, with gradients: {reason}" for reason in each.training_reasons]
    inference = not any(each.reasons for each in explained)
    training = not any(each.training_reasons for each in explained)
    if active_runner() == "eager":
        reasons.insert(0, "The eager runner is in force.")
        inference = training = False
    return Explanation(
        "compiled" if inference else "eager",
        "compiled" if training else "eager",
        tuple(dict.fromkeys(reasons)),  # each sentence once: the layers of a GRU are eager for the same reason
        "\n".join(each.text for each in explained),
        explained,
    )


def _explain_cell(
    name: str, cell: Cell, input_sizes: Sequence[Size] | None, input_dtypes: Sequence[torch.dtype] | None
) -> ExplainedCell:
    title = f"{name}{type(cell).__name__}({cell.input_size}, {cell.hidden_size})"
    dtype = weights_dtype(cell) or torch.get_default_dtype()
    # Refused here, before anything is traced.
    if dtype not in COMPILED_DTYPES:
        reason = f"Its weights are {dtype}; only float32, float64, bfloat16 and float16 are compiled."
        return ExplainedCell(title, f"{title}: eager\n  {reason}", (reason,), (reason,))
    inputs = _inputs(cell, input_sizes, input_dtypes, dtype)
    lines = [title]
    if has_16_bits(dtype):
        lines.append(f"  {str(dtype).removeprefix('torch.')} outside, float32 in the kernels")
    reasons: tuple[str, ...] = ()
    training_reasons: tuple[str, ...] = ()
    inference: KernelStages | None = None
    kernels: tuple[KernelStages, KernelStages] | None = None
    # As a training call would find them, whatever the caller's mode: programs compiled here serve later calls too.
    with torch.inference_mode(False), torch.enable_grad():
        program, trainable = find_program(cell, inputs, dtype), find_trainable(cell, inputs, dtype)
    if isinstance(program, Refusal):
        reasons = program.reasons
        lines += ["  eager", *(f"    {reason}" for reason in program.reasons)]
    else:
        inference = KernelStages(program.kernel)
        lines += [f"  compiled in {program.seconds * 1e3:.0f} ms", *describe_kernel(program.kernel)]
    if isinstance(trainable, Refusal):
        training_reasons = trainable.reasons
        lines += describe_refusal(program, trainable)
    elif not isinstance(program, Refusal):
        requires_grad = trainable.flags([False] * len(inputs), trainable.traced.weights.values(cell))
        training = trainable.training(requires_grad, bool(recomputing()))
        if isinstance(training, Refusal):
            training_reasons = training.reasons
        elif any(requires_grad):
            kernels = KernelStages(training.forward.kernel), KernelStages(training.backward.kernel)
            lines += describe_training(training)
    joint = None if isinstance(trainable, Refusal) else trainable.traced.graph
    return ExplainedCell(title, "\n".join(lines), reasons, training_reasons, inference, joint, kernels)


def _inputs(
    cell: Cell, sizes: Sequence[Size] | None, dtypes: Sequence[torch.dtype] | None, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Make one step of one row of each input, zeros, or what the cell draws."""
    drawn = cell.draw(1, 1, dtype=dtype, device="cpu")
    count = len(cell.inputs) - len(drawn)
    names = ", ".join(cell.inputs[:count])
    if sizes is None and count != 1:
        raise ValueError(
            f"{type(cell).__name__} takes {count} inputs ({names}), whose numbers of features are unknown before a "
            "call: pass explain(..., input_sizes=(...)), the features of each."
        )
    if sizes is not None and len(sizes) != count:
        raise ValueError(
            f"{type(cell).__name__} takes {count} inputs ({names}), got {len(sizes)} input_sizes: pass one for each."
        )
    if dtypes is not None and len(dtypes) != count:
        raise ValueError(
            f"{type(cell).__name__} takes {count} inputs ({names}), got {len(dtypes)} input_dtypes: pass one for each."
        )
    shapes = map(feature_shape, (cell.input_size,) if sizes is None else tuple(sizes))
    pairs = zip(shapes, dtypes or (dtype,) * count, strict=True)
    # One of each will do: a program serves any number of steps and rows.
    return (*(torch.zeros((1, 1, *shape), dtype=each) for shape, each in pairs), *drawn)


def _leaves(module: nn.Module) -> list[tuple[str, Cell]]:
    """List the cells that run in a step of ``module``, each with a title prefix; those of a Stack or GRU one by one."""
    cells: list[tuple[str, Cell]] = []
    for name, part in named_recurrent_parts(module):
        if isinstance(part, HasCells):
            for layer, direction, cell in part.leaf_cells():
                cells.append((f"{name}[layer {layer}, direction {direction}] ", cell))
        elif isinstance(part, Cell):
            cells.append((f"{name} " if name else "", part))
    return cells
