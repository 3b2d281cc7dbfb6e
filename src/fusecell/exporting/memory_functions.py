"""``memcpy``, ``memmove`` and ``memset`` as LLVM text, for machines without a C library: local to their object."""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["MEMORY_FUNCTIONS", "memory_functions"]

MEMORY_FUNCTIONS = frozenset({"memcpy", "memmove", "memset"})
"""What LLVM may call though no text says so."""


def memory_functions(names: Collection[str], pointer_bits: int) -> str:
    """Write the functions of these names; nothing in the text calls them, but the code generator does."""
    size = f"i{pointer_bits}"
    lines = [_definition(name, size) for name in sorted(names)]
    used = ", ".join(f"ptr @{name}" for name in sorted(names))
    lines.append(f'@llvm.compiler.used = appending global [{len(names)} x ptr] [{used}], section "llvm.metadata"\n')
    return "\n".join(lines)


def _definition(name: str, size: str) -> str:
    """Write a function that goes byte by byte: the last first, if what it moves lies before where it goes."""
    source = "i32 %value" if name == "memset" else "ptr %from"
    if name == "memset":
        byte = "%byte = trunc i32 %value to i8"
    else:
        byte = f"%source = getelementptr i8, ptr %from, {size} %at\n  %byte = load i8, ptr %source"
    backwards = "icmp ult ptr %from, %to" if name == "memmove" else "icmp eq i1 true, false"
    return f"""\
define internal ptr @{name}(ptr %to, {source}, {size} %count) noinline nounwind "no-builtins" {{
entry:
  %backwards = {backwards}
  %any = icmp ne {size} %count, 0
  br i1 %any, label %loop, label %done
loop:
  %i = phi {size} [ 0, %entry ], [ %next, %loop ]
  %next = add {size} %i, 1
  %from.end = sub {size} %count, %next
  %at = select i1 %backwards, {size} %from.end, {size} %i
  {byte}
  %target = getelementptr i8, ptr %to, {size} %at
  store i8 %byte, ptr %target
  %more = icmp ne {size} %next, %count
  br i1 %more, label %loop, label %done
done:
  ret ptr %to
}}
"""
