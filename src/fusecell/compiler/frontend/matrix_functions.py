"""Linear algebra of matrices with five rows and more, written with operations that are compiled.

torch's own functions loop in an order that depends on values. Smaller matrices have rules (`rules/small_matrices`), and
of weights torch computes an inverse in the weight prologue, where a step solves with one matrix for all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fusecell.compiler.frontend.traced_values import Untraceable
from fusecell.torch_transforms import in_functorch_transform

__all__ = ["MATRIX_FUNCTIONS", "IsWeight"]

IsWeight = Callable[[Tensor], bool]
"""Says whether a tensor is made of weights alone."""
_SMALL = 4
_MOST_ROWS = 32


def _eliminated(a: Tensor, divides_by_zero: bool) -> tuple[Tensor, Tensor]:
    """Return the inverses and the determinants of matrices, by Gauss and Jordan's elimination with row pivots.

    Arguments:
        divides_by_zero: give infinities and NaN for a singular matrix; otherwise its determinant is 0.
    """
    size = a.shape[-1]
    numbers = torch.arange(size)
    lines = torch.cat([a, torch.eye(size, dtype=a.dtype).expand_as(a)], -1)
    determinant = torch.ones_like(a[..., 0, 0])
    for k in range(size):
        sizes = torch.where(numbers < k, -1.0, lines[..., k].abs())
        best = sizes.argmax(-1, keepdim=True)
        is_best = (numbers == best).unsqueeze(-1)
        line = torch.where(is_best, lines, 0.0).sum(-2)
        lines = torch.where(is_best, lines[..., k : k + 1, :], lines)
        pivot = line[..., k]
        determinant = determinant * torch.where(best.squeeze(-1) == k, pivot, -pivot)
        if not divides_by_zero:
            pivot = torch.where(pivot == 0, 1.0, pivot)
        line = (line / pivot.unsqueeze(-1)).unsqueeze(-2)
        lines = torch.where((numbers == k).unsqueeze(-1), line, lines - lines[..., k : k + 1] * line)
    return lines[..., size:], determinant


def _gradient_of_inverted(inverse: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of matrices, from their inverses and the gradient of these."""
    slope: Tensor = inverse.mT @ gradient @ inverse.mT
    return -slope


class _Inverse(torch.autograd.Function):
    """Inverses of matrices."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        inverse, _ = _eliminated(a, divides_by_zero=True)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return _gradient_of_inverted(inverse, gradients[0])


class _Determinant(torch.autograd.Function):
    """Determinants of matrices."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        inverse, determinant = _eliminated(a, divides_by_zero=False)
        ctx.save_for_backward(inverse, determinant)
        return determinant

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        inverse, determinant = ctx.saved_tensors
        slope: Tensor = (gradients[0] * determinant)[..., None, None] * inverse.mT
        return slope


def _substituted(a: Tensor) -> Tensor:
    """Return the inverses of lower triangular matrices, row after row."""
    unit = torch.eye(a.shape[-1], dtype=a.dtype)
    lines: list[Tensor] = []
    for k in range(a.shape[-1]):
        line = unit[k].expand_as(a[..., k, :])
        if k:
            line = line - (a[..., k, None, :k] @ torch.stack(lines, -2)).squeeze(-2)
        lines.append(line / a[..., k, k, None])
    return torch.stack(lines, -2)


class _LowerInverse(torch.autograd.Function):
    """Inverses of lower triangular matrices."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        inverse = _substituted(a)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return _gradient_of_inverted(inverse, gradients[0]).tril()


class _CholeskyInverse(torch.autograd.Function):
    """Inverses of A = L Lᵀ; the gradient is torch's, which has numbers in the half of L that is not read, too."""

    @staticmethod
    def forward(ctx: Any, lower: Tensor) -> Tensor:
        factor = _substituted(lower)
        inverse = factor.mT @ factor
        ctx.save_for_backward(lower, inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        lower, inverse = ctx.saved_tensors
        slope: Tensor = inverse @ (gradients[0] + gradients[0].mT) @ inverse @ lower
        return -slope


class _Cholesky(torch.autograd.Function):
    """Lower triangular factors of positive definite matrices, column after column."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        size = a.shape[-1]
        numbers = torch.arange(size)
        columns: list[Tensor] = []
        for k in range(size):
            column = a[..., k]
            if k:
                before = torch.stack(columns, -2)
                column = column - (before[..., None, :, k] @ before).squeeze(-2)
            column = column / column[..., k, None].sqrt()
            columns.append(torch.where(numbers < k, 0.0, column))
        factor = torch.stack(columns, -2).mT
        ctx.save_for_backward(factor, _substituted(factor))
        return factor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        factor, inverse = ctx.saved_tensors
        inner = (factor.mT @ gradients[0]).tril()
        inner = inner - 0.5 * torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))
        slope: Tensor = inverse.mT @ inner @ inverse
        return 0.5 * (slope + slope.mT)


def _is_written_out(a: Tensor, is_weight: IsWeight) -> bool:
    """Whether an operation on matrices is to be written out here."""
    # A Function of the old form is none for torch.func's transforms, which have rules for torch's own operations.
    if a.shape[-1] <= _SMALL or in_functorch_transform() or is_weight(a) or a.is_complex():
        return False
    if a.shape[-1] > _MOST_ROWS:
        raise Untraceable(
            f"Linear algebra of {a.shape[-2]} x {a.shape[-1]} matrices is not compiled: of up to {_MOST_ROWS} x "
            f"{_MOST_ROWS} it is. Compute it of parameters alone, outside the loop, or solve iteratively with products."
        )
    return True


def _inverse(is_weight: IsWeight, A: Tensor) -> Tensor:
    is_written_out = _is_written_out(A, is_weight)
    result: Tensor = _Inverse.apply(A) if is_written_out else torch.linalg.inv(A)  # type: ignore[no-untyped-call]  # torch's
    return result


def _solve(is_weight: IsWeight, A: Tensor, B: Tensor, *, left: bool = True) -> Tensor:
    if not _is_by_inverse(is_weight, A, B):
        solution: Tensor = torch.linalg.solve(A, B, left=left)
        return solution
    inverse = _inverse(is_weight, A)
    if B.dim() > 1 and B.shape == A.shape[:-1]:  # vectors
        return (inverse @ B.unsqueeze(-1)).squeeze(-1)
    return inverse @ B if left else B @ inverse


def _is_by_inverse(is_weight: IsWeight, a: Tensor, b: Tensor) -> bool:
    """Whether to solve with an inverse: of a weight for values of rows, or of larger matrices."""
    return not is_weight(b) if is_weight(a) else _is_written_out(a, is_weight)


def _triangular_inverse(is_weight: IsWeight, A: Tensor, upper: bool, unitriangular: bool) -> Tensor:
    if not _is_written_out(A, is_weight):
        unit = torch.eye(A.shape[-1], dtype=A.dtype)
        result: Tensor = torch.linalg.solve_triangular(A, unit, upper=upper, unitriangular=unitriangular)
        return result
    lower = A.mT if upper else A
    if unitriangular:
        lower = lower.tril(-1) + torch.eye(A.shape[-1], dtype=A.dtype)
    inverse: Tensor = _LowerInverse.apply(lower)  # type: ignore[no-untyped-call]  # torch's
    return inverse.mT if upper else inverse


def _solve_triangular(
    is_weight: IsWeight, A: Tensor, B: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Tensor:
    if not _is_by_inverse(is_weight, A, B):
        options = {"upper": upper, "left": left, "unitriangular": unitriangular}
        solution: Tensor = torch.linalg.solve_triangular(A, B, **options)
        return solution
    inverse = _triangular_inverse(is_weight, A, upper, unitriangular)
    return inverse @ B if left else B @ inverse


def _cholesky(is_weight: IsWeight, A: Tensor, *, upper: bool = False) -> Tensor:
    if not _is_written_out(A, is_weight):
        result: Tensor = torch.linalg.cholesky(A, upper=upper)
        return result
    factor: Tensor = _Cholesky.apply(A)  # type: ignore[no-untyped-call]  # torch's
    return factor.mT if upper else factor


def _cholesky_by_old_name(is_weight: IsWeight, input: Tensor, upper: bool = False) -> Tensor:
    return _cholesky(is_weight, input, upper=upper)


def _cholesky_inverse(is_weight: IsWeight, L: Tensor, upper: bool = False) -> Tensor:
    if not _is_written_out(L, is_weight):
        return torch.cholesky_inverse(L, upper)
    inverse: Tensor = _CholeskyInverse.apply(L.mT if upper else L)  # type: ignore[no-untyped-call]  # torch's
    return inverse


def _cholesky_solve(is_weight: IsWeight, B: Tensor, L: Tensor, upper: bool = False) -> Tensor:
    if not _is_by_inverse(is_weight, L, B):
        return torch.cholesky_solve(B, L, upper)
    return _cholesky_inverse(is_weight, L, upper) @ B


def _determinant(is_weight: IsWeight, A: Tensor) -> Tensor:
    """Return determinants; small ones by their first row, as torch's gradient of them would look for zeros."""
    if not is_weight(A) and A.shape[-1] <= _SMALL:
        return _expanded_determinant(A)
    is_written_out = _is_written_out(A, is_weight)
    result: Tensor = _Determinant.apply(A) if is_written_out else torch.linalg.det(A)  # type: ignore[no-untyped-call]  # torch's
    return result


def _expanded_determinant(a: Tensor) -> Tensor:
    size = a.shape[-1]
    if size == 1:
        return a[..., 0, 0]
    total = torch.zeros_like(a[..., 0, 0])
    for column in range(size):
        rest = torch.cat((a[..., 1:, :column], a[..., 1:, column + 1 :]), -1)
        term = a[..., 0, column] * _expanded_determinant(rest)
        total = total - term if column % 2 else total + term
    return total


def _sign_and_log_determinant(is_weight: IsWeight, A: Tensor) -> Any:
    if is_weight(A):
        return torch.linalg.slogdet(A)
    value = _determinant(is_weight, A)
    named = torch.return_types.linalg_slogdet  # type: ignore[attr-defined]  # torch's, named after the function
    return named((value.detach().sign(), value.abs().log()))


def _log_determinant(is_weight: IsWeight, A: Tensor) -> Tensor:
    if is_weight(A):
        return torch.logdet(A)
    sign, size = _sign_and_log_determinant(is_weight, A)
    return torch.where(sign < 0, torch.nan, size)


def _cross(is_weight: IsWeight, input: Tensor, other: Tensor, dim: int | None = None) -> Tensor:
    if dim is None and not (is_weight(input) and is_weight(other)):
        raise Untraceable(
            "torch.cross without a dimension takes the first that has three elements, which is the batch where that "
            "has three rows; give it dim=-1."
        )
    return torch.cross(input, other, dim)


MATRIX_FUNCTIONS: Mapping[Any, Callable[..., Any]] = {
    **dict.fromkeys((torch.linalg.inv, torch.inverse, Tensor.inverse), _inverse),
    torch.linalg.solve: _solve,
    torch.linalg.solve_triangular: _solve_triangular,
    torch.linalg.cholesky: _cholesky,
    **dict.fromkeys((torch.cholesky, Tensor.cholesky), _cholesky_by_old_name),
    **dict.fromkeys((torch.cross, Tensor.cross), _cross),
    **dict.fromkeys((torch.cholesky_solve, Tensor.cholesky_solve), _cholesky_solve),
    **dict.fromkeys((torch.cholesky_inverse, Tensor.cholesky_inverse), _cholesky_inverse),
    **dict.fromkeys((torch.det, Tensor.det, torch.linalg.det), _determinant),
    **dict.fromkeys((torch.linalg.slogdet, torch.slogdet, Tensor.slogdet), _sign_and_log_determinant),
    **dict.fromkeys((torch.logdet, Tensor.logdet), _log_determinant),
}
"""By a function of torch, the one that stands for it while a step is traced; the first argument is an `IsWeight`."""
