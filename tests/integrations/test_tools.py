"""What works with torch.nn's layers works with the drop-ins, tool by tool; and the documentation says so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from torch import nn

import fusecell as fc
from tests.integrations.tools import TOOLS, agree, table

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
MARKED = [
    pytest.param(
        each,
        id=each.name,
        marks=[*[pytest.mark.packages] * bool(each.package), *[pytest.mark.long] * each.long],
    )
    for each in TOOLS
]


@pytest.mark.parametrize("tool", MARKED)
def test_a_tool_does_with_fusecell_what_it_does_with_torch(tool):
    if tool.missing:
        pytest.skip(tool.missing)
    results = []
    for library, works in ((nn, tool.torch), (fc, tool.fusecell)):
        if works:
            results.append(tool.run(library))
        else:  # the table says that it doesn't
            with pytest.raises(Exception):  # noqa: B017, PT011  # of any kind: it is the tool's
                tool.run(library)
    if len(results) == 2:
        agree(results[1], results[0])


def test_fusecell_works_wherever_torch_does():
    assert [each.name for each in TOOLS if each.torch and not each.fusecell] == []
    assert len({each.name for each in TOOLS}) == len(TOOLS) >= 60


def test_the_page_has_the_table():
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition("<!-- tools -->\n")
    _, _, after = rest.partition("\n<!-- end of tools -->")
    expected = f"{before}<!-- tools -->\n{table()}\n<!-- end of tools -->{after}"
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(expected, encoding="utf-8")
        return
    assert text == expected, "UPDATE_DOCS=1 pytest tests/integrations writes it"
