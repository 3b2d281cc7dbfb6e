"""What fusecell raises and warns of.

FusecellError
 ├─ NotCompilable   the compiled runner was asked for and a cell or a call can't be compiled
 ├─ CompilerError   generated code was refused by the checks that stand before machine code
 ├─ StreamFileError a file is not a stream that was saved, is damaged, or asks for more than its reader allows
 └─ TapeFileError   the same of a tape
EagerWarning        the automatic runner fell back to the Python loop, with the reasons
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "CompilerError",
    "EagerWarning",
    "FusecellError",
    "NotCompilable",
    "StreamFileError",
    "TapeFileError",
    "quoted",
]


class FusecellError(Exception):
    """The base of every error that is fusecell's own; bad arguments raise ValueError and TypeError."""


class NotCompilable(FusecellError, RuntimeError):
    """A cell or a call can't be compiled; ``reasons`` says why, a sentence each."""

    def __init__(self, subject: str, reasons: Iterable[str]) -> None:
        self.subject = subject
        self.reasons = tuple(reasons)
        super().__init__(f"{subject} can't be compiled: " + " ".join(self.reasons))


class CompilerError(FusecellError, RuntimeError):
    """The compiler made something that its own checks refuse; please report it."""


class StreamFileError(FusecellError, ValueError):
    """A file is not a stream that was saved, is damaged, or asks for more than its reader allows."""


class TapeFileError(FusecellError, ValueError):
    """A file is not a tape that was saved, or is damaged."""


class EagerWarning(UserWarning):
    """A cell runs as a Python loop of its steps, and why."""


def quoted(value: object, most: int = 80) -> str:
    """What somebody else wrote, for a message: escaped, so that it can't steer a terminal, and cut where it is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"
