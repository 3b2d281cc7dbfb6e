"""Identity guards against the signature: whatever changes the key of a module must fail its guards."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fusecell.compiler.frontend.guards import guards_of
from fusecell.compiler.frontend.signature import signature
from fusecell.torch_internals import tensor_guards

NAMES = ("a", "b", "c", "d")
VALUES = (
    True, False, 0, 1, 0.0, -0.0, 0.5, math.nan, "tanh", None, (1, 2), (1, (2.0, "x")), torch.float32, torch.tanh,
    nn.Tanh, torch.ops.aten.add.Tensor, len, [].append, lambda x: x, [1], {"gain": 1.0}, SimpleNamespace(gain=1.0),
)  # fmt: skip
SIZES = ((2,), (3,), (2, 2))


class Holder(nn.Module):
    """A module with nothing in it yet."""


class Other(Holder):
    """Another class."""


def tensor(draw, kind):
    made = torch.zeros(draw(st.sampled_from(SIZES)), dtype=draw(st.sampled_from((torch.float32, torch.float64))))
    return kind(made)


def value(draw):
    """A new float or tuple at times, which is equal to an old one but is another object."""
    found = draw(st.sampled_from(VALUES))
    return copy.deepcopy(found) if draw(st.booleans()) else found


def some_module(draw, root):
    return draw(st.sampled_from(list(root.modules())))


def put(module, name, new):
    """Set an attribute; of another kind it has to be deleted first."""
    try:
        setattr(module, name, new)
    except (TypeError, KeyError):
        delattr(module, name)
        setattr(module, name, new)


def set_attribute(draw, root):
    put(some_module(draw, root), draw(st.sampled_from(NAMES)), value(draw))


def set_tensor(draw, root):
    kind = draw(st.sampled_from((nn.Parameter, lambda made: made, nn.Buffer)))
    put(some_module(draw, root), draw(st.sampled_from(NAMES)), tensor(draw, kind))


def set_none(draw, root):
    module, name = some_module(draw, root), draw(st.sampled_from(NAMES))
    remove(module, name)
    module.register_parameter(name, None)


def remove(module, name):
    if hasattr(module, name):
        delattr(module, name)


def delete(draw, root):
    remove(some_module(draw, root), draw(st.sampled_from(NAMES)))


def put_again(draw, root):
    """Delete something and set it anew: it comes last then."""
    module = some_module(draw, root)
    names = [name for name in NAMES if hasattr(module, name)]
    if names:
        again(module, draw(st.sampled_from(names)))


def again(module, name):
    old = getattr(module, name)
    delattr(module, name)
    setattr(module, name, old)


def tie(draw, root):
    tensors = [*root.parameters(), *root.buffers()]
    if tensors:
        put(some_module(draw, root), draw(st.sampled_from(NAMES)), draw(st.sampled_from(tensors)))


def freeze(draw, root):
    for parameter in some_module(draw, root).parameters():
        parameter.requires_grad_(draw(st.booleans()))


def convert(draw, root):
    some_module(draw, root).to(draw(st.sampled_from((torch.float32, torch.float64))))


def switch(draw, root):
    some_module(draw, root).train(draw(st.booleans()))


def add_module(draw, root):
    module, name = some_module(draw, root), draw(st.sampled_from(NAMES))
    part = draw(st.sampled_from((Holder, Other, nn.Tanh, lambda: nn.Linear(2, 2))))()
    remove(module, name)
    module.add_module(name, part)


def share_module(draw, root):
    """One submodule under two names, where that makes no circle."""
    part, module = some_module(draw, root), some_module(draw, root)
    if module not in part.modules():
        remove(module, "d")
        module.add_module("d", part)


def replace_by_copy(draw, root):
    module = some_module(draw, root)
    for name, part in module._modules.items():
        module._modules[name] = copy.copy(part) if draw(st.booleans()) else part


def hook(draw, root):
    module = some_module(draw, root)
    register = draw(st.sampled_from((module.register_forward_hook, module.register_full_backward_hook)))
    handle = register(lambda *_: None)
    if draw(st.booleans()):
        handle.remove()


def grow_inside(draw, root):
    for name, old in list(vars(some_module(draw, root)).items()):
        if isinstance(old, list):
            old.append(1)
        elif isinstance(old, dict) and not name.startswith("_"):
            old["gain"] = 2.0
        elif isinstance(old, SimpleNamespace):
            old.gain = 2.0


def nothing(draw, root):
    """The usual case."""


BUILD = (set_attribute, set_attribute, set_tensor, set_tensor, add_module, add_module, set_none, tie, share_module)
MUTATE = (
    *BUILD, delete, put_again, put_again, freeze, convert, switch, replace_by_copy, hook, grow_inside, nothing,
)  # fmt: skip


def guarded():
    """A module with two of everything that guards take."""
    module = Holder()
    module.a, module.b = Holder(), Holder()
    module.one, module.other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    module.mean, module.variance = nn.Buffer(torch.zeros(2)), nn.Buffer(torch.zeros(2))
    module.register_parameter("bias", None)
    module.loose, module.function, module.kind, module.rate = torch.zeros(2), lambda x: x, nn.Tanh, 0.5
    return module


CHANGES = {
    "parameters in another order": lambda module: again(module, "one"),
    "buffers in another order": lambda module: again(module, "mean"),
    "submodules in another order": lambda module: again(module, "a"),
    "a function": lambda module: setattr(module, "function", lambda x: x),
    "a class": lambda module: setattr(module, "kind", nn.ReLU),
    "a number": lambda module: setattr(module, "rate", 0.25),
    "the training flag": lambda module: module.b.eval(),
    "a bias": lambda module: setattr(module, "bias", nn.Parameter(torch.zeros(2))),
    "no parameter": lambda module: setattr(module, "one", None),
    "a tied buffer": lambda module: setattr(module, "mean", module.variance),
    "a larger tensor": lambda module: setattr(module, "loose", torch.zeros(3)),
    "a frozen parameter": lambda module: module.one.requires_grad_(False),
    "another class of submodule": lambda module: setattr(module, "a", Other()),
    "a new submodule": lambda module: module.add_module("c", Holder()),
    "no submodule": lambda module: module.add_module("a", None),
    "a new attribute": lambda module: setattr(module.a, "rate", 1.0),
    "an attribute deleted": lambda module: delattr(module, "rate"),
    "a hook": lambda module: module.b.register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_fails_guards_and_changes_the_signature(name):
    module = guarded()
    before, guards = signature(module), guards_of(module)
    tensors = guards.tensors(module)
    check = tensor_guards(tensors)
    again(module, "rate")  # the order of plain attributes is no part of a module
    assert signature(module) == before
    assert check(*guards.tensors(module))
    CHANGES[name](module)
    assert signature(module) != before
    now = guards.tensors(module)
    assert now is None or not check(*now)


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_guards_hold_only_where_the_signature_is_equal(data):
    root = Holder()
    for change in data.draw(st.lists(st.sampled_from(BUILD), max_size=8)):
        change(data.draw, root)
    before, guards = signature(root), guards_of(root)
    hash(before)
    if guards is None:
        return
    tensors = guards.tensors(root)
    assert tensors is not None
    check = tensor_guards(tensors) if tensors else lambda: True
    if check is None:
        return
    assert len(guards.paths) == len(tensors)
    changes = data.draw(st.lists(st.sampled_from(MUTATE), min_size=1, max_size=3))
    for change in changes:
        change(data.draw, root)
    now = guards.tensors(root)
    hold = now is not None and check(*now)
    after = signature(root)
    if after != before:
        assert not hold, f"{before} has become {after}"
    if set(changes) == {nothing}:
        assert after == before
        assert hold
    if hold:
        attributes = dict(root.named_parameters(remove_duplicate=False)) | dict(root.named_buffers())
        for path, found in zip(guards.paths, now, strict=True):
            assert path not in attributes or attributes[path] is found
