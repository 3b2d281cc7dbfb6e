"""Static and shared libraries from an object file, by the target's own tools."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from fusecell.errors import ExportError
from fusecell.exporting.targets import ExportTarget

__all__ = ["build_library"]

_TOOLS = {
    "aarch64": ("aarch64-linux-gnu-ar", "aarch64-linux-gnu-gcc"),
    "armv7": ("arm-linux-gnueabihf-ar", "arm-linux-gnueabihf-gcc"),
    "riscv64": ("riscv64-linux-gnu-ar", "riscv64-linux-gnu-gcc"),
    "windows": ("x86_64-w64-mingw32-ar", "x86_64-w64-mingw32-gcc"),
    **dict.fromkeys(("cortex-m4", "cortex-m7", "cortex-m33", "cortex-m55"), ("arm-none-eabi-ar", "")),
    "wasm32": ("llvm-ar", ""),
}
_NATIVE = ("ar", "cc")


def build_library(object_file: Path, target: ExportTarget, *, shared: bool) -> Path:
    """Build a library from an object file, beside it, and remove that.

    Raises:
        ExportError: if there is no tool for it, or it fails.
    """
    archiver, linker = _TOOLS.get(target.name, _NATIVE)
    tool = linker if shared else archiver
    if not tool:
        raise ExportError(f"There are no shared libraries for {target.name}: export format='object' or 'static'.")
    if shutil.which(tool) is None:
        raise ExportError(
            f"A library for {target.name} is built by {tool}, which is not installed; install it, or export "
            "format='object'."
        )
    suffix = _shared_suffix(target) if shared else ".lib" if target.suffix == ".obj" else ".a"
    library = object_file.with_suffix(suffix)
    library.unlink(missing_ok=True)  # an archiver would add to it
    command = (
        [tool, "-shared", "-o", str(library), str(object_file), "-lm"]
        if shared
        else [tool, "rcs", str(library), str(object_file)]
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ExportError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
    object_file.unlink()
    return library


def _shared_suffix(target: ExportTarget) -> str:
    if target.suffix == ".obj":
        return ".dll"
    return ".dylib" if "apple" in target.triple or "darwin" in target.triple else ".so"
