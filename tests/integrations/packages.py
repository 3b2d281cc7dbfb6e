"""Whether a package that tests need is installed, and can be imported beside this machine's torch."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings

__all__ = ["missing"]


@functools.cache
def missing(name: str) -> str:
    """Return why a module can't be imported, or an empty string."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        return f"{name} is not installed"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module(name)
        except (ImportError, OSError) as error:  # one of another torch's libraries, a part that is gone
            return f"{name} can't be imported: {error}"
    return ""
