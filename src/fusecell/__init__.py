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
    "runner": "runner",
    "count_cells": "summary",
    "summary": "summary",
    "EagerWarning": "errors",
    "FusecellError": "errors",
    "NotCompilable": "errors",
}
_MODULES = ("cells", "testing")

__all__ = [*_HOME, *_MODULES]  # noqa: PLE0604  # names, though not yet loaded


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"fusecell.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"fusecell.{name}")
    else:
        raise AttributeError(f"module 'fusecell' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
