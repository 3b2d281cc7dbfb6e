"""Refusals: why a step or a call is not compiled, as sentences for its user.

The sentences are written where the reason is met: about an operation in `frontend.recorder`, `frontend.tracer` and
`frontend.rules`; about weights in `frontend.prologue_recorder`; about a graph's size in `schedule` and `codegen`; about
a call's tensors in `dispatch.eligibility`. `dispatch.runner` makes the warning of them, `inspection.explain` a list.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusecell.errors import CompilerError

__all__ = ["Refusal", "TooLarge", "refusal"]


@dataclass(frozen=True)
class Refusal:
    """A step that cannot be compiled.

    Arguments:
        reasons: one sentence each.
        changes: paths of the attributes that the step itself changes.
    """

    reasons: tuple[str, ...]
    changes: tuple[str, ...] = ()


class TooLarge(CompilerError):
    """A step would take too long to compile; the message has its size and the limit."""


def refusal(error: Exception) -> Refusal:
    """Turn an error inside the compiler into a refusal: the cell can still run as a Python loop."""
    if isinstance(error, TooLarge):
        return Refusal((str(error),))
    kind = type(error).__name__
    return Refusal((f"The compiler failed on it, please report this with the cell ({kind}: {error}).",))
