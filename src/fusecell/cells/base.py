"""Parameters in torch.nn's manner: what the cells of this package share beside the contract."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fusecell.cell import Cell

__all__ = ["Device", "WeightCell", "one_of"]

Device = torch.device | str | int | None


class WeightCell(Cell):
    """A cell with parameters named as torch.nn names them; subclasses write ``step``.

    Arguments:
        input_size, hidden_size: as in :class:`fusecell.Cell`.
        bias: whether the parameters whose names begin with "bias" are there; else they are registered as None.
        device, dtype: of the parameters.
        shapes: the shape of each parameter, in order; None for one that is left out.
    """

    options: ClassVar[tuple[str, ...]] = ()
    """Constructor arguments beside the sizes, kept under their own names; ``repr`` shows them."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        **shapes: tuple[int, ...] | None,
    ) -> None:
        super().__init__(input_size, hidden_size)
        self.bias = bias
        for name, shape in shapes.items():
            absent = shape is None or (name.startswith("bias") and not bias)
            value = None if absent else nn.Parameter(torch.empty(cast("Any", shape), device=device, dtype=dtype))
            self.register_parameter(name, value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter from U(-1/sqrt(hidden_size), 1/sqrt(hidden_size)), as torch.nn's cells do."""
        bound = 1 / math.sqrt(self.hidden_size) if self.hidden_size else 0.0
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)
        for child in self.children():
            if isinstance(child, nn.LayerNorm):
                child.reset_parameters()

    def extra_repr(self) -> str:
        parts = [f"{self.input_size}, {self.hidden_size}"]
        if not self.bias:
            parts.append("bias=False")
        return ", ".join(parts + [f"{name}={getattr(self, name)!r}" for name in self.options])


def one_of(cell: str, argument: str, given: object, choices: Sequence[object]) -> None:
    """Raise ValueError unless ``given`` is one of ``choices``."""
    if given not in choices:
        expected = " or ".join(repr(choice) for choice in choices)
        raise ValueError(f"{cell}: {argument} must be {expected}, got {given!r}.")
