"""What this machine's CPU can do, as Linux tells it, without LLVM."""

from __future__ import annotations

import functools
import platform
import sys

__all__ = ["host_level_features", "host_machine"]

_CPUS = "/proc/cpuinfo"
# LLVM's names of features that Linux calls by another name.
_LINUX_NAMES = {
    "sahf": "lahf_lm",
    "sse3": "pni",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "bmi": "bmi1",
    "lzcnt": "abm",
    "avx512vnni": "avx512_vnni",
    "avxvnni": "avx_vnni",
}


def host_machine() -> str:
    """Return the operating system and the architecture, ``"linux-x86_64"``."""
    return f"{sys.platform}-{platform.machine().lower()}"


def host_level_features(wanted: frozenset[str]) -> frozenset[str]:
    """Return those of some features, by LLVM's names, that all of this machine's CPUs have."""
    flags = _flags()
    return frozenset(name for name in wanted if _LINUX_NAMES.get(name, name) in flags)


@functools.cache
def _flags() -> frozenset[str]:
    try:
        with open(_CPUS, encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError:
        return frozenset()  # nothing is known, so no code fits
    sets = {frozenset(line.partition(":")[2].split()) for line in lines if line.partition(":")[0].strip() == "flags"}
    return frozenset.intersection(*sets) if sets else frozenset()
