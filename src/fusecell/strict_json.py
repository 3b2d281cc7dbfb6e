"""Parse JSON from an untrusted file: no name twice in an object, and no deeper nesting than the reader expects."""

from __future__ import annotations

import json
import re
from typing import Any

from fusecell.errors import quoted

__all__ = ["parse_json"]

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[\]{}]', re.DOTALL)


def parse_json(text: str, depth: int) -> Any:
    """Parse a JSON text in linear time.

    Arguments:
        depth: the levels of arrays and objects that may be nested.

    Raises:
        ValueError: if it isn't JSON, nests deeper, or has a name twice in one object.
    """
    # Counted before json.loads, which recurses at each level: a hostile text would exhaust the stack.
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
    """Return an object's members as a dict; json.loads would let the last of two equal names win."""
    members: dict[str, Any] = {}
    for name, value in pairs:
        if name in members:
            raise ValueError(f"its JSON names {quoted(name)} twice in one object")
        members[name] = value
    return members
