"""TorchScript: detect torch.jit.trace, and refuse it and torch.jit.script with a message that names the way out."""

from __future__ import annotations

from typing import NoReturn

import torch

from fusecell.torch_internals import in_jit_trace

__all__ = ["is_tracing", "refuse_script", "refuse_trace"]


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
        "Use torch.export.export(model, ...) or torch.onnx.export(..., dynamo=True). The drop-ins can be traced where "
        "they compute what torch.nn computes; fusecell.replace(model, back=True) makes them torch.nn's layers."
    )


def refuse_script(name: str) -> NoReturn:
    """Raise RuntimeError: torch.jit.script can't compile a module of the class ``name``."""
    raise RuntimeError(
        f"torch.jit.script can't compile {name}: it reads source code in a part of Python that fusecell isn't written "
        "in. Script torch.nn's own layers, fusecell.replace(copy.deepcopy(model), back=True), or use "
        "torch.export.export(model, ...)."
    )
