"""The command line of fusecell; ``fusecell --help`` lists its commands."""

from __future__ import annotations

import sys

__all__ = ["main"]

_EXTRA = {"typer", "rich", "matplotlib"}
"""Packages of the extra ``fusecell[demo]``; without another one, the import error itself is the better message."""


def main() -> None:
    """Run the command line; without the packages it needs, say how to install them."""
    try:
        from fusecell.cli.commands import app

        app()
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package not in _EXTRA:
            raise
        sys.exit(f'fusecell\'s command line needs {package}:  pip install "fusecell[demo]"')
