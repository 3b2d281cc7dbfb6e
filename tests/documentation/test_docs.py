"""Every example of the documentation runs, and its tables are those of the code."""

import doctest
import importlib
import os
import pkgutil
import re
import sys
import textwrap
import warnings
from types import ModuleType

import pytest

import fusecell as fc
from tests.paths import ROOT

# Without the reference and the gallery that `make docs` writes.
PAGES = [
    ROOT / "README.md",
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.parent.name not in ("api", "gallery")),
]
# An answer that is folded away is indented.
SNIPPET = re.compile(r"^( *)```python\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def snippets():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in SNIPPET.finditer(text):
            line = text.count("\n", 0, match.start(2)) + 1
            # Lines kept in number, so that a traceback names the page's own.
            code = "\n" * (line - 1) + textwrap.dedent(match[2])
            yield pytest.param(page, code, id=f"{page.relative_to(ROOT)}:{line}")


@pytest.mark.parametrize(("page", "code"), list(snippets()))
def test_snippets_run_as_pasted(page, code, monkeypatch):
    module = ModuleType("pasted")
    monkeypatch.setitem(sys.modules, "pasted", module)  # where pickle looks for the classes that it defines
    exec(compile(code, str(page), "exec"), module.__dict__)


def modules():
    for source in sorted((ROOT / "src").rglob("*.py")):
        if ">>> " in source.read_text(encoding="utf-8"):
            yield ".".join(source.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("name", list(modules()))
def test_docstrings_run(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fc.EagerWarning)
        result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


def test_there_are_examples_to_run():
    assert len(list(snippets())) >= 8
    assert "fusecell.cell" in set(modules())


def zoo_table():
    lines = ["| name | class | what it is | step | paper |", "|---|---|---|---|---|"]
    for member in (*fc.CELLS, *fc.cells.STRUCTURED_CELLS):
        cell = f"`{member.cell.__name__}`"
        steps = "<br>".join(f"`{step.strip()}`" for step in member.equation.split("; "))
        lines.append(f"| `{member.name}` | {cell} | {member.summary} | {steps} | {member.paper} |")
    return "\n".join(lines)


def test_the_page_of_cells_shows_the_zoo():
    page = ROOT / "docs" / "cells.md"
    text = page.read_text(encoding="utf-8")
    before, start, rest = text.partition("<!-- zoo")
    comment, arrow, rest = rest.partition("-->\n")
    _, end, after = rest.partition("<!-- end of zoo -->")
    expected = f"{before}{start}{comment}{arrow}{zoo_table()}\n{end}{after}"
    if os.environ.get("UPDATE_DOCS"):
        page.write_text(expected, encoding="utf-8")
    assert page.read_text(encoding="utf-8") == expected, (
        "docs/cells.md is behind fusecell.CELLS; UPDATE_DOCS=1 rewrites it"
    )


def test_the_design_names_every_module():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = text.partition("<!-- tree -->")[2].partition("<!-- end of tree -->")[0]
    named = set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))
    assert named == {module.name for module in pkgutil.iter_modules(fc.__path__)}


def test_the_readme_is_short_and_shows_something_by_line_30():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert "print(" in "\n".join(lines[:30])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    links = [
        link for link in links if not link.removeprefix("../").startswith(("api/", "gallery/"))
    ]  # made with the site, whose test follows them
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", ["reliability.md", "numerics.md"])
def test_the_tests_that_a_page_names_are_there(page):
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs" / page).read_text(encoding="utf-8"))
    assert named
    for file, test in named:
        assert not test or re.search(rf"^def {test}\(", (ROOT / file).read_text(encoding="utf-8"), re.M), test


def test_the_readme_in_chinese_says_the_same() -> None:
    """Code to the letter, as many headings, rows and figures, the same links but to the other language."""
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md")]
    for pattern in (r"```.*?```", r"^#+ ", r"^\|"):
        one, other = (re.findall(pattern, text, flags=re.DOTALL | re.MULTILINE) for text in texts)
        assert one == other
    links = [set(re.findall(r"\]\((.*?)\)", text)) for text in texts]
    assert links[0] ^ links[1] == {"README.md", "README.zh.md"}
    prose = [re.sub(r"```.*?```|`.*?`|\(.*?\)", "", text, flags=re.DOTALL) for text in texts]
    figures = [sorted(re.findall(r"\d+\.\d+", text)) for text in prose]
    assert figures[0] == figures[1]


def test_the_tutorial_s_picture_is_the_cell_s():
    picture = (ROOT / "docs" / "images" / "gru-step.svg").read_text(encoding="utf-8")
    assert picture == fc.diagram(fc.GRUCell(5, 10)).svg


@pytest.mark.parametrize("page", [page for page in PAGES if "zh" not in page.parts], ids=lambda page: page.name)
def test_lines_of_prose_end_before_column_120(page):
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert [line for line in text.splitlines() if len(line) > 120 and not line.startswith(("|", "!["))] == []
