"""The functions of sums over rows: one for each sum, which adds some rows to what there is, and those they share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fusecell.compiler.codegen.kernel_abi import Layout, row_address
from fusecell.compiler.codegen.llvm_builder import LANES, Function, Module, Value
from fusecell.compiler.codegen.microkernel import outer_name, shared_out, tiling
from fusecell.compiler.codegen.weight_gradients.pack_operand import (
    PIECE,
    STRETCH,
    STRIPS,
    emit_strips,
    has_strips,
    strip_bytes,
    strips_bytes,
)
from fusecell.compiler.schedule.plan import Plan, Sum

__all__ = ["add_to", "emit_sums", "flush"]

_GIVEN = (
    "ptr %args", "ptr %acc", "i1 %opens", "i64 %first", "i64 %kept", "i64 %runs", "i64 %run.rows", "i64 %kept.rows",
    "i64 %rows", "i64 %row.step", "i64 %half", "i64 %me", "i64 %crew",
)  # fmt: skip
"""What the function of a sum takes: to what it adds, and whether that opens, at zero; its first row, in the chunk's
buffers and in what is saved of the chunk; how many runs of rows there are, and from each to the next in both; the rows
of a run and from each to the next; which half that is; and which of how many threads takes its share of the columns."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of an operand: where they start, the bytes from each to the next, and from a run of them to the next."""

    start: str
    k: Value
    run: Value

    def beside(self, f: Function, count: Value, bytes_: Value) -> _Rows:
        """The same so many times ``bytes_`` further on."""
        return replace(self, start=f.at(self.start, f.mul(count, bytes_)))


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Tiles of one height: how many, the first of them, and its first feature."""

    count: int
    height: int
    first: int
    feature: int


def emit_sums(module: Module, layout: Layout, plan: Plan) -> None:
    """Write the function of every sum, under its name."""
    for found in plan.sums:
        emitter = _SumFunction(module, layout, plan, found)
        if found.a is None:
            emitter.row_sum()
        else:
            emitter.outer(found.a)


class _SumFunction:
    """The function of one sum."""

    def __init__(self, module: Module, layout: Layout, plan: Plan, found: Sum) -> None:
        self.module, self.layout, self.plan, self.found = module, layout, plan, found
        self.tiling = tiling(module.target, module.dtype, 1, module.blocks(found.width))
        self.f = Function(module, found.name, *_GIVEN)

    def row_sum(self) -> None:
        """Of one value's rows alone."""
        f, module = self.f, self.module
        b = self._operand(self.found.b, "b")
        zeros = module.zeros(8 * module.block)
        for first in range(0, module.blocks(self.found.width), 8):
            many = min(8, module.blocks(self.found.width) - first)
            turn = f.let("turn", f"urem i64 {first // 8}, %crew")
            with f.when("mine", f.let("is.mine", f"icmp eq i64 {turn}, %me")):
                acc = f.at("%acc", first * module.block)
                start = f.let("start", f"select i1 %opens, ptr {zeros}, ptr {acc}")
                self._add_rows(start, acc, b.beside(f, first, module.block), many)
        f.end()

    def _add_rows(self, start: str, acc: str, b: _Rows, many: int) -> None:
        """Add up so many blocks of columns of all rows, in registers, beginning with what is at ``start``."""
        f, module = self.f, self.module
        before, places = ([f.at(here, block * module.block) for block in range(many)] for here in (start, acc))
        first = [f.load(place, "so.far", module.block) for place in before]
        with f.loop_carrying("run", 0, "%runs", first) as (run, sums):
            begin = f.at(b.start, f.mul(run, b.run))
            with f.loop_carrying("row", 0, "%rows", sums) as (row, carried):
                here = f.at(begin, f.mul(row, b.k))
                for block, old in enumerate(carried):
                    value = f.load(f.at(here, block * module.block), "value", module.bytes)
                    carried[block] = f.let("sum", f"fadd {module.vector} {old}, {value}")
            sums[:] = carried
        for place, value in zip(places, sums, strict=True):
            f.store(value, place, module.block)

    def outer(self, first: int) -> None:
        """Of the products of all features of one value, ``first``, with all of another, over their rows."""
        f = self.f
        a, b = self._operand(first, "a"), self._operand(self.found.b, "b")
        few = f.let("few", f"udiv i64 {STRETCH}, {f.maximum('%rows', 1)}")
        at_once = f.maximum(few, 1, "at.once")
        with f.loop("run", 0, "%runs", at_once) as run:
            runs = f.minimum(f.sub("%runs", run), at_once, "runs")
            a_run, b_run = a.beside(f, run, a.run), b.beside(f, run, b.run)
            with f.loop("stretch", 0, "%rows", STRETCH) as begun:
                depth = f.minimum(f.sub("%rows", begun), STRETCH, "depth")
                is_first = f.let("is.first", f"icmp eq i64 {f.add(run, begun)}, 0")
                opens = f.let("opens", f"and i1 %opens, {is_first}")
                self._tiles(opens, a_run.beside(f, begun, a.k), b_run.beside(f, begun, b.k), (depth, runs))
        f.end()

    def _tiles(self, opens: str, a: _Rows, b: _Rows, size: tuple[Value, Value]) -> None:
        """All tiles of a stretch of rows, those of one block of columns after the other.

        Arguments:
            opens: whether the accumulators begin at zero.
            size: the rows of a run, and how many runs there are.
        """
        f, module, found = self.f, self.module, self.found
        stride, width = module.padded(found.width), self.tiling.width(self._most)
        start_row = f.let("start.row", f"select i1 {opens}, i64 0, i64 {stride}")
        strips = self._strips(a, size) if has_strips(module, self.plan, found) else None
        zeros = module.zeros(width * module.block)
        block = 0
        for many, wide in shared_out(module.blocks(found.width), width):
            with f.loop("block", block, block + many * wide, wide) as first:
                column = f.mul(first, module.block)
                for tiles in self._heights():
                    begin, end = f.share(tiles.count, "%me", "%crew")
                    with f.loop("tile", begin, end) as turn:
                        feature = f.add(f.mul(turn, tiles.height), tiles.feature)
                        here = f.at(f.at("%acc", f.mul(feature, stride)), column)
                        start = f.let("start", f"select i1 {opens}, ptr {zeros}, ptr {here}")
                        own = a.beside(f, feature, module.bytes)
                        if strips is not None:
                            own = strips.beside(f, f.add(turn, tiles.first), strip_bytes(module))
                        places = (f"ptr {place}" for place in (here, start, own.start, f.at(b.start, column)))
                        numbers = (stride, start_row, own.k, b.k, *size, own.run, b.run)
                        name = outer_name(module, tiles.height, wide)
                        f.call(name, *places, *(f"i64 {value}" for value in numbers))
            block += many * wide

    def _strips(self, a: _Rows, size: tuple[Value, Value]) -> _Rows:
        """Have the first value's rows in strips, of a crew each thread those of its own tiles."""
        f, module, (depth, runs) = self.f, self.module, size
        piece = PIECE * module.bytes
        start = f.at(self.layout.buffer(f, STRIPS), f.mul("%half", strips_bytes(module, self.found)))
        strips = _Rows(start, piece, f.mul(depth, piece))
        with f.loop("run", 0, runs) as run:
            source, target = a.beside(f, run, a.run), strips.beside(f, run, strips.run)
            for tiles in self._heights():
                begin, end = f.share(tiles.count, "%me", "%crew")
                to = target.beside(f, f.add(begin, tiles.first), strip_bytes(module))
                own = source.beside(f, f.add(f.mul(begin, tiles.height), tiles.feature), module.bytes)
                numbers = (a.k, depth, f.sub(end, begin), tiles.height * module.bytes)
                f.call(
                    emit_strips(module), f"ptr {to.start}", f"ptr {own.start}", *(f"i64 {value}" for value in numbers)
                )
        return strips

    @property
    def _most(self) -> int:
        """Features of the highest tile."""
        return min(self.tiling.most, self.found.height)

    def _heights(self) -> Iterator[_Tiles]:
        """The features shared out to tiles."""
        first, feature = 0, 0
        for count, height in shared_out(self.found.height, self._most):
            yield _Tiles(count, height, first, feature)
            first, feature = first + count, feature + count * height

    def _operand(self, index: int, name: str) -> _Rows:
        f, place = self.f, self.found.operands[index]
        base, stride, _ = row_address(
            f, self.layout, self.module, place.buffer, t="0", base="%first", kept="%kept", slot="0"
        )
        start = f.at(base, place.offset * self.module.bytes, name)
        run = "%kept.rows" if place.buffer.scope == "saved" else "%run.rows"
        return _Rows(start, f.mul("%row.step", stride, f"{name}.k"), f.mul(run, stride, f"{name}.run"))


def flush(module: Module) -> str:
    """The function that adds a share of a block to the total, emitted on first use."""
    name = "sum.flush"
    if name in module.made:
        return name
    module.made.add(name)
    f = Function(module, name, "ptr noalias %total", "ptr noalias %part", "i64 %from", "i64 %to")
    with f.loop("byte", "%from", "%to", module.block) as byte:
        total, part = f.at("%total", byte), f.at("%part", byte)
        old, more = f.load(total, "total", module.block), f.load(part, "part", module.block)
        f.store(f.let("sum", f"fadd {module.vector} {old}, {more}"), total, module.block)
    f.end()
    return name


def add_to(module: Module, *, fresh: bool) -> str:
    """The function that adds rows of our own to a caller's matrix, or stores them in a ``fresh`` one.

    It takes vectors where the matrix's columns are neighbours. Emitted on first use.
    """
    name = "sum.store" if fresh else "sum.add"
    if name in module.made:
        return name
    module.made.add(name)
    f = Function(
        module, name, "ptr noalias %to", "i64 %to.row", "i64 %to.column", "ptr noalias %from", "i64 %from.row",
        "i64 %height", "i64 %width",
    )  # fmt: skip
    close = f.let("close", f"icmp eq i64 %to.column, {module.bytes}")
    with f.loop("row", 0, "%height") as row:
        to, source = f.at("%to", f.mul(row, "%to.row")), f.at("%from", f.mul(row, "%from.row"))
        with f.when("near", close), f.loop("first", 0, "%width", LANES) as first:
            mask = f.first_lanes(f.sub("%width", first))
            offset = f.mul(first, module.bytes)
            theirs = f.at(to, offset)
            value = f.load(f.at(source, offset), "value", module.block)
            if not fresh:
                old = f.load_masked(theirs, mask, "old")
                value = f.let("sum", f"fadd {module.vector} {old}, {value}")
            f.store_masked(value, theirs, mask)
        far = f.let("far", f"xor i1 {close}, true")
        with f.when("far", far), f.loop("column", 0, "%width") as column:
            theirs = f.at(to, f.mul(column, "%to.column"))
            mine = f.at(source, f.mul(column, module.bytes))
            value = f.let("value", f"load {module.scalar}, ptr {mine}, align {module.bytes}")
            if not fresh:
                old = f.let("old", f"load {module.scalar}, ptr {theirs}, align {module.bytes}")
                value = f.let("sum", f"fadd {module.scalar} {old}, {value}")
            f.do(f"store {module.scalar} {value}, ptr {theirs}, align {module.bytes}")
    f.end()
    return name
