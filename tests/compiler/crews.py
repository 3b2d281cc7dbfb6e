"""Calls of any size on threads, for tests that are about them."""

from __future__ import annotations

import pytest

from fusecell.compiler.programs import launch as call
from fusecell.compiler.runtime import thread_team as threads

__all__ = ["always"]


def always(patch: pytest.MonkeyPatch) -> None:
    """Have every call run by as many threads as torch would take, and wait for all of them."""
    patch.setattr(call, "CREW_CALL", 0)
    patch.setattr(call, "CREW_STEP", 0)
    patch.setattr(call, "backs_off", lambda: False)
    patch.setattr(threads, "_LEAST_ARRIVAL", 1e12)
    patch.setattr(threads, "_MOST_ARRIVAL", 1e12)
