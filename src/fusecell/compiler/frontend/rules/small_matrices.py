"""Rules for linear algebra of small matrices, of up to four rows: written out element by element.

An element of all matrices of a row is one value, so that vectors run over the matrices. Larger ones need loops whose
order depends on values, and are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch

from fusecell.compiler.frontend.graph_writer import Operand, Writer
from fusecell.compiler.frontend.traced_values import Row, Untraceable
from fusecell.torch_internals import SOLVES_ADJOINTS_BY_FACTORS

__all__ = ["SMALL_MATRICES"]

_MOST_ROWS = 4
Elements = list[list[Row]]


def _elements(w: Writer, matrix: Operand) -> Elements:
    row = w.number(matrix)
    height, width = row.shape[-2:]
    if row.axis is not None and row.axis >= len(row.shape) - 2:
        raise Untraceable("The step mixes the rows of the batch: a matrix is made of several of them.")
    if max(height, width) > _MOST_ROWS:
        raise Untraceable(
            f"Linear algebra of {height} x {width} matrices is not compiled: of up to {_MOST_ROWS} x {_MOST_ROWS} it "
            "is. Compute it of parameters alone, outside the loop, or solve iteratively with products."
        )
    return [[w.move(lambda numbers, i=i, j=j: numbers[..., i, j], row) for j in range(width)] for i in range(height)]


def _matrix(w: Writer, elements: Elements) -> Row:
    flat = [element for line in elements for element in line]
    height, width = len(elements), len(elements[0])
    shape = max((element.shape for element in flat), key=len)
    wide = [w.move(lambda numbers: numbers.expand(shape), element) for element in flat]
    stacked: Row = w.move(lambda numbers: torch.stack(numbers, -1).unflatten(-1, (height, width)), wide)  # type: ignore[no-untyped-call]  # torch's
    return stacked


def _minor(w: Writer, m: Elements, rows: Sequence[int], cols: Sequence[int]) -> Row:
    """Return the determinant of some rows and columns, by its first row."""
    if len(rows) == 1:
        return m[rows[0]][cols[0]]
    total: Row | None = None
    for place, col in enumerate(cols):
        rest = [other for other in cols if other != col]
        term = w.point("mul", m[rows[0]][col], _minor(w, m, rows[1:], rest))
        total = term if total is None else w.point("sub" if place % 2 else "add", total, term)
    assert total is not None
    return total


def _factors(w: Writer, matrix: Operand) -> tuple[Row, Row]:
    """Return what stands for a matrix's LU factors and pivots, which only `_solve_by_factors` takes: the matrix."""
    row = w.number(matrix)
    shape = row.shape[:-1]
    return row, w.const(0.0, shape, row.axis if row.axis is not None and row.axis < len(shape) else None)


def _inverse_elements(w: Writer, m: Elements) -> Elements:
    size = len(m)
    everything = list(range(size))
    determinant = _minor(w, m, everything, everything)
    if size == 1:
        return [[w.point("div", 1.0, determinant)]]
    inverse: Elements = []
    for i in everything:
        line = []
        for j in everything:
            rows, cols = [r for r in everything if r != j], [c for c in everything if c != i]
            cofactor = _minor(w, m, rows, cols)
            if (i + j) % 2:
                cofactor = w.point("neg", cofactor)
            line.append(w.point("div", cofactor, determinant))
        inverse.append(line)
    return inverse


def _inverse(w: Writer, matrix: Operand, **_: Any) -> tuple[Row, Row]:
    result = _matrix(w, _inverse_elements(w, _elements(w, matrix)))
    return result, _success(w, result)


def _success(w: Writer, like: Row) -> Row:
    """Return the report that torch gives for each matrix: 0, as nothing here reads values to find a failure."""
    shape = like.shape[:-2]
    return w.const(0.0, shape, like.axis if like.axis is not None and like.axis < len(shape) else None)


def _solve(w: Writer, a: Operand, b: Operand, *, left: bool = True, **_: Any) -> tuple[Any, ...]:
    if not SOLVES_ADJOINTS_BY_FACTORS:
        raise Untraceable(
            "torch.linalg.solve in a step wants torch 2.12 or newer: older ones use its factors in another way for the "
            "gradient. torch.linalg.inv(a) @ b is compiled."
        )
    return _solved(w, _elements(w, a), a, b, left), *_factors(w, a), _success(w, w.number(a))


def _solve_by_factors(
    w: Writer, factors: Operand, _pivots: Operand, b: Operand, *, left: bool = True, adjoint: bool = False
) -> Row:
    m = _elements(w, factors)
    if adjoint:
        m = [[line[i] for line in m] for i in range(len(m))]
    return _solved(w, m, factors, b, left)


def _solved(w: Writer, m: Elements, a: Operand, b: Operand, left: bool) -> Row:
    """Return the solution of a x = b, or of x a = b, by the inverse of a."""
    inverse = _inverse_elements(w, m)
    right = w.number(b)
    is_vector = len(right.shape) == len(w.number(a).shape) - 1
    if is_vector:
        right = w.move(lambda numbers: numbers.unsqueeze(-1), right)
    lines = _lines(w, right, left)
    size = len(inverse)
    coefficients = inverse if left else [[inverse[j][i] for j in range(size)] for i in range(size)]
    result = _of_lines(w, [_dot(w, [_of_a_line(w, value) for value in line], lines) for line in coefficients], left)
    if is_vector:
        result = w.move(lambda numbers: numbers.squeeze(-1), result)
    return result


def _lines(w: Writer, row: Row, left: bool) -> list[Row]:
    """Return the rows of matrices, or where an operation is from the right their columns, each as one value.

    A line may have the batch in it, where a matrix that all rows share is applied to all of them at once.
    """
    size = row.shape[-2 if left else -1]
    if row.axis == len(row.shape) - (2 if left else 1):
        raise Untraceable("The step mixes the rows of the batch: a matrix is applied to the batch dimension.")
    return [w.move(lambda numbers, i=i: numbers[..., i, :] if left else numbers[..., i], row) for i in range(size)]


def _of_a_line(w: Writer, element: Row) -> Row:
    """Return an element of each matrix, to be computed with lines of others."""
    wide: Row = w.move(lambda numbers: numbers.unsqueeze(-1), element)
    return wide


def _of_lines(w: Writer, lines: Sequence[Row], left: bool) -> Row:
    stacked: Row = w.move(lambda numbers: torch.stack(numbers, -2 if left else -1), list(lines))
    return stacked


def _dot(w: Writer, a: Sequence[Row], b: Sequence[Row]) -> Row:
    terms = [w.point("mul", x, y) for x, y in zip(a, b, strict=True)]
    return reduce(lambda total, term: w.point("add", total, term), terms)


def _determinant(w: Writer, matrix: Operand) -> tuple[Row, None, None]:
    """Return a determinant, without the factors, by which torch would compute its gradient."""
    m = _elements(w, matrix)
    everything = range(len(m))
    return _minor(w, m, everything, everything), None, None


def _log_determinant(w: Writer, matrix: Operand) -> tuple[Row, Row, None, None]:
    determinant, *_ = _determinant(w, matrix)
    return w.point("sign", determinant), w.point("log", w.point("abs", determinant)), None, None


def _cholesky(w: Writer, matrix: Operand, *, upper: bool = False, **_: Any) -> tuple[Row, Row]:
    m = _elements(w, matrix)
    size = len(m)
    zero = w.const(0.0)
    factor: Elements = [[zero] * size for _ in range(size)]
    for j in range(size):
        for i in range(j, size):
            value = m[j][i] if upper else m[i][j]
            for k in range(j):
                value = w.point("sub", value, w.point("mul", factor[i][k], factor[j][k]))
            factor[i][j] = w.point("sqrt", value) if i == j else w.point("div", value, factor[j][j])
    if upper:
        factor = [[factor[j][i] for j in range(size)] for i in range(size)]
    result = _matrix(w, factor)
    return result, _success(w, result)


def _triangular(
    w: Writer, a: Operand, b: Operand, *, upper: bool, left: bool = True, unitriangular: bool = False, **_: Any
) -> Row:
    m, lines = _elements(w, a), _lines(w, w.number(b), left)
    size = len(m)
    if not left:
        # X A = B is Aᵀ Xᵀ = Bᵀ.
        m = [[m[j][i] for j in range(size)] for i in range(size)]
        upper = not upper
    m = [[_of_a_line(w, value) for value in line] for line in m]
    solution = dict(enumerate(lines))
    for i in range(size - 1, -1, -1) if upper else range(size):
        value = lines[i]
        for k in range(i + 1, size) if upper else range(i):
            value = w.point("sub", value, w.point("mul", m[i][k], solution[k]))
        solution[i] = value if unitriangular else w.point("div", value, m[i][i])
    return _of_lines(w, list(solution.values()), left)


def _cholesky_solve(w: Writer, b: Operand, factor: Operand, upper: bool = False) -> Row:
    """Solve A x = b, given L of A = L Lᵀ, or its transpose."""
    turned = w.move(lambda numbers: numbers.mT, w.number(factor))
    lower, higher = (turned, factor) if upper else (factor, turned)
    return _triangular(w, higher, _triangular(w, lower, b, upper=False), upper=True)


def _inverse_by_cholesky(w: Writer, factor: Operand, upper: bool = False) -> Row:
    """Return the inverse of A, given L of A = L Lᵀ, or its transpose."""
    size = w.number(factor).shape[-1]
    one, zero = w.const(1.0), w.const(0.0)
    identity = _matrix(w, [[one if i == j else zero for j in range(size)] for i in range(size)])
    return _cholesky_solve(w, identity, factor, upper)


def _cross(w: Writer, a: Operand, b: Operand, *, dim: int = -1) -> Row:
    x, y = w.number(a), w.number(b)

    def turned(row: Row, by: int) -> Row:
        result: Row = w.move(lambda numbers: numbers.roll(by, dim), row)
        return result

    return w.point(
        "sub",
        w.point("mul", turned(x, -1), turned(y, -2)),
        w.point("mul", turned(x, -2), turned(y, -1)),
    )


SMALL_MATRICES: Mapping[str, Callable[..., Any]] = {
    "linalg_inv_ex": _inverse,
    "_linalg_solve_ex": _solve,
    "linalg_lu_solve": _solve_by_factors,
    "linalg_cholesky_ex": _cholesky,
    "linalg_solve_triangular": _triangular,
    "cholesky_solve": _cholesky_solve,
    "cholesky_inverse": _inverse_by_cholesky,
    "_linalg_slogdet": _log_determinant,
    "_linalg_det": _determinant,
    "linalg_cross": _cross,
}
