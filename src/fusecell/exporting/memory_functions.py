"""``memcpy`` and ``memset`` as LLVM text, for machines without a C library: local to the object that calls them."""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["memory_functions"]


def memory_functions(names: Collection[str], pointer_bits: int) -> str:
    """Write the functions of these names; nothing in the text calls them, but the code generator does."""
    size = f"i{pointer_bits}"
    written = {"memcpy": ("ptr %from", _COPIED), "memset": ("i32 %value", _SET)}
    lines = []
    for name in sorted(names):
        parameter, byte = written[name]
        lines.append(
            f"define internal ptr @{name}(ptr %to, {parameter}, {size} %count) noinline nounwind "
            f'"no-builtins" {{\n'
            f"entry:\n  %any = icmp ne {size} %count, 0\n  br i1 %any, label %loop, label %done\n"
            f"loop:\n  %i = phi {size} [ 0, %entry ], [ %next, %loop ]\n{byte.format(size=size)}"
            f"  %at = getelementptr i8, ptr %to, {size} %i\n  store i8 %byte, ptr %at\n"
            f"  %next = add {size} %i, 1\n  %more = icmp ne {size} %next, %count\n"
            f"  br i1 %more, label %loop, label %done\ndone:\n  ret ptr %to\n}}\n"
        )
    used = ", ".join(f"ptr @{name}" for name in sorted(names))
    lines.append(f'@llvm.compiler.used = appending global [{len(names)} x ptr] [{used}], section "llvm.metadata"\n')
    return "\n".join(lines)


_COPIED = "  %source = getelementptr i8, ptr %from, {size} %i\n  %byte = load i8, ptr %source\n"
_SET = "  %byte = trunc i32 %value to i8\n"
