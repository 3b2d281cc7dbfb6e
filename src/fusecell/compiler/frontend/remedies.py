"""What to write instead of operations on rows that have no rule. On weights alone any operation of torch's is taken."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["REMEDIES"]

_TALL = "with more lines than columns and full rank"
REMEDIES: Mapping[str, str] = {
    "masked_scatter": (
        "It hands elements out row after row, so that those a row gets depend on the rows before; within each row, "
        "torch.where(mask, source.gather(1, (mask.cumsum(1) - 1).clamp(min=0)), x) does it."
    ),
    "mode": (
        "x.gather(1, (x[:, :, None] == x[:, None]).sum(2).argmax(1, keepdim=True)) is the most frequent element, the "
        "first of several."
    ),
    "linalg_qr": (
        "Of a matrix with positive diagonal in R, R is torch.linalg.cholesky(a.mT @ a).mT, and Q is "
        "torch.linalg.solve_triangular(R, a, upper=True, left=False)."
    ),
    "linalg_pinv": f"Of a matrix {_TALL} it is torch.linalg.solve(a.mT @ a, a.mT).",
    "linalg_lstsq": f"Of a matrix {_TALL} the solution is torch.linalg.solve(a.mT @ a, a.mT @ b).",
    "linalg_lu_factor_ex": "torch.linalg.solve, inv, det, slogdet and cholesky are compiled.",
    "linalg_matrix_exp": (
        "With b = a / 64 it is torch.linalg.matrix_power(eye + b + b @ b / 2 + b @ b @ b / 6, 64), to seven digits for "
        "a norm of 1."
    ),
}
