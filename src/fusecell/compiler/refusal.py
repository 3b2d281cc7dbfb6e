"""``Refusal``: the reasons why a step is not compiled."""

from __future__ import annotations

from dataclasses import dataclass

from fusecell.errors import CompilerError

__all__ = ["Refusal", "TooLarge", "refusal"]


@dataclass(frozen=True)
class Refusal:
    """The reasons why a step is not compiled; a result rather than an exception, as it is cached like a program.

    Arguments:
        reasons: a sentence each.
        changes: the attributes, by path, that the step itself changes.
    """

    reasons: tuple[str, ...]
    changes: tuple[str, ...] = ()


class TooLarge(CompilerError):
    """Raised for a step that would take too long to compile; the message has its size and the limit."""


def refusal(error: Exception) -> Refusal:
    """Turn a defect of the compiler into a refusal: it must not stop a user whose cell runs eagerly."""
    if isinstance(error, TooLarge):
        return Refusal((str(error),))
    kind = type(error).__name__
    return Refusal((f"The compiler failed on the step, please report this with the cell ({kind}: {error}).",))
