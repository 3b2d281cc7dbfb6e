"""Recurrent networks: write one time step in plain PyTorch, run it over whole sequences as one fused loop.

Names are imported on first use, so that a process that only streams never loads torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
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
    "replace": "convert",
    "Tape": "tape",
    "record": "tape",
    "runner": "runner",
    "recompute": "runner",
    "explain": "explain",
    "show_config": "config",
    "refresh": "compiler.runner",
    "count_cells": "summary",
    "summary": "summary",
    "EagerWarning": "errors",
    "FusecellError": "errors",
    "NotCompilable": "errors",
}
_MODULES = ("cells", "init", "testing", "wrappers")
# Who takes a name from here is about to compute: the compiler is imported with it, not in the first call.
_COMPUTING = ("cell", "cells", "drop_in", "layers", "wrappers")

__all__ = [*_HOME, *_MODULES]  # noqa: PLE0604  # names, though not yet loaded


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"fusecell.{_HOME[name]}"), name)
        if _HOME[name] in _COMPUTING:
            importlib.import_module("fusecell.runner").prepare()
    elif name in _MODULES:
        value = importlib.import_module(f"fusecell.{name}")
    else:
        raise AttributeError(f"module 'fusecell' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Importing ``fusecell.runner`` would put the module in the place of the function ``fusecell.runner``."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
