"""``WeightCell``, the base class of cells whose parameters are named and initialised as torch.nn's."""

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
    """Base class of cells with parameters named and initialised as torch.nn's; subclasses write ``step``.

    Arguments:
        input_size, hidden_size: as in :class:`fusecell.Cell`.
        bias: False registers None for every parameter whose name begins with "bias".
        device, dtype: of the parameters.
        shapes: the shape of each parameter by its name, in order; None registers no parameter.
    """

    options: ClassVar[tuple[str, ...]] = ()
    """Further constructor arguments, stored as attributes of the same names; ``repr`` shows them."""

    # Declared for type checkers: nn.Module's __getattr__ returns parameters as Tensor | Module.
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
            # Registered as None where absent, as torch.nn does: step can read self.bias_ih either way.
            absent = shape is None or (name.startswith("bias") and not bias)
            value = None if absent else nn.Parameter(torch.empty(cast("Any", shape), device=device, dtype=dtype))
            self.register_parameter(name, value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter from U(-1/sqrt(hidden_size), 1/sqrt(hidden_size)), as torch.nn's cells do."""
        # Parameters in order of registration, so that one seed gives the same numbers as torch.nn.
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


def one_of(cell: str, argument: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError unless an argument's value is one of ``choices``."""
    if value not in choices:
        expected = " or ".join(repr(choice) for choice in choices)
        raise ValueError(f"{cell}: {argument} must be {expected}, got {value!r}.")
