"""Panels: packed weights, as the microkernels of matrix products read them."""

from __future__ import annotations

from dataclasses import dataclass

from fusecell.compiler.codegen.llvm_module import Module
from fusecell.compiler.ir.primitives import LANES
from fusecell.compiler.ir.sizes import ceil_div
from fusecell.compiler.ir.storage import Storage

__all__ = ["Panel", "stored_vector_bytes"]


@dataclass(frozen=True, slots=True)
class Panel:
    """Packed weights of the products that share an operand, as the microkernel reads them.

    In memory ``[column group][k][product][lane]``: every read is the next one (BLIS's packing of B). Where a word has
    the weights of two k, ``k`` counts words.
    """

    name: str
    depth: int
    width: int
    weights: tuple[tuple[str, bool, tuple[int, int], tuple[int, int]], ...]
    """Per product: the weight, whether it is transposed, its rows and its columns."""
    stored: Storage | None = None
    """The format of the weights; None: the kernel's own numbers."""

    def group_bytes(self, module: Module) -> int:
        """Return the bytes of one column group."""
        return self.words * len(self.weights) * stored_vector_bytes(module, self.stored)

    @property
    def turns(self) -> int:
        """The depth as a microkernel counts it: in pairs, where it multiplies these."""
        return self.words if self.stored is not None and self.stored.multiplies_pairs else self.depth

    @property
    def words(self) -> int:
        """The number of words of a lane: one for each k, for each two, or for each four and one before them."""
        if self.stored is not None and self.stored.packs_fours:
            return 1 + ceil_div(self.depth, 4)
        return ceil_div(self.depth, 2) if self.stored is not None and self.stored.packs_pairs else self.depth


def stored_vector_bytes(module: Module, stored: Storage | None) -> int:
    """Return the bytes of 16 lanes of words of a panel."""
    if stored is None:
        return module.vector_bytes
    return LANES * (4 if stored.packs_pairs or stored.packs_fours else stored.itemsize)
