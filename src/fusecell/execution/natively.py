"""Functions whose frames torch.compile never compiles by themselves.

torch.compile breaks its graph at a subclass of ``nn.GRU`` and calls it; it would then compile each Python frame of the
call, among them all of this library's compiler. A function with this mark is run by Python instead, with all that it
calls. The mark doesn't hide it from a trace that begins further out, as with ``fullgraph=True`` and torch.export:
there the layer is the operator ``fusecell::scan``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

__all__ = ["natively"]

Function = TypeVar("Function", bound=Callable[..., object])

# Not torch.compiler.disable: it would hide the function from traces too, and it imports torch's compiler, which takes a
# second. This sets the entry that it would set in the frame evaluator's own table.
_FRAMES = torch._C._dynamo.eval_frame
_SKIP = _FRAMES._FrameExecStrategy(_FRAMES._FrameAction.SKIP, _FRAMES._FrameAction.SKIP)


def natively(function: Function) -> Function:
    """Mark a function: torch.compile doesn't compile its frames by themselves, nor those of its callees."""
    _FRAMES.set_code_exec_strategy(function.__code__, _SKIP)
    return function
