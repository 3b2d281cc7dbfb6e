"""Formats in which the weights of products are kept in memory: smaller than the numbers that are computed with.

=========  ==================================================================================================
bf16       the upper half of a float32: 8 bits of exponent, 8 of significand. A weight is half as long.
bf16.bf16  the same, and what these weights multiply are such numbers too, as the graph says: pairs of products.
f16        IEEE's half precision: 5 bits of exponent, 11 of significand.
i8         a whole number from -127 to 127. The graph multiplies what they sum to by a scale for each output.
i8.i8      the same, and what these weights multiply are such numbers too, as the graph says: sums are exact.
=========  ==================================================================================================

A kernel's weights are float32 numbers that such a format has exactly; packing them loses nothing. Sums of ``i8.i8``
have at most `MOST_EXACT` terms: computed in float32 or in integers, they have the same bits.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import numpy as np

__all__ = ["LARGEST_I8", "MOST_EXACT", "Storage"]

LARGEST_I8 = 127
"""The largest whole number of `Storage.I8`; -128 isn't used, so that every number has its negative."""
MOST_EXACT = 2**24 // LARGEST_I8**2
"""Products of two such numbers, 1040, of which float32 has every sum, in whichever order they are added."""
_LARGEST_BF16 = np.array(0x7F7F0000, np.uint32).view(np.float32)[()]
_Array = np.ndarray[Any, Any]


class Storage(Enum):
    """A format of stored weights."""

    BF16 = "bf16"
    BF16_BF16 = "bf16.bf16"
    F16 = "f16"
    I8 = "i8"
    I8_I8 = "i8.i8"

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return 1 if self.is_whole else 2

    @property
    def is_whole(self) -> bool:
        """Whether it has whole numbers alone."""
        return self in (Storage.I8, Storage.I8_I8)

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy's dtype of stored numbers; it has no bfloat16, whose bits are uint16."""
        return np.dtype(np.float16 if self is Storage.F16 else np.int8 if self.is_whole else np.uint16)

    @property
    def packs_pairs(self) -> bool:
        """Whether a word of 32 bits in a panel has the weights of two neighbouring k.

        So a kernel makes a float32 of each with one instruction, a shift or a mask, and no conversion.
        """
        return self in (Storage.BF16, Storage.BF16_BF16)

    @property
    def multiplies_pairs(self) -> bool:
        """Whether an instruction adds the products of such a word with a pair of an operand's numbers to a sum."""
        return self is Storage.BF16_BF16

    @property
    def packs_fours(self) -> bool:
        """Whether a word of 32 bits in a panel has the weights of four neighbouring k.

        As an instruction takes them that adds the products of four bytes with four others to a sum of 32 bits.
        """
        return self is Storage.I8_I8

    @property
    def largest(self) -> float:
        """The largest number; of whole numbers, whose scale fits any, infinity."""
        if self.is_whole:
            return float("inf")
        return float(np.finfo(np.float16).max) if self is Storage.F16 else float(_LARGEST_BF16)

    def rounded(self, values: _Array) -> _Array:
        """Round float32 numbers to the nearest ones that this format has, ties to even.

        Numbers too large become the largest, not infinity: a weight that is clipped is still a weight.
        """
        if self.is_whole:
            return np.clip(np.rint(values), -LARGEST_I8, LARGEST_I8).astype(np.float32)
        if self is Storage.F16:
            largest = float(np.finfo(np.float16).max)
            return np.clip(values, -largest, largest).astype(np.float16).astype(np.float32)
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        even = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
        # NaN stays what it is, and what would round to infinity the largest number.
        rounded = np.where(np.isnan(values), bits | np.uint32(1 << 22), even) & np.uint32(0xFFFF0000)
        overflows = np.isinf(rounded.view(np.float32)) & np.isfinite(values)
        return np.where(overflows, np.copysign(_LARGEST_BF16, values), rounded.view(np.float32))

    def encode(self, values: _Array) -> _Array:
        """Return numbers that this format has as they are stored: uint16, float16 or int8."""
        if self.is_whole:
            return values.astype(np.int8)
        if self is Storage.F16:
            return values.astype(np.float16)
        return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)

    def decode(self, stored: _Array) -> _Array:
        """Return stored numbers as float32."""
        if self.packs_pairs:
            return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return stored.astype(np.float32)
