"""Random cells: hypothesis draws a recipe of a step and a call of it. More than the tests run, offline::

python -m tests.compiler.random_cells --examples 2000 --seed 0 --backward --quick
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import fusecell as fc
import fusecell.compiler.runtime.guard_pages as check_memory
from fusecell.compiler.backend import llvm
from tests.compiler import force_threads
from tests.compiler.cell_recipes import (
    Call,
    IllConditioned,
    Op,
    Recipe,
    Weight,
    check_backward,
    check_forward,
    source,
)
from tests.compiler.expressions import (
    AXES,
    AXIS_WEIGHTS,
    BINARY,
    DRAWS,
    GROUPED,
    NORMS,
    ORDERS,
    POWERS,
    REDUCTIONS,
    TENSORS,
    UNARY,
)
from tests.compiler.tuned import tuned

__all__ = ["SIZES", "calls", "recipes"]

Drawn = TypeVar("Drawn")

SIZES = (1, 2, 3, 5, 7, 10, 13, 16, 17, 31, 33, 40)
MOST = 30.0
"""Larger values go through tanh, so that sequences stay finite and their rounding small."""
MOST_ORDERED = 200
"""Features that are put in another order, at the most: one by one they become as many nodes of a trace."""


@dataclass(frozen=True)
class _Value:
    """A value of a step: its name, its features per row, and about how large it gets."""

    name: str
    width: int
    bound: float


@dataclass
class _Writer:
    """Writes a step line by line from what hypothesis draws."""

    draw_: Any
    rows: list[_Value]
    weights: dict[str, Weight] = field(default_factory=dict)
    matrices: dict[str, tuple[int, int]] = field(default_factory=dict)
    vectors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)

    def draw(self, strategy: st.SearchStrategy[Drawn]) -> Drawn:
        value: Drawn = self.draw_(strategy)
        return value

    def choice(self, options: Any) -> Any:
        return self.draw(st.sampled_from(list(options)))

    # Lines.

    def add(self, expression: str, args: tuple[_Value, ...], width: int, bound: float) -> _Value:
        """One line; a value that may get large goes through tanh."""
        if bound > MOST:
            expression, bound = f"torch.tanh({expression})", 1.0
        value = _Value(f"v{len(self.ops)}", width, bound)
        self.ops.append(Op(value.name, expression, tuple(arg.name for arg in args)))
        self.rows.append(value)
        return value

    def value(self, fits: Callable[[int], bool] = lambda width: True) -> _Value | None:
        """A value whose width fits, the latest more often; None where there is none."""
        candidates = [value for value in self.rows if fits(value.width)]
        return self.choice([*candidates, *candidates[-2:]]) if candidates else None

    def any_value(self) -> _Value:
        value = self.value()
        assert value is not None
        return value

    # Weights.

    def weight(self, letter: str, expression: str, *, buffer: bool = False) -> str:
        name = f"{letter}{len(self.weights)}"
        self.weights[name] = Weight(name, expression if buffer else f"nn.Parameter({expression})", buffer)
        return name

    def matrix(self, rows: int, cols: int, kinds: tuple[str, ...] = ("turned", "computed")) -> str:
        """An expression of a (rows, cols) weight: new, shared, a part of a larger one, transposed or computed."""
        kind = self.choice(["new", "new", "known", "known", "larger", *kinds])
        if kind == "known":
            fits = [name for name, (r, c) in self.matrices.items() if r >= rows and c >= cols]
            if fits:
                return self._part(self.choice(fits), rows, cols)
        if kind == "larger":
            return self._part(
                self._new_matrix(rows * self.choice([1, 2, 3]), cols + self.choice([0, 1, 5])), rows, cols
            )
        if kind == "turned":
            return f"{self.matrix(cols, rows, ())}.t()"
        if kind == "computed":
            return self._computed(rows, cols)
        return f"self.{self._new_matrix(rows, cols)}"

    def _new_matrix(self, rows: int, cols: int) -> str:
        name = self.weight("w", f"torch.randn({rows}, {cols}) * {max(rows, cols) ** -0.5:.2f}")
        self.matrices[name] = rows, cols
        return name

    def _part(self, name: str, rows: int, cols: int) -> str:
        r, c = self.matrices[name]
        if cols == c and r == 2 * rows and self.draw(st.booleans()):
            return f"self.{name}.chunk(2)[{self.choice([0, 1])}]"
        row, col = self.draw(st.integers(0, r - rows)), self.draw(st.integers(0, c - cols))
        if (rows, cols) == (r, c):
            return f"self.{name}"
        across = f", {col}:{col + cols}" if cols < c else ""
        return f"self.{name}[{row}:{row + rows}{across}]"

    def _computed(self, rows: int, cols: int) -> str:
        matrix = self.matrix(rows, cols, ("turned",))
        forms = [f"torch.tanh({matrix})", f"({matrix} / ({matrix}.norm() + 1))"]
        forms += [f"({matrix} * torch.sigmoid(self.{self.weight('v', f'torch.randn({rows})')})[:, None])"]
        forms += [f"({matrix} * self.{self.weight('m', f'torch.rand({rows}, {cols}) > 0.4', buffer=True)})"]
        if rows == cols:
            forms += [f"({matrix} - {matrix}.t())", f"torch.matrix_exp({matrix} - {matrix}.t())"]
        if rows > 1:
            forms += [f"torch.cat(({matrix}[1:], {matrix}[:1]), 0)"]
        return str(self.choice(forms))

    def vector(self, width: int) -> str:
        """An expression of a weight that broadcasts to ``width`` features: own, shared, a part, or computed."""
        kind = self.choice(
            ["vector", "vector", "known", "scalar", "one", "line", "long", "buffer", "count", "computed"]
        )
        shared = [name for name, shape in self.vectors.items() if shape in ((width,), ())]
        if kind == "known" and shared:
            return f"self.{self.choice(shared)}"
        if kind == "long":
            start = self.choice([0, 1, width])
            return f"self.{self._new_vector((2 * width,))}[{start}:{start + width}]"
        if kind == "buffer":
            return f"self.{self.weight('b', f'torch.randn({width})', buffer=True)}"
        if kind == "count":
            return f"self.{self.weight('n', 'torch.tensor(3)', buffer=True)}"
        if kind == "computed":
            return f"torch.sigmoid(self.{self._new_vector((width,))})"
        shapes = {"scalar": (), "one": (1,), "line": (1, width)}
        return f"self.{self._new_vector(shapes.get(kind, (width,)))}"

    def _new_vector(self, shape: tuple[int, ...]) -> str:
        name = self.weight("p", f"torch.randn({shape})")
        self.vectors[name] = shape
        return name

    # Kinds of lines, a method each: what is drawn by name in KINDS.

    def product(self, width: int | None = None) -> _Value:
        """A product with a weight: of a value, of a product of two, of a concatenation."""
        args = (self.any_value(),)
        a, depth, bound = args[0].name, args[0].width, args[0].bound
        form = self.choice(["value", "value", "cat", "gated", "gated"])
        if form == "cat":
            args = (*args, *(self.any_value() for _ in range(self.choice([1, 2]))))
            a, depth = f"torch.cat(({', '.join(arg.name for arg in args)}), -1)", sum(arg.width for arg in args)
            bound = max(arg.bound for arg in args)
        elif form == "gated":
            gate = self.value(lambda size: size in (1, depth))
            if gate is not None:
                args, a = (*args, gate), f"({a} * torch.sigmoid({gate.name}))"
        width = width or self.choice([*SIZES, *(value.width for value in self.rows)])
        return self.add(self._product(a, depth, width), args, width, 2.5 * bound)

    def _product(self, a: str, depth: int, width: int) -> str:
        form = self.choice(["linear", "linear", "bias", "bias", "at", "addmm", "left", "einsum"])
        if form in ("linear", "bias"):
            bias = f", self.{self._new_vector((width,))}" if form == "bias" else ""
            return f"F.linear({a}, {self.matrix(width, depth)}{bias})"
        if form == "addmm":
            start = f"self.{self._new_vector((width,))}"
            return f"torch.addmm({start}, {a}, {self.matrix(depth, width)}, beta=0.5, alpha=2.0)"
        if form == "left":
            return f"({self.matrix(width, depth)} @ {a}.t()).t()"
        if form == "einsum":
            return f"torch.einsum('nk,fk->nf', {a}, {self.matrix(width, depth)})"
        return f"{a} @ {self.matrix(depth, width)}"

    def unary(self) -> _Value:
        a, form = self.any_value(), self.choice(UNARY)
        grown = a.bound ** POWERS[form] if form in POWERS else 4 * a.bound if "0.3, r" in form else a.bound + 1
        grown = a.bound**2 if form.count("{a}") > 1 else grown
        return self.add(form.format(a=a.name), (a,), a.width, grown)

    def binary(self) -> _Value:
        a = self.any_value()
        kind = self.choice(["value", "value", "value", "weight", "number"])
        if kind == "number":
            return self.add(self.choice(BINARY).format(a=a.name, b="0.6"), (a,), a.width, 4 * a.bound + 1)
        form = self.choice([*BINARY, *TENSORS])
        if "self.one" in form and "one" not in self.weights:
            self.weights["one"] = Weight("one", "nn.Parameter(torch.full((1,), 0.2))")
        if kind == "weight":
            return self.add(form.format(a=a.name, b=self.vector(a.width)), (a,), a.width, 4 * a.bound + 4)
        b = self.value(lambda width: width in (1, a.width))
        b = a if b is None else b
        bound = a.bound * b.bound if "} * {" in form or "addcmul" in form else a.bound + b.bound
        return self.add(form.format(a=a.name, b=b.name), (a, b), a.width, bound + a.bound + 1)

    def logic(self) -> _Value:
        """A choice by truth values: of comparisons, their connections, and a buffer of flags."""
        a = self.any_value()
        b = self.value(lambda width: width in (1, a.width)) or a
        flags = f"self.{self.weight('f', f'torch.rand({a.width}) > 0.5', buffer=True)}"
        compared = f"({a.name} {self.choice(['>', '<', '>=', '<=', '!='])} {b.name})"
        mask = self.choice(
            [
                compared,
                flags,
                f"{compared} & ~({a.name} < 0.3)",
                f"({a.name} > 0.1) | {flags}",
                f"({a.name} > 0) ^ ({b.name} > 0.5)",
                f"torch.logical_xor({a.name} > 0, {flags})",
            ]
        )
        form = self.choice(["torch.where({m}, {a}, {b} * 0.5)", "({m}) * {a}", "{a}.masked_fill({m}, 0.5)"])
        form = self.choice([form, "torch.where({m}, {a}, 0.25)", "({m}).to({a}.dtype) * {b} + {a}"])
        return self.add(form.format(m=mask, a=a.name, b=b.name), (a, b), a.width, a.bound + b.bound)

    def reduction(self) -> _Value:
        a = self.value(lambda width: width > 1) or self.product(5)
        form = self.choice(REDUCTIONS)
        return self.add(form.format(a=a.name), (a,), 1, REDUCTIONS[form] * a.bound)

    def norm(self) -> _Value:
        a = self.value(lambda width: width > 1) or self.product(7)
        names = {name: f"self.{self._new_vector((a.width,))}" for name in ("v", "u")}
        return self.add(self.choice(NORMS).format(a=a.name, w=a.width, **names), (a,), a.width, max(4.0, 2 * a.bound))

    def grouped(self) -> _Value:
        a = self.value(lambda width: bool(_factors(width))) or self.product(10)
        p = self.choice(_factors(a.width))
        form = self.choice(GROUPED).format(a=a.name, w=a.width, p=p, q=a.width // p)
        return self.add(form, (a,), a.width, max(4.0, 2 * a.bound))

    def axes(self) -> _Value:
        """What is computed along axes, of one value or of two."""
        a, b, p, q = self._matrices()
        form = self.choice(AXES)
        width, bound = AXES[form]
        names = {"a": a.name, "b": b.name, "p": p, "q": q}
        names |= {name.upper(): f"{names[name]}.view(-1, {p}, {q})" for name in ("a", "b")}
        args = (a, b) if "{b}" in form or "{B}" in form else (a,)
        grown = eval(bound.format(p=p, q=q), {"x": max(a.bound, b.bound)})
        return self.add(form.format(**names), args, eval(width, {"p": p, "q": q, "min": min}), grown)

    def axis_weight(self) -> _Value:
        """What is computed along axes with a weight: heads, convolutions, an embedding."""
        a, b, p, q = self._matrices()
        form = self.choice(AXIS_WEIGHTS)
        shape, width = AXIS_WEIGHTS[form]
        sizes = tuple(eval(f"[{shape}]", {"p": p, "q": q}))
        terms = max(sizes[-1], p, q) * 2
        weight = f"self.{self.weight('k', f'torch.randn({sizes}) * {terms**-0.5:.2f}')}"
        form = form.format(A=f"{a.name}.view(-1, {p}, {q})", W=weight, a=a.name, b=b.name, p=p, q=q)
        args = (a, b) if f"{b.name}[" in form else (a,)
        return self.add(form, args, eval(width, {"p": p, "q": q}), 4 * a.bound * b.bound)

    def drawn(self) -> _Value:
        """A value with random numbers in it."""
        a = self.any_value()
        return self.add(self.choice(DRAWS).format(a=a.name), (a,), a.width, 2 * a.bound + 1)

    def _matrices(self) -> tuple[_Value, _Value, int, int]:
        """Two values of p x q features, which may be one."""
        a = self.value(lambda width: bool(_factors(width))) or self.product(self.choice([6, 10, 12, 40]))
        b = self.value(lambda width: width == a.width) or a
        p = self.choice(_factors(a.width))
        return a, b, p, a.width // p

    def part(self) -> _Value:
        """Some of a value's features."""
        a = self.value(lambda width: width > 1) or self.product(3)
        start = self.draw(st.integers(0, a.width - 1))
        stop = self.draw(st.integers(start + 1, a.width))
        forms = {f"{a.name}[:, {start}:{stop}]": stop - start}
        if start:
            forms[f"{a.name}.split([{start}, {a.width - start}], 1)[1]"] = a.width - start
        if a.width % 2 == 0:
            forms |= {f"{a.name}.chunk(2, 1)[{self.choice([0, 1])}]": a.width // 2, f"F.glu({a.name})": a.width // 2}
        if a.width > 1:
            forms |= {f"{a.name}[:, ::2]": -(-a.width // 2), f"F.pad({a.name}, (1, 2))": a.width + 3}
        forms |= {f"{a.name}[:, 0, None]": 1}
        form = self.choice(forms)
        return self.add(form, (a,), forms[form], a.bound)

    def join(self) -> _Value:
        """Values side by side, or their features in turns."""
        a, b = self.any_value(), self.any_value()
        form = f"torch.cat(({a.name}, {b.name}), 1)"
        if a.width == b.width and self.draw(st.booleans()):
            form = f"torch.stack(({a.name}, {b.name}), {self.choice([1, 2])}).flatten(1)"
        return self.add(form, (a, b), a.width + b.width, max(a.bound, b.bound))

    def order(self) -> _Value:
        a = self.value(lambda width: 1 < width <= MOST_ORDERED) or self.product(3)
        return self.add(self.choice(ORDERS).format(a=a.name), (a,), a.width, a.bound)

    def small(self) -> _Value:
        """Products of a row with itself or a small table, feature by feature."""
        a = self.value(lambda width: width in (2, 3, 5, 7, 10)) or self.product(3)
        table = f"self.{self.weight('t', f'torch.randn(3, {a.width})')}"
        forms = {
            f"({a.name}[:, :2, None] * {a.name}[:, None, :2].tanh()).flatten(1)": 4,
            f"({a.name}[:, None, :] * {table}).sum(1)": a.width,
            f"({a.name}[:, None, :] * {table}).sum(2)": 3,
            f"({a.name} @ self.{self._new_vector((a.width,))})[:, None]": 1,
        }
        if a.width == 10:
            forms[f"torch.bmm({a.name}.view(-1, 2, 5), {a.name}.view(-1, 5, 2)).flatten(1)"] = 4
        form = self.choice(forms)
        return self.add(form, (a,), forms[form], 5 * a.bound)

    # What a step returns.

    def state(self, width: int) -> str:
        """Return the new value of a state: any value of its width, even another state, else a new product."""
        value = self.value(lambda size: size == width)
        if value is None or self.choice([True, True, False]):
            value = self.product(width)
        return (value if value.bound <= 3 else self.add(f"torch.tanh({value.name})", (value,), width, 1.0)).name

    def output(self, after: tuple[str, ...]) -> _Value:
        """A value, or what nothing else uses side by side."""
        used = {name for op in self.ops for name in op.args} | set(after)
        unused = [value for value in self.rows if value.name.startswith("v") and value.name not in used][-4:]
        if len(unused) < 2 or self.choice([True, False, False]):
            return self.any_value()
        names = ", ".join(value.name for value in unused)
        return self.add(f"torch.cat(({names}), -1)", tuple(unused), sum(value.width for value in unused), 1.0)


def _factors(width: int) -> list[int]:
    """The numbers of groups that ``width`` features part into."""
    return [p for p in range(2, width) if width % p == 0 and width <= 100]


KINDS = ("product", "product", "product", "unary", "unary", "unary", "binary", "binary", "binary", "logic")
KINDS += ("axes", "axes", "axis_weight", "drawn", "reduction", "norm", "grouped", "part", "join", "order", "small")


@st.composite
def recipes(draw: Any) -> Recipe:
    """Draw cells of every kind that the tracer has rules for."""
    sizes = draw(st.lists(st.sampled_from(SIZES), min_size=1, max_size=3))
    width = draw(st.sampled_from(SIZES))
    states = [_Value(f"h{place}", size, 3.0) for place, size in enumerate(sizes)]
    writer = _Writer(draw, [_Value("x", width, 3.0), *states])
    for kind in draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=12)):
        getattr(writer, kind)()
    after = tuple(writer.state(size) for size in sizes)
    output = writer.output(after)
    starts: tuple[str, ...] = ()
    if draw(st.sampled_from([False, False, True])):
        starts = tuple(writer.weight("s", f"torch.randn({size})") for size in sizes)
    weights = tuple(writer.weights.values())
    recipe = Recipe(width, tuple(sizes), output.width, weights, starts, tuple(writer.ops), output.name, after)
    return _pruned(recipe)


def _pruned(recipe: Recipe) -> Recipe:
    """A recipe without the lines and weights that nothing uses."""
    needed: set[str] = {recipe.output, *recipe.after}
    ops: list[Op] = []
    for op in reversed(recipe.ops):
        if op.name in needed:
            needed.update(op.args)
            ops.insert(0, op)
    named = set(re.findall(r"self\.(\w+)", " ".join(op.source for op in ops))) | set(recipe.starts)
    return replace(recipe, ops=tuple(ops), weights=tuple(weight for weight in recipe.weights if weight.name in named))


@st.composite
def calls(draw: Any) -> Call:
    """Sequences of a few steps, with and without lengths, resets and a state."""
    steps, rows = draw(st.integers(1, 9)), draw(st.sampled_from([*range(1, 10), 33]))
    lengths = st.lists(st.integers(0, steps), min_size=rows, max_size=rows).map(tuple)
    return Call(
        steps,
        rows,
        draw(st.integers(0, 99)),
        state=draw(st.booleans()),
        lengths=draw(st.none() | lengths),
        resets=draw(st.sampled_from([False, False, True])),
        reverse=draw(st.sampled_from([False, False, True])),
    )


def main(arguments: list[str] | None = None) -> None:
    """Check random cells, all in one process; stop at the first failure."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backward", action="store_true", help="compare gradients too")
    parser.add_argument("--quick", action="store_true", help="LLVM doesn't optimise: three times as many in the time")
    parser.add_argument("--threads", type=int, default=1, help="every call is run by so many, a few steps at a time")
    options = parser.parse_args(arguments)
    if options.quick:
        llvm.EFFORT = 0
        os.environ["FUSECELL_CACHE"] = "off"  # where nobody should find such code
    os.environ.setdefault("FUSECELL_CACHE", "off")
    # In the check mode buffers are where it puts them, threads' parts not pages apart.
    check_memory.ENABLED = options.threads == 1
    if options.threads > 1:
        patch = pytest.MonkeyPatch()
        force_threads.always(patch)
        tuned(patch, chunk_bytes=1 << 13)
    torch.set_num_threads(options.threads)
    # Machine code that kills the process leaves its cell here.
    last = Path(tempfile.mkdtemp()) / "last.py"
    print(f"the cell in hand is written to {last}", flush=True)
    counts: Counter[str] = Counter()

    @hypothesis.seed(options.seed)
    @settings(
        max_examples=options.examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(recipes(), calls())
    def check(recipe: Recipe, call: Call) -> None:
        last.write_text(source(recipe, call))
        counts[outcome(check_forward, recipe, call)] += 1
        if options.backward:
            counts["backward: " + outcome(check_backward, recipe, call)] += 1
        if sum(counts.values()) % 100 == 0:
            print(dict(counts), flush=True)

    check()
    print(dict(counts))


def outcome(check: Callable[[Recipe, Call], None], recipe: Recipe, call: Call) -> str:
    """Return the outcome of a check: equal, ill-conditioned, or the reasons of a refusal."""
    try:
        check(recipe, call)
    except IllConditioned:
        return "ill-conditioned"
    except fc.NotCompilable as refusal:
        return " ".join(refusal.reasons)
    finally:
        fc.refresh()  # nothing of it is met again
    return "equal"


if __name__ == "__main__":
    main(sys.argv[1:])
