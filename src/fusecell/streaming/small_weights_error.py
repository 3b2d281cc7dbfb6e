"""What small weights cost in accuracy: two streams of one module over the user's own sequences."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fusecell.streaming.bound_step import Array
from fusecell.streaming.row_layout import is_one_shape, joined_row, total_features
from fusecell.streaming.small_weights import StoredWeight
from fusecell.streaming.stream import Stream

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Difference", "WeightError", "weight_error"]


@dataclass(frozen=True)
class Difference:
    """How far a value of the stream with small weights is from that of the float32 stream.

    Example:
        >>> import torch, fusecell as fc
        >>> output = fc.weight_error(fc.GRU(5, 10), torch.randn(20, 5), "bfloat16").values[0]
        >>> 0 < output.rms <= output.largest < output.size
        True

    Attributes:
        name: ``"output"``, or a state: ``"0.h"``, the number of its cell from the bottom and its name.
        largest: the largest difference.
        rms: the root of the mean of squared differences.
        size: the root of the mean square of the float32 stream's value, to compare with.
    """

    name: str
    largest: float
    rms: float
    size: float


@dataclass(frozen=True)
class WeightError:
    """The errors of small weights, and what these take; ``print`` shows both as tables.

    Example:
        >>> import torch, fusecell as fc
        >>> report = fc.weight_error(fc.LSTM(5, 10), torch.randn(20, 5), "int8")
        >>> print(str(report).splitlines()[0])
        int8 weights: 1,240 bytes, of float32 2,720 (2.2x)

    Attributes:
        format: of the weights.
        values: of the outputs of all steps, and of the states after the last.
        weights: how each weight is stored.
        bytes, float32_bytes: of all weights, and of all in float32.
    """

    format: str
    values: tuple[Difference, ...]
    weights: tuple[StoredWeight, ...]
    bytes: int
    float32_bytes: int

    def __str__(self) -> str:
        rows = [("", "largest error", "rms error", "rms of the value")]
        rows += [(each.name, f"{each.largest:.2e}", f"{each.rms:.2e}", f"{each.size:.2e}") for each in self.values]
        stored = [("weight", "stored as", "bytes", "")]
        stored += [(each.name, each.format, f"{each.bytes:,}", each.reason) for each in self.weights]
        ratio = self.float32_bytes / self.bytes if self.bytes else 1.0
        head = f"{self.format} weights: {self.bytes:,} bytes, of float32 {self.float32_bytes:,} ({ratio:.1f}x)"
        return "\n".join([head, "", *_columns(rows), "", *_columns(stored)])


def weight_error(
    module: nn.Module,
    x: Any,
    weights: str = "int8",
    *,
    keep: Collection[str] = (),
    input_sizes: Sequence[int | tuple[int, ...]] | None = None,
) -> WeightError:
    """Run a module's stream with small weights and with float32 ones, and compare outputs and states.

    Example:
        >>> import torch, fusecell as fc
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch...>
        >>> report = fc.weight_error(fc.GRU(5, 32), torch.randn(100, 5), "bfloat16")
        >>> report.bytes, report.float32_bytes
        (7872, 14976)
        >>> report.values[0].name, report.values[0].rms < 0.01 * report.values[0].size
        ('output', True)

    Arguments:
        module: what :class:`fusecell.Stream` takes.
        x: sequences that are like those it will run on, (T, input_size) or (T, N, input_size); of a ``batch_first``
            layer (N, T, input_size). A tuple of such for a cell that takes several inputs.
        weights, keep, input_sizes: as :class:`fusecell.Stream` takes them.

    Returns:
        The :class:`fusecell.streaming.WeightError`.

    Raises:
        TypeError, ValueError, NotCompilable: as :class:`fusecell.Stream` does; ValueError for sequences of another
            shape, or without a step.
    """
    exact = Stream(module, input_sizes=input_sizes)
    sequences, rows = _sequences(x, exact.parts[0].row_shapes.input, getattr(module, "batch_first", False))
    if rows > 1:
        exact = Stream(module, rows, input_sizes=input_sizes)
    small = Stream(module, rows, weights=weights, keep=keep, input_sizes=input_sizes)
    outputs = [_named(stream.push(sequences)) for stream in (exact, small)]
    pairs = [(name, value, outputs[1][name]) for name, value in outputs[0].items()]
    names = [
        f"{place}.{part.graph[index].name}"
        for place, part in enumerate(exact.parts)
        for index in part.graph.leaves("state")
    ]
    pairs += zip(names, exact.state, small.state, strict=True)
    stored = tuple(small.weights)
    return WeightError(
        weights,
        tuple([_compared(*pair) for pair in pairs]),
        stored,
        sum(each.bytes for each in stored),
        sum(each.bytes for each in exact.weights),
    )


def _sequences(x: Any, layout: Any, batch_first: bool) -> tuple[Array, int]:
    """Return sequences as an array, time first, and how many rows they have.

    Arguments:
        layout: the shape of a row of the input, or those of several inputs.
    """
    one: Any = layout
    if is_one_shape(layout):
        sequences = _array(x)
    else:
        sequences, one = joined_row(x, layout, _array, "weight_error takes"), (total_features(layout),)
    has_rows = sequences.ndim == len(one) + 2
    if sequences.size == 0 or sequences.shape[2 if has_rows else 1 :] != one or sequences.ndim < len(one) + 1:
        of_row = ", ".join(map(str, one))
        raise ValueError(
            f"weight_error takes x of shape (T, {of_row}) or (T, N, {of_row}) with a step and a row at least, got "
            f"{sequences.shape}."
        )
    if has_rows and batch_first:
        sequences = sequences.swapaxes(0, 1)
    return sequences, sequences.shape[1] if has_rows else 1


def _array(value: Array | Tensor) -> Array:
    return value.detach().numpy() if hasattr(value, "detach") else np.asarray(value)


def _named(outputs: Any) -> dict[str, Array]:
    """Return outputs by name: ``output``, ``output[0]`` or ``output['name']``."""
    if isinstance(outputs, dict):
        return {f"output[{name!r}]": value for name, value in outputs.items()}
    if isinstance(outputs, tuple):
        return {f"output[{place}]": value for place, value in enumerate(outputs)}
    return {"output": outputs}


def _compared(name: str, exact: Array, small: Array) -> Difference:
    difference = small.astype(np.float64) - exact
    return Difference(name, float(np.abs(difference).max()), _rms(difference), _rms(exact))


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lay out a table, each column as wide as its widest text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
