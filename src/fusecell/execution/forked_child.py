"""torch's operators in a forked child, which has none of its parent's threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fusecell.forks import in_forked_child

__all__ = ["one_thread_after_fork"]


@contextmanager
def one_thread_after_fork() -> Iterator[None]:
    """In a forked child torch's operators do without other threads.

    If the parent had an OpenMP team, the child waits for ever for threads that it doesn't have, as soon as an operator
    asks for them, however small its tensors are.
    """
    threads = torch.get_num_threads() if in_forked_child() else 1
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
