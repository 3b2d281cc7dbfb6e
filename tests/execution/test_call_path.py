"""Every call that may repeat an earlier one goes through the cache, or by the slow path into it."""

from __future__ import annotations

import pytest
import torch

import fusecell as fc
import fusecell.compiler.dispatch.runner  # the first import registers a cache: here, not within a test
from fusecell.compiler.dispatch import fast_path
from fusecell.execution import call_path
from fusecell.execution.call_form import CellFactory, sequence_form, step_form

FORM = step_form(True, True)
X, H, C = torch.randn(3, 5), torch.randn(3, 4), torch.randn(3, 4)


class Cache:
    """Records what it is asked for, and answers with ``result``."""

    def __init__(self, result=None):
        self.result, self.looked_up, self.stored = result, [], []

    def find(self, owner, form, tensors):
        self.looked_up.append((owner, form, tensors))
        return self.result

    def keep(self, owner, form, tensors, factory):
        self.stored.append((owner, form, tensors, factory))


@pytest.fixture
def register():
    def register(result=None):
        cache = Cache(result)
        call_path.register_call_cache(cache)
        return cache

    yield register
    call_path.register_call_cache(fast_path.CACHE)


def refuse(*args):
    raise AssertionError("the slow path was taken")


def echo(*args):
    """A slow path that returns its arguments."""
    return "slow", args


@pytest.mark.parametrize(("states", "expected"), [((H,), H), ((H, C), (H, C))])
def test_a_hit_takes_no_slow_path_and_returns_the_state_as_users_see_it(register, states, expected):
    cache, cell = register((X, states)), fc.GRUCell(5, 4)
    outputs, after = call_path.call(cell, X, H, FORM, refuse)
    assert outputs is X
    assert after is expected or after == expected
    assert cache.stored == []


@pytest.mark.parametrize(
    ("state", "tensors"),
    [(None, (X,)), (H, (X, H)), ((H, C), (X, H, C)), ([H, C], (X, H, C))],
    ids=["none", "tensor", "tuple", "list"],
)
def test_a_miss_is_looked_up_and_stored_by_its_tensors(register, state, tensors):
    cache, cell = register(), fc.GRUCell(5, 4)
    _, (owner, x, state_passed, *options) = call_path.call(cell, X, state, FORM, echo, ("first", "second"))
    assert (owner, x, state_passed, options) == (cell, X, state, ["first", "second"])
    (looked_up,), (stored,) = cache.looked_up, cache.stored
    assert looked_up == stored[:3]
    assert all(value is expected for value, expected in zip(stored[2], tensors, strict=True))
    assert stored[3] is None


def test_a_module_that_builds_its_cell_is_asked_how_only_for_storing(register):
    factory = CellFactory(lambda: fc.GRUCell(5, 4), ("hidden_size",), {})
    asked = []

    def factory_of(owner):
        asked.append(owner)
        return factory

    layer = fc.GRU(5, 4)
    register((X, (H,)))
    call_path.call(layer, X, None, FORM, refuse, factory=factory_of)
    assert asked == []
    cache = register()
    call_path.call(layer, X, None, FORM, echo, factory=factory_of)
    assert asked == [layer]
    assert cache.stored[0][3] is factory


def test_the_eager_runner_neither_looks_up_nor_stores(register):
    cache = register((X, (H,)))
    with fc.runner("eager"):
        assert call_path.call(fc.GRUCell(5, 4), X, None, FORM, echo)[0] == "slow"
    assert cache.looked_up == cache.stored == []


@pytest.mark.parametrize("state", [5, {"h": H}, iter([H])])
def test_a_state_of_another_type_is_left_to_the_checks(register, state):
    """An iterator too: it can be read once, and the slow path needs what it has."""
    cache = register((X, (H,)))
    assert call_path.call(fc.GRUCell(5, 4), X, state, FORM, echo)[1][2] is state
    assert cache.looked_up == cache.stored == []


def test_a_call_that_fails_is_not_stored(register):
    cache = register()
    with pytest.raises(AssertionError, match="slow path"):
        call_path.call(fc.GRUCell(5, 4), X, None, FORM, refuse)
    assert cache.stored == []


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("layered", [False, True])
def test_layouts_are_views_and_their_inverses(batched, batch_first, layered):
    """What comes in (T, N, ...) of a caller's layout goes back to it, in the same memory."""
    form = sequence_form(batched, batch_first, layered)
    steps, rows = 7, 3 if batched else 1
    outputs = torch.randn(steps, rows, 4)
    shown = form.output(outputs)
    assert shown.shape == ((rows, steps, 4) if batched and batch_first else (steps, rows, 4) if batched else (steps, 4))
    assert torch.equal(form.scanned(shown), outputs)
    assert torch.equal(form.sequence(shown), outputs)
    assert shown.data_ptr() == outputs.data_ptr()
    state = torch.randn(rows, 4)
    assert form.state(state).shape == form.state_shape(rows, 4)
    assert torch.equal(form.rows_of(form.state(state)), state)
    assert form.fits((shown, form.state(state)), [1])
    assert not form.fits((shown[0], form.state(state)), [1])
    assert not form.fits((shown, form.state(state)[0]), [1])
    matrix = torch.randn(rows, 4, 2)
    assert form.state(matrix).shape == form.state_shape(rows, 4, 2)
    assert form.fits((shown, form.state(state), form.state(matrix)), [1, 2])
    assert not form.fits((shown, form.state(matrix)), [1, 2])
