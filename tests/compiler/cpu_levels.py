"""The x86-64 levels that this machine's CPU supports."""

from __future__ import annotations

from fusecell.compiler.backend.isa import instruction_set
from fusecell.compiler.backend.llvm import host


def runs_here(level: str) -> bool:
    """Whether programs for a level can run on this machine."""
    isa = instruction_set(host().triple)
    return level in isa.levels and host().features.issuperset(isa.features_of(level))
