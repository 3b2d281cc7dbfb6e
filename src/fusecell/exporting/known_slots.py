"""A kernel's text with those slots of its argument block filled in that are the same in every call."""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["with_known_slots"]

_ADDRESS = re.compile(r"  (%[\w.]+) = getelementptr i8, ptr %args, i64 (\d+)")
_LOAD = re.compile(r"  (%[\w.]+) = load (i64|ptr), ptr (%[\w.]+)")


def with_known_slots(text: str, known: Mapping[int, int]) -> str:
    """Replace the loads of known numbers from the argument block by the numbers; a known 0 may be a null address.

    LLVM could find them in the block, but looks back over so many stores only, and a block has hundreds of slots.

    Example:
        >>> from fusecell.exporting.known_slots import with_known_slots
        >>> text = "  %slot = getelementptr i8, ptr %args, i64 8\\n  %rows = load i64, ptr %slot"
        >>> print(with_known_slots(text, {8: 3}).splitlines()[1])
          %rows = add i64 0, 3

    Arguments:
        known: numbers by their offset in the block, in bytes.
    """
    lines, offsets = [], {"%args": 0}
    for line in text.splitlines():
        if line.startswith("define"):
            offsets = {"%args": 0}  # names are a function's own
        elif address := _ADDRESS.fullmatch(line):
            offsets[address[1]] = int(address[2])
        elif (load := _LOAD.fullmatch(line)) and offsets.get(load[3]) in known:
            value = known[offsets[load[3]]]
            if load[2] == "i64":
                line = f"  {load[1]} = add i64 0, {value}"
            elif value == 0:
                line = f"  {load[1]} = getelementptr i8, ptr null, i64 0"
        lines.append(line)
    return "\n".join(lines) + "\n"
