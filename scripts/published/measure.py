"""``measure``: run one case in every way that a user may, and compare it with the plain Python loop."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fusecell as fc
from fusecell.errors import NotCompilable
from fusecell.shapes import feature_shape, tensors_of

from .case import Case, Inputs

STEPS, ROWS, SEEDS = 6, 5, 3
# A kernel's rounding errors may be this many times the loop's, and always as many units in the last place.
RATIO, UNIT = 4.0, torch.finfo(torch.float32).eps
LENGTHS = (6, 2, 4, 0, 5)


@dataclass
class Outcome:
    """What became of one case; a check that isn't in ``checks`` could not be made."""

    case: Case
    skipped: str = ""
    broken: str = ""
    inference: bool = False
    training: bool = False
    refusals: list[str] = field(default_factory=list)
    checks: dict[str, bool] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    ratio: float = math.nan
    seconds: float = 0.0

    @property
    def compiled(self) -> bool:
        """Whether it is compiled in inference and in training."""
        return self.inference and self.training

    @property
    def right(self) -> bool:
        """Whether it is compiled in both and no check failed."""
        return self.compiled and all(self.checks.values())


def measure(case: Case) -> Outcome:
    """Measure one case."""
    outcome = Outcome(case)
    start = time.perf_counter()
    try:
        cell = _made(case)
    except (ImportError, OSError) as error:  # OSError: of a shared library that a package needs
        outcome.skipped = f"{case.source} can't be imported: {error}"
        return outcome
    except Exception as error:
        outcome.broken = f"building it raises {type(error).__name__}: {error}"
        return outcome
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _measure(case, cell, outcome)
    outcome.seconds = time.perf_counter() - start
    return outcome


def _measure(case: Case, cell: fc.Cell, outcome: Outcome) -> None:
    double = _in_double(_made(case)) if case.in_double else cell
    dtype = torch.float64 if case.in_double else torch.float32
    try:
        loop = _run(case, double, "eager", dtype)
        if not all(value.isfinite().all() for value in loop):
            outcome.broken = "its Python loop computes numbers that are not finite"
            return
    except Exception as error:
        outcome.broken = f"its Python loop raises {type(error).__name__}: {error}"
        return
    outcome.inference = _compiles(outcome, "inference", lambda: _run(case, double, "compiled", dtype, False))
    outcome.training = _compiles(outcome, "training", lambda: _run(case, double, "compiled", dtype))
    for gradients, compiled in ((False, outcome.inference), (True, outcome.training)):
        if compiled:
            _check_values(case, double, dtype, gradients, outcome)
    if outcome.compiled:
        if case.in_double:
            _check(outcome, "float32", lambda: _check_rounding(case, cell, double, outcome))
        _check(outcome, "chunk bits", lambda: _check_bits(case, cell, outcome))
    if outcome.inference:
        _check(outcome, "stream", lambda: _check_stream(case, cell, outcome))


def _made(case: Case) -> fc.Cell:
    torch.manual_seed(0)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # some packages greet when they are imported
        return case.make().train(case.trains)


def _in_double(cell: fc.Cell) -> fc.Cell:
    """Convert a cell to float64; torch's ``double()`` leaves complex parameters as they are."""
    cell.double()
    for value in (*cell.parameters(), *cell.buffers()):
        if value.is_complex():
            value.data = value.data.to(torch.complex128)
    return cell


def _compiles(outcome: Outcome, mode: str, call: Callable[[], object]) -> bool:
    try:
        call()
    except NotCompilable as refusal:
        outcome.refusals.append(f"{mode}: {' '.join(refusal.reasons)}")
        return False
    except Exception as error:
        outcome.refusals.append(f"{mode}: CRASH {type(error).__name__}: {error}")
        return False
    return True


def _check(outcome: Outcome, name: str, check: Callable[[], bool | None]) -> None:
    """Make a check; it returns None where it doesn't apply."""
    try:
        passed = check()
    except Exception as error:
        outcome.notes.append(f"{name} raises {type(error).__name__}: {error}")
        passed = False
    if passed is not None:
        outcome.checks[name] = passed


def _check_values(case: Case, cell: fc.Cell, dtype: torch.dtype, gradients: bool, outcome: Outcome) -> None:
    """Compare outputs, states and gradients, over plain sequences and all other kinds."""
    generator = torch.Generator().manual_seed(3)
    resets = torch.rand(STEPS, ROWS, generator=generator) < 0.3
    kinds: dict[str, dict[str, Any]] = {
        "values": {},
        "lengths": {"lengths": torch.tensor(LENGTHS)},
        "resets": {"resets": resets},
        "chunks": {"chunks": (2, 1, 3)},
    }
    for kind, options in kinds.items():
        name = f"{kind}, gradients" if gradients else kind

        def compare(options: dict[str, Any] = options, name: str = name) -> bool:
            compiled, loop = (_run(case, cell, runner, dtype, gradients, **options) for runner in RUNNERS)
            apart = max(_apart(*pair) for pair in zip(compiled, loop, strict=True))
            if not apart <= case.exact:
                outcome.notes.append(f"{name}: apart by {apart:.1e}")
            return apart <= case.exact

        _check(outcome, name, compare)


RUNNERS = ("compiled", "eager")


def _apart(actual: Tensor, expected: Tensor) -> float:
    """Return how far two tensors are apart, relative to the larger of one and the expected number."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return math.inf
    both_nan = actual.isnan() & expected.isnan()
    distance = (actual - expected).abs() / expected.abs().clamp(min=1)
    return float(torch.where(both_nan, 0.0, distance).nan_to_num(nan=math.inf).max()) if distance.numel() else 0.0


def _check_rounding(case: Case, cell: fc.Cell, double: fc.Cell, outcome: Outcome) -> bool:
    """Compare the rounding errors of float32 kernels with those of the loop."""
    ratios = []
    for seed in range(SEEDS):
        exact = _run(case, double, "eager", torch.float64, seed=seed)
        kernel, loop = (_error(_run(case, cell, runner, torch.float32, seed=seed), exact) for runner in RUNNERS)
        ratios.append(kernel / max(loop, UNIT))
    # A spike that rounding errors move by a step is no error of either; it is seldom one of most seeds.
    outcome.ratio = sorted(ratios)[SEEDS // 2]
    if not outcome.ratio <= RATIO:
        outcome.notes.append(f"float32: {outcome.ratio:.1f} times the loop's error")
    return outcome.ratio <= RATIO


def _error(values: list[Tensor], exact: list[Tensor]) -> float:
    """Return the largest error of any tensor, relative to the tensor's largest number."""
    return max(
        float((value.double() - true).abs().max() / true.abs().max().clamp(min=1e-3)) if true.numel() else 0.0
        for value, true in zip(values, exact, strict=True)
    )


def _check_bits(case: Case, cell: fc.Cell, outcome: Outcome) -> bool | None:
    """Compare a sequence in pieces with the whole of it, to the bit."""
    if _draws(case, cell):
        return None
    whole, pieces = (_run(case, cell, "compiled", torch.float32, False, chunks=chunks) for chunks in (None, (2, 1, 3)))
    return all(torch.equal(*pair) for pair in zip(whole, pieces, strict=True))


def _check_stream(case: Case, cell: fc.Cell, outcome: Outcome) -> bool | None:
    """Compare a stream with the whole sequence, to the bit."""
    cell = cell.eval() if _draws(case, cell) else cell
    if _draws(case, cell):
        return None
    x = _inputs(case, cell, torch.float32, 0)
    sizes = [tuple(value.shape[2:]) for value in x] if len(x) > 1 else None
    stream = fc.Stream(cell, ROWS, input_sizes=sizes)
    rows = [[(value[t] if len(value) > 1 else value[0]).numpy() for value in x] for t in range(STEPS)]
    steps = [stream.step(tuple(row) if len(row) > 1 else row[0]) for row in rows]
    with fc.runner("compiled"), torch.no_grad():
        outputs, _ = fc.Recurrent(cell)(x if len(x) > 1 else x[0])
    if isinstance(outputs, Tensor):
        return all(torch.equal(torch.from_numpy(step), output) for step, output in zip(steps, outputs, strict=True))
    return all(
        torch.equal(torch.from_numpy(part), output[t])
        for t, step in enumerate(steps)
        for part, output in zip(_parts(step), _parts(outputs), strict=True)
    )


def _parts(values: Any) -> list[Any]:
    return list(values.values() if isinstance(values, dict) else values)


def _draws(case: Case, cell: fc.Cell) -> bool:
    """Whether a step of the cell draws random numbers."""
    x = _inputs(case, cell, torch.float32, 0)
    before = torch.random.get_rng_state()
    with torch.no_grad(), fc.runner("eager"):
        fc.Recurrent(cell)(x if len(x) > 1 else x[0])
    return not torch.equal(before, torch.random.get_rng_state())


def _inputs(case: Case, cell: fc.Cell, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    torch.manual_seed(100 + seed)
    make = case.inputs or (lambda steps, rows: torch.randn(steps, rows, *feature_shape(cell.input_size)))
    values: Inputs = make(STEPS, ROWS)
    several = values if isinstance(values, tuple) else (values,)
    return tuple(value.to(dtype) if value.is_floating_point() else value for value in several)


def _start(case: Case, cell: fc.Cell, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    if callable(case.start):
        torch.manual_seed(200 + seed)
        return tuple(value.to(dtype) for value in case.start(ROWS))
    if case.start == "random":
        torch.manual_seed(200 + seed)
        return tuple(torch.randn(ROWS, *feature_shape(size)).to(dtype) / 2 for size in cell.state_sizes)
    return tuple(value.clone() for value in cell.initial_state(ROWS, dtype=dtype, device="cpu"))


def _run(
    case: Case,
    cell: fc.Cell,
    runner: str,
    dtype: torch.dtype,
    gradients: bool = True,
    *,
    seed: int = 0,
    chunks: tuple[int, ...] | None = None,
    **options: Any,
) -> list[Tensor]:
    """Return the outputs and last states of a sequence, and the gradients of all that can have one."""
    x, start = _inputs(case, cell, dtype, seed), _start(case, cell, dtype, seed)
    leaves = [value for value in (*x, *start) if value.is_floating_point()]
    for value in leaves:
        value.requires_grad_(gradients)
    torch.manual_seed(300 + seed)
    with fc.runner(runner), torch.set_grad_enabled(gradients):
        outputs, state = _in_chunks(fc.Recurrent(cell), x, start, chunks or (STEPS,), options)
    results = [*outputs, *state]
    if not gradients:
        return results
    generator = torch.Generator().manual_seed(4)
    seeds = [torch.randn(value.shape, generator=generator).to(dtype) for value in results]
    pairs = [pair for pair in zip(results, seeds, strict=True) if pair[0].requires_grad]
    parameters = [value for value in cell.parameters() if value.requires_grad]
    derivatives = torch.autograd.grad(
        [a for a, _ in pairs], [*leaves, *parameters], [b for _, b in pairs], allow_unused=True
    )
    none = [torch.zeros_like(value) for value in (*leaves, *parameters)]
    filled = [zero if value is None else value for value, zero in zip(derivatives, none, strict=True)]
    return [value.detach() for value in results] + [_real(value) for value in filled]


def _real(value: Tensor) -> Tensor:
    return torch.view_as_real(value) if value.is_complex() else value


def _in_chunks(
    layer: fc.Recurrent, x: tuple[Tensor, ...], start: tuple[Tensor, ...], chunks: tuple[int, ...], options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    pieces, at, state = [], 0, start
    for steps in chunks:
        part = tuple(value[at : at + steps] if len(value) > 1 else value for value in x)
        given = state if len(state) > 1 else state[0]
        output, after = layer(part if len(part) > 1 else part[0], given, **options)
        pieces.append(list(tensors_of(output)))
        state = after if isinstance(after, tuple) else (after,)
        at += steps
    return [torch.cat(values) for values in zip(*pieces, strict=True)], list(state)
