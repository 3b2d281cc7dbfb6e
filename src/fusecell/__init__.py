"""Recurrent networks: write one time step in plain PyTorch, run it over whole sequences as one fused loop.

Names are imported on first use, so that a process that only streams never loads torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Cell": "cell",
    "step": "cell",
    "CELLS": "cells",
    "GRUCell": "cells",
    "LSTMCell": "cells",
    "RNNCell": "cells",
    "GRU": "drop_in",
    "LSTM": "drop_in",
    "RNN": "drop_in",
    "Recurrent": "layers",
    "Bidirectional": "layers",
    "Sequential": "layers",
    "Stack": "layers",
    "scan": "layers",
    "detach": "layers",
    **dict.fromkeys(
        (
            "LearnedState",
            "Projected",
            "RecurrentDropout",
            "Residual",
            "VariationalDropout",
            "WeightDrop",
            "WithReadout",
            "Zoneout",
        ),
        "wrappers",
    ),
    "Stream": "streaming",
    "load_stream": "streaming",
    "weight_error": "streaming",
    "export": "exporting",
    "Ensemble": "ensemble",
    "quantize": "quantized",
    "replace": "convert",
    "wrap": "wrapped_module",
    "accelerate": "convert",
    "Tape": "tape",
    "record": "tape",
    "runner": "execution.context",
    "recompute": "execution.context",
    "linearize": "inspection.linearize",
    "diagram": "inspection.diagram",
    "explain": "inspection.explain",
    "show_config": "inspection.environment",
    "refresh": "compiler.dispatch.runner",
    "count_cells": "inspection.summary",
    "summary": "inspection.summary",
    "EagerWarning": "errors",
    "ExportError": "errors",
    "FusecellError": "errors",
    "NotCompilable": "errors",
}
_MODULES = ("cells", "init", "quantized", "testing", "weights", "wrappers")
# Not in __all__, as it needs a package of its own.
_OPTIONAL = ("onnx",)
# Who takes a name from here is about to compute: the compiler is imported with it, not in the first call.
_COMPUTING = ("cell", "cells", "drop_in", "layers", "wrappers")

__all__ = [*_HOME, *_MODULES]  # noqa: PLE0604  # names, though not yet loaded


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"fusecell.{_HOME[name]}"), name)
        if _HOME[name] in _COMPUTING:
            importlib.import_module("fusecell.execution.runners").prepare()
    elif name in _MODULES or name in _OPTIONAL:
        value = importlib.import_module(f"fusecell.{name}")
    else:
        raise AttributeError(f"module 'fusecell' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_OPTIONAL, "__version__"})
