"""The package ``fusecell_runtime``, out of fusecell's modules that need no torch.

They are the ones that ``streaming`` imports, each that it imports and so on, but for those named here with a reason. In
the package each is as it is under ``src/fusecell``, its imports of ``fusecell`` being of ``fusecell_runtime``.
"""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

__all__ = ["PACKAGE", "WITHOUT", "imported", "modules", "write"]

PACKAGE = "fusecell_runtime"
HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1] / "src" / "fusecell"
LICENSE = HERE.parents[1] / "LICENSE"
STARTS = (
    "fusecell.errors",
    "fusecell.streaming",
    "fusecell.streaming.latency",
    "fusecell.compiler.runtime.guard_pages",
)
WITHOUT = {"fusecell.streaming.build": "makes streams of torch's modules"}
_IMPORT = re.compile(r"^(\s*(?:from|import|>>> from|>>> import) )fusecell\b", re.MULTILINE)


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, wherever in it; of a name that is imported from a package, both."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{each.name}" for each in node.names)


def _file(module: str) -> Path | None:
    """Where a module of fusecell's is; nothing for a name in a module, nor for the package itself."""
    place = SOURCE.joinpath(*module.split(".")[1:])
    paths = (place.with_suffix(".py"), place / "__init__.py") if place != SOURCE else ()
    return next((path for path in paths if path.is_file()), None)


def modules() -> list[Path]:
    """The files of the package, relative to ``src/fusecell``."""
    found: set[Path] = set()
    waiting = list(STARTS)
    while waiting:
        name = waiting.pop()
        path = None if name in WITHOUT or name.partition(".")[0] != "fusecell" else _file(name)
        if path is not None and path not in found:
            found.add(path)
            waiting += [*imported(path), name.rpartition(".")[0]]
    return sorted(path.relative_to(SOURCE) for path in found)


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
    (folder / "py.typed").touch()
    shutil.copy(LICENSE, folder / "LICENSE")
