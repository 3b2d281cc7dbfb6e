"""Checks of a cell over sequences, run through the active runner, and of the cell as a module."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import torch
from torch import Tensor

from fusecell.cell import Cell
from fusecell.execution.options import Options, State
from fusecell.execution.results import public_state
from fusecell.execution.runners import run
from fusecell.shapes import map_outputs, output_shapes, tensors_of, zero_outputs
from fusecell.testing.harness import Outcome, Trial, apart, kinds, outputs_of, same
from fusecell.validation import state_tuple

__all__ = [
    "check_aliasing",
    "check_copies",
    "check_empty",
    "check_halves",
    "check_lengths",
    "check_resets",
    "check_reverse",
    "check_sequence",
    "check_state_dict",
    "check_unbatched",
]

_KEEPS = "Keep whatever a step needs from the one before in the state."


def check_sequence(trial: Trial) -> Iterator[str]:
    """a whole sequence equals a plain loop over step"""
    with torch.no_grad():
        expected = trial.loop()
    yield from trial.compare(trial.scan(), expected, "of the sequence, against a loop over step,", _KEEPS)


def check_reverse(trial: Trial) -> Iterator[str]:
    """a reversed sequence equals a plain loop from each row's last valid step to its first"""
    lengths = _lengths(trial)
    expected = _row_by_row(trial, lengths, None, reverse=True)
    actual = trial.scan(_padded_with_nan(trial, lengths), lengths=lengths, reverse=True)
    yield from trial.compare(actual, expected, f"reversed within lengths {lengths}, against a plain loop,", _KEEPS)


def check_lengths(trial: Trial) -> Iterator[str]:
    """with lengths, each row equals a plain loop over its valid steps, whatever the padding is"""
    lengths = _lengths(trial)
    expected = _row_by_row(trial, lengths, None)
    actual = trial.scan(_padded_with_nan(trial, lengths), lengths=lengths)
    yield from trial.compare(actual, expected, f"with lengths {lengths}, against a plain loop,", _KEEPS)


def check_resets(trial: Trial) -> Iterator[str]:
    """with resets, each row equals a plain loop that returns to initial_state"""
    lengths = [trial.steps] * trial.batch_size
    resets = torch.zeros(trial.steps, trial.batch_size, dtype=torch.bool)
    # At the first, second and last step, and in no row at the same steps as in another.
    resets[1, 0] = resets[-1, 1:] = resets[0, -1] = True
    expected = _row_by_row(trial, lengths, resets)
    fix = "initial_state must give the same at every call, and all memory must be in the state."
    yield from trial.compare(trial.scan(resets=resets), expected, "with resets, against a plain loop,", fix)


def _lengths(trial: Trial) -> list[int]:
    """Return unsorted lengths: the first row is whole, the last one empty."""
    return [trial.steps, *(1 + row % trial.steps for row in range(trial.batch_size - 2)), 0]


def _padded_with_nan(trial: Trial, lengths: list[int]) -> State:
    """Return the caller's inputs with NaN in x beyond each row's length."""
    # NaN, so that any arithmetic on the padding, even times zero, shows.
    x = trial.caller_inputs[0].clone()
    if not x.is_floating_point():  # integers have no NaN
        return trial.caller_inputs
    for row, length in enumerate(lengths):
        x[length:, row] = torch.nan
    return (x, *trial.caller_inputs[1:])


@torch.no_grad()
def _row_by_row(trial: Trial, lengths: list[int], resets: Tensor | None, reverse: bool = False) -> Outcome:
    """Run each row by itself in a plain loop: this defines lengths, resets and reverse."""
    like, cell = trial.like, trial.cell
    outputs = zero_outputs(cell.output_size, like.new_zeros, trial.steps, trial.batch_size)
    first = cell.initial_state(trial.batch_size, dtype=like.dtype, device=like.device)
    after: list[State] = []
    for n, length in enumerate(lengths):
        rows = slice(n, n + 1)
        state = tuple(value[rows] for value in trial.state)
        for t in reversed(range(length)) if reverse else range(length):
            if resets is not None and resets[t, n]:
                state = tuple(value[rows] for value in first)
            output, state = cell.step(trial.at(t, rows=rows), state)
            for whole, value in zip(tensors_of(outputs), outputs_of(cell, output), strict=True):
                whole[t, n] = value[0]
        after.append(state)
    return outputs, tuple(torch.cat(column) for column in zip(*after, strict=True))


def check_halves(trial: Trial) -> Iterator[str]:
    """a sequence in two halves, the state carried over, equals the whole"""
    middle = trial.steps // 2
    with torch.no_grad():
        whole = run(trial.cell, trial.inputs, trial.state, Options())
        first = run(trial.cell, _times(trial.inputs, slice(0, middle)), trial.state, Options())
        second = run(trial.cell, _times(trial.inputs, slice(middle, None)), first[1], Options())
    joined = map_outputs(lambda *halves: torch.cat(halves), first[0], second[0]), second[1]
    yield from trial.compare(joined, whole, f"of two halves, cut at step {middle}, against the whole,", _KEEPS)


def _times(inputs: State, times: slice) -> State:
    """Return some steps of the inputs; those with one step are constant over time."""
    return tuple(value if value.shape[0] == 1 else value[times] for value in inputs)


def check_empty(trial: Trial) -> Iterator[str]:
    """a sequence of no steps gives an empty output and the initial state of the call"""
    expected = zero_outputs(trial.cell.output_size, trial.like.new_zeros, 0, trial.batch_size), trial.state
    actual = trial.scan(_times(trial.caller_inputs, slice(0, 0)))
    yield from trial.compare(actual, expected, "of a sequence of no steps", "draw() is called with steps=0 then.")


def check_unbatched(trial: Trial) -> Iterator[str]:
    """input and state without a batch dimension give the same as a batch of one, in layers and cell(x)"""
    cell, fix = trial.cell, "Leave forward to fusecell.Cell, and index from the end in step: x[..., :n], dim=-1."
    inputs = tuple(value[:, :1] for value in trial.caller_inputs)
    state = tuple(value[:1] for value in trial.state)
    row_inputs, row_state = tuple(value[:, 0] for value in inputs), tuple(value[0] for value in state)
    batched = trial.scan(inputs, state)
    outputs, after = trial.scan(row_inputs, row_state)
    unbatched = map_outputs(lambda value: value[:, None], outputs), tuple(value[None] for value in after)
    yield from trial.compare(unbatched, batched, "of a sequence without a batch", fix)
    pairs = zip(_call(trial, row_inputs, row_state), _call(trial, inputs, state), strict=True)
    for name, (value, expected) in zip(cell.states, pairs, strict=True):
        if not trial.close(value[None], expected):
            yield f"state {name} of cell(x) without a batch {apart(value[None], expected)}. {fix}"


def _call(trial: Trial, inputs: State, state: State) -> State:
    """Call the cell as a module on the first step, as torch.nn's cells are called; return the new state."""
    torch.manual_seed(trial.seed + 2)
    x = tuple(value[0] for value in inputs)
    with torch.no_grad():
        return state_tuple(trial.cell, trial.cell(x if len(x) > 1 else x[0], public_state(state)))


def check_aliasing(trial: Trial) -> Iterator[str]:
    """results of layers and cell(x) share no memory with the arguments or with each other"""
    arguments = {
        **{f"input {name}": value for name, value in zip(trial.cell.inputs, trial.caller_inputs, strict=False)},
        **{f"state {name}": value for name, value in zip(trial.cell.states, trial.state, strict=True)},
        **{f"parameter {name}": value for name, value in trial.cell.named_parameters()},
        **{f"buffer {name}": value for name, value in trial.cell.named_buffers()},
    }
    # No steps: there the new state is the given one, which a careless implementation returns as it is.
    for call in ("a layer", "a layer over no steps", "cell(x)"):
        results = _results(trial, call)
        owners = {_memory(value): name for name, value in arguments.items() if value.numel()}
        for name, value in results.items():
            if value.numel() and _memory(value) in owners:
                yield (
                    f"{name} that {call} returns shares its memory with {owners[_memory(value)]}; writing to one would "
                    "change the other. Leave forward to fusecell.Cell, which copies, or return a clone()."
                )
            owners[_memory(value)] = name


def _results(trial: Trial, call: str) -> dict[str, Tensor]:
    """Return all that a call returns, by name."""
    names = [f"state {name}" for name in trial.cell.states]
    if call == "cell(x)":
        return dict(zip(names, _call(trial, trial.caller_inputs, trial.state), strict=True))
    outputs, after = trial.scan(trial.caller_inputs if call == "a layer" else _times(trial.caller_inputs, slice(0, 0)))
    labels = [f"the {name}" for name in output_shapes(trial.cell.output_size)]
    return {**dict(zip(labels, tensors_of(outputs), strict=True)), **dict(zip(names, after, strict=True))}


def _memory(value: Tensor) -> int:
    """Return the address of a tensor's storage, which all views of it share."""
    return value.untyped_storage().data_ptr()


def check_copies(trial: Trial) -> Iterator[str]:
    """pickle and deepcopy give a cell that computes the same"""
    with torch.no_grad():
        expected = trial.loop()
    for how, duplicate in (("pickle", _pickled), ("deepcopy", copy.deepcopy)):
        try:
            twin = duplicate(trial.cell)
        except Exception as problem:
            yield (
                f"{how} raises {kinds(problem)}: {problem}. Define the class at the top of a module, and keep lambdas, "
                "open files and computed tensors out of its attributes."
            )
            continue
        other = Trial(twin, trial.steps, trial.batch_size, trial.seed, trial.extras, x=trial.x)
        with torch.no_grad():
            fix = "Attributes that step uses must survive the copy; see __getstate__."
            yield from trial.compare(other.loop(), expected, f"of a copy by {how}", fix)


def _pickled(cell: Cell) -> Cell:
    twin: Cell = pickle.loads(pickle.dumps(cell))
    return twin


def check_state_dict(trial: Trial) -> Iterator[str]:
    """the state_dict holds the cell's parameters and buffers, nothing else, and loads back"""
    cell = trial.cell
    # Tied parameters are in the state_dict under each of their names.
    saved = cell.state_dict()
    parameters = {name: value.detach() for name, value in cell.named_parameters(remove_duplicate=False)}
    tensors = {**parameters, **dict(cell.named_buffers(remove_duplicate=False))}
    for name in saved.keys() - tensors.keys():
        yield f"state_dict holds {name!r}, which is neither parameter nor buffer. Leave get_extra_state unwritten."
    for name in parameters.keys() - saved.keys():
        yield f"state_dict lacks the parameter {name!r}, so saving a model would lose it."
    for name in saved.keys() & tensors.keys():
        if not same(saved[name], tensors[name]):
            yield f"{name!r} in the state_dict {apart(saved[name], tensors[name])}, which is what the cell holds."
    problems = copy.deepcopy(cell).load_state_dict(saved, strict=False)
    for name in (*problems.missing_keys, *problems.unexpected_keys):
        yield f"load_state_dict doesn't take {name!r} from the cell's own state_dict."
