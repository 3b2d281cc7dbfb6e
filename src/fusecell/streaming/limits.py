"""``Limits``: the most memory, work and compilation that a stream's file may ask for."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from fusecell.errors import quoted
from fusecell.tensor_file import FILE_BYTES, HEADER_BYTES

__all__ = ["Limits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits within which a stream's file is loaded; one that asks for more is refused.

    Example:
        >>> from fusecell.streaming import Limits
        >>> Limits(nodes=20_000).nodes  # for a file that you trust
        20000

    Arguments:
        file_bytes: the size of the file, and so of its weights in memory.
        header_bytes: the size of the header: names, shapes, and the texts of the graphs.
        parts: the number of cells.
        nodes: the number of values in a step, over all parts.
        features: the numbers per row in those values.
        multiply_adds: the multiply-adds of a step of one row.
        code_bytes: the size of the LLVM text that is compiled, over all parts; 1 MiB takes some 5 seconds. Also that of
            a file's machine code for one CPU.
        scratch_bytes: the memory per row besides weights and states.

    Raises:
        ValueError: unless all are integers of 1 or more.
    """

    file_bytes: int = FILE_BYTES
    header_bytes: int = HEADER_BYTES
    parts: int = 256
    nodes: int = 4096
    features: int = 1 << 22
    multiply_adds: int = 1 << 31
    code_bytes: int = 4 << 20
    scratch_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if type(value) is not int or value < 1:
                raise ValueError(f"Limits takes integers of 1 or more; got {name}={quoted(value)}.")
