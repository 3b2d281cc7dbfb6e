"""Checks of ``step`` itself, without a runner."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fusecell.cell import Cell, capture_intermediates
from fusecell.eager import checked_output
from fusecell.execution.options import State
from fusecell.module_snapshot import Snapshot
from fusecell.shapes import feature_shape, map_outputs, output_shapes, tensors_of
from fusecell.step_changes import changing_line, explain_changes
from fusecell.testing.harness import Trial, apart, kinds, outputs_of, same

__all__ = [
    "check_branches",
    "check_gradients",
    "check_module",
    "check_notes",
    "check_purity",
    "check_rows",
    "check_shapes",
]


def check_shapes(trial: Trial) -> Iterator[str]:
    """output, states and initial state have their declared sizes and the dtype of the input"""
    cell, rows = trial.cell, trial.batch_size
    sizes = cell.state_sizes
    if len(sizes) != len(cell.states):
        yield f"state_sizes {sizes} has {len(sizes)} entries for the states {cell.states}. Give one size per name."
        return
    shapes = [(rows, *feature_shape(size)) for size in sizes]
    # In float64 too: a constant made in float32 inside step shows only after cell.double().
    for each in (trial, _doubled(trial)):
        dtype = each.like.dtype
        label = "" if each is trial else f" after cell.to({dtype})"
        start = each.cell.initial_state(rows, dtype=dtype, device=each.like.device)
        yield from _misshapen("initial_state", label, start, cell.states, shapes, dtype)
        with torch.no_grad():
            result: Any = each.cell.step(each.at(0), each.state)
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], tuple)):
            yield f"step returns {kinds(result)}; expected (output, state) with state a tuple: `return h, (h,)`."
            return
        output, after = result
        names = output_shapes(cell.output_size)
        expected = [(rows, *shape) for shape in names.values()]
        try:
            output = checked_output(cell, output, None)
        except TypeError as problem:
            yield str(problem)
            return
        yield from _misshapen("step", label, tensors_of(output), tuple(names), expected, dtype)
        yield from _misshapen("step", label, after, cell.states, shapes, dtype)


def _doubled(trial: Trial) -> Trial:
    try:
        return trial.doubled()
    except Exception:
        return trial  # a cell that can't be copied; the check "copies" says why


def _misshapen(
    source: str, label: str, values: State, names: Sequence[str], shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
) -> Iterator[str]:
    if len(values) != len(names):
        yield f"{source} gives {len(values)} states{label}, expected {len(names)} ({', '.join(names)})."
        return
    for value, name, shape in zip(values, names, shapes, strict=True):
        if tuple(value.shape) != shape:
            yield (
                f"{source} gives {name} of shape {tuple(value.shape)}{label}, expected {shape}. "
                "Set self.state_sizes or self.output_size where a size is not hidden_size."
            )
        if value.dtype != dtype:
            yield (
                f"{source} gives {name} in {value.dtype}{label}, expected {dtype}. "
                "Make constants with x.new_tensor(...), or keep them as buffers, so that they follow the cell."
            )


def check_purity(trial: Trial) -> Iterator[str]:
    """step returns the same twice, changes none of its arguments, and draws no random numbers"""
    cell = trial.cell
    x, state = trial.at(0), trial.state
    inputs = x if isinstance(x, tuple) else (x,)
    named = {
        **{f"input {name}": value for name, value in zip(cell.inputs, inputs, strict=True)},
        **{f"state {name}": value for name, value in zip(cell.states, state, strict=True)},
        **{f"parameter {name}": value for name, value in cell.named_parameters()},
        **{f"buffer {name}": value for name, value in cell.named_buffers()},
    }
    before = {name: value.detach().clone() for name, value in named.items()}
    generator = torch.get_rng_state()
    with torch.no_grad():
        output, after = cell.step(x, state)
        first = map_outputs(Tensor.clone, output), tuple(value.clone() for value in after)
        drew = not torch.equal(generator, torch.get_rng_state())
        # Another seed: if the step draws from the global generator, its results differ.
        torch.manual_seed(trial.seed + 99)
        second = cell.step(x, state)
    for name, value in named.items():
        if not same(value, before[name]):
            yield f"step changes {name} in place: it {apart(value, before[name])}. Compute a new tensor instead."
    if drew:
        yield (
            "step uses the global random generator. Draw in draw(), which is called once per call, and take the "
            "result as one of `inputs`. A Stack draws its dropout in scan, not in step: check a Stack in eval()."
        )
    fix = "Keep nothing from call to call outside of the state, and draw random numbers in draw()."
    yield from trial.compare(second, first, "of a second call with the same arguments", fix)


def check_module(trial: Trial) -> Iterator[str]:
    """step leaves the module as it was: attributes, buffers, parameters, and what lists and objects in it hold"""
    before = Snapshot(trial.cell, values=True)

    def run() -> None:
        with torch.no_grad():
            trial.cell.step(trial.at(0), trial.state)

    try:
        run()
        changes = before.changes()
        before.restore()
        if changes:
            yield explain_changes(changes, changing_line(before, run))
    finally:
        before.restore()


def check_branches(trial: Trial) -> Iterator[str]:
    """step reads no tensor's value into Python, so that the same operations run for every value"""
    with _Reads() as reads, torch.no_grad():
        trial.cell.step(trial.at(0), trial.state)
    if reads.calls:
        yield (
            f"step reads a tensor's value into Python ({', '.join(reads.calls)}), so what it computes may depend on "
            "it. Choose between values with torch.where, and keep numbers as numbers or as 0-dim buffers."
        )


class _Reads(TorchFunctionMode):
    """Collect the calls that read a tensor's value into Python."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("__bool__", "__float__", "__int__", "__index__", "item", "tolist", "numpy"):
            self.calls.append(name)
        return func(*args, **(kwargs or {}))


def check_gradients(trial: Trial) -> Iterator[str]:
    """gradients of two steps agree with finite differences in float64"""
    # In float64, which gradcheck's step of 1e-6 needs: in float32 such a difference has hardly a digit left.
    double = trial.doubled()
    wrapper = _TwoSteps(double)
    leaves = {
        **{f"input {n}": v for n, v in zip(double.cell.inputs, double.inputs, strict=True) if v.is_floating_point()},
        **{f"state {name}": value for name, value in zip(double.cell.states, double.state, strict=True)},
        **{f"parameter {name}": value.detach() for name, value in double.cell.named_parameters()},
    }
    for name, leaf in leaves.items():
        if not leaf.numel():
            continue
        tested = leaf.clone().requires_grad_()
        try:
            # The full Jacobian takes two runs per number; past a thousand a random projection of it has to do.
            torch.autograd.gradcheck(wrapper.of(name), (tested,), fast_mode=leaf.numel() > 1000)
        except RuntimeError as problem:
            # Without the two Jacobians that gradcheck prints, which fill the screen.
            lines = [line.strip() for line in str(problem).partition("numerical:")[0].splitlines() if line.strip()]
            reason = " ".join(lines)[:400].rstrip(",.")
            yield (
                f"the gradient of {name} is not that of the values: {reason}. Look for detach(), .data, no_grad() and "
                "a custom backward in step. A cell with kinks (relu, abs, clamp) can differ at the kink itself: try "
                "another seed. If the gradient is meant to differ, surrogate=True compares it with the loop's."
            )


def check_surrogates(trial: Trial) -> Iterator[str]:
    """gradients of a sequence are those of the loop over step, surrogates included"""
    double = trial.doubled()
    names: list[str] = []
    gradients: list[Any] = []
    for run in (double.scan, double.loop):
        given = [value.clone().requires_grad_(value.is_floating_point()) for value in double.inputs]
        start = [value.clone().requires_grad_() for value in double.state]
        drawn = len(double.caller_inputs)
        with torch.enable_grad():
            outputs, after = run(tuple(given[:drawn] if run == double.scan else given), tuple(start))
        results = [value for value in (*outputs_of(double.cell, outputs), *after) if value.requires_grad]
        leaves = {
            **{f"input {n}": v for n, v in zip(double.cell.inputs, given[:drawn], strict=False) if v.requires_grad},
            **{f"state {name}": value for name, value in zip(double.cell.states, start, strict=True)},
            **{f"parameter {name}": value for name, value in double.cell.named_parameters() if value.requires_grad},
        }
        # Weights that differ from one element to the next: of a plain sum two wrong signs could cancel.
        weights = [torch.linspace(0.5, 1.5, v.numel(), dtype=v.dtype).reshape(v.shape) for v in results]
        of_run = torch.autograd.grad(results, list(leaves.values()), weights, allow_unused=True)
        names, gradients = list(leaves), [*gradients, of_run]
    for name, actual, expected in zip(names, *gradients, strict=True):
        zero = torch.zeros((), dtype=torch.float64)
        a, b = (zero if value is None else value for value in (actual, expected))
        if not double.close(a + torch.zeros_like(b), b + torch.zeros_like(a)):
            yield (
                f"the gradient of {name} differs from that of a loop over step {apart(a, b)}. A custom backward must "
                "depend on its arguments alone."
            )


class _TwoSteps(nn.Module):
    """Two steps as a function of one tensor, so that what a state hands on is differentiated too."""

    def __init__(self, trial: Trial) -> None:
        super().__init__()
        self.cell = trial.cell
        self.trial = trial

    def forward(self, inputs: State, state: State) -> State:
        outputs: list[Tensor] = []
        for t in range(2):
            output, state = self.cell.step(self.trial.at(t, inputs), state)
            outputs += outputs_of(self.cell, output)
        return (*outputs, *state)

    def of(self, name: str) -> Callable[[Tensor], State]:
        """Return the function of one tensor, such as "state h", with all others fixed."""
        kind, label = name.split(" ", 1)
        inputs, states = list(self.trial.inputs), list(self.trial.state)

        def run(value: Tensor) -> State:
            sequence, start, parameters = list(inputs), list(states), {}
            if kind == "input":
                sequence[self.cell.inputs.index(label)] = value
            elif kind == "state":
                start[self.cell.states.index(label)] = value
            else:
                parameters = {f"cell.{label}": value}
            results = torch.func.functional_call(self, parameters, (tuple(sequence), tuple(start)))
            return tuple(result + 0 * value.sum() for result in results)  # gradcheck rejects results without a graph

        return run


def check_rows(trial: Trial) -> Iterator[str]:
    """rows of a batch are independent: the same alone and together, whatever the other rows are"""
    whole = trial.loop()
    for row in (0, trial.batch_size - 1):
        rows = slice(row, row + 1)
        alone = trial.loop(state=tuple(value[rows] for value in trial.state), rows=rows)
        expected = (
            map_outputs(lambda value, rows=rows: value[:, rows], whole[0]),
            tuple(value[rows] for value in whole[1]),
        )
        fix = "Reduce over the last dimension only, and give sizes as -1 or x.shape[0], never as squeeze()."
        yield from trial.compare(alone, expected, f"of row {row} alone, against the same row in the batch,", fix)
    # Row 0 changed: a step that mixes rows, as batch norm does, then changes the others.
    changed = tuple(
        torch.cat((value[:, :1] * 3 + 1, value[:, 1:]), 1) if value.is_floating_point() else value
        for value in trial.inputs
    )
    state = tuple(torch.cat((value[:1] * 3 + 1, value[1:])) for value in trial.state)
    others = slice(1, None)
    after = trial.loop(changed, state)
    fix = "A step must not mix rows, as batch norm or a mean over dim 0 does; use layer norm or the last dimension."
    yield from trial.compare(
        (map_outputs(lambda value: value[:, others], after[0]), tuple(value[others] for value in after[1])),
        (map_outputs(lambda value: value[:, others], whole[0]), tuple(value[others] for value in whole[1])),
        "of other rows, when only row 0 is changed,",
        fix,
    )


def check_notes(trial: Trial) -> Iterator[str]:
    """notes have unique names, a state's name only for the new state, and one row for each row of the input"""
    seen: dict[tuple[int, str], Cell] = {}
    notes: list[tuple[Cell, str, Tensor]] = []
    with capture_intermediates(lambda cell, name, value: notes.append((cell, name, value))), torch.no_grad():
        _, after = trial.cell.step(trial.at(0), trial.state)
    new = dict(zip(trial.cell.states, after, strict=False))
    for cell, name, value in notes:
        if (id(cell), name) in seen:
            yield f"note names {name!r} twice in a step. Give each value its own name, such as {name}1 and {name}2."
        seen[id(cell), name] = cell
        # Only the checked cell's new states are known here; a cell inside it may note its own states freely.
        state = name in cell.states and (cell is not trial.cell or new.get(name) is value)
        if name in (*cell.states, "output") and not state:
            yield (
                f"note uses {name!r}, which is recorded anyway as a state or the output, for another value. Choose "
                "another name."
            )
        if value.dim() < 1 or value.shape[0] != trial.batch_size:
            yield (
                f"note names {name!r} a value of shape {tuple(value.shape)}, expected ({trial.batch_size}, size) "
                f"or ({trial.batch_size}, d1, ..., dk): one row for each row of the input."
            )
