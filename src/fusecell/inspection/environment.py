"""``show_config``: versions, machine and settings, for bug reports."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, fields
from importlib.metadata import version

import torch

from fusecell import __version__
from fusecell.compiler.backend.disk_cache import cache_info
from fusecell.compiler.backend.llvm import EFFORT
from fusecell.compiler.backend.target import host_target
from fusecell.compiler.runtime import guard_pages as check
from fusecell.compiler.runtime.debug_output import debug_stages
from fusecell.execution.context import active_runner

__all__ = ["Config", "show_config"]


@dataclass(frozen=True)
class Config:
    """Versions, machine and settings as texts; ``str()`` is a table."""

    fusecell: str
    torch: str
    llvmlite: str
    python: str
    system: str
    target: str
    vectors: str
    denormals: str  # whether kernels count them as zero, which depends on the architecture
    threads: str
    runner: str
    cache: str
    optimiser: str
    checks: str
    debug: str

    def __str__(self) -> str:
        return "\n".join(f"{field.name:<9} {getattr(self, field.name)}" for field in fields(self))


def show_config() -> Config:
    """Report the versions, the machine and the settings that fusecell runs with, for bug reports.

    Example:
        >>> import fusecell as fc
        >>> fc.show_config().runner
        'auto'

    Returns:
        A :class:`Config`; print it.
    """
    target = host_target()
    return Config(
        fusecell=__version__,
        torch=torch.__version__,
        llvmlite=version("llvmlite"),
        python=f"{platform.python_implementation()} {platform.python_version()}",
        system=f"{platform.system()} {platform.machine()}",
        target=f"{target.name}, {target.triple}" + _set("FUSECELL_TARGET"),
        vectors=f"{target.vector_bits} bits, {target.registers} registers, {'with' if target.fma else 'no'} FMA",
        denormals=target.isa.about_denormals,
        threads=f"{torch.get_num_threads()} of {os.cpu_count()}",
        runner=active_runner(),
        cache=_cache() + _set("FUSECELL_CACHE"),
        optimiser="on" if EFFORT else "off, slow code: FUSECELL_OPTIMISE=0",
        # Guard pages around every tensor: FUSECELL_CHECK=1 makes kernels slow, which a report of speed should show.
        checks="on" if check.ENABLED else "off",
        debug=", ".join(debug_stages()) or "off",
    )


def _cache() -> str:
    info = cache_info()
    if not info.enabled:
        return f"off: {info.reason}"
    return f"{info.path}, {info.entries} kernels, {info.bytes / 2**20:.1f} MiB"


def _set(variable: str) -> str:
    """Return `` (VARIABLE=value)`` if an environment variable is set, else nothing."""
    value = os.environ.get(variable)
    return f" ({variable}={value})" if value else ""
