"""PackedSequence: validate one, pad its data for a scan, and pack the outputs like it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

__all__ = ["Packing", "check_packed"]


@dataclass(frozen=True, slots=True)
class Packing:
    """The correspondence between a PackedSequence and padded sequences with rows in its order, longest first.

    Arguments:
        packed: the sequence that the user passed.
        lengths: (N,) int64, in the packed order.
        indices: (sum of lengths,) int64: for each entry of the packed data its index in (T * N,).
    """

    packed: PackedSequence
    lengths: Tensor
    indices: Tensor

    @classmethod
    def open(cls, packed: PackedSequence) -> Packing:
        """Derive the lengths and indices of a PackedSequence from its batch sizes."""
        # Rows stay in the packed order until the end: only states are reordered then, never a whole sequence.
        sizes = packed.batch_sizes.to(packed.data.device)
        valid = torch.arange(int(packed.batch_sizes[0]), device=sizes.device) < sizes[:, None]
        return cls(packed, valid.sum(0), valid.flatten().nonzero()[:, 0])

    def padded(self, data: Tensor) -> Tensor:
        """Return packed data as (T, N, ...), zero beyond each row's length."""
        steps, rows = self.packed.batch_sizes.shape[0], self.lengths.shape[0]
        return (
            data.new_zeros(steps * rows, *data.shape[1:])
            .index_copy(0, self.indices, data)
            .reshape(steps, rows, *data.shape[1:])
        )

    def data(self, padded: Tensor) -> Tensor:
        """Return (T, N, ...) as packed data."""
        return padded.flatten(0, 1).index_select(0, self.indices)

    def repack(self, padded: Tensor) -> PackedSequence:
        """Return (T, N, ...) as a PackedSequence with the lengths and the order of rows of the one opened."""
        return self.packed._replace(data=self.data(padded))

    def sort(self, value: Tensor, dim: int = 0) -> Tensor:
        """Bring rows from the caller's order to the packed order."""
        order = self.packed.sorted_indices
        return value if order is None else value.index_select(dim, order)

    def unsort(self, value: Tensor, dim: int = 0) -> Tensor:
        """Bring rows from the packed order to the caller's."""
        order = self.packed.unsorted_indices
        return value if order is None else value.index_select(dim, order)


def check_packed(packed: PackedSequence) -> None:
    """Validate a PackedSequence: torch's constructor accepts any tensors.

    Raises:
        ValueError: if its batch sizes don't fit its data, or its indices are no permutation of its rows.
    """
    if torch.compiler.is_compiling() or packed.batch_sizes.device.type == "meta":
        return  # there are no values to look at
    sizes, count = [int(size) for size in packed.batch_sizes.tolist()], packed.data.shape[0]
    falling = all(above >= below for above, below in pairwise(sizes))
    if not sizes or sizes[-1] < 0 or not falling or sum(sizes) != count:
        raise ValueError(
            f"A PackedSequence's batch_sizes must fall from step to step and add up to its {count} rows of data, "
            f"got {sizes}. Make it with torch.nn.utils.rnn.pack_padded_sequence."
        )
    for name in ("sorted_indices", "unsorted_indices"):
        order: Tensor | None = getattr(packed, name)
        if order is None or order.device.type == "meta":
            continue
        if not torch.equal(order.cpu().long().sort()[0], torch.arange(sizes[0])):
            raise ValueError(
                f"A PackedSequence's {name} must name each of its {sizes[0]} rows once, got {order.tolist()}. "
                "Make it with torch.nn.utils.rnn.pack_padded_sequence."
            )
