"""Rules for complex numbers: pairs of real values, by which complex states and products are computed.

A graph has real numbers alone. The order of operations is that of the textbook formulas, which torch's kernels have
too, except for division and square roots, where torch scales against overflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fusecell.compiler.frontend.aten_arguments import mapped
from fusecell.compiler.frontend.contractions import contracted
from fusecell.compiler.frontend.graph_writer import Operand, Writer
from fusecell.compiler.frontend.rules.indexing import INDEXING
from fusecell.compiler.frontend.rules.scans import SCANS
from fusecell.compiler.frontend.traced_values import Complex, Row, Sum, Untraceable

__all__ = ["COMPLEX", "KEEPS_PAIR", "MAKES_COMPLEX", "are_joined", "moved_pair", "pair_of", "sum_of_pairs"]

_MOST_POINTS = 512
"""Points of a Fourier transform along a dimension, at the most: as a product it takes the square of them."""
_MOST_FACTORS = 8
"""Of a power that is computed as a product, at the most."""

Pair = Complex | Row | float | int | complex | bool


def pair_of(w: Writer, value: Any) -> Complex:
    """Return any operand as a pair of real values."""
    if isinstance(value, Complex):
        return value
    if isinstance(value, complex):
        return Complex((), w.const(value.real), w.const(value.imag))
    real = w.number(value)
    return Complex(real.shape, real, w.const(0.0, real.shape, real.axis, real.split))


def _is_zero(w: Writer, row: Row) -> bool:
    node = w.builder.nodes[row.node]
    return node.op == "const" and node.attrs["value"] == 0


def _of(w: Writer, real: Row, imaginary: Row) -> Complex:
    shape = tuple(np.broadcast_shapes(real.shape, imaginary.shape))
    if imaginary.shape != shape or imaginary.axis != real.axis:
        # A part that is a number takes the shape of the other, whose values, infinite ones say, are not to reach it.
        imaginary = w.point("mul", w.const(1.0, real.shape, real.axis, real.split), imaginary)
    if real.shape != shape:
        real = w.point("mul", w.const(1.0, imaginary.shape, imaginary.axis, imaginary.split), real)
    return Complex(shape, real, imaginary)


def _each(op: str) -> Callable[..., Complex]:
    def rule(w: Writer, a: Pair, b: Pair, alpha: float = 1) -> Complex:
        x, y = pair_of(w, a), pair_of(w, b)
        if alpha != 1:
            y = Complex(y.shape, w.point("mul", y.real, alpha), w.point("mul", y.imaginary, alpha))
        return _of(w, w.point(op, x.real, y.real), w.point(op, x.imaginary, y.imaginary))

    return rule


def _mul(w: Writer, a: Pair, b: Pair) -> Complex:
    if not isinstance(b, Complex | complex):
        a, b = b, a
    if not isinstance(a, Complex | complex):
        # A real factor scales both parts.
        y = pair_of(w, b)
        return _of(w, w.point("mul", y.real, a), w.point("mul", y.imaginary, a))
    x, y = pair_of(w, a), pair_of(w, b)
    return _of(
        w,
        w.point("sub", w.point("mul", x.real, y.real), w.point("mul", x.imaginary, y.imaginary)),
        w.point("add", w.point("mul", x.real, y.imaginary), w.point("mul", x.imaginary, y.real)),
    )


def _div(w: Writer, a: Pair, b: Pair) -> Complex:
    if not isinstance(b, Complex | complex):
        x = pair_of(w, a)
        return _of(w, w.point("div", x.real, b), w.point("div", x.imaginary, b))
    y = pair_of(w, b)
    square = w.point("add", w.point("mul", y.real, y.real), w.point("mul", y.imaginary, y.imaginary))
    product = _mul(w, pair_of(w, a), _conj(w, y))
    return _of(w, w.point("div", product.real, square), w.point("div", product.imaginary, square))


def _conj(w: Writer, x: Complex) -> Complex:
    return Complex(x.shape, x.real, w.point("neg", x.imaginary))


def _neg(w: Writer, x: Complex) -> Complex:
    return Complex(x.shape, w.point("neg", x.real), w.point("neg", x.imaginary))


def _abs(w: Writer, x: Complex) -> Row:
    return w.point("sqrt", w.point("add", w.point("mul", x.real, x.real), w.point("mul", x.imaginary, x.imaginary)))


def _sgn(w: Writer, x: Complex) -> Complex:
    length = _abs(w, x)
    is_zero = w.point("eq", length, 0.0)
    parts = [w.point("where", is_zero, 0.0, w.point("div", part, length)) for part in (x.real, x.imaginary)]
    return Complex(x.shape, *parts)


def _exp(w: Writer, x: Complex) -> Complex:
    size = w.point("exp", x.real)
    return _of(w, w.point("mul", size, w.point("cos", x.imaginary)), w.point("mul", size, w.point("sin", x.imaginary)))


def _log(w: Writer, x: Complex) -> Complex:
    return _of(w, w.point("log", _abs(w, x)), _angle(w, x))


def _angle(w: Writer, x: Complex) -> Row:
    return w.point("atan2", x.imaginary, x.real)


def _pow(w: Writer, x: Pair, exponent: Operand) -> Complex:
    if isinstance(x, Complex) and isinstance(exponent, int | float):
        if 0 < exponent == int(exponent) <= _MOST_FACTORS:
            result = x
            for _ in range(int(exponent) - 1):
                result = _mul(w, result, x)
            return result
        return _polar(w, w.point("pow", _abs(w, x), float(exponent)), w.point("mul", _angle(w, x), float(exponent)))
    raise Untraceable(
        "Powers of complex numbers are compiled for exponents that are real numbers; others are (x.log() * y).exp()."
    )


def _tanh(w: Writer, x: Complex) -> Complex:
    # With e^-2|x|, which is no overflow.
    small = w.point("exp", w.point("mul", w.point("abs", x.real), -2.0))
    twice = w.point("mul", x.imaginary, 2.0)
    square = w.point("mul", small, small)
    across = w.point("mul", w.point("mul", small, 2.0), w.point("cos", twice))
    scale = w.point("add", w.point("add", square, 1.0), across)
    real = w.point("copysign", w.point("div", w.point("sub", 1.0, square), scale), x.real)
    return _of(w, real, w.point("div", w.point("mul", w.point("mul", small, 2.0), w.point("sin", twice)), scale))


def _tanh_backward(w: Writer, gradient: Pair, result: Complex) -> Complex:
    return _mul(w, gradient, _conj(w, _each("sub")(w, 1.0, _mul(w, result, result))))


def _sinh(w: Writer, x: Complex) -> Complex:
    return _each("sub")(w, *_halves_of_exp(w, x))


def _cosh(w: Writer, x: Complex) -> Complex:
    return _each("add")(w, *_halves_of_exp(w, x))


def _halves_of_exp(w: Writer, x: Complex) -> tuple[Complex, Complex]:
    """Return exp(x) / 2 and exp(-x) / 2."""
    return _mul(w, 0.5, _exp(w, x)), _mul(w, 0.5, _exp(w, _neg(w, x)))


def _turned(rule: Callable[[Writer, Complex], Complex]) -> Callable[[Writer, Complex], Complex]:
    """Return the rule of a function of x i: sin(x) = sinh(x i) / i, and cos(x) = cosh(x i)."""
    return lambda w, x: rule(w, Complex(x.shape, w.point("neg", x.imaginary), x.real))


def _sin(w: Writer, x: Complex) -> Complex:
    turned = _turned(_sinh)(w, x)
    return Complex(turned.shape, turned.imaginary, w.point("neg", turned.real))


def _sigmoid(w: Writer, x: Complex) -> Complex:
    # By tanh, which is no overflow.
    return _each("add")(w, 0.5, _mul(w, 0.5, _tanh(w, _mul(w, 0.5, x))))


def _sigmoid_backward(w: Writer, gradient: Pair, result: Complex) -> Complex:
    return _mul(w, gradient, _conj(w, _mul(w, result, _each("sub")(w, 1.0, result))))


def _addmm(w: Writer, bias: Pair, a: Pair, b: Pair, *, beta: float = 1, alpha: float = 1) -> Complex:
    scaled = _mul(w, _product(("ik", "kj", "ij"))(w, a, b), float(alpha))
    return _each("add")(w, _mul(w, bias, float(beta)), scaled)


def _equal(w: Writer, a: Pair, b: Pair) -> Row:
    x, y = pair_of(w, a), pair_of(w, b)
    return w.point("and", w.point("eq", x.real, y.real), w.point("eq", x.imaginary, y.imaginary))


def _sum(w: Writer, x: Complex, dims: Any = None, keepdim: bool = False, **_: Any) -> Complex:
    several = [dims] if isinstance(dims, int) else dims
    reduced = w.dims(x.real, several)
    if x.real.axis in reduced:
        # The gradient of a complex weight.
        sums = [w.rowsum(part, reduced, keepdim) for part in (x.real, x.imaginary)]
        return Complex(sums[0].shape, *sums)
    real, imaginary = (w.reduce("sum", part, several, keepdim) for part in (x.real, x.imaginary))
    return Complex(real.shape, real, imaginary)


def are_joined(w: Writer, pair: Complex) -> bool:
    """Whether the gradient of a complex weight can be one of its parts in turn: where it adds up values of each row."""
    nodes = [w.builder.nodes[part.node] for part in (pair.real, pair.imaginary)]
    parts = [w.builder.nodes[arg] for node in nodes if node.op == "total" for arg in node.args]
    return all(node.op == "rowsum" for node in parts or nodes)


def sum_of_pairs(w: Writer, pair: Complex) -> Sum:
    """Return the gradient of a complex weight as that of its parts, real and imaginary in turn."""
    node = _joined_sums(w, pair.real.node, pair.imaginary.node)
    return Sum((*pair.shape, 2), node)


def _joined_sums(w: Writer, real: int, imaginary: int) -> int:
    first, second = w.builder.nodes[real], w.builder.nodes[imaginary]
    if first.op == second.op == "rowsum":
        size = w.builder.size(first.args[0])
        rows = [Row((w.rows, size, 1), node.args[0]) for node in (first, second)]
        joined: Row = w.move(lambda numbers: torch.cat(numbers, 2), rows)
        return w.rowsum(joined, [0], False).node
    if first.op == second.op == "total" and len(first.args) == len(second.args):
        parts = [_joined_sums(w, a, b) for a, b in zip(first.args, second.args, strict=True)]
        return w.builder.add("total", *parts)
    raise Untraceable(
        "The gradient of a complex weight is no sum of values of each row; keep the weight as two real parameters, its "
        "real and imaginary parts."
    )


def _mean(w: Writer, x: Complex, dims: Any = None, keepdim: bool = False, **_: Any) -> Complex:
    several = [dims] if isinstance(dims, int) else dims
    count = math.prod(x.shape[dim] for dim in w.dims(x.real, several))
    total = _sum(w, x, dims, keepdim)
    return _div(w, total, float(count))


def _of_parts(rule: Callable[..., Any]) -> Callable[..., Complex]:
    """Return a rule that moves or adds the elements of both parts alike."""

    def of_parts(w: Writer, *args: Any, **options: Any) -> Complex:
        real, imaginary = (
            rule(w, *mapped(args, part, "", Complex), **options)
            for part in (lambda pair: pair.real, lambda pair: pair.imaginary)
        )
        return Complex(real.shape, real, imaginary)

    return of_parts


def _where(w: Writer, condition: Operand, a: Pair, b: Pair) -> Complex:
    x, y = pair_of(w, a), pair_of(w, b)
    return _of(w, w.point("where", condition, x.real, y.real), w.point("where", condition, x.imaginary, y.imaginary))


def _product(labels: tuple[str, str, str]) -> Callable[..., Complex]:
    def rule(w: Writer, a: Pair, b: Pair) -> Complex:
        x, y = pair_of(w, a), pair_of(w, b)

        def times(left: Operand, right: Operand) -> Row | Sum:
            return contracted(w, left, right, *labels)

        real, imaginary = times(x.real, y.real), times(x.real, y.imaginary)
        if not _is_zero(w, x.imaginary):
            real = _less(w, real, times(x.imaginary, y.imaginary))
            imaginary = _more(w, imaginary, times(x.imaginary, y.real))
        return Complex(real.shape, real, imaginary)

    return rule


def _more(w: Writer, a: Row | Sum, b: Row | Sum) -> Row | Sum:
    """Write a sum of two rows, or of two sums over rows: parts of the gradient of a complex weight."""
    return w.total(a, b) if isinstance(a, Sum) and isinstance(b, Sum) else w.point("add", a, b)


def _less(w: Writer, a: Row | Sum, b: Row | Sum) -> Row | Sum:
    return w.total(a, w.scaled(b, -1.0)) if isinstance(a, Sum) and isinstance(b, Sum) else w.point("sub", a, b)


def _view_as_real(w: Writer, x: Complex) -> Row:
    joined: Row = w.move(lambda numbers: torch.stack(numbers, -1), [x.real, x.imaginary])
    return joined


def _view_as_complex(w: Writer, x: Row) -> Complex:
    real, imaginary = (w.move(lambda numbers, part=part: numbers[..., part], x) for part in range(2))
    return Complex(real.shape, real, imaginary)


def _complex(w: Writer, real: Operand, imaginary: Operand) -> Complex:
    return _of(w, w.number(real), w.number(imaginary))


def _polar(w: Writer, size: Operand, angle: Operand) -> Complex:
    return _of(w, w.point("mul", size, w.point("cos", angle)), w.point("mul", size, w.point("sin", angle)))


def moved_pair(w: Writer, func: Callable[..., Any], values: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the result of an operation that only moves elements of a pair, or of a list of them."""
    several = isinstance(values, list | tuple)
    pairs = [pair_of(w, value) for value in (values if several else [values])]
    real, imaginary = (
        w.move(func, [part(pair) for pair in pairs] if several else part(pairs[0]), *args, **kwargs)  # type: ignore[no-untyped-call]
        for part in (lambda pair: pair.real, lambda pair: pair.imaginary)
    )
    if isinstance(real, Row):
        return Complex(real.shape, real, imaginary)
    return [Complex(a.shape, a, b) for a, b in zip(real, imaginary, strict=True)]


def _fourier(w: Writer, x: Pair, dims: Sequence[int], normalisation: int, sign: float) -> Complex:
    """Write a Fourier transform, along each dimension as a product with the table of its sines and cosines."""
    pair = pair_of(w, x)
    if len(dims) > 1:
        pair = _fourier(w, pair, dims[1:], normalisation, sign)
    dim = dims[0] % len(pair.shape)
    size = pair.shape[dim]
    if size > _MOST_POINTS:
        raise Untraceable(
            f"A Fourier transform of {size} points is not compiled: of up to {_MOST_POINTS} it is. Transform the input "
            "outside the loop, or parts of it in the step."
        )
    turns = np.outer(np.arange(size), np.arange(size)) % size
    angle = 2 * math.pi * turns / size
    # Exact where they are 0: the sign of what is left of them would decide whether an angle is pi or -pi.
    sine = np.where(2 * turns % size == 0, 0.0, np.sin(angle))
    cosine = np.where((4 * turns % size == 0) & (2 * turns % size != 0), 0.0, np.cos(angle))
    scale = {0: 1.0, 1: size**-0.5, 2: 1.0 / size}[normalisation]
    table = Complex((size, size), _table(w, cosine * scale), _table(w, sign * sine * scale))
    letters = "abcdefgh"[: len(pair.shape)]
    labels = (letters, letters[dim] + "z", letters.replace(letters[dim], "z"))
    return _product(labels)(w, pair, table)


def _table(w: Writer, numbers: np.ndarray[Any, Any]) -> Row:
    dtype = torch.float32 if w.builder.dtype == "f32" else torch.float64
    return w.row(w.literal(torch.from_numpy(numbers).to(dtype)))


def _fft_c2c(w: Writer, x: Complex, dims: Sequence[int], normalisation: int, forward: bool) -> Complex:
    return _fourier(w, x, dims, normalisation, -1.0 if forward else 1.0)


def _fft_r2c(w: Writer, x: Row, dims: Sequence[int], normalisation: int, onesided: bool) -> Complex:
    whole = _fourier(w, x, dims, normalisation, -1.0)
    if not onesided:
        return whole
    last = dims[-1]
    half: Complex = moved_pair(w, lambda numbers: numbers.narrow(last, 0, numbers.shape[last] // 2 + 1), whole)
    return half


def _fft_c2r(w: Writer, x: Complex, dims: Sequence[int], normalisation: int, last: int) -> Row:
    dim = dims[-1]
    if len(dims) > 1:
        x = _fourier(w, x, dims[:-1], normalisation, 1.0)

    # The other half is the first one's conjugate, backwards.
    def rest(numbers: torch.Tensor) -> torch.Tensor:
        return numbers.narrow(dim, 1, last - numbers.shape[dim]).flip(dim)

    mirrored: Complex = moved_pair(w, rest, x)
    whole: Complex = moved_pair(w, lambda numbers: torch.cat(numbers, dim), [x, _conj(w, mirrored)])
    real: Row = _fourier(w, whole, dims[-1:], normalisation, 1.0).real
    return real


MAKES_COMPLEX: Mapping[str, Callable[..., Any]] = {
    "complex": _complex,
    "polar": _polar,
    "view_as_complex": _view_as_complex,
    "_fft_r2c": _fft_r2c,
}
"""Rules for operations of real values with complex results."""

COMPLEX: Mapping[str, Callable[..., Any]] = {
    **MAKES_COMPLEX,
    "add": _each("add"),
    "sub": _each("sub"),
    "mul": _mul,
    "div": _div,
    "neg": _neg,
    "_conj": _conj,
    "_conj_physical": _conj,
    "conj_physical": _conj,
    "abs": _abs,
    "sgn": _sgn,
    "exp": _exp,
    "eq": _equal,
    "ne": lambda w, a, b: w.point("not", _equal(w, a, b)),
    "angle": _angle,
    "log": _log,
    "pow": _pow,
    "sqrt": lambda w, x: _pow(w, x, 0.5),
    "square": lambda w, x: _mul(w, x, x),
    "reciprocal": lambda w, x: _div(w, 1.0, x),
    "rsub": lambda w, x, other, alpha=1: _each("sub")(w, other, _mul(w, x, float(alpha)) if alpha != 1 else x),
    "tanh": _tanh,
    "tanh_backward": _tanh_backward,
    "sinh": _sinh,
    "cosh": _cosh,
    "sin": _sin,
    "cos": _turned(_cosh),
    "sigmoid": _sigmoid,
    "sigmoid_backward": _sigmoid_backward,
    "_neg_view": _neg,
    "addmm": _addmm,
    "sum": _sum,
    "mean": _mean,
    "mm": _product(("ik", "kj", "ij")),
    "bmm": _product(("bik", "bkj", "bij")),
    "mv": _product(("ik", "k", "i")),
    "view_as_real": _view_as_real,
    "real": lambda w, x: x.real,
    "imag": lambda w, x: x.imaginary,
    "_fft_c2c": _fft_c2c,
    "_fft_c2r": _fft_c2r,
    "where": _where,
    "cumsum": _of_parts(SCANS["cumsum"]),
    **{name: _of_parts(INDEXING[name]) for name in ("index", "index_put", "index_select", "gather", "scatter")},
}
"""Rules for operations of which an operand is complex."""

KEEPS_PAIR = frozenset({"clone", "detach", "alias", "contiguous", "lift_fresh", "resolve_conj", "resolve_neg"})
"""Operations whose result has the value of their argument, where that is complex."""
