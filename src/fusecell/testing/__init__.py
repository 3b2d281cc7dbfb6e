"""``check_cell``: tests of the cell contract, to run on your own cells."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusecell.cell import Cell
from fusecell.module_snapshot import preserved
from fusecell.testing import sequence_checks, step_checks
from fusecell.testing.harness import Trial, kinds, name_of

__all__ = ["CHECKS", "CellCheckError", "CellReport", "check_cell"]

Check = Callable[[Trial], Iterator[str]]

CHECKS: dict[str, Check] = {
    "shapes": step_checks.check_shapes,
    "purity": step_checks.check_purity,
    "module": step_checks.check_module,
    "branches": step_checks.check_branches,
    "gradients": step_checks.check_gradients,
    "rows": step_checks.check_rows,
    "notes": step_checks.check_notes,
    "sequence": sequence_checks.check_sequence,
    "lengths": sequence_checks.check_lengths,
    "resets": sequence_checks.check_resets,
    "reverse": sequence_checks.check_reverse,
    "halves": sequence_checks.check_halves,
    "empty": sequence_checks.check_empty,
    "unbatched": sequence_checks.check_unbatched,
    "aliasing": sequence_checks.check_aliasing,
    "copies": sequence_checks.check_copies,
    "state_dict": sequence_checks.check_state_dict,
}
"""The checks by name: each takes a :class:`Trial` and yields a sentence for every failure.

The docstring of a check is the sentence that a report prints for it.
"""


class CellCheckError(AssertionError):
    """Raised by :func:`check_cell`; ``failures`` holds a (check, sentence) pair for every failure."""

    def __init__(self, cell: str, failures: Sequence[tuple[str, str]]) -> None:
        self.failures = tuple(failures)
        count = len({name for name, _ in failures})
        # In the order of CHECKS, in which causes come before what follows from them: a step that draws random numbers
        # fails half of the checks.
        title = (
            "1 check:"
            if count == 1
            else f"{count} checks; mend the first one first, as later ones often follow from it:"
        )
        super().__init__("\n".join([f"{cell} fails {title}", *(f"  {name}: {text}" for name, text in failures)]))


@dataclass(frozen=True)
class CellReport:
    """The checks that a cell passed, as (name, sentence) pairs; ``str()`` has a line for each.

    Example:
        >>> import fusecell as fc
        >>> report = fc.testing.check_cell(fc.cells.MGUCell(3, 4))
        >>> report.cell, report.checks[0][0]
        ('MGUCell', 'shapes')
    """

    cell: str
    checks: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        width = max((len(name) for name, _ in self.checks), default=0)
        lines = (f"  {name.ljust(width)}  {what}" for name, what in self.checks)
        return "\n".join([f"{self.cell} keeps the contract:", *lines])


def check_cell(
    cell: Cell,
    *,
    steps: int = 5,
    batch_size: int = 3,
    seed: int = 0,
    extras: Sequence[Tensor] = (),
    x: Tensor | None = None,
    skip: Collection[str] = (),
    surrogate: bool = False,
) -> CellReport:
    """Check a cell against the contract of :class:`fusecell.Cell`, with random inputs and states.

    Sequences run through the active runner and are compared with plain loops over ``step``. The cell is checked in its
    present mode: if it behaves differently in training, call this again after ``eval()``.

    Example:
        >>> import fusecell as fc
        >>> print(fc.testing.check_cell(fc.GRUCell(5, 10)).checks[0])
        ('shapes', 'output, states and initial state have their declared sizes and the dtype of the input')

    Arguments:
        cell: any cell; it is unchanged after the call.
        steps, batch_size: T and N of the sequences, at least 2 each.
        seed: the seed of the random inputs and states.
        extras: values for the cell's ``inputs`` after x, without those that ``draw`` returns; (T, N, ...) or
            (1, N, ...) each.
        x: the input, (T, N, ...), where random numbers won't do, such as token ids.
        skip: names of checks to leave out.
        surrogate: whether the gradient is meant to differ from that of the values, as of spikes and straight-through
            estimators: it is then compared with the loop's, and not with finite differences.

    Returns:
        A :class:`CellReport` of the checks; print it.

    Raises:
        CellCheckError: an AssertionError with a sentence for every failure.
        TypeError: if ``cell`` is not a cell.
        ValueError: for too few steps or rows, an unknown name in ``skip``, or ``extras`` that don't match ``inputs``.
    """
    if not isinstance(cell, Cell):
        raise TypeError(f"check_cell takes a fusecell.Cell, got {type(cell).__name__}. Pass layer.cell for a layer.")
    if steps < 2 or batch_size < 2:
        raise ValueError(f"check_cell needs at least 2 steps and 2 rows, got steps={steps}, batch_size={batch_size}.")
    unknown = set(skip) - set(CHECKS)
    if unknown:
        raise ValueError(f"There are no checks {sorted(unknown)}; there are {', '.join(CHECKS)}.")
    failures: list[tuple[str, str]] = []
    trial = Trial(cell, steps, batch_size, seed, tuple(extras), x=x)
    device = trial.like.device
    generators = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    # Checks run the cell in every way that it may be wrong: the caller's cell and random numbers must not notice.
    with generators, preserved(cell):
        trial.check_extras()
        checks = {name: check for name, check in CHECKS.items() if name not in skip}
        if surrogate and "gradients" in checks:
            checks["gradients"] = step_checks.check_surrogates
        for name, check in checks.items():
            failures += [(name, sentence) for sentence in _run(check, trial)]
            if name == "shapes" and failures:
                break  # with wrong shapes the other checks fail too, and say less about the cause
    if failures:
        raise CellCheckError(name_of(cell), failures)
    return CellReport(name_of(cell), tuple((name, _sentence(check)) for name, check in checks.items()))


def _run(check: Check, trial: Trial) -> list[str]:
    """Run a check and return its sentences; an exception that the cell raises becomes one more."""
    sentences: list[str] = []
    try:
        sentences.extend(check(trial))
    except Exception as problem:
        sentences.append(f"a call raises {kinds(problem)}: {problem}")
    return sentences


def _sentence(check: Check) -> str:
    return (check.__doc__ or "").strip()
