"""``refresh`` reaches every cache of compiled code, and no cache grows without bound."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusecell as fc
from fusecell.compiler import cache_registry
from fusecell.compiler.dispatch import scan_operator, torch_compile

GAIN = {"value": 1.0}


class Amplifier(fc.Cell):
    """Reads a global, which only refresh follows."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.w = nn.Parameter(torch.ones(3))

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> Any:
        h = self.note("gain", GAIN["value"] * x * self.w) + 0 * state[0]
        return h, (h,)


class Other(Amplifier):
    pass


@pytest.fixture(autouse=True)
def gain() -> Any:
    yield
    GAIN["value"] = 1.0
    fc.refresh()


X = torch.ones(2, 1, 3)


def _without(layer: Any) -> Tensor:
    with torch.no_grad():
        return layer(X)[0].max()  # type: ignore[no-any-return]


def _with(layer: Any) -> Tensor:
    return layer(X)[0].max().detach()  # type: ignore[no-any-return]


def _gradient(layer: Any) -> Tensor:
    (g,) = torch.autograd.grad(layer(X)[0].sum(), [layer.cell.w])
    return g.max() / 2


def _recording(layer: Any) -> Tensor:
    return fc.record(layer, X).value("gain").max()


def _recorded_gradient(layer: Any) -> Tensor:
    tape = fc.record(layer, X, gradients=True)
    (g,) = torch.autograd.grad(tape.outputs.sum(), [layer.cell.w])
    return g.max() / 2


def _clipped(layer: Any) -> Tensor:
    return fc.scan(layer.cell, X, clip_state_grad=1.0)[0].max().detach()


def _masked(layer: Any) -> Tensor:
    with torch.no_grad():
        return fc.scan(layer.cell, X, mask=torch.ones(2, 1, dtype=torch.bool))[0].max()


KINDS = {
    "no_gradient": _without,
    "training": _with,
    "gradient": _gradient,
    "recording": _recording,
    "recorded_gradient": _recorded_gradient,
    "clipped": _clipped,
    "masked": _masked,
}


@pytest.mark.parametrize("which", ["layer", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_refresh_reaches_every_cache(kind: str, which: str) -> None:
    layer, look = fc.Recurrent(Amplifier()), KINDS[kind]
    for _ in range(3):  # the third goes the short way
        assert look(layer) == 1
    GAIN["value"] = 2.0
    assert look(layer) == 1, "a global is not followed by itself"
    fc.refresh(layer if which == "layer" else None)
    assert look(layer) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_cell_inside_a_wrapper(kind: str) -> None:
    layer, look = fc.Recurrent(Amplifier()), KINDS[kind]
    assert look(layer) == 1
    GAIN["value"] = 2.0
    fc.refresh(Other())  # another's
    assert look(layer) == 1
    fc.refresh(layer.cell)
    assert look(layer) == 2


def test_kernels_of_the_operator() -> None:
    layer = fc.Recurrent(Amplifier())
    torch.export.export(layer, (X,))
    torch.compile(layer, backend="eager", fullgraph=True)(X)
    caches = (scan_operator.training_kernels, scan_operator._output_size, scan_operator._shapes)
    assert all(cache.cache_info().currsize for cache in caches)
    fc.refresh()
    assert not any(cache.cache_info().currsize for cache in caches)


def test_warnings_come_again() -> None:
    class Refused(fc.Cell):
        def step(self, x: Tensor, state: tuple[Tensor, ...]) -> Any:
            return x.mode(1, keepdim=True)[0] + x, state

    cell = Refused(3, 3)
    for expected in (1, 0):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            fc.scan(cell, X)
        assert len(warned) == expected
    fc.refresh(cell)
    with pytest.warns(fc.EagerWarning, match="mode") as again:
        fc.Recurrent(cell)(X)
    assert again[0].filename == __file__, "a warning points at the user's code"


class Computed(Amplifier):
    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> Any:
        h = torch.tanh(x * self.w.sin() + state[0])
        return h, (h,)


def test_what_torch_has_traced_runs_on_after_a_refresh() -> None:
    layer = fc.Recurrent(Computed())
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    before = compiled(X)[0]
    fc.refresh()
    assert torch.equal(compiled(X)[0], before)


def test_prologues_that_torch_s_traces_refer_to_are_kept_once_and_as_long_as_their_module() -> None:
    count = len(torch_compile._PROLOGUES)
    layer: Any = fc.Recurrent(Computed())
    for _ in range(3):
        torch.compiler.reset()
        torch.compile(layer, backend="eager", fullgraph=True)(X)
    assert len(torch_compile._PROLOGUES) == count + 1
    del layer
    torch.compiler.reset()
    gc.collect()
    assert len(torch_compile._PROLOGUES) <= count


def test_a_cache_is_forgotten_with_its_object() -> None:
    class Cache:
        calls = 0

        def forget(self, kinds: Any = None) -> None:
            Cache.calls += 1

    count, cache = len(cache_registry._FORGETS), Cache()
    cache_registry.register_cache(cache.forget)
    fc.refresh()
    assert Cache.calls == 1
    del cache
    gc.collect()
    fc.refresh()
    assert Cache.calls == 1
    assert len(cache_registry._FORGETS) == count


class Redefined(fc.Cell):
    """A cell whose step and submodule are defined anew while it is in use, as in a notebook."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.part = type("Part", (nn.Module,), {"forward": lambda part, x: 2 * x})()

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> Any:
        return self.part(x) + state[0], state


def _halved(self: Any, x: Tensor, state: tuple[Tensor, ...]) -> Any:
    return self.part(x) / 2 + state[0], state


def _assign(kind: Any, name: str, function: Any) -> None:
    setattr(kind, name, function)


def _replace_code(kind: Any, name: str, function: Any) -> None:
    getattr(kind, name).__code__ = function.__code__


@pytest.mark.parametrize("change", [_assign, _replace_code], ids=["assigned", "code"])
@pytest.mark.parametrize("call", [_without, lambda layer: fc.step(layer.cell, X[0])[0].max()], ids=["layer", "step"])
def test_a_method_that_is_defined_anew_is_seen_without_refresh(change: Any, call: Any) -> None:
    layer: Any = fc.Recurrent(type("Own", (Redefined,), {"step": Redefined.step})())
    code = Redefined.step.__code__
    assert [float(call(layer)) for _ in range(3)] == [2, 2, 2]
    change(type(layer.cell.part), "forward", lambda part, x: 6 * x)
    assert [float(call(layer)) for _ in range(3)] == [6, 6, 6]
    change(type(layer.cell), "step", _halved)
    try:
        assert [float(call(layer)) for _ in range(3)] == [3, 3, 3]
    finally:
        Redefined.step.__code__ = code
