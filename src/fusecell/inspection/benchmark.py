"""Measure a layer's speed on this machine: compiled, as a Python loop, in torch.nn, and against the machine's peak."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fusecell.cells import GRUCell, LSTMCell, RNNCell
from fusecell.drop_in import GRU, LSTM, RNN
from fusecell.execution.context import runner
from fusecell.inspection.summary import summary
from fusecell.layers import Recurrent

__all__ = ["Speed", "measure"]

_NAMESAKES: dict[type[nn.Module], type[nn.Module]] = {GRU: nn.GRU, LSTM: nn.LSTM, RNN: nn.RNN}
_LAYERS: dict[type[nn.Module], type[nn.Module]] = {GRUCell: nn.GRU, LSTMCell: nn.LSTM, RNNCell: nn.RNN}


@dataclass(frozen=True)
class Speed:
    """The times of a layer with each implementation; ``str()`` is a table.

    Attributes:
        seconds: the median time of a call with each implementation: "fusecell", "Python loop", "torch.nn".
        steps, rows: T and N of the input.
        training: whether a call included the backward.
        flops: floating-point operations in the matrix products of a call; 0 where they can't be counted.
        peak: operations per second of a large matrix product here, with the same number of threads.
        threads: torch's number of threads.
    """

    seconds: dict[str, float]
    steps: int
    rows: int
    training: bool
    flops: int
    peak: float
    threads: int

    @property
    def share(self) -> float:
        """The share of the machine's peak that fusecell reached."""
        return self.flops / self.seconds["fusecell"] / self.peak

    def __str__(self) -> str:
        compiled, kind = self.seconds["fusecell"], "forward and backward" if self.training else "inference"
        lines = [f"T={self.steps} N={self.rows}, {kind}, {self.threads} thread(s), microseconds per step"]
        for name, seconds in self.seconds.items():
            ratio = "" if name == "fusecell" else f"  {seconds / compiled:.2f}x fusecell's time"
            lines.append(f"  {name:<12} {1e6 * seconds / self.steps:10.2f}{ratio}")
        if self.flops:
            rate = f"{self.flops / compiled / 1e9:.1f} GFLOP/s in products, {self.share:.0%} of the"
            lines.append(f"  {rate} {self.peak / 1e9:.0f} that a large product reaches here")
        return "\n".join(lines)


def measure(layer: nn.Module, seq_len: int, batch_size: int, *, training: bool = False, seconds: float = 3.0) -> Speed:
    """Time a layer compiled, as a Python loop and, if torch.nn has the same layer, torch.nn's, in turns.

    Example:
        >>> import fusecell as fc
        >>> from fusecell.inspection.benchmark import measure
        >>> speed = measure(fc.GRU(5, 10), 7, 3, seconds=0.1)
        >>> sorted(speed.seconds)
        ['Python loop', 'fusecell', 'torch.nn']

    Arguments:
        layer: any layer that takes (T, N, input_size), or (N, T, input_size) with ``batch_first``.
        seq_len, batch_size: T and N.
        training: time a forward and a backward to all parameters, instead of a forward without gradients.
        seconds: about how long to measure, all implementations together.

    Returns:
        A :class:`Speed`; print it.

    Raises:
        NotCompilable: if the layer can't be compiled.
        TypeError: for a module that is no layer of fusecell.
    """
    totals = summary(layer, seq_len, batch_size)
    like = next(layer.parameters(), torch.zeros(()))
    size: int = layer.input_size  # type: ignore[assignment]
    shape = (batch_size, seq_len, size) if getattr(layer, "batch_first", False) else (seq_len, batch_size, size)
    x = torch.randn(shape, dtype=like.dtype)
    calls = {"fusecell": _call(layer, x, training, "compiled"), "Python loop": _call(layer, x, training, "eager")}
    reference = _torch_layer(layer)
    if reference is not None:
        calls["torch.nn"] = _call(reference, x, training, None)
    # A backward has two products for each of the forward: one for the inputs' gradient, one for the weights'.
    flops = 2 * (totals.macs or 0) * (3 if training else 1)
    return Speed(
        _take_turns(calls, seconds), seq_len, batch_size, training, flops, _peak(like.dtype), torch.get_num_threads()
    )


def _torch_layer(layer: nn.Module) -> nn.Module | None:
    """Build torch.nn's layer of the same sizes, or return None where torch.nn has none that computes the same."""
    if isinstance(layer, Recurrent) and not layer.reverse and type(layer.cell) in _LAYERS:
        cell: Any = layer.cell
        names = {"bias": cell.bias, "batch_first": layer.batch_first, "dtype": cell.weight_ih.dtype}
        reference = _LAYERS[type(cell)](cell.input_size, cell.hidden_size, **names)
        plain = getattr(cell, "reset_after", True) and not getattr(cell, "proj_size", 0)
        return reference if plain else None
    kind = _NAMESAKES.get(type(layer))
    if kind is None or not getattr(layer, "reset_after", True):
        return None
    names = {
        name: getattr(layer, name)
        for name in ("num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size")
        if name != "proj_size" or kind is nn.LSTM
    }
    first: Tensor = next(layer.parameters())
    return kind(layer.input_size, layer.hidden_size, dtype=first.dtype, **names)


def _call(layer: nn.Module, x: Tensor, training: bool, name: Any) -> Callable[[], object]:
    """Return a function that runs a layer, with its backward if ``training``, in the runner ``name`` if not None."""
    parameters = list(layer.parameters())

    def forward() -> Tensor:
        result = layer(x)
        y: Tensor = result[0] if isinstance(result, tuple) else result
        return y

    def call() -> object:
        if not training:
            with torch.no_grad():
                return forward()
        # Not backward(), which would add to the .grad of the user's layer.
        return torch.autograd.grad(forward().sum(), parameters, allow_unused=True)

    def call_in_runner() -> object:
        with runner(name):
            return call()

    return call if name is None else call_in_runner


def _take_turns(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Time the calls one after another in turns, at least five; return the median of each.

    In turns, so that other load on the machine affects all alike.
    """
    for call in calls.values():
        call()  # compiles, and fills the call cache
    times: dict[str, list[float]] = {name: [] for name in calls}
    until = time.perf_counter() + seconds
    # Five at least: the median of fewer is decided by one disturbed call.
    while len(times["fusecell"]) < 5 or time.perf_counter() < until:
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(turns) for name, turns in times.items()}


def _peak(dtype: torch.dtype) -> float:
    """Measure the operations per second of a matrix product large enough to keep the cores busy."""
    # 768: three float32 matrices of 2.3 MB exceed L2, so BLAS blocks them as it does any large product. The best of
    # twelve, not the median: a peak is what the machine can reach.
    a, b = torch.randn(768, 768, dtype=dtype), torch.randn(768, 768, dtype=dtype)
    best = float("inf")
    for _ in range(12):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * 768**3 / best
