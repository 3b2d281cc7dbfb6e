"""What to write instead of operations on rows that have no rule. On weights alone any operation of torch's is taken."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

__all__ = ["AS_INPUT", "GRADIENT_REMEDIES", "REMEDIES", "of_write", "without_rule"]

AS_INPUT = (
    "A weight's gradient is compiled as a sum over rows of what each of them adds to it. Return the weight from "
    "Cell.draw, expanded to (1, batch, ...): an input of the step may have any gradient."
)
"""For what a step does to the gradient of a weight."""
_ITERATES = "Its iterations end when they have converged, which differs from row to row."
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
    "_linalg_eigh": (
        f"{_ITERATES} Of matrices [[a, b], [b, d]] the eigenvalues are (a + d) / 2 -+ torch.hypot((a - d) / 2, b); of "
        "larger ones the eigenvector whose eigenvalue is largest comes of v = F.normalize(a @ v, dim=1), a fixed "
        "number of times, and the eigenvalue is v.mT @ a @ v."
    ),
    "linalg_eig": (
        f"{_ITERATES} Of matrices [[a, b], [c, d]] with real eigenvalues these are (a + d) / 2 -+ "
        "torch.sqrt((a - d) ** 2 / 4 + b * c)."
    ),
    "_linalg_svd": (
        f"{_ITERATES} The largest singular value is (a @ v).norm(dim=1) after v = F.normalize(a.mT @ (a @ v), dim=1), "
        "a fixed number of times; the Frobenius norm, the determinant and solutions are compiled."
    ),
    "linalg_ldl_factor_ex": "Of a matrix that is positive definite torch.linalg.cholesky is compiled.",
    "igamma": (
        "For a whole number a it is 1 - torch.exp(-x) * sum(x**k / math.factorial(k) for k in range(a)), and for a "
        "half, a = 0.5, torch.erf(x.sqrt())."
    ),
    "igammac": (
        "For a whole number a it is torch.exp(-x) * sum(x**k / math.factorial(k) for k in range(a)), and for a half, "
        "a = 0.5, torch.erfc(x.sqrt())."
    ),
    "special_zeta": (
        "For a whole number s above 1, zeta(s, q) is torch.polygamma(s - 1, q) * (-1) ** s / math.factorial(s - 1)."
    ),
    **dict.fromkeys(
        ("linalg_lu", "lu_unpack", "geqrf", "ormqr", "linalg_householder_product"),
        "torch.linalg.solve, inv, det, slogdet and cholesky are compiled.",
    ),
    "triangular_solve": "torch.linalg.solve_triangular(A, b, upper=True) is compiled, with its gradient.",
    "histc": (
        "It counts elements of all rows; (x[:, :, None] >= edges[:-1]).logical_and(x[:, :, None] < edges[1:]).sum(1) "
        "counts those of each."
    ),
    "bincount": "It counts ids of all rows; F.one_hot(ids, count).sum(1) counts those of each.",
    "masked_select": (
        "How many elements a mask picks depends on values; compute with torch.where(mask, x, 0), and count with "
        "mask.sum(1)."
    ),
    "nonzero": (
        "How many elements are not 0 depends on values; torch.where(x != 0, a, b) computes with all of them, and "
        "(x != 0).sum(1) counts them."
    ),
    "_unique2": (
        "How many elements differ depends on values; y = x.sort(1).values has equal ones side by side, and (y[:, 1:] "
        "!= y[:, :-1]).sum(1) + 1 counts those that differ."
    ),
    "dist": (
        "It is one distance of all rows together; that of each row is (x - y).norm(dim=-1, keepdim=True), also with "
        "other norms, p=1."
    ),
    "linalg_matrix_exp": (
        "With b = a / 64 it is torch.linalg.matrix_power(eye + b + b @ b / 2 + b @ b @ b / 6, 64), to seven digits for "
        "a norm of 1."
    ),
}
GRADIENT_REMEDIES: Mapping[str, str] = {
    "AsStridedBackward0": (
        "The gradient of as_strided has no rule: what it adds up where follows from memory. x.unfold(dim, size, step) "
        "cuts the same windows, and x[:, ::step] the same elements, with a gradient."
    ),
}
"""What to write instead of operations that are compiled, but not their gradients, by autograd's names of these."""
_NO_OTHER = (
    "On rows write it by elementwise functions, sums over features, products, gather or sort; on parameters alone any "
    "operation is compiled."
)


def without_rule(name: str) -> str:
    """Return the sentences that refuse an operation on rows that has no rule."""
    return f"The op {name} has no rule. {REMEDIES.get(name, _NO_OTHER)}"


def of_write(target: Tensor, sources: Iterable[tuple[str, Tensor]]) -> str:
    """Say why a write to an input, a state or a tensor of the cell is refused."""
    storage = target.untyped_storage()._cdata
    for path, tensor in sources:
        if tensor.untyped_storage()._cdata == storage:
            name = path.rpartition(".")[2]
            owner, _, of_parametrization = path.partition(".parametrizations.")
            if of_parametrization:
                return (
                    f"The parametrization of self.{owner} changes {name} in place at each step, which a compiled "
                    f"loop would not. self.{owner}.parametrizations.eval() leaves it as it is, and is compiled."
                )
            if name in ("num_batches_tracked", "running_mean", "running_var"):
                return (
                    f"The step norms by the statistics of the batch, which mixes its rows, and keeps them in "
                    f"self.{path}: .eval() on the BatchNorm uses its running statistics; LayerNorm, GroupNorm and "
                    "an InstanceNorm with track_running_stats=False have each row's own."
                )
            if isinstance(tensor, nn.Parameter):
                return (
                    f"The step changes self.{path} in place, which a compiled loop would not. Change a parameter "
                    "between calls, as after each step of the optimizer, or compute with a changed copy, such as "
                    f"w = self.{path}.clamp(-1, 1); what is another for each row and step, keep as a state."
                )
            return (
                f"The step changes self.{path} in place, which a compiled loop would not. Keep it in the state: "
                f'name it in `states = ("h", "{name}")` and return its new value as part of the new state.'
            )
    return "The step changes an input or a state in place; compute a new tensor instead."
