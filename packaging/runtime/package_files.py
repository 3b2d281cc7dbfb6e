"""Build the package ``fusecell_runtime`` from the modules of fusecell that run saved streams without torch.

These are the modules in ``STARTS`` and everything they import, except ``WITHOUT``. They are copied unchanged, but for
``import fusecell``, which becomes ``import fusecell_runtime``.
"""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

__all__ = ["PACKAGE", "WITHOUT", "imported", "modules", "write"]

PACKAGE = "fusecell_runtime"
FOLDER = Path(__file__).resolve().parent
SOURCE = FOLDER.parents[1] / "src" / "fusecell"
LICENSE = FOLDER.parents[1] / "LICENSE"
STARTS = (
    "fusecell.errors",
    "fusecell.streaming",
    "fusecell.streaming.latency",
    "fusecell.compiler.runtime.guard_pages",
)
# A module that is imported on use only, and the reason for leaving it out.
WITHOUT = {"fusecell.streaming.build": "makes streams of torch's modules"}
# Imports at the start of a line, and those of examples in docstrings.
_IMPORT = re.compile(r"^(\s*(?:from|import|>>> from|>>> import) )fusecell\b", re.MULTILINE)


def imported(path: Path) -> Iterator[str]:
    """Iterate over the modules that a file imports, at the top or inside functions.

    ``from a import b`` yields ``a`` and ``a.b``, because b may be a module.
    """
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{each.name}" for each in node.names)


def _file(module: str) -> Path | None:
    """Return a module's file; None for a name inside a module, and for fusecell, which ``package_init`` replaces."""
    base = SOURCE.joinpath(*module.split(".")[1:])
    paths = (base.with_suffix(".py"), base / "__init__.py") if base != SOURCE else ()
    return next((path for path in paths if path.is_file()), None)


def modules() -> list[Path]:
    """List the files of the package, relative to ``src/fusecell``."""
    files: set[Path] = set()
    pending = list(STARTS)
    while pending:
        name = pending.pop()
        path = None if name in WITHOUT or name.partition(".")[0] != "fusecell" else _file(name)
        if path is not None and path not in files:
            files.add(path)
            # The parent too: importing a module runs its package's __init__.
            pending += [*imported(path), name.rpartition(".")[0]]
    return sorted(path.relative_to(SOURCE) for path in files)


def write(folder: Path) -> None:
    """Write the package into ``folder``, which is to have the package's name."""
    for path in modules():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_IMPORT.sub(rf"\1{PACKAGE}", (SOURCE / path).read_text("utf-8")), "utf-8")
    version = re.search(r'^__version__ = "(.*)"$', (SOURCE / "__init__.py").read_text("utf-8"), re.MULTILINE)
    assert version is not None
    text = (FOLDER / "package_init.py").read_text("utf-8").replace("<version>", version[1])
    (folder / "__init__.py").write_text(text, "utf-8")
    (folder / "py.typed").touch()
    shutil.copy(LICENSE, folder / "LICENSE")
