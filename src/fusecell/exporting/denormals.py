"""The mode in which denormals count as zero, set and restored by LLVM text."""

from __future__ import annotations

from fusecell.compiler.backend.isa import DenormalControl

__all__ = ["denormal_mode"]


def denormal_mode(control: DenormalControl | None) -> tuple[str, str, frozenset[str]]:
    """Return what makes denormals count as zero, what restores the caller's mode, and the declarations of both."""
    if control is None:
        return "", "", frozenset()
    kind = f"i{control.bits}"
    if control.through_memory:
        before = [
            f"%mode.caller = alloca {kind}",
            f"%mode.kernel = alloca {kind}",
            f"call void {control.read}(ptr %mode.caller)",
            f"%mode = load {kind}, ptr %mode.caller",
            f"%flushing = or {kind} %mode, {control.flush}",
            f"store {kind} %flushing, ptr %mode.kernel",
            f"call void {control.write}(ptr %mode.kernel)",
        ]
        after = f"call void {control.write}(ptr %mode.caller)"
    else:
        before = [
            f"%mode = call {kind} {control.read}()",
            f"%flushing = or {kind} %mode, {control.flush}",
            f"call void {control.write}({kind} %flushing)",
        ]
        after = f"call void {control.write}({kind} %mode)"
    return "".join(f"{line}\n  " for line in before), f"{after}\n  ", frozenset(control.declarations)
