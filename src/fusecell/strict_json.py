"""JSON from elsewhere, read strictly: no name twice in an object, and no deeper than its reader expects."""

from __future__ import annotations

import json
import re
from typing import Any

from fusecell.errors import quoted

__all__ = ["parse_json"]

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[\]{}]', re.DOTALL)


def parse_json(text: str, depth: int) -> Any:
    """What a text says, read in time that grows as its length does, without recursion into what nests too deep.

    Arguments:
        depth: how many arrays and objects may lie in one another.

    Raises:
        ValueError: if it is no JSON, nests deeper, or names something twice.
    """
    level = 0
    for token in _TOKEN.finditer(text):
        mark = token[0]
        if mark in ("[", "{"):
            level += 1
        elif mark in ("]", "}"):
            level -= 1
        if level > depth:
            raise ValueError(f"its JSON nests deeper than {depth} arrays and objects in one another")
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for name, value in pairs:
        if name in members:
            raise ValueError(f"its JSON names {quoted(name)} twice in one object")
        members[name] = value
    return members
