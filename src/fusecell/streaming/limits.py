"""What a stream's file may ask for."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from fusecell.errors import quoted
from fusecell.tensor_file import FILE_BYTES, HEADER_BYTES

__all__ = ["Limits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The most that a stream's file may ask for; what asks for more is refused.

    Example:
        >>> from fusecell.streaming import Limits
        >>> Limits(nodes=20_000).nodes  # for a file that one trusts
        20000

    Arguments:
        file_bytes: of the file, and so of its weights in memory.
        header_bytes: of what stands before its tensors: names, shapes, and the graphs' texts.
        parts: cells, one above the other.
        nodes: values of a step, of all parts together.
        features: numbers per row of those values.
        multiply_adds: of a step of one row.
        code_bytes: of the text that is compiled, of all parts together: some 5 seconds of compiling for each MiB.
        scratch_bytes: of memory beside weights and states, for each row.

    Raises:
        ValueError: unless all are whole numbers of 1 or more.
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
                raise ValueError(f"Limits takes whole numbers of 1 or more; got {name}={quoted(value)}.")
