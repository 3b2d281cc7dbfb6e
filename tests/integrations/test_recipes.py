"""The recipes, small: each trains as well with fusecell as with torch.nn, loss by loss."""

from __future__ import annotations

import re
import warnings

import pytest
import torch

import fusecell as fc
from benchmarks.integrations import FOLDER, RECIPES, load
from tests.integrations.packages import missing
from tests.paths import ROOT


def need(name):
    for module in RECIPES[name]:
        if missing(module):
            pytest.skip(missing(module))


@pytest.fixture(autouse=True)
def warnings_of_theirs():
    """Let the libraries warn of what they like, while fusecell's warnings stay errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", fc.EagerWarning)
        yield


@pytest.mark.packages
@pytest.mark.parametrize("name", RECIPES)
def test_losses_are_those_of_torch(name):
    need(name)
    losses, _ = load("side_by_side").run(load(name).program, 3, small=True)
    theirs, ours = zip(*losses, strict=True)
    assert len(set(theirs)) == 3
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.packages
def test_a_lightning_module_is_saved_as_torchscript():
    need("lightning_torchscript")
    recipe, scripts = load("lightning_torchscript"), []
    for fusecell in (False, True):
        torch.manual_seed(0)
        scripts.append(recipe.scripted(fusecell))
    assert scripts[0].code == scripts[1].code
    assert scripts[1].encoder.original_name == "LSTM"
    x = torch.randn(3, 9, 5)
    torch.testing.assert_close(scripts[1](x), scripts[0](x))


def test_every_recipe_is_listed_and_documented():
    files = {path.stem for path in FOLDER.glob("*.py")} - {"side_by_side"}
    assert files == set(RECIPES)
    page = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    assert set(re.findall(r"examples/recipes/(\w+)\.py", page)) == files
