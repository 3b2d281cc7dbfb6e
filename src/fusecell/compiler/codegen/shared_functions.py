"""Functions of a kernel that are the same but for the slots of the argument block that they read become one.

Layers that repeat in a step, or an iteration that is written out, give the same loops over other buffers, and LLVM
takes as long for each. The first of them stays, with the slots as parameters. Strides, extents and offsets inside a
buffer remain constants: as parameters they would cost additions in the innermost loops.

Functions are compared after those that they call: once these are one, their callers differ in slots alone too, those
that they pass on. Calls spell such slots ``i64 noundef 1104``; no other argument is spelled so.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property

__all__ = ["share_functions"]

_FEWEST_LINES = 16
"""Of functions that are compared; below, LLVM is as fast as the comparison."""

_HEAD = re.compile(r"define internal void @([\w.]+)\((.*)\) (.*)")
_SLOT = re.compile(r"(?<=getelementptr i8, ptr %args, i64 )\d+$|(?<=i64 noundef )\d+", re.MULTILINE)
_LOCAL = re.compile(r"%[\w.]+|^[\w.]+(?=:$)", re.MULTILINE)
_CALL = re.compile(r"call void @([\w.]+)\(([^\n]*)\)$", re.MULTILINE)
_TABLE = re.compile(r"@([\w.]+)( = internal constant .*)")
_GLOBAL = re.compile(r"@([\w.]+)")


def share_functions(functions: Sequence[str], tables: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Return a module's functions with one for all that differ in nothing but slots of the argument block.

    Example:
        >>> body = "  %slot = getelementptr i8, ptr %args, i64 {}\\n" + "  store i64 0, ptr %slot\\n" * 60
        >>> define = "define internal void @{}(ptr %args) noinline #0 {{\\nentry:\\n" + body + "  ret void\\n}}\\n"
        >>> calls = "define void @run(ptr %args) #0 {\\n  call void @a(ptr %args)\\n  call void @b(ptr %args)\\n}\\n"
        >>> shared, _ = share_functions([define.format("a", 8), define.format("b", 16), calls])
        >>> print(shared[0].splitlines()[0])
        define internal void @a(ptr %args, i64 %slot.at0) noinline #0 {
        >>> print(shared[1])
        define void @run(ptr %args) #0 {
          call void @a(ptr %args, i64 noundef 8)
          call void @a(ptr %args, i64 noundef 16)
        }
        <BLANKLINE>

    Arguments:
        functions: the text of each.
        tables: the texts of constant tables; functions whose address is in one stay as they are.

    Returns:
        The functions, and the tables, of which those with the same entries are one too.
    """
    tables, table_names = _share_tables(tables)
    by_address = {name for text in tables for name in _GLOBAL.findall(text)}
    members = [_Function(_renamed(text, table_names)) for text in functions]
    calls: dict[str, tuple[str, str]] = {}
    removed: set[str] = set()
    for level in _levels(members):
        for each in level:
            each.redirect(calls)
        for alike in _groups([each for each in level if each.name not in by_address]):
            first, *others = alike
            text, arguments = _with_parameters([each.text for each in alike])
            for each, slots in zip(alike, arguments, strict=True):
                calls[each.name] = first.name, "".join(f", i64 noundef {slot}" for slot in slots)
            first.text = text
            removed.update(each.name for each in others)
    return [each.text for each in members if each.name not in removed], tables


class _Function:
    """A function's text, and its name; texts that are no function of the kernel's own have none."""

    def __init__(self, text: str) -> None:
        self.text = text
        head = _HEAD.match(text)
        self.name = head[1] if head else ""

    @cached_property
    def callees(self) -> list[str]:
        """The names of the functions that it calls."""
        return [name for name, _ in _CALL.findall(self.text)]

    def redirect(self, calls: dict[str, tuple[str, str]]) -> None:
        """Call the functions that remain in place of those that became one with them, with the slots of these."""

        def call(match: re.Match[str]) -> str:
            name, added = calls.get(match[1], (match[1], ""))
            return f"call void @{name}({match[2]}{added})"

        if not calls.keys().isdisjoint(self.callees):
            self.text = _CALL.sub(call, self.text)

    def without_names(self) -> str:
        """Return the text with the function's name and its slots left out, and its values numbered."""
        numbers: dict[str, str] = {}

        def number(match: re.Match[str]) -> str:
            return numbers.setdefault(match[0].removeprefix("%"), f"%{len(numbers)}")

        head, _, body = self.text.partition("\n")
        unnamed = head.replace(f"@{self.name}(", "@(", 1)
        body = "\n".join(line for line in body.split("\n") if not line.startswith("  ;"))
        return _LOCAL.sub(number, f"{unnamed}\n{_SLOT.sub('#', body)}")


def _levels(functions: Sequence[_Function]) -> Iterator[list[_Function]]:
    """Yield the functions by the depth of what they call: first those that call none of the others."""
    by_name = {each.name: each for each in functions if each.name}
    depths: dict[str, int] = {}

    def depth(function: _Function) -> int:
        if function.name not in depths or not function.name:
            callees = [by_name[name] for name in function.callees if name in by_name]
            depths[function.name] = 1 + max(map(depth, callees), default=-1)
        return depths[function.name]

    levels: dict[int, list[_Function]] = defaultdict(list)
    for each in functions:
        levels[depth(each)].append(each)
    for _, level in sorted(levels.items()):
        yield level


def _groups(functions: Sequence[_Function]) -> list[list[_Function]]:
    """Return the groups of two and more of the functions that differ in names and slots alone."""
    by_length: dict[int, list[_Function]] = defaultdict(list)
    for each in functions:
        lines = each.text.count("\n")
        if lines >= _FEWEST_LINES and each.name:
            by_length[lines].append(each)
    alike: dict[str, list[_Function]] = defaultdict(list)
    for same_length in by_length.values():
        if len(same_length) > 1:
            for each in same_length:
                alike[each.without_names()].append(each)
    return [group for group in alike.values() if len(group) > 1]


def _share_tables(tables: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the tables with one for all of the same entries, and by the name of each other the name of that."""
    names: dict[str, str] = {}
    first: dict[str, str] = {}
    for text in tables:
        match = _TABLE.match(text)
        if match:
            names[match[1]] = first.setdefault(match[2], match[1])
    others = {name: same for name, same in names.items() if name != same}
    return [text for text in tables if not (match := _TABLE.match(text)) or match[1] not in others], others


def _renamed(text: str, names: dict[str, str]) -> str:
    return _GLOBAL.sub(lambda match: f"@{names.get(match[1], match[1])}", text) if names else text


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
