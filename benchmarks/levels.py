"""Hold every contestant to a level of CPUs, to see on one machine what another will do: ``--level x86-64-v3`` is AVX2.

Where CPU, hypervisor and kernel let a process answer CPUID itself, no library sees more than the level has
(``cpuid_fault.c``), so that each chooses its kernels as it does on such a CPU. Elsewhere torch, oneDNN, MKL, XLA and
fusecell are held by their variables, and two peers by nothing.

Call :func:`hold` before a framework is imported: each looks once.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

__all__ = ["LEVELS", "UNHELD", "hold", "hold_cpuid"]

LEVELS: Mapping[str, Mapping[str, str]] = {
    "x86-64-v2": {
        "FUSECELL_TARGET": "x86-64-v2",
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "XLA_FLAGS": "--xla_cpu_max_isa=SSE4_2",
    },
    "x86-64-v3": {
        "FUSECELL_TARGET": "x86-64-v3",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
    },
}
"""What to set for each level: torch's own kernels, oneDNN's, MKL's and XLA's have a variable each."""
UNHELD = ("ONNX Runtime", "OpenVINO")
"""Peers that no variable is known to hold. Where CPUID can't be held they run what the CPU has, and have a mark."""


def hold(level: str) -> tuple[str, ...]:
    """Hold this process to a level of CPUs, and return the peers that can't be held on this machine.

    The variables are set, beside what ``XLA_FLAGS`` has already, whether or not CPUID is held.

    Arguments:
        level: one of `LEVELS`.
    """
    variables = dict(LEVELS[level])
    variables["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {variables['XLA_FLAGS']}".strip()
    os.environ.update(variables)
    reason = hold_cpuid(level)
    if reason is None:
        return ()
    print(f"{' and '.join(UNHELD)} are not held to {level}: {reason}.", file=sys.stderr)
    return UNHELD


def hold_cpuid(level: str) -> str | None:
    """Hide from all of this process what the CPU has above a level; return why that can't be done, or None.

    Arguments:
        level: one of `LEVELS`.
    """
    compiler = shutil.which("cc")
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return "only Linux on x86-64 lets a process answer CPUID"
    if compiler is None:
        return "there is no C compiler"
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "cpuid_fault.so")
        source = Path(__file__).with_name("cpuid_fault.c")
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
        code = ctypes.CDLL(str(library)).hold_cpuid(int(level != "x86-64-v2"))
    return f"this CPU, or what it runs under, answers CPUID by itself ({os.strerror(code)})" if code else None
