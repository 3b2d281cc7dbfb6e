"""A line on stderr where compiling a cell takes longer than one would wait without a word."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["told_if_slow"]

DELAY = 2.0
"""Seconds before the line is written."""


@contextmanager
def told_if_slow(name: str) -> Iterator[None]:
    """Say what is being compiled if the block takes longer than two seconds.

    Arguments:
        name: of the cell's class.
    """
    timer = threading.Timer(DELAY, _tell, [name])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _tell(name: str) -> None:
    print(
        f"fusecell: compiling {name}, which takes a while; its machine code is kept for the next process.",
        file=sys.stderr,
        flush=True,
    )
