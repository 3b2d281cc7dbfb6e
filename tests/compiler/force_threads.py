"""Run calls of any size on several threads, for tests of threading."""

from __future__ import annotations

import pytest

from fusecell.compiler.programs import team_size
from tests.compiler.tuned import tuned

__all__ = ["always"]


def always(patch: pytest.MonkeyPatch) -> None:
    """Have every call use all of torch's threads, and wait for each of them."""
    tuned(patch, team_call_us=0, team_step_us=0, least_arrival_us=1e12, most_arrival_us=1e12)
    patch.setattr(team_size, "backs_off", lambda: False)
