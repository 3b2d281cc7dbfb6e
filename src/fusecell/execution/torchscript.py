"""TorchScript: torch.jit.trace and torch.jit.script take a drop-in for torch.nn's class, and refuse any other cell.

A trace records the calls that torch.nn's own forward makes. A script reads source code, which is found through the
class of a module: while torch.jit.script runs, a drop-in is therefore of a class that has torch.nn's name and forward.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import nn

from fusecell.torch_internals import in_jit_script, in_jit_trace

__all__ = ["is_tracing", "read_as", "refuse_script", "refuse_trace"]


def is_tracing() -> bool:
    """Return whether torch.jit.trace, or the ONNX exporter that is built on it, records this call."""
    return not torch.compiler.is_compiling() and in_jit_trace()


def refuse_trace(name: str, reason: str) -> NoReturn:
    """Raise RuntimeError: torch.jit.trace can't record a call.

    Arguments:
        name: the class of the cell or layer.
        reason: a sentence that says why.
    """
    raise RuntimeError(
        f"torch.jit.trace, and torch.onnx.export(dynamo=False), can't record {name}: {reason} "
        "Use torch.export.export(model, ...). The drop-ins can be traced where they compute what torch.nn computes; "
        "fusecell.replace(model, back=True) makes them torch.nn's layers."
    )


def refuse_script(name: str, reason: str) -> NoReturn:
    """Raise RuntimeError: torch.jit.script can't compile a module.

    Arguments:
        name: the class of the cell or layer.
        reason: a sentence that says why.
    """
    raise RuntimeError(
        f"torch.jit.script can't compile {name}: {reason} Use torch.export.export(model, ...). The drop-ins can be "
        "scripted where they compute what torch.nn computes, as torch.nn's layers, which "
        "fusecell.replace(model, back=True) makes them."
    )


def read_as(module: nn.Module, base: Any, added: Iterable[str], *, own_forward: bool) -> None:
    """Let torch.jit.script read a module as if its class were ``base``, until it has finished.

    The module stays the same object, and gets its class back at the first access to one of its attributes after that.
    torch.jit.script puts what ``__prepare_scriptable__`` returns into the model that it scripts, where a copy of class
    ``base`` would stay for good.

    Arguments:
        module: a drop-in.
        base: its class in torch.nn.
        added: the names of the attributes that the drop-in has and ``base`` has not.
        own_forward: keep the module's forward, a user's.
    """
    kind: Any = type(module)
    module.__class__ = _stand_in(kind, base, tuple(added), own_forward)


@functools.cache
def _stand_in(kind: Any, base: Any, added: tuple[str, ...], own_forward: bool) -> Any:
    """Build a subclass of ``kind`` that torch.jit takes for ``base``: by its name, source, forward and annotations."""
    shown = kind if own_forward else base

    def __getattribute__(module: Any, name: str) -> Any:
        if not in_jit_script():  # it has finished, or failed
            object.__setattr__(module, "__class__", kind)
            vars(module).pop("__overloads__", None)  # which it leaves
            return getattr(module, name)
        return kind.__getattribute__(module, name)

    annotations = (inspect.get_annotations(each) for each in base.__mro__)
    properties = [name for each in kind.__mro__ for name, value in vars(each).items() if isinstance(value, property)]
    return type(
        shown.__name__,
        (kind,),
        {
            "__module__": shown.__module__,
            "__qualname__": shown.__qualname__,
            "__annotations__": next(filter(None, annotations)),
            "__jit_ignored_attributes__": list(added),
            "__jit_unused_properties__": properties,
            "__getattribute__": __getattribute__,
            "forward": shown.forward,
        },
    )
