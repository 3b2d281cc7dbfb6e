"""What fusecell raises and warns of.

FusecellError
 ├─ NotCompilable   the compiled runner was asked for and a cell or a call can't be compiled
 └─ CompilerError   generated code was refused by the checks that stand before machine code
EagerWarning        the automatic runner fell back to the Python loop, with the reasons
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["CompilerError", "EagerWarning", "FusecellError", "NotCompilable"]


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


class EagerWarning(UserWarning):
    """A cell runs as a Python loop of its steps, and why."""
