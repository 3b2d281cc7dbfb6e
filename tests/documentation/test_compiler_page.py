"""docs/compiler.md follows README's LeakyCell through every stage: what it shows is what the compiler prints.

``UPDATE_DOCS=1`` writes the page's texts anew.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise

import pytest
import torch
from torch import nn

import fusecell as fc
from fusecell.compiler.backend import llvm
from fusecell.compiler.backend.target import host_target
from tests.paths import ROOT

PAGE = ROOT / "docs" / "compiler.md"
TARGET = "x86-64-v3"
SHOWN = re.compile(r"(<!-- shown: ([\w ]+) -->\n```text\n)(.*?)(```\n<!-- end of shown -->)", re.DOTALL)
CLASS = re.compile(r"^class LeakyCell.*?^        return [^\n]*\n", re.MULTILINE | re.DOTALL)
WIDE = 112


def truncated(text: str) -> str:
    """Truncate lines to the page's width."""
    lines = (line if len(line) <= WIDE else line[: WIDE - 4] + " ..." for line in text.splitlines())
    return "\n".join(lines) + "\n"


def changes(explained: fc.inspection.explain.Explanation) -> str:
    """Each pass with the lines that it takes away and adds."""
    parts = []
    for (_, before), (name, after) in pairwise([("", explained.graph), *explained.passes.items()]):
        lines = [line for line in difflib.ndiff(before.splitlines(), after.splitlines()) if line[0] in "-+"]
        parts += [f"{name}:" if lines else f"{name}: changes nothing here", *(f"  {line}" for line in lines)]
    return "\n".join(parts)


def only(text: str, *beginnings: str) -> str:
    """Return the lines with one of these beginnings, and "..." for those left out."""
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith(beginnings):
            lines.append(line)
        elif lines[-1:] != ["..."]:
            lines.append("...")
    return "\n".join(lines)


def between(text: str, *marks: str) -> str:
    """Return the text from the second to last of ``marks`` to the last, each searched after the one before."""
    start = 0
    for mark in marks[:-1]:
        start = text.index(mark, start)
    return f"...\n{text[start : text.index(marks[-1], start + 1)].rstrip()}\n..."


def innermost_loop(assembly: str) -> str:
    """The loop around the multiply-adds of a tile of two rows."""
    lines = between(assembly, "\ntile.2x1x1:", "\n.Lfunc_end").splitlines()
    last = max(number for number, line in enumerate(lines) if "vfmadd" in line)
    first = max(number for number, line in enumerate(lines[:last]) if line.startswith(".L"))
    end = next(number for number, line in enumerate(lines) if number > last and line.startswith("\tj"))
    return "\n".join(line.expandtabs(8) for line in lines[first : end + 1])


SECTIONS: Mapping[str, Callable[[fc.inspection.explain.Explanation], str]] = {
    "graph": lambda explained: explained.graph,
    "joint": lambda explained: "...\n" + explained.joint[explained.joint.index("grad.output = ") :],
    "passes": changes,
    "forward": lambda explained: only(list(explained.forward.passes.values())[-1], "graph", "return"),
    "backward": lambda explained: list(explained.backward.passes.values())[-1],
    "plan": lambda explained: explained.plan,
    "backward plan": lambda explained: explained.backward.plan,
    "llvm epilogue": lambda explained: between(explained.llvm, "@loop0.10.epilogue(", "column.body:", "  %at.12"),
    "llvm tile": lambda explained: between(explained.llvm, "@tile.2x1x1(", "k.body:", "k.done:"),
    "asm": lambda explained: innermost_loop(explained.assembly),
    "explain": lambda explained: re.sub(r"compiled in \d+ ms", "compiled in ... ms", explained.cells[0].text).replace(
        "read from the cache", "compiled"
    ),
}


@pytest.fixture(scope="module")
def explained() -> Iterator[fc.inspection.explain.Explanation]:
    """README's cell as it is compiled for one target."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSECELL_TARGET", TARGET)
        patch.setattr(llvm, "EFFORT", llvm.FULL_EFFORT)
        try:
            host_target()
        except ValueError as error:
            pytest.skip(str(error))
        fc.refresh()
        match = CLASS.search((ROOT / "README.md").read_text(encoding="utf-8"))
        assert match is not None
        namespace = {"fc": fc, "nn": nn, "torch": torch}
        exec(match[0], namespace)
        result = fc.explain(namespace["LeakyCell"](5, 10))  # type: ignore[operator]
        _ = result.assembly, result.passes
        yield result
    fc.refresh()


def test_the_page_shows_what_the_compiler_prints(explained: fc.inspection.explain.Explanation) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert {name for _, name, *_ in SHOWN.findall(text)} == set(SECTIONS)

    def fresh(match: re.Match[str]) -> str:
        if match[2] in ("asm", "explain") and llvm.VERSIONS not in text:
            return match[0]  # another LLVM makes other machine code
        return match[1] + truncated(SECTIONS[match[2]](explained)) + match[4]

    if os.environ.get("UPDATE_DOCS"):
        text = re.sub(r"(?<=<!-- versions: ).*(?= -->)", llvm.VERSIONS, text)
        PAGE.write_text(SHOWN.sub(fresh, text), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == SHOWN.sub(fresh, text), (
        "docs/compiler.md is behind the compiler; UPDATE_DOCS=1 rewrites what it shows"
    )


def test_the_page_walks_with_the_cell_of_the_readme() -> None:
    classes = [CLASS.search(page.read_text(encoding="utf-8")) for page in (ROOT / "README.md", PAGE)]
    readme, shown = (match[0] if match else "" for match in classes)
    assert readme
    assert readme == shown


def test_lines_fit_a_screen() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []


GLOSSARY = (
    "argument block", "barrier", "buffer assignment", "chunk", "epilogue", "fast path", "graph", "guard", "hoisted",
    "joint graph", "location", "microkernel", "panel", "pass", "phase", "primitive", "program cache",
    "saved for the backward", "stage", "thread team", "weight prologue",
)  # fmt: skip


def test_the_glossary_is_in_order_and_complete() -> None:
    glossary = PAGE.read_text(encoding="utf-8").partition("## Glossary")[2]
    words = re.findall(r"^\| \*\*([\w -]+)\*\* \|", glossary, re.MULTILINE)
    assert words == sorted(words)
    assert set(GLOSSARY) <= set(words)
