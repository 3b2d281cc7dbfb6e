"""What tensors hold that share memory with one that a step writes to in place: its views, and what it views."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fusecell.compiler.frontend.graph_writer import Writer
from fusecell.compiler.frontend.rules.complex_numbers import moved_pair
from fusecell.compiler.frontend.traced_values import Complex, ExternalGrad, Sum, Unsupported, Value

__all__ = ["Overwritten", "overwritten", "strided"]


@dataclass(frozen=True, slots=True, eq=False)
class Overwritten:
    """Value of a tensor after a write to a part of its memory.

    Attributes:
        before: its value before the write.
        written: the value that was written.
        places: for each of the tensor's elements the element of ``written`` that is there now, -1 for none.
    """

    before: Value | Overwritten
    written: Value | Overwritten
    places: Tensor

    def value(self, w: Writer) -> Value:
        """Return the value as nodes of a graph."""
        before, written = self.before, self.written
        assert not isinstance(before, Overwritten)
        assert not isinstance(written, Overwritten)
        for part in (before, written):
            if isinstance(part, Unsupported | ExternalGrad):
                return part
            if isinstance(part, Sum):
                return Unsupported(tuple(self.places.shape), "The gradient of a weight is changed in place in part.")
        is_new = self.places >= 0
        is_complex = isinstance(before, Complex) or isinstance(written, Complex)
        move = partial(moved_pair, w) if is_complex else w.move

        def joined(numbers: list[Tensor]) -> Tensor:
            old, new = numbers
            return torch.where(is_new, new.reshape(-1)[self.places.clamp(min=0)], old)

        if bool(is_new.all()):
            result: Value = move(lambda numbers: numbers.reshape(-1)[self.places], written)
        else:
            result = move(joined, [before, written])
        return result


def overwritten(tensor_key: tuple[object, ...], target: Tensor) -> Tensor | None:
    """Return, for each element of a tensor, the element of ``target`` in the same memory; None if they share none.

    Arguments:
        tensor_key: of the tensor, by `aten_arguments.key_of`: its storage, offset, shape and strides.
    """
    _, offset, shape, strides, *_ = tensor_key
    assert isinstance(offset, int)
    assert isinstance(shape, tuple)
    assert isinstance(strides, tuple)
    here, there = (
        _addresses(offset, shape, strides),
        _addresses(int(target.storage_offset()), target.shape, target.stride()),
    )
    if not here.size or not there.size:
        return None
    order = np.argsort(there.ravel(), kind="stable")
    ordered = there.ravel()[order]
    at = np.searchsorted(ordered, here)
    at[at == len(ordered)] = 0
    places = np.where(ordered[at] == here, order[at], -1)
    return torch.from_numpy(places) if (places >= 0).any() else None


def _addresses(
    offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Return where in its storage each element of a tensor is."""
    addresses = np.full((), offset, dtype=np.int64)
    for size, stride in zip(shape, strides, strict=True):
        addresses = addresses[..., None] + np.arange(size, dtype=np.int64) * stride
    return addresses


def strided(numbers: Tensor, source: Tensor, result: Tensor) -> Tensor:
    """Return the elements that ``result``, by as_strided, has of ``source``, whose elements are ``numbers``."""
    here = _addresses(int(source.storage_offset()), source.shape, source.stride())
    there = _addresses(int(result.storage_offset()), result.shape, result.stride())
    storage = np.zeros(max(int(here.max(initial=0)), int(there.max(initial=0))) + 1, dtype=np.int64)
    storage[here] = numbers.numpy()
    return torch.from_numpy(storage[there])
