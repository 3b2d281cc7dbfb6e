"""Why a step is not compiled."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Refusal", "refusal"]


@dataclass(frozen=True)
class Refusal:
    """Why a step has no graph, a sentence each.

    Arguments:
        changes: the attributes, by path, that the step itself changes.
    """

    reasons: tuple[str, ...]
    changes: tuple[str, ...] = ()


def refusal(error: Exception) -> Refusal:
    """A defect of ours as a reason: it must not stop a user whose cell runs well without the compiler."""
    kind = type(error).__name__
    return Refusal((f"The compiler failed on it, please report this with the cell ({kind}: {error}).",))
