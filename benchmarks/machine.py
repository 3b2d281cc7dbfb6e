"""Bind the process to cores, and describe the machine and the versions for the results."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["bind", "describe", "revision", "versions"]


def bind(threads: int) -> list[int]:
    """Bind the process to ``threads`` cores and return them; call it before a framework counts cores.

    Raises:
        ValueError: if there are fewer, or the system is not Linux.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError(f"Binding a process to cores needs Linux; this is {platform.system()}.")
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(cores):
        raise ValueError(f"--threads {threads}: this process may use {len(cores)} cores; give 1 to {len(cores)}.")
    os.sched_setaffinity(0, cores[:threads])
    os.environ["OMP_NUM_THREADS"] = str(threads)  # some read this rather than count the cores they may use
    return cores[:threads]


def describe() -> dict[str, str | int]:
    """Return the CPU, the operating system and the load of the last minute."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.machine()}",
        "load": f"{os.getloadavg()[0]:.2f}",
    }


def revision() -> str:
    """Return the present commit, with "-dirty" if files differ from it; "unknown" outside of a clone."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        process = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return process.stdout.strip()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of Python and of those ``packages`` that are installed."""
    installed = {"python": platform.python_version()}
    for package in packages:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def _cpu_model() -> str:
    """Return Linux's name of the CPU with its family and model, which tell it where a cloud shortens the name."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name", platform.processor())
    family, model = fields.get("cpu family"), fields.get("model")
    return f"{name} (family {family}, model {model})" if family else name
