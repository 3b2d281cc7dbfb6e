"""Steps as data: a recipe's cell, its source to paste and run, and its comparison on two runners."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusecell as fc
from fusecell.errors import FusecellError

__all__ = [
    "Call",
    "Data",
    "IllConditioned",
    "Op",
    "RandomCell",
    "Recipe",
    "Weight",
    "check_backward",
    "check_forward",
    "source",
]

State = tuple[Tensor, ...]

NUDGE = 1e-12
CONDITION = 1e4
"""Cells whose results move more than this times a nudge of their numbers are no test of rounding."""
DOUBLE = 1e-10
"""2e-16 a rounding, magnified 1e4 times at most, leaves room for fifty of them in a row, all one way."""
SINGLE = 2e-6
_SEED = 5
"""Of what a step draws."""
FLOOR = 1e-3
"""Smaller results are differences of numbers near 1, with their rounding."""


@dataclass(frozen=True)
class Weight:
    """A parameter or a buffer, as the expression that makes it."""

    name: str
    source: str
    buffer: bool = False


@dataclass(frozen=True)
class Op:
    """A line of a step: the value's name and the expression that makes it, from weights and the values in ``args``."""

    name: str
    source: str
    args: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """A cell: its weights, the lines of its step and what they return.

    Arguments:
        starts: the weights that its initial state is; none for zeros.
        after: the value that each state becomes.
    """

    input_size: int
    state_sizes: tuple[int, ...]
    output_size: int
    weights: tuple[Weight, ...]
    starts: tuple[str, ...]
    ops: tuple[Op, ...]
    output: str
    after: tuple[str, ...]

    @property
    def states(self) -> tuple[str, ...]:
        """The names of the states."""
        return tuple(f"h{place}" for place in range(len(self.state_sizes)))

    @property
    def draws(self) -> bool:
        """Whether a step draws random numbers: in float32 others than in float64."""
        form = re.compile(r"randn_like|rand\(len|dropout|bernoulli|uniform_|rsample")
        return any(form.search(op.source) for op in self.ops)


@dataclass(frozen=True)
class Call:
    """A sequence to run: its sizes, the seed of weights and data, and the options of ``scan``."""

    steps: int
    rows: int
    seed: int
    state: bool = False
    lengths: tuple[int, ...] | None = None
    resets: bool = False
    reverse: bool = False


class RandomCell(fc.Cell):
    """A recipe as a cell."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe.input_size, recipe.state_sizes[0])
        self.recipe = recipe
        self.states = recipe.states
        self.state_sizes, self.output_size = recipe.state_sizes, recipe.output_size
        for weight in recipe.weights:
            value = eval(_code(weight.source), {"torch": torch, "nn": nn})
            if weight.buffer:
                self.register_buffer(weight.name, value)
            else:
                self.register_parameter(weight.name, value)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        recipe = self.recipe
        values: dict[str, Any] = {"x": x, **dict(zip(recipe.states, state, strict=True))}
        for op in recipe.ops:
            values[op.name] = eval(_code(op.source), {"torch": torch, "F": F, "self": self}, values)
        return values[recipe.output], tuple([values[name] for name in recipe.after])

    def initial_state(self, batch_size: int, **options: Any) -> State:
        if not self.recipe.starts:
            return super().initial_state(batch_size, **options)
        return tuple([getattr(self, name).expand(batch_size, -1) for name in self.recipe.starts])


@functools.lru_cache(10_000)
def _code(expression: str) -> CodeType:
    return compile(expression, "<recipe>", "eval")


def source(recipe: Recipe, call: Call, *, dtype: str = "float64", runner: str = "compiled") -> str:
    """A program that makes the recipe's cell and calls it: ``y``, ``after``."""
    names = ", ".join(recipe.states)
    lines = ["import torch", "from torch import nn", "from torch.nn import functional as F", ""]
    lines += ["import fusecell as fc", "", "", "class Found(fc.Cell):"]
    lines += [f"    states = {recipe.states!r}", "", "    def __init__(self):"]
    lines += [f"        super().__init__({recipe.input_size}, {recipe.state_sizes[0]})"]
    lines += [f"        self.state_sizes, self.output_size = {recipe.state_sizes}, {recipe.output_size}"]
    for weight in recipe.weights:
        buffer = f"        self.register_buffer({weight.name!r}, {weight.source})"
        lines.append(buffer if weight.buffer else f"        self.{weight.name} = {weight.source}")
    lines += ["", "    def step(self, x, state):", f"        {names}, = state"]
    lines += [f"        {op.name} = {op.source}" for op in recipe.ops]
    lines += [f"        return {recipe.output}, ({', '.join(recipe.after)},)", ""]
    if recipe.starts:
        expanded = ", ".join(f"self.{name}.expand(batch_size, -1)" for name in recipe.starts)
        lines += ["    def initial_state(self, batch_size, **options):", f"        return ({expanded},)", ""]
    lines += ["", f"torch.manual_seed({call.seed})", f"cell = Found().to(torch.{dtype})"]
    lines += [f"x = torch.randn({call.steps}, {call.rows}, {recipe.input_size}).to(torch.{dtype})"]
    initial = [f"torch.randn({call.rows}, {size}).tanh().to(torch.{dtype})" for size in recipe.state_sizes]
    lines += [f"state = ({', '.join(initial)},)" if call.state else "state = None"]
    lines += [f"lengths = {None if call.lengths is None else list(call.lengths)}"]
    lines += [f"resets = torch.rand({call.steps}, {call.rows}) < 0.3" if call.resets else "resets = None"]
    lines += [f"torch.manual_seed({_SEED})", f"with torch.no_grad(), fc.runner({runner!r}):"]
    options = f"lengths=lengths, resets=resets, reverse={call.reverse}"
    lines += [f"    y, after = fc.scan(cell, x, state, {options})"]
    return "\n".join(lines) + "\n"


@dataclass
class Data:
    """A cell and the tensors that it is called with."""

    cell: RandomCell
    x: Tensor
    state: State | None
    options: dict[str, Any]

    @classmethod
    def of(cls, recipe: Recipe, call: Call) -> Data:
        """Drawn in float32, in the order of :func:`source`."""
        torch.manual_seed(call.seed)
        cell = RandomCell(recipe)
        x = torch.randn(call.steps, call.rows, recipe.input_size)
        state = None
        if call.state:
            state = tuple([torch.randn(call.rows, size).tanh() for size in recipe.state_sizes])
        lengths = None if call.lengths is None else list(call.lengths)
        resets = torch.rand(call.steps, call.rows) < 0.3 if call.resets else None
        return cls(cell, x, state, {"lengths": lengths, "resets": resets, "reverse": call.reverse})

    def changed(self, change: Any) -> Data:
        """A copy whose floating-point numbers are ``change`` of these."""
        cell = copy.deepcopy(self.cell)
        for value in (*cell.parameters(), *cell.buffers()):
            if value.is_floating_point():
                value.data = change(value.data)
        state = None if self.state is None else tuple(map(change, self.state))
        return Data(cell, change(self.x), state, self.options)

    def double(self) -> Data:
        return self.changed(Tensor.double)

    def nudged(self, size: float) -> Data:
        """Return a copy with a relative perturbation of about ``size`` in every number."""
        return self.changed(lambda value: value * (1 + size * torch.randn_like(value)))

    def run(self, runner: str) -> list[Tensor]:
        """The outputs and the last states."""
        torch.manual_seed(_SEED)
        with torch.no_grad(), fc.runner(runner):
            y, after = fc.scan(self.cell, self.x, self.state, **self.options)
        return [y, *(after if isinstance(after, tuple) else (after,))]

    def gradients(self, runner: str) -> dict[str, Tensor]:
        """Return the gradients of a random weighting of all results, by name; zeros where there are none."""
        data = self.changed(Tensor.clone)
        leaves = {"x": data.x.requires_grad_(), **dict(data.cell.named_parameters())}
        for name, value in zip(data.cell.states, data.state or (), strict=False):
            leaves[name] = value.requires_grad_()
        torch.manual_seed(_SEED)
        with fc.runner(runner):
            y, after = fc.scan(data.cell, data.x, data.state, **data.options)
        results = [y, *(after if isinstance(after, tuple) else (after,))]
        generator = torch.Generator().manual_seed(0)
        seeds = [torch.randn(value.shape, generator=generator).to(value.dtype) for value in results]
        total = torch.stack([(value * seed).sum() for value, seed in zip(results, seeds, strict=True)]).sum()
        if not total.requires_grad:
            return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        pairs = zip(leaves.items(), gradients, strict=True)
        return {name: torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in pairs}


class IllConditioned(Exception):
    """A cell that magnifies the last bits of its numbers: two runners may differ, neither of them wrong."""


def check_forward(recipe: Recipe, call: Call) -> None:
    """Hold compiled code, in float64 and in float32, against the eager runner in float64.

    Raises:
        AssertionError: where they differ, or the compiler failed; with the cell's source.
        NotCompilable: where the compiler refuses the cell for a documented reason.
        IllConditioned: where nothing can be compared.
    """
    data = Data.of(recipe, call)
    exact = data.double()
    try:
        truth = exact.run("eager")
    except RuntimeError as error:  # torch knows no such call
        raise IllConditioned from error
    _well_conditioned(exact.nudged(NUDGE).run("eager"), truth)
    off = furthest(_compiled(exact, recipe, call, "float64"), truth)
    assert off <= DOUBLE, f"float64 is off by {off:.1e}:\n\n{source(recipe, call)}"
    # Eager float32 may be lucky; so what float32's rounding of the numbers alone moves is a measure too.
    of_loop = data.run("eager")
    if recipe.draws:
        truth = [value.double() for value in of_loop]  # in float32 other numbers are drawn
    single = furthest(of_loop, truth)
    nudged = data.nudged(2**-22) if recipe.draws else exact.nudged(2**-23)
    sensitivity = furthest(nudged.run("eager"), truth)
    off, most = furthest(_compiled(data, recipe, call, "float32"), truth), max(4 * single, 4 * sensitivity, SINGLE)
    message = f"float32 is off by {off:.1e}, eager by {single:.1e}"
    assert off <= most, f"{message}:\n\n{source(recipe, call, dtype='float32')}"


def check_backward(recipe: Recipe, call: Call, runner: str = "compiled") -> None:
    """Hold a runner's gradients in float64 against the eager runner's; raises as :func:`check_forward` does."""
    exact = Data.of(recipe, call).double()
    try:
        truth = exact.gradients("eager")
    except RuntimeError as error:
        raise IllConditioned from error
    _well_conditioned(list(exact.nudged(NUDGE).gradients("eager").values()), list(truth.values()))
    try:
        gradients = exact.gradients(runner)
    except FusecellError as error:
        raise _judged(error, source(recipe, call)) from error
    for name, expected in truth.items():
        off = furthest([gradients[name]], [expected])
        assert off <= DOUBLE, f"the gradient of {name} is off by {off:.1e}:\n\n{source(recipe, call)}"


def furthest(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference, relative to each tensor's largest value; infinite where NaN meets a number."""
    most = 0.0
    for one, other in zip(actual, expected, strict=True):
        one, other = one.double(), other.double()
        if one.shape != other.shape or not torch.equal(one.isfinite(), other.isfinite()):
            return float("inf")
        finite = other[other.isfinite()]
        away = one[one.isfinite()] - finite
        if finite.numel():
            most = max(most, (away.abs().max() / finite.abs().max().clamp(min=FLOOR)).item())
    return most


def _well_conditioned(nudged: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
    if not all(value.isfinite().all() for value in truth) or furthest(nudged, truth) > CONDITION * NUDGE:
        raise IllConditioned


def _compiled(data: Data, recipe: Recipe, call: Call, dtype: str) -> list[Tensor]:
    try:
        return data.run("compiled")
    except FusecellError as error:
        raise _judged(error, source(recipe, call, dtype=dtype)) from error


def _judged(error: FusecellError, program: str) -> Exception:
    """Return a refusal unchanged, and a compiler error with the program that shows it."""
    if isinstance(error, fc.NotCompilable) and not any("report" in reason for reason in error.reasons):
        return error
    return AssertionError(f"{error}\n\n{program}")
