"""A few hundred hostile files; ``python -m tests.reliability.fuzz_files`` tries any number."""

from __future__ import annotations

import sys
from collections import Counter

import pytest

from tests.reliability.fuzz_files import fuzz

COUNTS = {"streams": 300, "tapes": 60}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts memory as Linux does")
@pytest.mark.parametrize("kind", COUNTS)
def test_mutants_are_refused_or_do_what_they_say(kind):
    outcomes = Counter()
    defects = fuzz(kind, COUNTS[kind], seed=1, report=lambda index, outcome: outcomes.update([outcome.kind]))
    assert not defects
    # Both happen, or the mutants are too wild or too tame to find anything.
    assert min(outcomes["ran"], outcomes["refused"]) > COUNTS[kind] // 20
