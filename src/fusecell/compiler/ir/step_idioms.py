"""Formulas that people know by one name, found in a step's graph: ``softplus``, ``silu``, ``layer_norm``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from fusecell.compiler.ir.graph import Graph

__all__ = ["TRANSPARENT", "idiom"]

TRANSPARENT = frozenset({"slice", "view", "gather", "broadcast", "reshape"})
"""Primitives that only say which numbers of a value are read."""

Idiom = tuple[str, int]
"""A function's name and the value that it is applied to; no name for the value itself."""


def idiom(graph: Graph, index: int, boxes: Collection[int] = ()) -> Idiom | None:
    """Return the function that a value is of another, where its formula is a known one.

    Arguments:
        boxes: values that have names of their own, which no formula may hide.
    """
    for rule in _RULES.get(graph[index].op, ()):
        found = rule(_Value(graph, index, frozenset(boxes) - {index}))
        if found is not None:
            return found[0], found[1].index
    return None


class _Value:
    """A value of a graph, behind what only spreads it or gives it another shape."""

    def __init__(self, graph: Graph, index: int, boxes: frozenset[int]) -> None:
        while graph[index].op in ("broadcast", "reshape") and index not in boxes:
            index = graph[index].args[0]
        self._graph, self._boxes, self.index = graph, boxes, index

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Value) and self.index == other.index

    def __hash__(self) -> int:
        return hash(self.index)

    @property
    def op(self) -> str:
        """Its primitive; of what has a name of its own none."""
        return "" if self.index in self._boxes else self._graph[self.index].op

    @property
    def args(self) -> list[_Value]:
        args = self._graph[self.index].args if self.op else ()
        return [_Value(self._graph, arg, self._boxes) for arg in args]

    def pairs(self) -> Sequence[tuple[_Value, _Value]]:
        """Both orders of two arguments."""
        first, second = self.args
        return (first, second), (second, first)

    def of(self, *ops: str) -> _Value | None:
        """Return the value that functions are applied to, the outermost first; None if these are others."""
        value = self
        for op in ops:
            if value.op != op:
                return None
            value = value.args[0]
        return value

    def number(self) -> float | None:
        return float(self._graph[self.index].attrs["value"]) if self.op == "const" else None


Found = tuple[str, _Value] | None


def _relu(value: _Value) -> Found:
    """where(x <= 0, 0, x)."""
    condition, zero, x = value.args
    return ("relu", x) if zero.number() == 0 and condition.of("le") == x else None


def _softplus(value: _Value) -> Found:
    """where(x > 20, x, log1p(exp(x)))."""
    _, x, other = value.args
    return ("softplus", x) if other.of("log1p", "exp") == x else None


def _elu(value: _Value) -> Found:
    """where(x <= 0, expm1(x), x), with a factor of 1 or without."""
    _, below, x = value.args
    candidates = [below, *(below.args if below.op == "mul" else ())]
    return ("elu", x) if any(each.of("expm1") == x for each in candidates) else None


def _silu(value: _Value) -> Found:
    """x sigmoid(x)."""
    return next((("silu", x) for x, other in value.pairs() if other.of("sigmoid") == x), None)


def _once(value: _Value) -> Found:
    """x 1."""
    return next((("", x) for x, other in value.pairs() if other.number() == 1), None)


def _log_sigmoid(value: _Value) -> Found:
    """min(x, 0) - log1p(exp(-|x|))."""
    low, rest = value.args
    x = rest.of("log1p", "exp", "neg", "abs")
    return ("log σ", x) if x is not None and low.op == "minimum" and x in low.args else None


def _cancelled(value: _Value) -> Found:
    """(x + y) - y, as straight-through gradients are written."""
    both, other = value.args
    if both.op != "add":
        return None
    return next((("", x) for x, y in both.pairs() if y == other), None)


def _layer_norm(value: _Value) -> Found:
    """(x - mean(x)) rsqrt(mean((x - mean(x))^2) + eps), and the same without a mean."""
    for x, scale in value.pairs():
        squares = _under_root(scale)
        if squares is not None and squares == x:
            centred = x.op == "sub" and _is_mean(x.args[1], x.args[0])
            return ("layer_norm", x.args[0]) if centred else ("rms_norm", x)
    return None


def _under_root(scale: _Value) -> _Value | None:
    """Return x of rsqrt(mean(x x) + eps)."""
    inside = scale.of("rsqrt")
    if inside is None:
        return None
    for part in inside.args if inside.op == "add" else [inside]:
        total = part.args[0] if part.op in ("div", "mul") else part
        if total.op in ("sum", "reduce") and total.args[0].op == "mul":
            first, second = total.args[0].args
            return first if first == second else None
    return None


def _is_mean(value: _Value, x: _Value) -> bool:
    total = value.args[0] if value.op in ("div", "mul") else value
    return total.op in ("sum", "reduce") and total.args[0] == x


def _softmax(value: _Value) -> Found:
    """exp(x - max(x)) / sum(exp(x - max(x)))."""
    powers, total = value.args
    x = powers.of("exp", "sub")
    if x is None or total.op not in ("sum", "reduce") or total.args[0] != powers:
        return None
    return "softmax", x


def _normalize(value: _Value) -> Found:
    """x / max(sqrt(sum(x x)), eps)."""
    x, length = value.args
    for part in length.args if length.op == "maximum" else [length]:
        total = part.of("sqrt")
        if total is not None and total.op in ("sum", "reduce") and total.args[0].op == "mul":
            return ("normalize", x) if all(each == x for each in total.args[0].args) else None
    return None


def _padded(value: _Value) -> Found:
    """Zeros around x."""
    others = [each for each in value.args if each.number() != 0]
    return ("", others[0]) if len(others) == 1 and len(value.args) > 1 else None


_RULES: dict[str, tuple[Callable[[_Value], Found], ...]] = {
    "where": (_relu, _softplus, _elu),
    "mul": (_once, _silu, _layer_norm),
    "sub": (_log_sigmoid, _cancelled),
    "div": (_softmax, _normalize),
    "interleave": (_padded,),
}
