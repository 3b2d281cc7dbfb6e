"""Random calls: hypothesis draws a layer and a call of every form. More than the tests run, offline::

python -m tests.reliability.random_calls --examples 2000 --seed 0
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fusecell as fc
import fusecell.compiler.runtime.guard_pages as check_memory
from fusecell.compiler.backend import llvm
from tests.compiler.cell_recipes import CONDITION, DOUBLE, NUDGE, SINGLE, furthest

__all__ = ["Call", "calls", "check", "run"]


# Layers.


def _recurrent(make: Callable[[int, int], fc.Cell]) -> Callable[..., nn.Module]:
    return lambda width, hidden, **options: fc.Recurrent(make(width, hidden), **options)


def _drop_in(name: str, **kwargs: Any) -> Callable[..., nn.Module]:
    def make(width: int, hidden: int, reverse: bool, **options: Any) -> nn.Module:
        layer: nn.Module = getattr(fc, name)(width, hidden, bidirectional=reverse, **kwargs, **options)
        return layer

    return make


def _both(width: int, hidden: int, reverse: bool, **options: Any) -> nn.Module:
    parts = (fc.LSTMCell(width, hidden), fc.GRUCell(width, 2 * hidden))
    return fc.Bidirectional(*(fc.Recurrent(cell, **options) for cell in parts[:: -1 if reverse else 1]))


LAYERS: dict[str, Callable[..., nn.Module]] = {
    **{member.name: _recurrent(member.make) for member in fc.CELLS},
    "learned": _recurrent(lambda width, hidden: fc.LearnedState(fc.LSTMCell(width, hidden))),
    "stack": _recurrent(lambda width, hidden: fc.Stack(fc.GRUCell(width, hidden), fc.LSTMCell(hidden, 3))),
    "residual": _recurrent(
        lambda width, hidden: fc.Stack(fc.RNNCell(width, width), fc.GRUCell(width, width), residual=True)
    ),
    "RNN": _drop_in("RNN", nonlinearity="relu", bias=False),
    "GRU": _drop_in("GRU"),
    "LSTM": _drop_in("LSTM", num_layers=2),
    "LSTM, projected": _drop_in("LSTM", proj_size=1),
    "Bidirectional": _both,
}
SIZES = ((1, 2), (3, 17), (16, 8), (5, 9))


# Layouts: where in memory numbers are. Some make rows, steps or features one and the same.


def _windows(value: Tensor) -> Tensor:
    strides = [min(2, size) for size in value.shape[:-1]] + [1]
    reach = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, strides, strict=True))
    return value.flatten()[:reach].clone().as_strided(value.shape, strides) if value.numel() >= reach else value


def _within(value: Tensor, sizes: Sequence[int], index: tuple[slice, ...]) -> Tensor:
    """Embed a tensor in memory full of NaN."""
    around = value.new_full(tuple(sizes), float("nan"))
    around[index] = value
    return around[index]


def _all(value: Tensor, **changed: slice) -> tuple[slice, ...]:
    return tuple(changed.get(f"d{dim}", slice(None)) for dim in range(value.dim()))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda value: value,
    "transposed": lambda value: value.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda value: _within(
        value, (*value.shape[:-1], value.shape[-1] + 3), (..., slice(1, 1 + value.shape[-1]))
    ),
    "every second step": lambda value: _within(value, (2 * value.shape[0], *value.shape[1:]), (slice(None, None, 2),)),
    "every second feature": lambda value: _within(
        value, (*value.shape[:-1], 2 * value.shape[-1]), (..., slice(None, None, 2))
    ),
    "one for all steps": lambda value: value[:1].expand(value.shape),
    "one for all features": lambda value: value[..., :1].expand(value.shape),
    "overlapping": _windows,
}


@dataclass(frozen=True)
class Call:
    """A layer and a call of it."""

    layer: str
    sizes: tuple[int, int]
    options: dict[str, Any]
    form: str
    """``"batched"``, ``"unbatched"`` or ``"packed"``."""
    steps: int
    rows: int
    dtype: torch.dtype
    layout: str
    state: tuple[str, ...] | None
    """The layout of each state, in turns."""
    lengths: tuple[int, ...] | None
    flags: dict[str, tuple[bool, ...]]
    """Of resets and mask."""
    given_as: str
    """``"list"``, ``"array"``, ``"int32"`` or ``"strided"``."""
    wants: tuple[bool, ...]
    """Whether a gradient is wanted of the input, each state, each parameter, in turns."""
    mode: str
    loss: str
    """What the gradient is of: ``"all"``, ``"output"``, ``"state"``, ``"sum"`` or ``"part"``."""
    seed: int = field(default=0)


def _tuples(element: st.SearchStrategy[Any], size: int) -> st.SearchStrategy[Any]:
    return st.tuples(*[element] * size)


@st.composite
def calls(draw: Any) -> Call:
    """Calls of every form."""
    form = draw(st.sampled_from(["batched", "batched", "batched", "unbatched", "packed"]))
    least = 1 if form == "packed" else 0
    steps = draw(st.integers(1, 9) | st.integers(least, 70))
    rows = 1 if form == "unbatched" else draw(st.integers(1, 6) | st.sampled_from([least, 17, 33]))
    drawn = _tuples(st.integers(least, steps), rows)
    flags = {}
    if form != "packed":
        for name in ("resets", "mask"):
            some = draw(st.none() | st.integers(0, 2**32))
            if some is not None:
                rate, values = draw(st.sampled_from([0.1, 0.5, 1.0])), np.random.default_rng(some)
                flags[name] = tuple((values.random(steps * rows) < rate).tolist())
    return Call(
        draw(st.sampled_from(list(LAYERS))),
        draw(st.sampled_from(SIZES)),
        {
            **{name: draw(st.booleans()) for name in ("batch_first", "reverse", "recompute")},
            "masked_output": draw(st.sampled_from(["hold", "zero"])),
            "tbptt": draw(st.sampled_from([None, None, 1, 3])),
            "clip_state_grad": draw(st.sampled_from([None, None, 0.5])),
        },
        form,
        steps,
        rows,
        draw(st.sampled_from([torch.float32, torch.float64])),
        draw(st.sampled_from(list(LAYOUTS))),
        draw(st.none() | _tuples(st.sampled_from(list(LAYOUTS)), 2)),
        draw(drawn if form == "packed" else st.none() | drawn),
        flags,
        draw(st.sampled_from(["list", "array", "int32", "strided"])),
        tuple(draw(st.lists(st.booleans(), min_size=1, max_size=7))),
        draw(st.sampled_from(["grad", "grad", "grad", "no_grad", "inference"])),
        draw(st.sampled_from(["all", "output", "state", "sum", "part"])),
        draw(st.integers(0, 99)),
    )


def _in_turns(choices: Sequence[Any], count: int) -> list[Any]:
    return [choices[place % len(choices)] for place in range(count)]


@dataclass
class _Data:
    """The tensors of a call, drawn from its seed, each number with a relative perturbation of ``nudge``."""

    call: Call
    dtype: torch.dtype
    nudge: float = 0.0

    def __post_init__(self) -> None:
        call = self.call
        torch.manual_seed(call.seed)
        options = dict(call.options)
        if call.form == "packed":
            options["batch_first"] = False
        self.layer = LAYERS[call.layer](*call.sizes, **options).to(self.dtype)
        self.noise = torch.Generator().manual_seed(1)
        for parameter in self.layer.parameters():
            parameter.data = self._nudged(parameter.data)
        self.batch_first = options["batch_first"] and call.form == "batched"
        shape = (call.rows, call.steps) if self.batch_first else (call.steps, call.rows)
        self.shape = (call.steps,) if call.form == "unbatched" else shape
        self.x = self._drawn((*self.shape, call.sizes[0]), call.layout)
        shapes = _state_shapes(self.layer, call)
        layouts = _in_turns(call.state or ("plain",), len(shapes))
        self.states = [self._drawn(*pair) for pair in zip(shapes, layouts, strict=True)] if call.state else []
        self.leaves = [self.x, *self.states, *self.layer.parameters()]
        for leaf, wants in zip(self.leaves, _in_turns(call.wants, len(self.leaves)), strict=True):
            leaf.requires_grad_(wants)

    def _nudged(self, value: Tensor) -> Tensor:
        noise = torch.randn(value.shape, generator=self.noise, dtype=torch.float64)
        return (value.double() * (1 + self.nudge * noise)).to(self.dtype)

    def _drawn(self, shape: tuple[int, ...], layout: str) -> Tensor:
        # In float32's numbers, so that both dtypes run on the same.
        value = self._nudged(torch.randn(shape))
        return LAYOUTS[layout](value) if value.numel() else value

    def state(self) -> Any:
        if not self.states:
            return None
        if isinstance(self.layer, fc.Bidirectional):
            ahead = len(self.layer.forward_layer.cell.states)
            return _bare(self.states[:ahead]), _bare(self.states[ahead:])
        return _bare(self.states)

    def input(self) -> Any:
        if self.call.form != "packed":
            return self.x
        lengths = torch.tensor(self.call.lengths)
        return nn.utils.rnn.pack_padded_sequence(self.x, lengths, enforce_sorted=False)

    def keywords(self) -> dict[str, Any]:
        keywords: dict[str, Any] = {}
        if self.call.form == "packed":
            return keywords
        if self.call.lengths is not None:
            keywords["lengths"] = _given(torch.tensor(self.call.lengths, dtype=torch.int64), self.call.given_as)
        for name, values in self.call.flags.items():
            flags = torch.tensor(values, dtype=torch.bool).reshape(self.shape)
            keywords[name] = LAYOUTS["transposed"](flags) if self.call.given_as == "strided" else flags
        return keywords


def _given(lengths: Tensor, how: str) -> Any:
    if how == "strided":
        return torch.stack((lengths, lengths), 1)[:, 0]
    return {"list": lengths.tolist, "array": lengths.numpy, "int32": lengths.int}[how]()


def _bare(states: Sequence[Tensor]) -> Any:
    return states[0] if len(states) == 1 else tuple(states)


def _state_shapes(layer: Any, call: Call) -> list[tuple[int, ...]]:
    batch = () if call.form == "unbatched" else (call.rows,)
    if isinstance(layer, fc.Bidirectional):
        parts = (layer.forward_layer, layer.backward_layer)
        return [(*batch, size) for part in parts for size in part.cell.state_sizes]
    if isinstance(layer, fc.Recurrent):
        return [(*batch, size) for size in layer.cell.state_sizes]
    return [(layer.num_layers * (1 + layer.bidirectional), *batch, size) for size in layer.state_sizes()]


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, nn.utils.rnn.PackedSequence):
        return [value.data]
    return [value] if isinstance(value, Tensor) else [tensor for each in value for tensor in _flat(each)]


def run(call: Call, runner: str, dtype: torch.dtype, nudge: float = 0.0) -> list[Tensor]:
    """Return outputs, states, and the gradients of all leaves that require one."""
    data = _Data(call, dtype, nudge)
    modes = {"grad": nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}
    with fc.runner(runner), modes[call.mode]():
        results = _flat(data.layer(data.input(), data.state(), **data.keywords()))
    required = [leaf for leaf in data.leaves if leaf.requires_grad]
    targets = {"output": results[:1], "state": results[1:]}.get(call.loss, results)
    if call.mode == "grad" and required and any(value.requires_grad for value in targets):
        losses = [_loss(value, call.loss) for value in targets if value.requires_grad]
        results += torch.autograd.grad(sum(losses), required, allow_unused=True, materialize_grads=True)
    return [value.detach() for value in results]


def _loss(value: Tensor, kind: str) -> Tensor:
    if kind == "sum":  # its gradient is one number, expanded
        return value.sum()
    if kind == "part":
        value = value[..., ::2]
    return (value * torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view_as(value)).sum()


def check(call: Call) -> str:
    """Compare compiled code with the Python loop in float64; return the outcome.

    Raises:
        AssertionError: where they differ.
    """
    truth = run(call, "eager", torch.float64)
    finite = all(value.isfinite().all() for value in truth)
    if not finite or furthest(run(call, "eager", torch.float64, NUDGE), truth) > CONDITION * NUDGE:
        return "ill-conditioned"
    runner = "compiled" if call.steps and call.rows else "auto"  # of nothing there is nothing to compile
    off, most = furthest(run(call, runner, call.dtype), truth), DOUBLE
    if call.dtype is torch.float32:
        single = furthest(run(call, "eager", torch.float32), truth)
        sensitivity = furthest(run(call, "eager", torch.float64, 2.0**-23), truth)
        most = max(4 * single, 4 * sensitivity, SINGLE)
    assert off <= most, f"off by {off:.1e}, at most {most:.1e} expected: {call}"
    return "equal"


def main() -> None:
    """Check random calls; stop at the first failure."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="LLVM doesn't optimise")
    options = parser.parse_args()
    if options.quick:
        llvm.EFFORT = 0
        os.environ["FUSECELL_CACHE"] = "off"  # where nobody should find such code
    check_memory.ENABLED = True
    counts: Counter[str] = Counter()

    @hypothesis.seed(options.seed)
    @settings(
        max_examples=options.examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(calls())
    def each(call: Call) -> None:
        counts[check(call)] += 1
        if sum(counts.values()) % 100 == 0:
            print(dict(counts), flush=True)

    each()
    print(dict(counts))


if __name__ == "__main__":
    main()
