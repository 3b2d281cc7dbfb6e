"""Settings that every test shares."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

import fusecell as fc
from fusecell.cells import CELLS, ZooCell
from fusecell.compiler.runtime import guard_pages
from tests.browser import chromium
from tests.check_mode import RUN_NO_KERNELS

TESTS = Path(__file__).parent

# No deadline: the first example of a test may compile a cell. "ci" looks longer than "dev".
settings.register_profile("dev", deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect long tests, those of pages, and in the check mode those that run no kernels, unless they are named.

    A test is named on the command line by its ``::`` or its file, a marker by ``-m``.
    """
    if any("::" in argument or argument.endswith(".py") for argument in config.args):
        return
    unneeded = []
    if not config.option.markexpr:
        unneeded += [item for item in items if any(map(item.get_closest_marker, ("pages", "long")))]
    if guard_pages.ENABLED:
        files = [item.path.relative_to(TESTS).with_suffix("").as_posix() for item in items]
        unneeded += [item for item, file in zip(items, files, strict=True) if file in RUN_NO_KERNELS]
    config.hook.pytest_deselected(items=unneeded)
    items[:] = [item for item in items if item not in set(unneeded)]


def pytest_collection_finish() -> None:
    """Leave what all tests share, the objects of imported modules, out of each collection of garbage."""
    gc.collect()
    gc.freeze()


if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=CELLS, ids=[entry.name for entry in CELLS])
def zoo_cell(request: pytest.FixtureRequest) -> ZooCell:
    """Each member of the zoo in turn."""
    entry: ZooCell = request.param
    return entry


@pytest.fixture(scope="module")  # a process has room for one Playwright at a time
def browser() -> Iterator[Any]:
    """Chromium, without a page."""
    yield from chromium()


@pytest.fixture
def eager() -> Iterator[None]:
    """The reference: the Python loop over ``step``."""
    with fc.runner("eager"):
        yield
