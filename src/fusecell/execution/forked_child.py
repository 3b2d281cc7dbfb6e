"""Keep torch's operators to one thread in a forked child, which has none of its parent's threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fusecell.forks import in_forked_child

__all__ = ["one_thread_after_fork"]


@contextmanager
def one_thread_after_fork() -> Iterator[None]:
    """Set torch's number of threads to 1 inside a ``with`` block or a decorated function, in a forked child only.

    If the parent had an OpenMP team, the runtime in the child still counts on its threads: the first operator that asks
    for more than one, however small its tensors are, would wait forever.
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
