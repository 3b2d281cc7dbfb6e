"""Replace torch.nn's recurrent layers and cells in a model by fusecell's, or the other way round."""

from __future__ import annotations

import copy
import re
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils._pytree import tree_leaves

from fusecell.cell import Cell
from fusecell.drop_in.class_swap import become, class_name, fusecell_class, is_torchs_recurrent, original_class
from fusecell.other_libraries import scanned_class
from fusecell.other_libraries.loops import Loop

__all__ = ["Replaced", "Speedup", "accelerate", "replace"]

# Attributes that change no result of torch.nn's: one saves memory, the other acts only with a mask.
_HARMLESS = ("recompute", "masked_output")
_RECURRENT = re.compile("RNN|GRU|LSTM")


@dataclass(frozen=True)
class Speedup:
    """How many times as fast a model runs a sample with fusecell's classes as with torch.nn's.

    Attributes:
        forward: without gradients.
        training: forward and backward; None for a model in which nothing is trained.
    """

    forward: float
    training: float | None

    def __str__(self) -> str:
        training = "" if self.training is None else f", forward and backward {self.training:.2f} times"
        return f"on the sample: forward {self.forward:.2f} times as fast{training}"


@dataclass
class Replaced:
    """A report of what :func:`replace` changed; ``str()`` has a line for each module.

    Attributes:
        changed: (path, class before, class after) of each module that changed.
        left: (path, reason) of each recurrent module that was left alone.
        speedup: on the sample that was passed to :func:`replace`; None without one.
    """

    changed: tuple[tuple[str, str, str], ...] = ()
    left: tuple[tuple[str, str], ...] = ()
    speedup: Speedup | None = None

    def __str__(self) -> str:
        lines = [f"{path or '(itself)'}: {before} -> {after}" for path, before, after in self.changed]
        lines += [f"{path or '(itself)'}: left alone, {reason}" for path, reason in self.left]
        lines += [] if self.speedup is None else [str(self.speedup)]
        return "\n".join(lines) or "nothing to replace"


def replace(model: nn.Module, *, back: bool = False, sample: Any = None) -> Replaced:
    """Replace every torch.nn RNN, GRU, LSTM and cell in a model by fusecell's, in place.

    Each module stays the same object with the same parameters, hooks and state_dict; only its class changes. So
    optimizers, and all else that refers to it, remain valid. A subclass of torch.nn's classes is replaced too, unless
    its forward is one of its own that doesn't call torch.nn's by ``super()``: what it adds stays.

    Layers of ncps, sb3-contrib, speechbrain, torchrecurrent and torchrl that loop over time in Python become subclasses
    of what they are, that run the loop as a scan (:mod:`fusecell.other_libraries`).

    Example:
        >>> import torch, fusecell as fc
        >>> model = torch.nn.ModuleDict({"encoder": torch.nn.GRU(5, 10), "head": torch.nn.Linear(10, 2)})
        >>> print(fc.replace(model))
        encoder: torch.nn.GRU -> fusecell.GRU

    Arguments:
        model: any module.
        back: replace fusecell's by torch.nn's instead.
        sample: an input of the model, or a tuple of its arguments. A copy of the model runs it with both classes in
            turns, and the report has the ratio of their times. It takes a second or so.

    Returns:
        A :class:`Replaced`; print it.

    Raises:
        TypeError: for anything but a module.
        ValueError: with ``back``, for a module that torch.nn can't compute, such as a GRU with ``reset_after=False``;
            nothing has changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace takes a torch.nn.Module, got {type(model).__name__}.")
    if back:
        return _replace_back(model)
    before = None if sample is None else copy.deepcopy(model)
    report = Replaced()
    for path, module in model.named_modules():
        _replace_one(module, path, report)
    _forget_parts(model, report)
    if before is not None:
        report.speedup = _speedup(before, copy.deepcopy(model), sample)
    return report


def _replace_one(module: nn.Module, path: str, report: Replaced) -> None:
    """Replace a module, but none of its parts, and add it to a report if it is recurrent."""
    kind: Any = type(module)
    scanned = scanned_class(kind)
    if isinstance(scanned, str):
        report.left += ((path, f"{kind.__name__}: {scanned}"),)
    elif scanned is not None:
        become(module, scanned)
        report.changed += ((path, class_name(kind), class_name(scanned)),)
    elif isinstance(module, torch.jit.ScriptModule):
        if _RECURRENT.search(module.original_name):
            report.left += ((path, f"a TorchScript of {module.original_name}: replace it before torch.jit.script"),)
    elif is_torchs_recurrent(module):
        after = fusecell_class(module)
        if isinstance(after, str):
            report.left += ((path, f"a subclass, {kind.__name__}: {after}"),)
        else:
            become(module, after)
            report.changed += ((path, class_name(kind), class_name(after)),)
    elif _looks_recurrent(module):
        report.left += (
            (path, f"{kind.__name__} is no class of torch.nn; fusecell.wrap takes one that computes a step"),
        )


def _forget_parts(model: nn.Module, report: Replaced) -> None:
    """Take out of a report the parts of other libraries' loops, which run as they are, but inside a scan."""
    loops = [path for path, module in model.named_modules() if isinstance(module, Loop)]
    prefixes = tuple([f"{path}." if path else "" for path in loops])
    kinds = (nn.RNNBase, nn.RNNCellBase)
    report.left = tuple(
        (path, reason)
        for path, reason in report.left
        if not path.startswith(prefixes) or isinstance(model.get_submodule(path), kinds)
    )


def _replace_back(model: nn.Module) -> Replaced:
    """Replace fusecell's classes by those whose place they take."""
    modules = [(path, module, original_class(type(module))) for path, module in model.named_modules()]
    for path, module, original in modules:
        if original is not None and not isinstance(module, Loop):
            _check_plain(path, module)
    changed = []
    for path, module, original in modules:
        if original is not None:
            changed.append((path, class_name(type(module)), class_name(original)))
            become(module, original)
    return Replaced(tuple(changed))


def _check_plain(path: str, module: Any) -> None:
    """Raise ValueError if a module has an option that torch.nn lacks."""
    for name, value in module.added_attributes.items():
        option = getattr(module, name)
        if name not in _HARMLESS and option is not value and option != value:
            raise ValueError(
                f"replace: {path or type(module).__name__} has {name}={option!r}, which torch.nn can't compute; "
                f"nothing was changed. Set it to {value!r} first, or replace only the other modules."
            )


def _looks_recurrent(module: nn.Module) -> bool:
    """Return whether a module is named as recurrent ones are, and is neither fusecell's nor made of such modules."""
    kind = type(module)
    if not _RECURRENT.search(kind.__name__) or kind.__module__.startswith("fusecell."):
        return False
    parts = (nn.RNNBase, nn.RNNCellBase, Cell, Loop)
    kinds: list[Any] = [type(part) for part in module.modules()]
    return not any(issubclass(each, parts) or scanned_class(each) for each in kinds)


@contextmanager
def accelerate() -> Iterator[Replaced]:
    """Replace torch.nn's recurrent layers and cells by fusecell's as code in a ``with`` block builds its models.

    Every module that becomes a part of another in this thread goes through :func:`replace`: whatever name the code
    knows torch.nn's classes by, and subclasses too. A layer that is a part of nothing, such as one that is a model by
    itself, is left as it is.

    Example:
        >>> import torch, fusecell as fc
        >>> with fc.accelerate() as report:
        ...     model = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.LSTM(5, 10))
        >>> print(report)
        Sequential.1: torch.nn.LSTM -> fusecell.LSTM

    Yields:
        A :class:`Replaced`, to which each module is added with the class and the attribute that it became a part of.
    """
    thread, report = threading.get_ident(), Replaced()

    def replace_part(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        if module is not None and threading.get_ident() == thread:
            _replace_one(module, f"{type(parent).__name__}.{name}", report)

    handle = register_module_module_registration_hook(replace_part)
    try:
        yield report
    finally:
        handle.remove()


def _speedup(before: nn.Module, after: nn.Module, sample: Any) -> Speedup:
    """Measure a model with torch.nn's classes and with fusecell's, in turns."""
    arguments = sample if isinstance(sample, tuple) else (sample,)
    trained = any(parameter.requires_grad for parameter in before.parameters())
    with torch.random.fork_rng(devices=()):
        forward = _ratio(before, after, arguments, backward=False)
        training = _ratio(before, after, arguments, backward=True) if trained else None
    return Speedup(forward, training)


def _ratio(slow: nn.Module, fast: nn.Module, arguments: tuple[Any, ...], *, backward: bool) -> float:
    """Return how many times as long one model takes as another: the median over pairs of calls."""
    ratios: list[float] = []
    began = time.perf_counter()
    # The first pairs compile and warm up. A tenth of a second holds many calls of a small model.
    while len(ratios) < 5 or (time.perf_counter() - began < 0.3 and len(ratios) < 200):
        ratios.append(_seconds(slow, arguments, backward) / _seconds(fast, arguments, backward))
    return statistics.median(ratios[2:])


def _seconds(model: nn.Module, arguments: tuple[Any, ...], backward: bool) -> float:
    began = time.perf_counter()
    with torch.set_grad_enabled(backward):
        leaves = tree_leaves(model(*arguments))
    if backward:
        model.zero_grad()
        losses = [value.sum() for value in leaves if isinstance(value, Tensor) and value.requires_grad]
        torch.autograd.backward(losses)
    return time.perf_counter() - began
