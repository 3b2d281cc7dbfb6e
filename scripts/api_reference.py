"""Write the pages of the API reference out of the docstrings: ``python scripts/api_reference.py docs/api``.

One page for each way of thinking about the library; every public name is on one of them, once. Equations, examples,
arguments and sources are those of the docstrings, whose examples are run by the tests.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

_ERRORS = "FusecellError NotCompilable EagerWarning ExportError CompilerError StreamFileError TapeFileError"
PAGES = {
    "cells": ("Cells", "fusecell: Cell GRUCell LSTMCell RNNCell step CELLS wrap", "fusecell.cells"),
    "layers": (
        "Layers",
        "fusecell: Recurrent Bidirectional Stack Sequential Ensemble",
        "fusecell: GRU LSTM RNN replace accelerate",
    ),
    "sequences": ("Sequences", "fusecell: scan detach recompute", "fusecell.init"),
    "wrappers": ("Wrappers", "fusecell.wrappers"),
    "streaming": (
        "Streaming",
        "fusecell: Stream load_stream weight_error quantize",
        "fusecell.streaming: Limits StoredWeight WeightError Difference",
        "fusecell.quantized: QuantizedCell",
    ),
    "export": ("Exporting", "fusecell: export", "fusecell.onnx", "fusecell.weights"),
    "inside": (
        "Inside",
        "fusecell: record Tape diagram explain summary count_cells linearize",
        "fusecell.inspection.diagram: Diagram",
        "fusecell.inspection.linearize: Linearized",
        "fusecell.play: PlayCell write_page",
    ),
    "testing": ("Testing", "fusecell.testing"),
    "settings": ("Settings", "fusecell: runner refresh show_config", f"fusecell.errors: {_ERRORS}"),
}
"""By the name of its file: the title of each page, and modules with the names on it; all public ones where none is."""

SECTIONS = ("Example", "Arguments", "Attributes", "Returns", "Yields", "Raises")
_WIDTH = 88


def names_of(page: str) -> Iterator[tuple[str, str, Any]]:
    """Iterate over (module, name, object) of what is on a page; a name that an earlier page has is left out."""
    seen = {id(value) for other in list(PAGES)[: list(PAGES).index(page)] for *_, value in _listed(other)}
    for module, name, value in _listed(page):
        if id(value) not in seen:
            seen.add(id(value))
            yield module, name, value


def _listed(page: str) -> Iterator[tuple[str, str, Any]]:
    for entry in PAGES[page][1:]:
        module, _, names = entry.partition(": ")
        home = importlib.import_module(module)
        for name in names.split() or [
            name for name in home.__all__ if not name.islower() or callable(getattr(home, name))
        ]:
            yield module, name, getattr(home, name)


def anchors() -> dict[str, str]:
    """Return the page and anchor of every public name, by its bare name."""
    return {name: f"{page}.md#{name.lower()}" for page in PAGES for _, name, _ in names_of(page)}


def page_of(page: str, links: dict[str, str]) -> str:
    """Return a page as Markdown."""
    lines = [f"# {PAGES[page][0]}", ""]
    for module, name, value in names_of(page):
        lines += [f"## {name}", "", *_entry(f"{module}.{name}", value, links)]
    return "\n".join(lines).rstrip() + "\n"


def _entry(path: str, value: Any, links: dict[str, str]) -> list[str]:
    if not callable(value) or isinstance(value, ModuleType):
        return [f"`{path}`", "", *_data(path), ""]
    lines = [*_signature(path, value), *_text(inspect.getdoc(value) or "", links)]
    if inspect.isclass(value):
        for name, member in vars(value).items():
            documented = callable(member) or isinstance(member, property | classmethod | staticmethod)
            if name.startswith("_") or not documented or not getattr(member, "__doc__", None):
                continue
            lines += [f"### {path.rpartition('.')[2]}.{name}", ""]
            if callable(member):
                lines += _signature(name, member)
            lines += _text(inspect.getdoc(member) or "", links)
    return lines


def _data(path: str) -> list[str]:
    """Say what a constant is."""
    module, _, name = path.rpartition(".")
    value = getattr(importlib.import_module(module), name)
    of = f", of {len(value)} entries" if hasattr(value, "__len__") else ""
    kinds = sorted({type(entry).__name__ for entry in value}) if isinstance(value, tuple | list) else []
    return [f"A {type(value).__name__}{of}{': ' + ', '.join(f'`{kind}`' for kind in kinds) if kinds else ''}."]


def _signature(path: str, value: Any) -> list[str]:
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return []
    parts = [part if isinstance(part, str) else _parameter(part) for part in _shown(signature)]
    line = f"{path}({', '.join(parts)})"
    if len(line) > _WIDTH:
        line = f"{path}(\n" + "".join(f"    {part},\n" for part in parts) + ")"
    return ["```python", line, "```", ""]


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    text = stars + parameter.name
    annotated = parameter.annotation is not inspect.Parameter.empty
    if annotated:
        kind = parameter.annotation
        text += f": {kind if isinstance(kind, str) else getattr(kind, '__name__', kind)}"
    if parameter.default is inspect.Parameter.empty:
        return text
    return f"{text}{' = ' if annotated else '='}{parameter.default!r}"


def _shown(signature: inspect.Signature) -> list[Any]:
    """Return the parameters as they are written, with the stars between them."""
    shown: list[Any] = []
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "ctx"):
            continue
        starred = "*" in shown or any(
            not isinstance(each, str) and each.kind is inspect.Parameter.VAR_POSITIONAL for each in shown
        )
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not starred:
            shown.append("*")
        shown.append(parameter)
    return shown


def _text(doc: str, links: dict[str, str]) -> list[str]:
    """Return a docstring as Markdown."""
    result: list[str] = []
    for name, lines in _sections(doc):
        if name:
            result += [f"**{name}**", ""]
        if name in ("Arguments", "Attributes", "Raises"):
            result += _definitions(lines, links)
        elif name == "Example":
            result += _examples(lines, links)
        else:
            result += _paragraphs(lines, links)
        result.append("")
    return result


def _sections(doc: str) -> Iterator[tuple[str, list[str]]]:
    """Split a docstring into (name of the section, its lines); what comes first has no name."""
    name, lines = "", []  # type: tuple[str, list[str]]
    for line in doc.splitlines():
        heading = line.rstrip(":")
        if line.endswith(":") and heading in SECTIONS:
            yield name, _dedented(lines) if name else lines
            name, lines = heading, []
        elif name and line and not line.startswith(" "):
            yield name, _dedented(lines)
            name, lines = "", [line]
        else:
            lines.append(line)
    yield name, _dedented(lines) if name else lines


def _dedented(lines: list[str]) -> list[str]:
    return textwrap.dedent("\n".join(lines)).splitlines()


def _paragraphs(lines: list[str], links: dict[str, str]) -> list[str]:
    result, rest = [], list(lines)
    while rest:
        line = rest.pop(0)
        if line.lstrip().startswith(".. math::"):
            equation = [line.partition("::")[2].strip()]
            while rest and (not rest[0].strip() or rest[0].startswith("    ")):
                equation.append(rest.pop(0).strip())
            text = "\n".join(part for part in equation if part)
            if "&" in text or "\\\\" in text:
                text = f"\\begin{{aligned}}\n{text}\n\\end{{aligned}}"
            result += ["", "$$", text, "$$", ""]
        else:
            result.append(_inline(line, links))
    return result


def _examples(lines: list[str], links: dict[str, str]) -> list[str]:
    result: list[str] = []
    in_code = False
    for line in lines:
        starts = line.startswith((">>>", "..."))
        if starts and not in_code:
            result += ["```pycon"]
            in_code = True
        if in_code and not line.strip():
            result += ["```", ""]
            in_code = False
        elif in_code:
            result.append(line)
        else:
            result.append(_inline(line, links))
    return [*result, "```"] if in_code else result


def _definitions(lines: list[str], links: dict[str, str]) -> list[str]:
    result: list[str] = []
    for line in lines:
        if line and not line.startswith(" "):
            names, colon, text = line.partition(":")
            marked = ", ".join(f"`{name.strip()}`" for name in names.split(",")) if colon else names
            result.append(f"- {marked}{colon}{_inline(text, links)}")
        elif line.strip():
            result.append(f"  {_inline(line.strip(), links)}")
    return result


def _inline(line: str, links: dict[str, str]) -> str:
    def link(match: re.Match[str]) -> str:
        name = match[1].lstrip("~").rpartition(".")[2]
        return f"[`{name}`]({links[name]})" if name in links else f"`{name}`"

    line = re.sub(r":math:`([^`]*)`", r"$\1$", line)
    line = re.sub(r":(?:class|func|meth|mod|data|attr|exc):`([^`]*)`", link, line)
    line = line.replace("``", "`")
    return re.sub(r"(?<![(<\"`])(https?://[^\s,)]+[^\s,.)])", r"<\1>", line)


def main(folder: str) -> None:
    """Write all pages into a folder."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    links = anchors()
    for page in PAGES:
        (target / f"{page}.md").write_text(page_of(page, links), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
