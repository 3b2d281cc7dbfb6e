"""Functions of a kernel that are the same but for the slots of the argument block that they read become one.

Layers that repeat in a step, or an iteration that is written out, give the same loops over other buffers, and LLVM
takes as long for each. The first of them stays, with the slots as parameters. Strides, extents and offsets inside a
buffer remain constants: as parameters they would cost additions in the innermost loops.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

__all__ = ["share_functions"]

_FEWEST_LINES = 60
"""Of functions that are compared; below, LLVM is as fast as the comparison."""

_HEAD = re.compile(r"define internal void @([\w.]+)\((.*)\) (.*)")
_SLOT = re.compile(r"(?<=getelementptr i8, ptr %args, i64 )\d+$", re.MULTILINE)
_LOCAL = re.compile(r"%[\w.]+|^[\w.]+(?=:$)", re.MULTILINE)
_CALL = re.compile(r"call void @([\w.]+)\(([^\n]*)\)$", re.MULTILINE)


def share_functions(functions: Sequence[str], tables: Sequence[str] = ()) -> list[str]:
    """Return a module's functions with one for all that differ in nothing but slots of the argument block.

    Example:
        >>> body = "  %slot = getelementptr i8, ptr %args, i64 {}\\n" + "  store i64 0, ptr %slot\\n" * 60
        >>> define = "define internal void @{}(ptr %args) noinline #0 {{\\nentry:\\n" + body + "  ret void\\n}}\\n"
        >>> calls = "define void @run(ptr %args) #0 {\\n  call void @a(ptr %args)\\n  call void @b(ptr %args)\\n}\\n"
        >>> shared = share_functions([define.format("a", 8), define.format("b", 16), calls])
        >>> print(shared[0].splitlines()[0])
        define internal void @a(ptr %args, i64 %slot.at0) noinline #0 {
        >>> print(shared[1])
        define void @run(ptr %args) #0 {
          call void @a(ptr %args, i64 8)
          call void @a(ptr %args, i64 16)
        }
        <BLANKLINE>

    Arguments:
        functions: the text of each.
        tables: texts that refer to functions by address; those stay as they are.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for position, text in enumerate(functions):
        lines = text.count("\n")
        if lines >= _FEWEST_LINES and _HEAD.match(text):
            by_length[lines].append(position)
    alike: dict[str, list[int]] = defaultdict(list)
    for positions in by_length.values():
        if len(positions) > 1:
            for position in positions:
                alike[_without_names(functions[position])].append(position)
    by_address = {name for text in tables for name in re.findall(r"@([\w.]+)", text)}
    result: dict[int, str] = dict(enumerate(functions))
    calls: dict[str, tuple[str, str]] = {}
    for positions in alike.values():
        free = [position for position in positions if _name(functions[position]) not in by_address]
        if len(free) < 2:
            continue
        first, *others = free
        text, arguments = _with_parameters([functions[position] for position in free])
        result[first] = text
        for position in others:
            del result[position]
        for position, values in zip(free, arguments, strict=True):
            calls[_name(functions[position])] = _name(text), "".join(f", i64 {value}" for value in values)

    def call(match: re.Match[str]) -> str:
        name, added = calls.get(match[1], (match[1], ""))
        return f"call void @{name}({match[2]}{added})"

    return [_CALL.sub(call, text) for text in result.values()] if calls else list(functions)


def _name(text: str) -> str:
    head = _HEAD.match(text)
    assert head is not None
    return head[1]


def _without_names(text: str) -> str:
    """Return a function's text with its name and its slots left out, and its values numbered."""
    numbers: dict[str, str] = {}

    def number(match: re.Match[str]) -> str:
        return numbers.setdefault(match[0].removeprefix("%"), f"%{len(numbers)}")

    head, _, body = text.partition("\n")
    unnamed = head.replace(f"@{_name(text)}(", "@(", 1)
    body = "\n".join(line for line in body.split("\n") if not line.startswith("  ;"))
    return _LOCAL.sub(number, f"{unnamed}\n{_SLOT.sub('#', body)}")


def _with_parameters(texts: Sequence[str]) -> tuple[str, list[list[str]]]:
    """Return one function for several that differ in slots, and the slots that each of them passes to it."""
    slots = [_SLOT.findall(text) for text in texts]
    columns = list(zip(*slots, strict=True))
    distinct = list(dict.fromkeys(column for column in columns if len(set(column)) > 1))
    spelled = iter([f"%slot.at{distinct.index(column)}" if column in distinct else column[0] for column in columns])
    body = _SLOT.sub(lambda match: next(spelled), texts[0])
    parameters = "".join(f", i64 %slot.at{place}" for place in range(len(distinct)))
    body = _HEAD.sub(lambda head: f"define internal void @{head[1]}({head[2]}{parameters}) {head[3]}", body, count=1)
    return body, [[column[member] for column in distinct] for member in range(len(texts))]
