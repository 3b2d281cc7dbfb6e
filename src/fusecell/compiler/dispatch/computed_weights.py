"""Cached calls of cells that compute weights from others, such as ``F.softplus(self.rate)``: torch does so in each."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fusecell.compiler.frontend.weight_prologue import Prologue
from fusecell.execution.options import State

__all__ = ["ComputedWeights"]


class ComputedWeights:
    """The weights of a call's kernels, computed from tensors of the module.

    Arguments:
        prologue: what computes them.
        count: how many tensors of a call the caller gave; the module's come after them.
        indices: of the module's tensors among a call's, by path.

    Attributes:
        paths: of the tensors that the weights are computed from.
    """

    def __init__(self, prologue: Prologue, count: int, indices: Mapping[str, int]) -> None:
        self._prologue, self._count = prologue, count
        self.paths = prologue.source_paths
        self._indices = [indices[path] for path in self.paths]

    def select(self, tensors: State) -> State:
        """Return the caller's tensors of a call, then the weights, then the tensors that these were computed from.

        With autograd where grad mode is on, which goes on from the gradients of the weights.
        """
        originals: tuple[Tensor, ...] = tuple([tensors[index] for index in self._indices])
        return *tensors[: self._count], *self._prologue.computed_from(originals), *originals
