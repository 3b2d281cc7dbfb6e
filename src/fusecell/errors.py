"""Errors and warnings of fusecell.

FusecellError
 ├─ NotCompilable   a cell or a call can't be compiled, and the compiled runner was required
 ├─ CompilerError   the compiler's own checks rejected the code it generated
 ├─ StreamFileError a file is not a saved stream, is damaged, or asks for more than its reader allows
 ├─ TapeFileError   a file is not a saved tape, or is damaged
 └─ ExportError     an exported step can't be built, or its numbers are not the stream's
EagerWarning        the automatic runner fell back to the Python loop; the text says why
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "CompilerError",
    "EagerWarning",
    "ExportError",
    "FusecellError",
    "NotCompilable",
    "StreamFileError",
    "TapeFileError",
    "quoted",
]


class FusecellError(Exception):
    """Base class of fusecell's own errors; bad arguments raise ValueError and TypeError."""


class NotCompilable(FusecellError, RuntimeError):
    """Raised where a cell or a call can't be compiled; ``reasons`` is a tuple of sentences that say why."""

    def __init__(self, subject: str, reasons: Iterable[str]) -> None:
        self.subject = subject
        self.reasons = tuple(reasons)
        super().__init__(f"{subject} can't be compiled: " + " ".join(self.reasons))


class CompilerError(FusecellError, RuntimeError):
    """Raised where the compiler generated code that its own checks reject: a defect, please report it."""


class StreamFileError(FusecellError, ValueError):
    """Raised where a file is not a saved stream, is damaged, or asks for more than its reader allows."""


class TapeFileError(FusecellError, ValueError):
    """Raised where a file is not a saved tape, or is damaged."""


class ExportError(FusecellError, RuntimeError):
    """Raised where an exported step can't be built with the tools at hand, or its numbers are not the stream's."""


class EagerWarning(UserWarning):
    """Warning that a cell runs as a Python loop over its steps; the text says why."""


def quoted(value: object, most: int = 80) -> str:
    """Escape untrusted text for a message, so that it can't send control codes to a terminal, and shorten it."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"
