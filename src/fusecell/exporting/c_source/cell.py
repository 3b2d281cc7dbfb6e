"""The C function of one cell, with the loop nests of its graph.

A value is ``r`` while its nest computes it, feature by feature, and ``all_r`` in memory where later nests read it. A
nest with products goes over blocks of columns::

    for block of the columns:
        r_pre[lane] = bias                        the sum begins with it
        for k:                                    in order, each multiply-add rounded once
            for lane: r_pre[lane] = FMA(a, weight[k][lane], r_pre[lane])
        for lane: r = sigmoid(r_pre[lane]) ...    all that needs the same column only
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fusecell.compiler.ir.affine import Term, affine_parts
from fusecell.compiler.ir.graph import Graph, Node
from fusecell.compiler.ir.primitives import PRIMITIVES
from fusecell.compiler.ir.sizes import align_up, ceil_div
from fusecell.compiler.ir.storage import Storage
from fusecell.errors import ExportError
from fusecell.exporting.c_source.axes import AXIS_LOOPS, AxisNest, indented, view_index
from fusecell.exporting.c_source.constants import constant_values
from fusecell.exporting.c_source.expressions import expression
from fusecell.exporting.c_source.functions import c_number
from fusecell.exporting.c_source.loops import PARTS, Nest, Nests, arrange, base, is_alone, no_loop, segments
from fusecell.exporting.c_source.parts import RESERVED
from fusecell.streaming.bound_step import Array, Part

if TYPE_CHECKING:
    from fusecell.exporting.c_source.writer import SourceWriter

__all__ = ["CellWriter"]

MOST_BLOCK = 64
"""Columns of a product that accumulate together, at the most: as many as keep the multiply-adds of AVX2 busy."""


class CellWriter:
    """Writer of the function of one cell.

    Arguments:
        writer: of the file.
        place: the position of the cell in the stream.
        part: the cell.
        state_at: the position of its first state in the stream's memory.
    """

    def __init__(self, writer: SourceWriter, place: int, part: Part, state_at: int) -> None:
        self.writer, self.place, self.part, self.state_at = writer, place, part, state_at
        self.graph: Graph = part.plan.graph
        self.nests: Nests = arrange(self.graph)
        self._used = set(RESERVED) | {writer.prefix}
        self.name = {index: self._unique(node.name) for index, node in self.graph}
        self.home = {index: nest for nest in self.nests.nests for index in nest.values}
        self.data: list[str] = []
        self._written: dict[int, str] = {}
        self._vectors: Mapping[int, Array] = {
            **constant_values(part, self.graph, self.nests.constants),
            **dict(zip(self.graph.leaves("weight"), part.weights, strict=True)),
        }
        self._in_block: dict[int, str] = {}
        """Local arrays of the nest that is being written: values of a block of columns, by lane."""

    def _unique(self, name: str) -> str:
        plain = re.sub(r"\W", "_", name, flags=re.ASCII)
        plain = plain if re.match(r"[A-Za-z]", plain) else f"v{plain}"
        unique, count = plain, 1
        while unique in self._used:
            unique, count = f"{plain}_{count}", count + 1
        self._used.add(unique)
        return unique

    def text(self) -> str:
        """Return the function, and the constants before it."""
        real, rows = self.writer.real, self.writer.stream.batch_size
        body: list[str] = []
        for nest in self.nests.nests:
            body += self._nest(nest)
        body += self._results()
        pointers = [line for line in self._pointers() if self._is_used(line, body)]
        lines = [*pointers, *body]
        if rows > 1:
            lines = ["int row;", f"for (row = 0; row < {rows}; row++) {{", *indented(lines), "}"]
        unused = [
            f"(void){name};" for name in ("memory", "inputs") if not any(re.search(rf"\b{name}\b", x) for x in lines)
        ]
        parameters = f"{real} *memory, const {real} *RESTRICT inputs, {real} *RESTRICT outputs"
        head = [f"/* {self.part.kind} */", f"static void cell_{self.place}({parameters})", "{"]
        return "\n".join([*self.data, *head, *indented([*lines, *unused]), "}\n"])

    @staticmethod
    def _is_used(declaration: str, body: Sequence[str]) -> bool:
        name = declaration.split(" = ")[0].split()[-1].removeprefix("*")
        return any(re.search(rf"\b{name}\b", line) for line in body)

    @property
    def _row(self) -> str:
        """The position of a row, as a factor; empty where there is one row."""
        return " + row * {}" if self.writer.stream.batch_size > 1 else ""

    def _pointers(self) -> list[str]:
        """Declare where the inputs, the states and stored values are."""
        graph, real, at = self.graph, self.writer.real, self.state_at
        row, lines = self._row.format(self.part.input_size), []
        for leaf in graph.leaves("input"):
            first, _ = self.part.input_ranges[graph[leaf].name]
            lines.append(f"const {real} *const {self.name[leaf]} = inputs{row}{f' + {first}' if first else ''};")
        for leaf, start in zip(graph.leaves("state"), self.part.start, strict=True):
            lines.append(f"{real} *const {self.name[leaf]} = memory + {at}{self._row.format(graph[leaf].size)};")
            at += start.size
        for index in sorted(self.nests.stored):
            if not self._is_number(index):
                lines.append(f"{real} *const all_{self.name[index]} = memory + {self.writer.take(graph[index].size)};")
        return lines

    def _is_number(self, index: int) -> bool:
        """Whether a value is a variable of the function: one number, and no product's."""
        nest = self.home[index]
        return nest.width == 1 and not self._has_products(nest) and not is_alone(self.graph[index].op)

    def _has_products(self, nest: Nest) -> bool:
        return any(self.graph[index].op == "affine" for index in nest.values)

    def _results(self) -> list[str]:
        """Write the output and the new states, now that nothing reads the old ones."""
        graph, size = self.graph, self.part.output_size
        position = f"row * {size} + col" if self.writer.stream.batch_size > 1 else "col"
        lines = self._copied(f"outputs[{position}]", graph.outputs["output"], size)
        news = {leaf: graph.outputs[f"state.{graph[leaf].name}"] for leaf in graph.leaves("state")}
        moved = [leaf for leaf, new in news.items() if leaf != new and graph[base(graph, new)].op == "state"]
        # A state that becomes another's old one waits until all are read: they may be exchanged.
        for leaf in moved:
            lines += self._copied(f"next_{self.name[leaf]}[col]", news[leaf], graph[leaf].size)
        for leaf, new in news.items():
            if leaf in moved:
                lines += self._loop(graph[leaf].size, [f"{self.name[leaf]}[col] = next_{self.name[leaf]}[col];"])
            elif leaf != new:
                lines += self._copied(f"{self.name[leaf]}[col]", new, graph[leaf].size)
        scratch = [
            f"{self.writer.real} *const next_{self.name[leaf]} = memory + {self.writer.take(graph[leaf].size)};"
            for leaf in moved
        ]
        return [*scratch, *lines]

    def _copied(self, target: str, index: int, size: int) -> list[str]:
        return self._loop(size, [f"{target} = {self.element(index, 'col')};"])

    def _loop(self, size: int, body: Sequence[str]) -> list[str]:
        """Write a loop over features."""
        if size == 1:
            return [re.sub(r"\bcol\b", "0", line) for line in body] if len(body) == 1 else self._block_of_one(body)
        return [f"for (int col = 0; col < {size}; col++) {{", *indented(body), "}"]

    @staticmethod
    def _block_of_one(body: Sequence[str]) -> list[str]:
        return ["{", *indented([re.sub(r"\bcol\b", "0", line) for line in body]), "}"]

    # Values.

    def element(self, index: int, at: str, nest: Nest | None = None) -> str:
        """Spell the feature ``at`` of a value, as ``nest`` or a result reads it."""
        graph, node = self.graph, self.graph[index]
        if node.op == "const":
            return c_number(node.attrs["value"], graph.dtype)
        if nest is not None and self.home.get(index) is nest:
            return f"{self._in_block[index]}[lane]" if index in self._in_block else self.name[index]
        if math.prod(node.type.shape) == 1:
            at = "0"
        while graph[index].op in PARTS:
            attrs = graph[index].attrs
            if graph[index].op == "view":
                at = view_index(attrs, at)
            elif attrs["start"]:
                at = str(attrs["start"]) if at == "0" else f"{attrs['start']} + {at}"
            index = graph[index].args[0]
        if index in self.home and self._is_number(index):
            return self.name[index]
        text = f"{self._in_memory(index)}[{at}]"
        # Truth values are 1 and 0 in memory.
        return f"({text} != 0)" if node.type.kind == "mask" else text

    def _in_memory(self, index: int) -> str:
        """Return the name of the array that a value is in."""
        if index in self._vectors:
            if index not in self._written:
                name = self._constant_name(self.name[index])
                self._written[index] = name
                self.data.append(self.writer.constant(name, np.ascontiguousarray(self._vectors[index]).ravel()))
            return self._written[index]
        return f"all_{self.name[index]}" if index in self.home else self.name[index]

    def _constant_name(self, name: str) -> str:
        """Name a constant of the file, in which cells have names of their own."""
        return f"cell_{self.place}_{name}" if len(self.writer.stream.parts) > 1 else name

    def _value(self, index: int, at: str, nest: Nest) -> str:
        """Spell the computation of a value from its arguments."""
        node, graph = self.graph[index], self.graph
        if PRIMITIVES[node.op].reduction:
            self.writer.needs(node.op)
            (arg,) = node.args
            return f"reduce_{node.op}({self._address(arg)}, {graph[arg].size}, 1)"
        return expression(node, [self.element(arg, at, nest) for arg in node.args], self.writer.needs, graph.dtype)

    def _kind(self, node: Node) -> str:
        return "int" if node.type.kind == "mask" else self.writer.real

    # Nests.

    def _nest(self, nest: Nest) -> list[str]:
        if self.graph[nest.values[0]].op == "concat":
            return self._concatenation(nest)
        if is_alone(self.graph[nest.values[0]].op):
            return self._along_axes(nest.values[0])
        if self._has_products(nest):
            return self._products(nest)
        if nest.width == 1:
            return self._pointwise(nest, nest.values, "0")
        return self._loop(nest.width, self._pointwise(nest, nest.values, "col"))

    def _concatenation(self, nest: Nest) -> list[str]:
        (index,) = nest.values
        lines, before = [], 0
        for arg in self.graph[index].args:
            size = self.graph[arg].size
            position = f"{before} + col" if before else "col"
            lines += self._copied(f"all_{self.name[index]}[{position}]", arg, size)
            before += size
        return lines

    def _along_axes(self, index: int) -> list[str]:
        """Write a value that is computed along axes."""
        graph, node = self.graph, self.graph[index]
        if node.op not in AXIS_LOOPS:
            raise no_loop(node)
        sizes = [math.prod(graph[arg].type.shape) for arg in node.args]
        sources = [self._address(arg) for arg in node.args]
        out, writer = f"all_{self.name[index]}", self.writer
        loops = AXIS_LOOPS[node.op]
        return loops(AxisNest(node.attrs, sizes, sources, out, writer.real, graph.dtype, writer.needs))

    def _address(self, index: int) -> str:
        """Spell the address of a value's first number, all of whose numbers are neighbours."""
        graph, offset = self.graph, 0
        while graph[index].op == "slice":
            offset += graph[index].attrs["start"]
            index = graph[index].args[0]
        is_variable = index in self.home and self._is_number(index)
        if graph[index].op == "view" or (is_variable and graph[index].type.kind == "mask"):
            raise ExportError(f"format='c' can't read {graph[index].name} as an array: export format='object'.")
        if is_variable:
            return f"(&{self.name[index]})"
        if graph[index].op == "const" and index not in self._vectors:
            value = np.array([graph[index].attrs["value"]], self.part.dtype)
            self._vectors = {**self._vectors, index: value}
        return f"({self._in_memory(index)} + {offset})" if offset else self._in_memory(index)

    def _pointwise(self, nest: Nest, values: Sequence[int], at: str) -> list[str]:
        """Write values of one feature."""
        lines = []
        for index in values:
            value = self._value(index, at, nest)
            if index in self._in_block:
                lines.append(f"{self._in_block[index]}[lane] = {value};")
            else:
                lines.append(f"const {self._kind(self.graph[index])} {self.name[index]} = {value};")
            lines += self._kept(index, at, nest)
        return lines

    def _kept(self, index: int, at: str, nest: Nest) -> list[str]:
        """Write the store of a value that later nests read."""
        if index not in self.nests.stored or self._is_number(index):
            return []
        return [f"all_{self.name[index]}[{at}] = {self.element(index, at, nest)};"]

    def _products(self, nest: Nest) -> list[str]:
        """Write a nest with products, block by block."""
        graph = self.graph
        blocks = ceil_div(nest.width, MOST_BLOCK)
        size = nest.width if nest.width <= 4 else align_up(ceil_div(nest.width, blocks), 8)
        blocks = ceil_div(nest.width, size)
        runs = list(segments(graph, nest.values))
        self._in_block = self._block_arrays(runs)
        full = blocks * size == nest.width
        start = "block * " + str(size) if blocks > 1 else ""
        at = f"{start} + lane" if start else "lane"
        count = str(size) if full else "count"
        lines = [f"{self.writer.real} {name}[{size}];" for name in dict.fromkeys(self._in_block.values())]
        if not full:
            left = f"{nest.width} - {start}" if start else str(nest.width)
            lines.append(
                f"const int count = {left} < {size} ? {left} : {size};" if start else f"const int count = {nest.width};"
            )
        for is_product, run in runs:
            if is_product:
                lines += self._sums(run, nest, size, blocks, at, count)
                stores = [line for index in run for line in self._kept(index, at, nest)]
                lines += self._lanes(count, stores) if stores else []
            else:
                body = self._pointwise(nest, run, at if at == "lane" else "col")
                lines += self._lanes(count, body if at == "lane" else [f"const int col = {at};", *body])
        self._in_block = {}
        return [f"for (int block = 0; block < {blocks}; block++) {{" if blocks > 1 else "{", *indented(lines), "}"]

    @staticmethod
    def _lanes(count: str, body: Sequence[str]) -> list[str]:
        return [f"for (int lane = 0; lane < {count}; lane++) {{", *indented(body), "}"]

    def _block_arrays(self, runs: Sequence[tuple[bool, list[int]]]) -> dict[int, str]:
        """Name the local arrays of a block: products, and values that are computed before and read after one."""
        graph, users = self.graph, self.graph.users()
        arrays: dict[int, str] = {}
        for place, (is_product, run) in enumerate(runs):
            later = {index for _, other in runs[place + 1 :] for index in other}
            for index in run:
                if is_product:
                    start, _ = affine_parts(graph[index])
                    # A product that only begins another's sum goes on in its array.
                    goes_on = start in arrays and graph[start].op == "affine" and users[start] == [index]
                    kept = goes_on and start not in self.nests.stored and start not in graph.outputs.values()
                    arrays[index] = self.name[index]
                    if kept and start is not None:  # under the last name, which is the whole sum's
                        arrays |= dict.fromkeys(
                            (each for each in arrays if arrays[each] == arrays[start]), self.name[index]
                        )
                elif later.intersection(users[index]):
                    arrays[index] = self.name[index]
        return arrays

    def _sums(self, run: Sequence[int], nest: Nest, size: int, blocks: int, at: str, count: str) -> list[str]:
        """Write the sums of products of one block; narrow ones of one operand share its loop, to fill the pipeline."""
        most = max(1, MOST_BLOCK // size)
        waiting: dict[str, list[tuple[int, Term]]] = {}
        for index in run:
            waiting.setdefault(self._in_block[index], []).extend(
                (index, term) for term in affine_parts(self.graph[index])[1]
            )
        begun: set[str] = set()
        lines: list[str] = []
        while waiting:
            ready = [name for name, terms in waiting.items() if not self._waits(terms[0][0], name, waiting)]
            operand = waiting[ready[0]][0][1][0]
            together = [name for name in ready if waiting[name][0][1][0] == operand][:most]
            for name in together:
                if name not in begun:
                    lines += self._beginning(waiting[name][0][0], nest, size, at, count)
                    begun.add(name)
            lines += self._accumulation([waiting[name].pop(0) for name in together], size, blocks)
            waiting = {name: terms for name, terms in waiting.items() if terms}
        return lines

    def _waits(self, index: int, name: str, waiting: Mapping[str, object]) -> bool:
        """Whether a sum begins with another one that isn't complete."""
        start, _ = affine_parts(self.graph[index])
        other = None if start is None else self._in_block.get(start)
        return other is not None and other != name and other in waiting

    def _beginning(self, index: int, nest: Nest, size: int, at: str, count: str) -> list[str]:
        """Write what a sum begins with."""
        name = self._in_block[index]
        start, _ = affine_parts(self.graph[index])
        value = "0" if start is None else self.element(start, at, nest)
        if start is not None and count != str(size):
            value = f"lane < count ? {value} : 0"
        return [f"for (int lane = 0; lane < {size}; lane++)", f"    {name}[lane] = {value};"]

    def _accumulation(self, products: Sequence[tuple[int, Term]], size: int, blocks: int) -> list[str]:
        """Write the loop over one operand that adds products to their sums."""
        graph = self.graph
        row = products[0][1][0]
        names = dict.fromkeys(graph[weight].name for _, (_, weight, _) in products)
        lines = [
            f"for (int k = 0; k < {graph[row].size}; k++) {{ /* {', '.join(names)} */",
            f"    const {self.writer.real} a = {self.element(row, 'k')};",
        ]
        for index, term in products:
            name, weights = self._in_block[index], self._panel(index, term, size, blocks)
            factor = f"{weights}[{'block' if blocks > 1 else 0}][k][lane]"
            stored = graph[term[1]].attrs.get("stored")
            if stored is not None:
                factor = f"(float){factor}" if Storage(stored).is_whole else f"number_{stored}({factor})"
            lines.append(f"    for (int lane = 0; lane < {size}; lane++)")
            lines.append(f"        {name}[lane] = FMA(a, {factor}, {name}[lane]);")
        return [*lines, "}"]

    def _panel(self, index: int, term: Term, size: int, blocks: int) -> str:
        """Write the weights of one product, [block][k][lane], the last block filled up with zeros; return its name."""
        _, weight, attrs = term
        values = np.asarray(self.part.weights[self.graph.leaves("weight").index(weight)])
        (k0, k1), (column0, column1) = attrs["rows"], attrs["cols"]
        region = (values.T if attrs["transposed"] else values)[k0:k1, column0:column1]
        padded = np.zeros((k1 - k0, blocks * size), values.dtype)
        padded[:, : region.shape[1]] = region
        name = self._constant_name(self._unique(f"{self.name[index]}_{self.name[weight]}"))
        panel = padded.reshape(k1 - k0, blocks, size).transpose(1, 0, 2)
        stored = self.graph[weight].attrs.get("stored")
        if stored is None:
            self.data.append(self.writer.constant(name, panel))
        else:
            self.data.append(self.writer.stored_constant(name, panel, Storage(stored)))
        return name
