"""Cached calls of 16-bit layers: their tensors converted to the float32 of their kernels, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter

from torch import Tensor, nn

from fusecell.compiler.frontend.dtypes import rounded, widened
from fusecell.execution.options import State

__all__ = ["Conversion", "ConvertedCall", "selector"]

Run = Callable[[nn.Module, State], tuple[Tensor | None, State] | None]
"""A cached call, given the owner and the tensors that its kernel takes."""


class Conversion:
    """The tensors of a 16-bit call that a kernel takes, converted to its float32 and back.

    Arguments:
        tensors: all of an example call's.
        indices: of those that the kernel takes; the input comes first.
    """

    def __init__(self, tensors: State, indices: Sequence[int]) -> None:
        self._select = selector(indices)
        self._dtypes = [tensors[index].dtype for index in indices]
        self.dtype = self._dtypes[0]

    def widened(self, tensors: State) -> State:
        """Select and convert those that the kernel takes."""
        return widened(self._select(tensors))

    def restored(self, tensors: State) -> State:
        """Convert the tensors that :meth:`widened` returned back to what they were."""
        return tuple([value.to(dtype) for value, dtype in zip(tensors, self._dtypes, strict=True)])


class ConvertedCall:
    """A cached call of a 16-bit layer, around the call of its float32 kernels."""

    def __init__(self, run: Run, conversion: Conversion) -> None:
        self._run, self._conversion = run, conversion

    def __call__(self, owner: nn.Module, tensors: State) -> tuple[Tensor | None, State] | None:
        result = self._run(owner, self._conversion.widened(tensors))
        if result is None:
            return None
        (outputs, after), dtype = result, self._conversion.dtype
        return None if outputs is None else outputs.to(dtype), rounded(after, dtype)


def selector(indices: Sequence[int]) -> Callable[[State], State]:
    """Return a function that takes some entries of a tuple, in an order of its own."""
    if len(indices) > 1:
        return itemgetter(*indices)
    (index,) = indices
    return lambda tensors: (tensors[index],)
