"""Calls of any size on threads, for tests that are about them."""

from __future__ import annotations

import pytest

from fusecell.compiler.programs import launch as call
from tests.compiler.tuned import tuned

__all__ = ["always"]


def always(patch: pytest.MonkeyPatch) -> None:
    """Have every call run by as many threads as torch would take, and wait for all of them."""
    tuned(patch, team_call_us=0, team_step_us=0, least_arrival_us=1e12, most_arrival_us=1e12)
    patch.setattr(call, "backs_off", lambda: False)
