"""Generated code under valgrind; ``python -m tests.reliability.memcheck`` runs more of it."""

from __future__ import annotations

import re
import shutil

import pytest

import fusecell as fc
from tests.reliability.memcheck import errors, write_graphs

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not shutil.which("valgrind"), reason="needs valgrind: apt-get install valgrind"),
]


def test_memcheck_finds_only_the_write_out_of_bounds(tmp_path):
    """Valid calls, and one whose output is 8 bytes shorter than its kernel writes."""
    write_graphs(tmp_path, [fc.GRUCell])
    messages = errors(tmp_path, short=8)
    assert messages
    for line in messages:
        assert re.match(r"InvalidWrite: .* Address \w+ is \d+ bytes (inside|after) a block of size", line), line
