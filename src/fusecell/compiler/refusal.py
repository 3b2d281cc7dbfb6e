"""Why a step is not compiled."""

from __future__ import annotations

from dataclasses import dataclass

from fusecell.errors import CompilerError

__all__ = ["Refusal", "TooLarge", "refusal"]


@dataclass(frozen=True)
class Refusal:
    """Why a step has no graph, a sentence each.

    Arguments:
        changes: the attributes, by path, that the step itself changes.
    """

    reasons: tuple[str, ...]
    changes: tuple[str, ...] = ()


class TooLarge(CompilerError):
    """A step would take too long to compile; the message has its size and the limit."""


def refusal(error: Exception) -> Refusal:
    """A defect of ours as a reason: it must not stop a user whose cell runs well without the compiler."""
    if isinstance(error, TooLarge):
        return Refusal((str(error),))
    kind = type(error).__name__
    return Refusal((f"The compiler failed on it, please report this with the cell ({kind}: {error}).",))
