"""Rules for ATen operations that move features, or fill tensors with a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fusecell.compiler.frontend.graph_writer import Operand, Writer
from fusecell.compiler.frontend.traced_values import Row, Untraceable, Weight

__all__ = ["CONSTANTS", "KEEPS", "MOVES", "as_stored", "filled", "padded_with", "repeated_for_rows"]

_MOVES = (
    "view _unsafe_view _reshape_alias reshape permute transpose t expand unsqueeze squeeze slice select split "
    "split_with_sizes unsafe_split unsafe_split_with_sizes unsafe_chunk chunk unbind cat stack flip roll repeat "
    "slice_backward select_backward constant_pad_nd diagonal unfold rot90 diag_embed diagonal_backward tril triu "
    "pixel_shuffle pixel_unshuffle channel_shuffle upsample_nearest1d upsample_nearest2d upsample_nearest3d "
    "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d "
    "view_copy expand_copy permute_copy transpose_copy t_copy squeeze_copy unsqueeze_copy slice_copy select_copy "
    "narrow_copy split_copy split_with_sizes_copy unbind_copy diagonal_copy unfold_copy"
)
MOVES = frozenset(_MOVES.split())
"""Operations whose results hold their argument's elements, or zeros, and nothing else."""

# Operations whose result has the value of their argument.
KEEPS = (
    "clone",
    "detach",
    "alias",
    "alias_copy",
    "contiguous",
    "lift_fresh",
    "_conj",
    "conj_physical",
    "resolve_conj",
    "resolve_neg",
)

# The number each factory fills with; None where it is an argument. Memory that torch leaves as it is counts as zeros.
CONSTANTS: Mapping[str, float | None] = {
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty", "zero"), 0.0),
    **dict.fromkeys(
        ("empty_strided", "new_empty_strided", "_efficientzerotensor", "_new_zeros_with_same_feature_meta"), 0.0
    ),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), 1.0),
    **dict.fromkeys(("full", "full_like", "new_full", "scalar_tensor", "fill"), None),
}


def as_stored(value: float, dtype: torch.dtype) -> float:
    """Return the number that a tensor has where it is filled with another: torch.full((3,), 0.1) has float32's 0.1."""
    return float(torch.tensor(value, dtype=torch.float64).to(dtype))


def filled(w: Writer, name: str, args: Sequence[Any], result: torch.Tensor) -> Row:
    """Return the tensor of a factory: filled with a number, the same for all rows."""
    value = CONSTANTS[name]
    number = args[0] if name == "scalar_tensor" else args[-1] if args else None
    other = None
    if value is None and isinstance(number, Weight) and number.fill is not None:
        value = number.fill  # y[:, 0] = 1.5 comes as a tensor of one number
    elif value is None and isinstance(number, Row | Weight):
        value, other = 0.0, number
    elif value is None:
        if not isinstance(number, int | float):
            raise Untraceable(
                "The step fills a tensor with the value of another; expand that one, value.expand_as(tensor)."
            )
        value = as_stored(number, result.dtype)
    shape = tuple(result.shape)
    # A number is the same wherever in a dimension the batch is.
    axis = next((dim for dim, size in enumerate(shape) if size and size % w.rows == 0), None)
    split = (1, 1) if axis is None else (1, shape[axis] // w.rows)
    numbers = w.const(value, shape, axis, split)
    return numbers if other is None else w.point("add", numbers, other)


def repeated_for_rows(w: Writer, value: Operand) -> Row:
    """Write what is the same for all rows once for each, one behind the other, as an instance norm has its gain."""
    spread = w.move(lambda numbers: numbers.unsqueeze(0), w.number(value))
    ones = w.const(1.0, (w.rows, *[1] * (len(spread.shape) - 1)), 0)
    row: Row = w.move(lambda numbers: numbers.flatten(0, 1), w.point("mul", spread, ones))
    return row


def padded_with(w: Writer, x: Operand, widths: Sequence[int], value: float) -> Row:
    """Write a tensor with a border of a number around it."""
    row = w.number(x)
    # One number for each row of the batch, so that it moves along with them.
    shape = tuple(size if dim == row.axis else 1 for dim, size in enumerate(row.shape))
    border = w.const(value, shape, row.axis, row.split)

    def pad(numbers: Sequence[torch.Tensor]) -> torch.Tensor:
        inside = torch.nn.functional.pad(torch.ones_like(numbers[0]), list(widths))
        moved = torch.nn.functional.pad(numbers[0], list(widths))
        if row.axis is not None and moved.shape[row.axis] != row.shape[row.axis]:
            raise Untraceable("The step mixes the rows of the batch: it pads the batch dimension.")
        return torch.where(inside > 0, moved, numbers[1])

    padded: Row = w.move(pad, [row, border])
    return padded
