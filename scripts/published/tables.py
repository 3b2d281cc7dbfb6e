"""All cases, family by family."""

from __future__ import annotations

from . import (
    packages_gated,
    packages_spiking,
    packages_structured,
    papers_attention,
    papers_gated,
    papers_images,
    papers_memory,
    papers_missing,
    papers_others,
    papers_physical,
    papers_spiking,
    papers_states,
    papers_weights,
)
from .case import Case

FAMILIES = (
    "gated zoo",
    "classic",
    "block-diagonal",
    "normed",
    "parametrised",
    "conditional",
    "ssm",
    "complex",
    "xlstm",
    "rwkv",
    "matrix memory",
    "attention",
    "liquid",
    "ode",
    "oscillators",
    "neuroscience",
    "spiking",
    "convolutional",
    "audio",
    "missing data",
    "generation",
    "sampling",
    "graph",
)


def all_cases() -> list[Case]:
    """Return the cases of all files in the order of their families."""
    modules = (
        packages_gated,
        packages_spiking,
        packages_structured,
        papers_attention,
        papers_gated,
        papers_images,
        papers_memory,
        papers_missing,
        papers_others,
        papers_physical,
        papers_spiking,
        papers_states,
        papers_weights,
    )
    cases = [case for module in modules for case in module.TABLE.cases]
    names = [case.name for case in cases]
    repeated = {name for name in names if names.count(name) > 1}
    unknown = {case.family for case in cases} - set(FAMILIES)
    if repeated or unknown:
        raise ValueError(f"names of several cases: {sorted(repeated)}; families without a place: {sorted(unknown)}")
    return sorted(cases, key=lambda case: FAMILIES.index(case.family))
