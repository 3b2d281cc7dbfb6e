"""The CPU that kernels are made for."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

from fusecell.compiler.backend import llvm

__all__ = ["Target", "host_target", "l2_bytes"]

NATIVE = "native"

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_USUAL_L2 = 1 << 20

# The levels of the x86-64 psABI in LLVM's names, each adding to the one before.
LEVELS: dict[str, tuple[str, ...]] = {
    "x86-64-v2": ("cx16", "popcnt", "sahf", "sse3", "ssse3", "sse4.1", "sse4.2"),
    "x86-64-v3": ("avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "xsave"),
    "x86-64-v4": ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
}


@dataclass(frozen=True)
class Target:
    """A CPU as the emitter and LLVM need to know it.

    Attributes:
        cpu: LLVM's name of the CPU, which also chooses its scheduling model.
        features: LLVM's feature text, ``"+avx2,+fma"``.
        triple: LLVM's target triple.
        vector_bits: width of the widest vector worth using: 512, 256 or 128.
        fma: whether a multiply-add is one instruction with one rounding.
        registers: number of vector registers.
    """

    cpu: str
    features: str
    triple: str
    vector_bits: int
    fma: bool
    registers: int

    @property
    def name(self) -> str:
        """A short label: the level's name, or ``"host"`` and the CPU's."""
        return self.cpu if self.cpu in LEVELS else f"host {self.cpu}"


def host_target() -> Target:
    """The target that ``FUSECELL_TARGET`` asks for: ``native`` (the default) or an x86-64 level.

    The variable is read at every call.

    Example:
        >>> from fusecell.compiler.backend.target import host_target
        >>> host_target().vector_bits in (128, 256, 512)
        True

    Raises:
        ValueError: the value is unknown, or names a level above what this CPU has.
    """
    return _chosen(os.environ.get("FUSECELL_TARGET", "") or NATIVE)


@functools.cache
def _chosen(choice: str) -> Target:
    host = llvm.host()
    if choice == NATIVE:
        return _target(host.cpu, host.feature_text, host.triple, host.features)
    if choice not in LEVELS:
        raise ValueError(f"FUSECELL_TARGET is {choice!r}; expected one of {', '.join((NATIVE, *LEVELS))}.")
    needed = _needed(choice)
    missing = [feature for feature in needed if feature not in host.features]
    if missing:
        fitting = [level for level in LEVELS if host.features.issuperset(_needed(level))]
        raise ValueError(
            f"FUSECELL_TARGET is {choice!r}, but this CPU ({host.cpu}, {host.triple}) lacks "
            f"{', '.join(missing)}; here it can be {' or '.join((NATIVE, *fitting))}."
        )
    return _target(choice, ",".join(f"+{feature}" for feature in needed), host.triple, frozenset(needed))


def _needed(choice: str) -> tuple[str, ...]:
    levels = list(LEVELS)
    return tuple(feature for level in levels[: levels.index(choice) + 1] for feature in LEVELS[level])


def _target(cpu: str, features: str, triple: str, has: frozenset[str]) -> Target:
    neon = triple.startswith(("aarch64", "arm64"))
    avx512 = {"avx512f", "avx512vl"} <= has
    avx2 = {"avx2", "fma"} <= has
    return Target(
        cpu=cpu,
        features=features,
        triple=triple,
        vector_bits=512 if avx512 else 256 if avx2 else 128,
        fma=neon or avx512 or "fma" in has,
        registers=32 if neon or avx512 else 16,
    )


@functools.cache
def l2_bytes() -> int:
    """Bytes of a core's second cache, as Linux has it; a megabyte where nobody says."""
    try:
        for cache in sorted(_CACHES.glob("index*")):
            if (cache / "level").read_text().strip() == "2":
                return int((cache / "size").read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return _USUAL_L2
    return _USUAL_L2
