"""What a fork of the process leaves behind: locks that survive it, and threads that don't."""

from __future__ import annotations

import os
import threading

__all__ = ["in_forked_child", "new_lock"]

_forked: list[int] = []


def in_forked_child() -> bool:
    """Whether this process was forked after fusecell was imported: it has none of its parent's threads."""
    return bool(_forked)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _forked.append(os.getpid()))


def new_lock() -> threading.RLock:
    """A lock that a fork waits for, so that no child finds it shut for ever by a thread that it doesn't have.

    A fork takes those first that were made last: make a lock after those that are taken while it is held.
    """
    made = threading.RLock()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=made.acquire, after_in_parent=made.release, after_in_child=made.release)
    return made
