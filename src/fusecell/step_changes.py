"""Explain which attributes of its module a step changes, and in which of the user's lines.

A compiled loop runs without Python, so what a step does to its module would be lost: the compiler refuses such a step.
"""

from __future__ import annotations

import functools
import linecache
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from fusecell.module_snapshot import Change, Snapshot

__all__ = ["changing_line", "explain_changes"]

# Frames of these files are not the user's: torch, fusecell, functools, and generated code such as "<string>".
_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent), functools.__file__, "<")


def explain_changes(changes: list[Change], line: str = "") -> str:
    """Explain why a step that changes its module is not compiled, and what to write in its place.

    Arguments:
        changes: at least one.
        line: the file and line that does it, as :func:`changing_line` returns; empty if unknown.
    """
    actions = _joined([f"{change.how} self.{change.path}" for change in changes])
    first = changes[0].path.rpartition(".")[2].partition("[")[0]
    return (
        f"The step changes the module: it {actions}{f' in {line}' if line else ''}. The loop is compiled from one "
        "step, so what a step leaves on the module never reaches the next. Keep it in the state: name it in "
        f'`states = ("h", "{first}")`, give its size in `state_sizes`, and return its new value as part of the new '
        "state. What never changes belongs in __init__."
    )


def _joined(parts: list[str]) -> str:
    """Join up to four parts to an enumeration, and count the rest."""
    shown = parts[:4] + ([f"{len(parts) - 4} more"] if len(parts) > 4 else [])
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def changing_line(before: Snapshot, run: Callable[[], object]) -> str:
    """Run a function again, line by line, and return the first of the user's lines that changes the module.

    Arguments:
        before: the module, as it is now.
        run: a function that runs the step. Exceptions are ignored: it is run elsewhere for its result.

    Returns:
        The file, the line's number and its text; "" where nothing changes, or not in a line of Python.
    """
    result: list[str] = []
    last: list[tuple[str, int]] = []  # the user's line that is being executed

    def trace(frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        if result:
            return None
        # A library's frames aren't followed: what they change is changed by the user's line that called them.
        if event == "call" and frame.f_code.co_filename.startswith(_LIBRARIES):
            return None
        # An event comes before its line: the change, if there is one now, was made by the line before.
        if last and before.changes():
            result.append(_line(*last[-1]))
            return None
        caller = frame.f_back if event == "return" else frame
        while caller is not None and caller.f_code.co_filename.startswith(_LIBRARIES):
            caller = caller.f_back
        if caller is not None:
            last[:] = [(caller.f_code.co_filename, caller.f_lineno)]
        return trace

    outer = sys.gettrace()  # a debugger's, or a coverage tool's
    sys.settrace(trace)
    try:
        run()
    except Exception:
        pass
    finally:
        sys.settrace(outer)
    if not result and last and before.changes():
        result.append(_line(*last[-1]))
    return result[0] if result else ""


def _line(name: str, number: int) -> str:
    """Format a line of a file for a message, with its text."""
    source = linecache.getline(name, number).strip()
    source = source if len(source) < 100 else source[:97] + "..."
    return f"{Path(name).name}, line {number}" + (f": `{source}`" if source else "")
