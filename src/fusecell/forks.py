"""Survive a fork of the process: locks that no child finds locked, and a flag for the missing threads."""

from __future__ import annotations

import os
import threading

__all__ = ["in_forked_child", "new_lock"]

_forked_pids: list[int] = []


def in_forked_child() -> bool:
    """Return whether this process was forked after fusecell was imported: it has none of its parent's threads."""
    return bool(_forked_pids)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=lambda: _forked_pids.append(os.getpid()))


def new_lock() -> threading.RLock:
    """Return a lock that a fork acquires, so that no child inherits it locked by a thread that it doesn't have.

    A fork acquires the locks created last first, the reverse of registration. Create a lock after those that code
    acquires while holding it, or a fork deadlocks with that code.
    """
    lock = threading.RLock()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return lock
