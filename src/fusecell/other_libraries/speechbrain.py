"""speechbrain's Li-GRU and SLi-GRU: products and norms before the loop stay speechbrain's, the loop is a scan."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fusecell.cell import Cell
from fusecell.execution.options import State
from fusecell.layers import scan
from fusecell.other_libraries.loops import Loop

__all__ = ["LightGru", "StableLightGru"]


class _LightStep(Cell):
    """One pass of the loop in ``LiGRU_Layer._ligru_cell``; its inputs are the input's product and the dropout mask."""

    inputs = ("w", "mask")

    def __init__(self, recurrent: nn.Linear, activation: Any, norm: nn.Module | None = None) -> None:
        super().__init__(recurrent.out_features, recurrent.in_features)
        self.recurrent, self.activation, self.norm = recurrent, activation, norm

    def step(self, x: tuple[Tensor, Tensor], state: State) -> tuple[Tensor, State]:
        (h,), (w, mask) = state, x
        product = self.recurrent(h)
        gates = w + (product if self.norm is None else self.norm(product))
        candidate, z = gates.chunk(2, 1)
        z = torch.sigmoid(z)
        h = z * h + (1 - z) * (self.activation(candidate) * mask)
        return h, (h,)


class _Light(Loop):
    u: nn.Linear
    act: Any

    def _scanned(self, w: Tensor, ht: Tensor, norm: nn.Module | None) -> Tensor:
        layer: Any = self
        mask: Tensor = layer._sample_drop_mask(w)
        cell = self.cell_around(_LightStep, self.u, self.act, norm)
        # A state or a mask of one row, or a mask of one number, is that of every row.
        rows = (len(w), self.u.in_features)
        outputs: Any
        outputs, _ = scan(cell, (w, mask.expand(rows)[:, None]), ht.expand(rows), batch_first=True)
        result: Tensor = outputs
        return result


class LightGru(_Light):
    """In the place of ``speechbrain.nnet.RNN.LiGRU_Layer``."""

    overrides: ClassVar[tuple[str, ...]] = ("_ligru_cell",)

    def _ligru_cell(self, w: Tensor, ht: Tensor) -> Tensor:
        return self._scanned(w, ht, None)


class StableLightGru(_Light):
    """In the place of ``speechbrain.nnet.RNN.SLiGRU_Layer``, which normalises the recurrent product too."""

    overrides: ClassVar[tuple[str, ...]] = ("_sligru_cell",)
    layer_norm: nn.Module

    def _sligru_cell(self, w: Tensor, ht: Tensor) -> Tensor:
        return self._scanned(w, ht, self.layer_norm)
