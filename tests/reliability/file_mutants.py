"""Mutants of good files, at every layer of the format, for the fuzzer of files.

A mutant is a kind of file, a seed and an index; nothing else decides what it is. It is a draft of a good file, changed
by one to four mutations, each with a random generator of its own, so that any of them can be left out to shrink it.
Checksums are worked out again, so that what stands behind them is reached.
"""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import fusecell as fc
from fusecell.compiler.ir.graph import Graph
from fusecell.compiler.ir.primitives import PRIMITIVES, Type
from fusecell.errors import CompilerError
from fusecell.streaming.file import digest
from fusecell.tensor_file import read_tensor_file

__all__ = ["KINDS", "bases", "mutant"]

KINDS = ("streams", "tapes")
_DTYPES = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "I64": np.int64}
_OTHER_DTYPES = [*_DTYPES, "BF16", "BOOL", "U8", "F8_E4M3", "C64", "", "f32", None, 7]
_NUMBERS = [0, 1, 2, 3, 5, 16, 17, -1, 2**31, 2**32 + 1, 2**63, 2**64, 10**30, True, False, 1.0, 2.5, None]
_NUMBERS += [float("nan"), float("inf"), "4", "", [], {}]
_NAMES = [
    "order",
    "starts",
    "strips",
    "x.rows",
    "h.rows",
    "state.h",
    "in.x",
    "out.output",
    "saved.h",
    "grad.h",
    "run",
    "",
]
_NAMES += ["partials.loop0.4", "panel.loop0.4.0", "sum.0.block", "at.h", "h.packed", "steps", "rows", "λ", "x" * 300]
_NAMES += ["\x1b[31mred", "a\x00b", "\ud800", "\u202egnp", "a b", "h.1", "a\nb", "'; --", "0", "h\x85", "resets.step"]


@dataclass
class Draft:
    """A file before it is written as bytes; any part may be invalid."""

    about: dict[str, Any]
    parts: Any
    tensors: dict[str, tuple[Any, Any, bytes]]
    """Each tensor's dtype, shape and bytes, in the order in which they lie."""
    kind: str
    header_edits: list[Callable[[str], str]] = field(default_factory=list)
    entry_edits: dict[str, dict[str, Any]] = field(default_factory=dict)
    byte_edits: list[Callable[[bytearray], None]] = field(default_factory=list)
    checksum: bool = True

    def content(self) -> bytes:
        """The file."""
        about = dict(self.about)
        text = self.parts if isinstance(self.parts, str) else json.dumps(self.parts)
        about.setdefault("parts" if self.kind == "streams" else "tracks", text)
        if self.kind == "streams" and self.checksum:
            about["sha256"] = self._digest(about["parts"])
        header: dict[str, Any] = {"__metadata__": about}
        data = b""
        for name, (dtype, shape, content) in self.tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
            header[name] |= self.entry_edits.get(name, {})
            data += content
        text = json.dumps(header)
        for edit in self.header_edits:
            text = edit(text)
        encoded = text.encode("utf-8", "surrogatepass")
        encoded += b" " * (-len(encoded) % 8)
        whole = bytearray(len(encoded).to_bytes(8, "little") + encoded + data)
        for change in self.byte_edits:
            change(whole)
        return bytes(whole)

    def _digest(self, text: Any) -> str:
        try:
            return digest(text, {name: _array(*stored) for name, stored in self.tensors.items()})
        except (ValueError, TypeError, KeyError, AttributeError):
            return "0" * 64


def _array(dtype: Any, shape: Any, content: bytes) -> np.ndarray[Any, Any]:
    return np.frombuffer(content, _DTYPES[dtype]).reshape(shape)


# Good files


def bases(folder: Path) -> None:
    """Write the good files that mutants are made of."""
    torch.manual_seed(0)
    mixed = fc.Sequential(fc.GRU(3, 4), fc.Recurrent(fc.LSTMCell(4, 3)), nn.Linear(3, 2), nn.Sigmoid())
    layers: list[Any] = [
        fc.GRU(3, 4),
        fc.Recurrent(fc.cells.LayerNormGRUCell(3, 5)).double(),
        mixed,
        fc.LearnedState(fc.RNNCell(2, 3)),
        fc.Recurrent(fc.cells.PeepholeLSTMCell(2, 17)),
        fc.Stack(fc.RNNCell(4, 4), fc.GRUCell(4, 4), residual=True),
        fc.GRU(3, 4, reset_after=False),
        fc.WithReadout(fc.cells.LeakyCell(3, 5), nn.Sequential(nn.Linear(5, 3), nn.Softmax(-1))),
    ]
    for place, layer in enumerate(layers):
        fc.Stream(layer.eval()).save(folder / f"streams.{place}")
    for place, (layer, keywords) in enumerate(
        [
            (fc.LSTM(3, 4, bidirectional=True), {"lengths": [5, 2], "labels": "abcde", "gradients": True}),
            (fc.GRU(3, 4, 2), {}),
            (fc.Recurrent(fc.cells.LeakyCell(3, 2)).double(), {"labels": [1, 2, 3, 4, 5]}),
        ]
    ):
        tape = fc.record(layer, torch.randn(5, 2, 3, dtype=next(layer.parameters()).dtype), **keywords)
        if keywords.get("gradients"):
            tape.outputs.sum().backward()
        tape.save(folder / f"tapes.{place}")


def _draft(path: Path, kind: str) -> Draft:
    file = read_tensor_file(path, tuple(_DTYPES))
    names = {np.dtype(dtype).name: name for name, dtype in _DTYPES.items()}
    order = sorted(file.stored.items(), key=lambda pair: pair[1].start)
    tensors = {
        name: (names[each.dtype], list(each.shape), bytes(file.data[each.start : each.stop])) for name, each in order
    }
    about = dict(file.metadata)
    parts = json.loads(about.pop("parts" if kind == "streams" else "tracks"))
    return Draft(about, parts, tensors, kind)


def mutant(folder: Path, kind: str, seed: int, index: int, skipped: Sequence[int] = ()) -> tuple[bytes, list[str]]:
    """Return a mutated file and the log of its mutations.

    Arguments:
        folder: of the good files.
        skipped: mutations that are left out.
    """
    rng = random.Random(f"{kind} {seed} {index}")
    paths = sorted(folder.glob(f"{kind}.*"))
    path, count = rng.choice(paths), rng.choice([1, 1, 1, 2, 2, 3, 4])
    draft, log = _draft(path, kind), [path.name]
    mutations = _STREAMS if kind == "streams" else _TAPES
    for place in range(count):
        each = random.Random(f"{kind} {seed} {index} {place}")
        mutation = each.choices([pair[0] for pair in mutations], [pair[1] for pair in mutations])[0]
        if place not in skipped:
            log.append(f"{place}: {mutation.__name__} {mutation(draft, each) or ''}")
    return draft.content(), log


# The container


def change_bytes(draft: Draft, rng: random.Random) -> str:
    """Change, insert or delete bytes; shorten or lengthen the file."""
    kind, draw = rng.choice(["flip", "cut", "longer", "insert", "delete", "length"]), random.Random(rng.random())

    def change(whole: bytearray) -> None:
        place = draw.randrange(len(whole)) if draw.random() < 0.5 else draw.randrange(min(len(whole), 400))
        if kind == "flip":
            whole[place] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del whole[place:]
        elif kind == "longer":
            whole.extend(bytes(draw.randrange(1, 70)))
        elif kind == "insert":
            whole[place:place] = bytes([draw.randrange(256)])
        elif kind == "delete":
            del whole[place : place + draw.randrange(1, 9)]
        else:
            whole[:8] = draw.choice([0, 1, 2**63, 2**64 - 1, len(whole), len(whole) - 8]).to_bytes(8, "little")

    draft.byte_edits.append(change)
    return kind


def change_header(draft: Draft, rng: random.Random) -> str:
    """Change the header's JSON text: repeat, delete or replace a token, repeat a key, nest deeply."""
    kind, draw = rng.choice(["token", "twice", "nest", "infinite", "other"]), random.Random(rng.random())

    def edit(text: str) -> str:
        if kind == "token":
            return _other_token(text, draw)
        if kind == "twice":
            name = draw.choice([*draft.tensors, "__metadata__"])
            return text[:-1] + f", {json.dumps(name)}: {draw.choice(['{}', '3', 'null'])}}}"
        if kind == "nest":
            return text[:-1] + ', "deep": ' + "[" * 200_000 + draw.choice(["", "]" * 200_000]) + "}"
        if kind == "infinite":
            return text.replace(draw.choice(["[0, ", "[1, ", "[4"]), draw.choice(["[NaN, ", "[Infinity, ", "[1e400, "]))
        return draw.choice(
            ["[]", "3", "null", '""', "{", "", "{}", '{"__metadata__": 3}', "\ud800", '{"a": "\\ud800"}']
        )

    draft.header_edits.append(edit)
    return kind


def _other_token(text: str, rng: random.Random) -> str:
    tokens = re.findall(r'"(?:[^"\\]|\\.)*"|[\w.+-]+|\s+|.', text, re.DOTALL)
    place = rng.randrange(len(tokens))
    how = rng.choice(["delete", "twice", "replace", "swap"])
    if how == "delete":
        del tokens[place]
    elif how == "twice":
        tokens.insert(place, tokens[place])
    elif how == "swap":
        other = rng.randrange(len(tokens))
        tokens[place], tokens[other] = tokens[other], tokens[place]
    else:
        tokens[place] = json.dumps(rng.choice([*_NUMBERS, *_NAMES]))
    return "".join(tokens)


def change_entry(draft: Draft, rng: random.Random) -> str:
    """Change a tensor's entry: its dtype, shape, offsets or name."""
    if not draft.tensors:
        return ""
    name, what = rng.choice(list(draft.tensors)), rng.choice(["dtype", "shape", "data_offsets", "more", "name"])
    stored = draft.tensors[name]
    if what == "name":
        other = rng.choice([*_NAMES, *draft.tensors])
        draft.tensors = {other if key == name else key: value for key, value in draft.tensors.items()}
        return f"{name} is called {other!r}"
    shape = list(stored[1])
    value: Any = {
        "dtype": rng.choice(_OTHER_DTYPES),
        "shape": rng.choice([_with_another(shape, rng), rng.choice(_NUMBERS), [*shape, 1], shape[::-1], [2**62, 4]]),
        "data_offsets": [rng.choice([*_NUMBERS, 4, 8, len(stored[2])]), rng.choice([*_NUMBERS, 8, 16, len(stored[2])])],
        "more": rng.choice(_NUMBERS),
    }[what]
    draft.entry_edits.setdefault(name, {})[what] = value
    return f"{name}: {what} {value!r:.60}"


def _with_another(values: list[Any], rng: random.Random) -> list[Any]:
    values = list(values)
    if values:
        values[rng.randrange(len(values))] = rng.choice(_NUMBERS)
    return values


def change_tensor(draft: Draft, rng: random.Random) -> str:
    """Replace a tensor consistently: remove or add one, or change its dtype, shape or values."""
    if not draft.tensors:
        return ""
    name = rng.choice(list(draft.tensors))
    dtype, shape, content = draft.tensors[name]
    how = rng.choice(["away", "more", "dtype", "shape", "values", "values", "turned", "swap"])
    if how == "away":
        del draft.tensors[name]
    elif how == "more":
        draft.tensors[rng.choice([f"{name}0", "9.weight.0", "lengths", "0.value.z", "0.start.9"])] = (
            dtype,
            shape,
            content,
        )
    elif how == "swap":
        other = rng.choice(list(draft.tensors))
        draft.tensors[name], draft.tensors[other] = draft.tensors[other], draft.tensors[name]
    else:
        try:
            draft.tensors[name] = _another(_array(dtype, shape, content), how, rng)
        except (KeyError, ValueError, TypeError):
            return ""
    return f"{name}: {how}"


def _another(value: np.ndarray[Any, Any], how: str, rng: random.Random) -> tuple[str, list[int], bytes]:
    if how == "dtype":
        value = value.astype(rng.choice(list(_DTYPES.values())))
    elif how == "shape":
        shape = [max(0, size + rng.choice([-1, 0, 1, 3])) for size in value.shape]
        value = np.resize(value, rng.choice([shape, [*value.shape, 1], value.shape[1:], [value.size]]))
    elif how == "turned":
        value = np.ascontiguousarray(value.T)
    elif value.size:
        value = value.copy()
        extremes = [0.0, 1e30, 1e-40, -5.0] + ([float("nan"), float("inf")] if value.dtype.kind == "f" else [])
        flat = value.reshape(-1)
        with np.errstate(all="ignore"):
            flat[rng.randrange(flat.size) :] = np.array(rng.choice(extremes)).astype(value.dtype)
    names = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
    return names[value.dtype], list(value.shape), value.tobytes()


# The JSON inside


def change_json(draft: Draft, rng: random.Random) -> str:
    """Change the JSON of parts or tracks at any level: replace, add, delete or repeat an item."""
    how = rng.choice(["replace", "replace", "away", "more", "twice", "order", "text", "nest", "about"])
    places = list(_places(draft.parts)) if not isinstance(draft.parts, str) else []
    if how == "about" or not places:
        name = rng.choice(["format", "labels", "parts", "tracks", "sha256", "more"])
        draft.about[name] = rng.choice(
            ["", "null", "[]", "3", '[["a"]]', "[NaN]", '{"a": 1, "a": 2}', '["\\ud800"]', "["]
        )
        draft.checksum = rng.random() < 0.7
        return f"{name} is {draft.about[name]!r}"
    if how in ("text", "nest"):
        text = json.dumps(draft.parts)
        deep = rng.choice(["[", '{"a":']) * 100_000
        draft.parts = _other_token(text, rng) if how == "text" else rng.choice([deep, text[:-1] + "," + deep])
        return how
    holder, key = rng.choice(places)
    if how == "away":
        del holder[key]
    elif how == "more":
        if isinstance(holder, dict):
            holder[rng.choice([*_NAMES, "kind", "graph"])] = rng.choice(_NUMBERS)
        else:
            holder.insert(key, rng.choice([*_NUMBERS, *_NAMES]))
    elif how == "twice":
        if isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
    elif how == "order":
        if isinstance(holder, list):
            rng.shuffle(holder)
    else:
        holder[key] = rng.choice([*_NUMBERS, *_NAMES, "é" * 100_000, "GRUCell"])
    return f"{how} at {key!r}"


def _places(value: Any) -> Iterable[tuple[Any, Any]]:
    """Iterate over (container, key) for every item of the lists and dicts in a value."""
    stack = [value]
    while stack:
        holder = stack.pop()
        if isinstance(holder, list | dict):
            for key in range(len(holder)) if isinstance(holder, list) else list(holder):
                yield holder, key
                stack.append(holder[key])


# Graphs


@dataclass
class Line:
    """A node of a graph's text, with any text in any place."""

    name: str
    op: str
    args: list[str]
    attrs: Any
    type: str

    def __str__(self) -> str:
        attrs = " " + json.dumps(self.attrs, sort_keys=True) if self.attrs or self.attrs == 0 else ""
        return f"{self.name} = {self.op}({', '.join(self.args)}){attrs} : {self.type}"


@dataclass
class Text:
    """A graph's text in pieces."""

    head: str
    lines: list[Line]
    returns: list[tuple[str, str]]

    @classmethod
    def of(cls, text: str) -> Text:
        graph = Graph.parse(text)
        nodes = [
            Line(
                node.name,
                node.op,
                [graph[arg].name for arg in node.args],
                copy.deepcopy(dict(node.attrs)),
                str(node.type),
            )
            for _, node in graph
        ]
        returns = [(label, graph[index].name) for label, index in graph.outputs.items()]
        return cls(text.split("\n")[0], nodes, returns)

    def __str__(self) -> str:
        lines = [self.head, *map(str, self.lines), *(f"return {label} = {name}" for label, name in self.returns)]
        return "\n".join(lines) + "\n"

    def types(self) -> dict[str, Type]:
        """The types of all values that have one."""
        types: dict[str, Type] = {}
        for line in self.lines:
            try:
                types[line.name] = PRIMITIVES[line.op].result(line.op, [types[arg] for arg in line.args], line.attrs)
            except (CompilerError, KeyError, TypeError, AttributeError):
                continue
        return types

    def fit(self) -> None:
        """Write the types that the rules give."""
        types = self.types()
        for line in self.lines:
            if line.name in types:
                line.type = str(types[line.name])

    def rename_uses(self, old: str, new: str, after: int, rng: random.Random) -> None:
        """Make some uses of a value read another one."""
        for line in self.lines[after:]:
            line.args = [new if arg == old and rng.random() < 0.7 else arg for arg in line.args]
        self.returns = [(label, new if name == old and rng.random() < 0.7 else name) for label, name in self.returns]


def change_graph(draft: Draft, rng: random.Random) -> str:
    """Edit a part's graph, mostly with types and tensors that fit the edit."""
    if not isinstance(draft.parts, list) or not draft.parts:
        return ""
    place = rng.randrange(len(draft.parts))
    part = draft.parts[place]
    try:
        text = Text.of(part["graph"])
    except (CompilerError, KeyError, TypeError, AttributeError, IndexError):
        return ""
    log = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        edit = rng.choices([pair[0] for pair in _EDITS], [pair[1] for pair in _EDITS])[0]
        if text.lines:
            log.append(f"{edit.__name__} {edit(text, rng) or ''}")
    if rng.random() < 0.75:
        text.fit()
    if rng.random() < 0.85:
        _fit_tensors(draft, place, text, rng)
    part["graph"] = str(text)
    return "; ".join(log)


def grow_graph(draft: Draft, rng: random.Random) -> str:
    """Extend a part's graph so that it stays valid and computes something else."""
    if not isinstance(draft.parts, list) or not draft.parts:
        return ""
    place = rng.randrange(len(draft.parts))
    try:
        text = Text.of(draft.parts[place]["graph"])
    except (CompilerError, KeyError, TypeError, AttributeError, IndexError):
        return ""
    log = [a_new_value(text, rng)]
    if rng.random() < 0.2:
        log.append(a_chain(text, rng))
    if rng.random() < 0.4:
        log.append(a_return_alike(text, rng))
    if rng.random() < 0.2:
        log.append(another_name(text, rng))
    text.fit()
    _fit_tensors(draft, place, text, rng)
    draft.parts[place]["graph"] = str(text)
    return "; ".join(log)


def _fit_tensors(draft: Draft, place: int, text: Text, rng: random.Random) -> None:
    """Replace the part's tensors by ones of its leaves' shapes."""
    types, counts = text.types(), {"weight": 0, "state": 0}
    dtype = "F64" if text.head.endswith("f64") else "F32"
    for name in [name for name in draft.tensors if name.startswith(f"{place}.")]:
        del draft.tensors[name]
    values = np.random.default_rng(rng.randrange(1 << 30))
    for line in text.lines:
        if line.op in counts and line.name in types and np.prod(types[line.name].shape, dtype=float) < 100_000:
            shape = types[line.name].shape if line.op == "weight" else (1, *types[line.name].shape)
            name = f"{place}.{'weight' if line.op == 'weight' else 'start'}.{counts[line.op]}"
            content = values.normal(size=shape).astype(_DTYPES[dtype]).tobytes()
            draft.tensors[name] = (dtype, list(shape), content)
            counts[line.op] += 1


def another_op(text: Text, rng: random.Random) -> str:
    line = rng.choice(text.lines)
    same = [op for op, each in PRIMITIVES.items() if each.arity == len(line.args)]
    line.op = rng.choice(same if rng.random() < 0.7 and same else [*PRIMITIVES, "system", "eval"])
    return f"{line.name} is {line.op}"


def another_argument(text: Text, rng: random.Random) -> str:
    place = rng.randrange(len(text.lines))
    line = text.lines[place]
    names = [each.name for each in (text.lines[:place] if rng.random() < 0.8 else text.lines)] or ["x"]
    if line.args and rng.random() < 0.8:
        line.args[rng.randrange(len(line.args))] = rng.choice(names)
    elif rng.random() < 0.5:
        line.args.append(rng.choice([*names, *_NAMES]))
    elif line.args:
        line.args.pop()
    return line.name


def another_attribute(text: Text, rng: random.Random) -> str:
    lines = [line for line in text.lines if line.attrs]
    if not lines:
        return ""
    line = rng.choice(lines)
    places = list(_places(line.attrs))
    if not places:
        return ""
    holder, key = rng.choice(places)
    old, how = holder[key], rng.random()
    if how < 0.5 and type(old) is int:
        holder[key] = old + rng.choice([-2, -1, 1, 2, 4, 16])
    elif how < 0.55 and type(old) is bool:
        holder[key] = not old
    elif how < 0.6 and isinstance(holder, dict):
        del holder[key]
    elif how < 0.65:
        line.attrs = rng.choice([[], 3, {"a": [[[[[[]]]]]]}, {**line.attrs, "more": 1}])
    else:
        holder[key] = rng.choice([*_NUMBERS, [0, 1], [1, 0], [0, 2, 4], [[[0]]], 1e-45, -0.0, 1e300])
    return f"{line.name}: {key!r}"


def another_size(text: Text, rng: random.Random) -> str:
    """Change a size everywhere."""
    sizes = sorted(set(re.findall(r"\b\d+\b", str(text))) - {"0", "1"})
    if not sizes:
        return ""
    old, new = rng.choice(sizes), str(rng.choice([1, 2, 3, 5, 7, 15, 16, 17, 33]))
    for line in text.lines:
        line.attrs = json.loads(re.sub(rf"\b{old}\b", new, json.dumps(line.attrs)))
        line.type = re.sub(rf"\b{old}\b", new, line.type)
    return f"{old} is {new}"


def another_return(text: Text, rng: random.Random) -> str:
    names = [line.name for line in text.lines]
    how = rng.choice(["value", "value", "value", "away", "more", "label", "order"])
    place = rng.randrange(len(text.returns)) if text.returns else 0
    if not text.returns or how == "more":
        labels = [
            "output",
            "state.h",
            "state.x",
            "note.r",
            "saved.h",
            "grad.weight.weight_ih",
            "grad.input.x",
            "after.h",
        ]
        text.returns.append((rng.choice([*labels, *_NAMES]), rng.choice(names)))
    elif how == "value":
        text.returns[place] = text.returns[place][0], rng.choice(names)
    elif how == "away":
        del text.returns[place]
    elif how == "order":
        rng.shuffle(text.returns)
    else:
        text.returns[place] = rng.choice([*_NAMES, "output", "state.", "state.nothing"]), text.returns[place][1]
    return how


def a_return_alike(text: Text, rng: random.Random) -> str:
    """Return another value of the same type instead."""
    if not text.returns:
        return ""
    types = text.types()
    place = rng.randrange(len(text.returns))
    label, name = text.returns[place]
    alike = [other for other in types if types[other] == types.get(name)] or [name]
    text.returns[place] = label, rng.choice(alike)
    return f"{label} is {text.returns[place][1]}"


def another_name(text: Text, rng: random.Random) -> str:
    """Rename a value everywhere."""
    old, new = rng.choice(text.lines).name, rng.choice([*_NAMES, *(line.name for line in text.lines)])
    for line in text.lines:
        line.name = new if line.name == old else line.name
        line.args = [new if arg == old else arg for arg in line.args]
    text.returns = [
        (label.replace(f"state.{old}", f"state.{new}"), new if name == old else name) for label, name in text.returns
    ]
    return f"{old} is called {new!r:.40}"


def lines_about(text: Text, rng: random.Random) -> str:
    how, place, other = (
        rng.choice(["away", "twice", "swap"]),
        rng.randrange(len(text.lines)),
        rng.randrange(len(text.lines)),
    )
    if how == "away":
        del text.lines[place]
    elif how == "twice":
        text.lines.insert(other, copy.deepcopy(text.lines[place]))
    else:
        text.lines[place], text.lines[other] = text.lines[other], text.lines[place]
    return how


def another_head(text: Text, rng: random.Random) -> str:
    text.head = rng.choice(
        ["graph step f32", "graph step f64", "graph  f32", "graph \x1b[2J f32", "", "graph run f32", "graph step f16"]
    )
    return repr(text.head)


def a_new_value(text: Text, rng: random.Random) -> str:
    """Add values of valid types that others read, as a user's step might."""
    return "; ".join(filter(None, (_new_value(text, rng) for _ in range(rng.choice([1, 1, 2, 4, 8])))))


def _new_value(text: Text, rng: random.Random) -> str:
    types = text.types()
    place = rng.randrange(1, len(text.lines) + 1)
    names = [line.name for line in text.lines[:place] if line.name in types]
    for _ in range(30):
        if not names:
            return ""
        op = rng.choice([op for op in PRIMITIVES if op not in ("input", "state")])
        count = PRIMITIVES[op].arity
        args = [rng.choice(names) for _ in range(rng.choice([1, 2, 3]) if count is None else count)]
        attrs = _attributes(op, [types[arg] for arg in args], rng)
        try:
            result_type = PRIMITIVES[op].result(op, [types[arg] for arg in args], attrs)
        except CompilerError:
            continue
        name = f"new{len(text.lines)}"
        text.lines.insert(place, Line(name, op, args, attrs, str(result_type)))
        _use(text, name, result_type, args, place + 1, types, rng)
        return f"{name} = {op}"
    return ""


def _use(
    text: Text, name: str, new_type: Type, args: list[str], after: int, types: dict[str, Type], rng: random.Random
) -> None:
    """Make others read a new value: instead of one of its type, or combined with one it broadcasts to."""
    alike = [
        other for other in types if types[other] == new_type and other in {line.name for line in text.lines[:after]}
    ]
    replaceable = [arg for arg in args if types[arg] == new_type] or alike
    if replaceable and rng.random() < 0.6:
        text.rename_uses(rng.choice(replaceable), name, after, rng)
        return
    # Joined with a value that keeps its size.
    rows = [line.name for line in text.lines[: after - 1] if line.name in types and types[line.name].kind == "row"]
    rows = (
        [other for other in rows if new_type.size in (1, types[other].size)] if new_type.kind in ("row", "mask") else []
    )
    if new_type.kind == "mask" and rows:
        other = rng.choice(rows)
        joined = Line(f"{name}.w", "where", [name, other, other], {}, "")
    elif new_type.kind == "row" and rows:
        other = rng.choice(rows)
        joined = Line(f"{name}.j", rng.choice(["add", "mul", "sub", "maximum"]), [other, name], {}, "")
    else:
        return
    text.lines.insert(after, joined)
    text.rename_uses(other, joined.name, after + 1, rng)
    text.fit()


def _attributes(op: str, types: list[Type], rng: random.Random) -> dict[str, Any]:
    def part(whole: int) -> list[int]:
        start = rng.randrange(whole)
        return [start, rng.randrange(start + 1, whole + 1)]

    first = types[0].shape if types else (1,)
    if op == "weight":
        return {"shape": [rng.choice([1, 3, 4, 5]) for _ in range(rng.choice([1, 2]))]}
    if op == "const":
        return {"value": rng.choice([0.0, 1.0, -2.5, 1e-30, 1e30, 1e300, float("inf"), float("nan"), 0.1])}
    if op == "slice":
        start, stop = part(first[0])
        return {"start": start, "stop": stop}
    if op == "broadcast":
        return {"size": first[0] if first[0] > 1 else rng.choice([1, 2, 4, 17])}
    if op == "product":
        return _region(types, rng, part)
    if op == "affine":
        init = len(types) % 2 == 1
        pairs = types[1:] if init else types
        return {"init": init, "terms": [_region(pairs[i : i + 2], rng, part) for i in range(0, len(pairs), 2)]}
    if op == "place":
        return {"shape": [size + 1 for size in first], "corner": [rng.randrange(2) for _ in first]}
    return {}


def _region(types: list[Type], rng: random.Random, part: Callable[[int], list[int]]) -> dict[str, Any]:
    shape, transposed = (types + [Type("weight", (1, 1))] * 2)[1].shape, rng.random() < 0.5
    shape = shape[::-1] if transposed else shape
    if len(shape) != 2:
        return {"transposed": transposed, "rows": [0, 1], "cols": [0, 1]}
    depth = min(types[0].shape[0], shape[0])
    start = rng.randrange(shape[0] - depth + 1)
    return {"transposed": transposed, "rows": [start, start + depth], "cols": part(shape[1])}


def a_chain(text: Text, rng: random.Random) -> str:
    """Add a long chain of values, each of the one before, used once or twice."""
    types = text.types()
    rows = [place for place, line in enumerate(text.lines) if line.name in types and types[line.name].kind == "row"]
    if not rows:
        return ""
    place, count, double = rng.choice(rows), rng.choice([5, 20, 60]), rng.random() < 0.5
    old = text.lines[place].name
    names = [old, *(f"{old}.c{number}" for number in range(count))]
    op = rng.choice(["add", "maximum", "mul"]) if double else rng.choice(["tanh", "neg", "abs", "sigmoid"])
    chain = [Line(new, op, [before] * (2 if double else 1), {}, str(types[old])) for before, new in pairwise(names)]
    text.lines[place + 1 : place + 1] = chain
    text.rename_uses(old, names[-1], place + 1 + count, rng)
    return f"{count} of {op}"


_EDITS: list[tuple[Callable[[Text, random.Random], str], int]] = [
    (another_op, 3),
    (another_argument, 3),
    (another_attribute, 4),
    (another_size, 3),
    (another_return, 3),
    (another_name, 3),
    (lines_about, 2),
    (another_head, 1),
    (a_new_value, 8),
    (a_chain, 1),
]
_CONTAINER: list[tuple[Callable[[Draft, random.Random], str], int]] = [
    (change_bytes, 2),
    (change_header, 2),
    (change_entry, 3),
    (change_tensor, 3),
    (change_json, 4),
]
_STREAMS = [*_CONTAINER, (change_graph, 14), (grow_graph, 20)]
_TAPES = _CONTAINER
