"""The package ``fusecell_runtime``, out of fusecell's modules that need no torch.

Each is the module of the same name under ``src/fusecell``, its imports of ``fusecell`` being of ``fusecell_runtime``.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

__all__ = ["PACKAGE", "modules", "write"]

PACKAGE = "fusecell_runtime"
HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1] / "src" / "fusecell"
LICENSE = HERE.parents[1] / "LICENSE"
MODULES = (
    "errors.py",
    "py.typed",
    "compiler/__init__.py",
    "compiler/locks.py",
    "compiler/backend",
    "compiler/codegen",
    "compiler/ir",
    "compiler/runtime",
    "compiler/schedule",
    "compiler/transforms",
    "streaming",
)
WITHOUT = {
    "compiler/ir/interpreter.py": "computes with torch",
    "streaming/build.py": "makes streams of torch's modules",
}
_IMPORT = re.compile(r"^(\s*(?:from|import|>>> from|>>> import) )fusecell\b", re.MULTILINE)


def modules() -> list[Path]:
    """The files of the package, relative to ``src/fusecell``."""
    named = [SOURCE / name for name in MODULES]
    every = [path for one in named for path in ([one] if one.is_file() else sorted(one.rglob("*.py")))]
    return [path.relative_to(SOURCE) for path in every if path.relative_to(SOURCE).as_posix() not in WITHOUT]


def write(folder: Path) -> None:
    """Write the package into a folder of its name."""
    for path in modules():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_IMPORT.sub(rf"\1{PACKAGE}", (SOURCE / path).read_text("utf-8")), "utf-8")
    version = re.search(r'^__version__ = "(.*)"$', (SOURCE / "__init__.py").read_text("utf-8"), re.MULTILINE)
    assert version is not None
    text = (HERE / "package_init.py").read_text("utf-8").replace("<version>", version[1])
    (folder / "__init__.py").write_text(text, "utf-8")
    shutil.copy(LICENSE, folder / "LICENSE")
