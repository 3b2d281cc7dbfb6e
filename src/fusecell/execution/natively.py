"""Functions that torch.compile leaves to Python where it doesn't trace through them.

torch.compile breaks its graph at a subclass of ``nn.GRU``, calls it, and would then compile each of its frames: the
whole of this library's compiler, where torch.nn's layer is one call. A function marked here is run as it is then,
with all that it calls. Where torch traces a call from outside, as ``fullgraph=True`` and torch.export do, nothing
changes: the layer is the operator ``fusecell::scan``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

__all__ = ["natively"]

Function = TypeVar("Function", bound=Callable[..., object])

# What torch.compiler.disable sets would hide the function from a trace too, and importing torch's compiler takes a
# second: this is the frame evaluator's own table, of which torch.compile is one user.
_FRAMES = torch._C._dynamo.eval_frame
_SKIP = _FRAMES._FrameExecStrategy(_FRAMES._FrameAction.SKIP, _FRAMES._FrameAction.SKIP)


def natively(function: Function) -> Function:
    """Mark a function: its frames, and those of all that it calls, are never compiled by torch.compile themselves."""
    _FRAMES.set_code_exec_strategy(function.__code__, _SKIP)
    return function
