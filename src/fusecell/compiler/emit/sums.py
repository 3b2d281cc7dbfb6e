"""Sums over all rows of all steps, for the gradients of weights.

Rows are taken in the order in which the steps run, in blocks of 512: a block is added up row by row, then added to
the total. So a sum has the same bits however the steps are cut into chunks, and long ones stay accurate.
"""

from __future__ import annotations

from contextlib import nullcontext

from fusecell.compiler.emit.crew import Crew
from fusecell.compiler.emit.layout import Layout, row_address
from fusecell.compiler.emit.text import LANES, Function, Module, Value
from fusecell.compiler.emit.tiles import Tiling, outer_name, shared_out, tiling
from fusecell.compiler.plan import Plan, Sum

__all__ = ["BLOCK", "SumEmitter"]

BLOCK = 512
# So many rows of an operand's tile stay in L1 while it meets all of the other operand.
_STRETCH = 128


class SumEmitter:
    """The sums of a plan: :meth:`functions`, and what ``@run`` does with them at the start, per chunk, at the end."""

    def __init__(self, module: Module, layout: Layout, plan: Plan) -> None:
        self.module, self.layout, self.plan = module, layout, plan

    def _tiling(self, found: Sum) -> Tiling:
        return tiling(self.module.target, self.module.dtype, 1, self.module.blocks(found.width))

    def functions(self) -> None:
        """One function per sum, and those they share."""
        for found in self.plan.sums:
            if found.a is None:
                self._row_sum(found)
            else:
                self._outer(found)
        if self.plan.sums:
            self._flush()

    # What @run calls.

    def clear(self, f: Function, crew: Crew) -> None:
        """Begin with nothing."""
        if not self.plan.sums:
            return
        self._filled, self._done, self._closed = (f.let(name, "alloca i64") for name in ("filled", "done", "closed"))
        f.store_int(0, self._filled)
        f.store_int(0, self._closed)
        # A block that is full is closed: it moves to the total.
        few = f.let("is.few", f"icmp slt i64 {f.mul(self.layout.word(f, 'steps'), crew.rows)}, {BLOCK}")
        self._in_place = {found.name: self._add_in_place(f, found, few) for found in self._whole_gradients()}
        with crew.leader():
            for found in self.plan.sums:
                with f.loop("byte", 0, self._bytes(found), self.module.block) as byte:
                    f.store("zeroinitializer", f.at(self.layout.buffer(f, found.part), byte), self.module.block)

    def add_chunk(self, f: Function, crew: Crew, total: str, backwards: str) -> None:
        """Add the rows of a chunk, as many at a time as the open block still takes; a crew parts what they add to."""
        if not self.plan.sums:
            return
        crew.meet(crew.rowwise)
        filled_at, done_at = self._filled, self._done
        last = f.sub(total, 1, "last")
        f.store_int(0, done_at)
        blocks = f.let("most.blocks", f"sdiv i64 {total}, {BLOCK}")
        with f.loop("turn", 0, f.add(blocks, 2)):
            done = f.load_int(done_at, "done")
            filled = f.load_int(filled_at, "filled")
            count = f.minimum(f.sub(BLOCK, filled), f.sub(total, done), "count")
            mirrored = f.sub(last, done, "mirrored")
            first = f.let("first.row", f"select i1 {backwards}, i64 {mirrored}, i64 {done}")
            for found in self.plan.sums:
                given = ("ptr %args", f"i64 {first}", f"i1 {backwards}", f"i64 {count}", "i64 %me", "i64 %crew")
                f.call(f"{found.name}", *given)
            f.store_int(f.add(done, count), done_at)
            now = f.add(filled, count, "filled")
            full = f.let("is.full", f"icmp eq i64 {now}, {BLOCK}")
            f.store_int(f.let("kept", f"select i1 {full}, i64 0, i64 {now}"), filled_at)
            with f.when("full", full):
                self._flush_all(f, crew)
        crew.meet(crew.rowwise)

    def finish(self, f: Function, crew: Crew) -> None:
        """Close the last block and bring the sums to the caller's gradients."""
        if not self.plan.sums:
            return
        several = f.let("several", f"icmp ne i64 {f.load_int(self._closed, 'closed')}, 0")
        with f.when("several", several):
            self._flush_all(f, crew)
        for found in self.plan.sums:
            total, part = (self.layout.buffer(f, name) for name in (found.total, found.part))
            source = f.let("source", f"select i1 {several}, ptr {total}, ptr {part}")
            there = self._in_place.get(found.name, "false")
            with f.when("handed", f.let("is.elsewhere", f"xor i1 {there}, true")):
                self._hand_over(f, crew, found, source)

    # Parts.

    def _whole_gradients(self) -> list[Sum]:
        """The sums that are a whole gradient, its rows whole vectors."""
        covered = self.plan.covered()
        return [
            found
            for found in self.plan.sums
            if found.label in covered and not found.flipped and not found.width % LANES
        ]

    def _add_in_place(self, f: Function, found: Sum, few: str) -> str:
        """Have a sum's block be the caller's gradient, if that lies in memory as the block does and is all there is."""
        layout, bytes_ = self.layout, self.module.bytes
        strides = [(0, self.module.padded(found.width)), (1, bytes_)] if found.a is not None else [(0, bytes_)]
        here = f.let("low.bits", f"and i64 {layout.word(f, f'out.{found.label}.ptr')}, 63")
        fits = f.let("fits", f"and i1 {few}, {f.let('is.aligned', f'icmp eq i64 {here}, 0')}")
        for dim, stride in strides:
            given = layout.word(f, f"out.{found.label}.stride{dim}")
            fits = f.let("fits", f"and i1 {fits}, {f.let('is.so', f'icmp eq i64 {given}, {stride}')}")
        with f.when("in.place", fits):
            layout.place(f, found.part, layout.pointer(f, f"out.{found.label}.ptr"))
        return fits

    def _bytes(self, found: Sum) -> int:
        return found.height * self.module.padded(found.width)

    def _flush_all(self, f: Function, crew: Crew) -> None:
        """Close a block: add it to the total, which begins with the first."""
        crew.meet()
        closed = f.load_int(self._closed, "closed")
        first = f.let("is.first", f"icmp eq i64 {closed}, 0")
        f.store_int(f.add(closed, 1), self._closed)
        for found in self.plan.sums:
            share = f.share(self._bytes(found) // self.module.block, "%me", "%crew")
            begin, end = (f.mul(vector, self.module.block) for vector in share)
            places = (f"ptr {self.layout.buffer(f, name)}" for name in (found.total, found.part))
            f.call("sum.flush", *places, f"i64 {begin}", f"i64 {end}", f"i1 {first}")
        crew.meet()

    def _flush(self) -> None:
        module = self.module
        f = Function(
            module, "sum.flush", "ptr noalias %total", "ptr noalias %part", "i64 %from", "i64 %to", "i1 %first"
        )
        with f.loop("byte", "%from", "%to", module.block) as byte:
            total, part = f.at("%total", byte), f.at("%part", byte)
            more = f.load(part, "part", module.block)
            old = f.load(total, "total", module.block)
            old = f.let("so.far", f"select i1 %first, {module.vector} zeroinitializer, {module.vector} {old}")
            f.store(f.let("sum", f"fadd {module.vector} {old}, {more}"), total, module.block)
            f.store("zeroinitializer", part, module.block)
        f.end()

    def _operand(self, f: Function, index: int, name: str) -> tuple[str, str]:
        """Where an operand's first row is, and the bytes to the next in the order in which rows are added."""
        place = self.plan.place(index, "post")
        assert place is not None, f"{self.plan.graph[index].name}, an operand of a sum, is nowhere in memory"
        base, stride, _ = row_address(f, self.layout, self.module, place.buffer, t="0", base="0", slot="0")
        start = f.at(f.at(base, f.mul("%first", stride)), place.offset * self.module.bytes, name)
        back = f.sub(0, stride)
        return start, f.let(f"{name}.k", f"select i1 %backwards, i64 {back}, i64 {stride}")

    def _function(self, found: Sum) -> Function:
        head = ("ptr %args", "i64 %first", "i1 %backwards", "i64 %rows", "i64 %me", "i64 %crew")
        return Function(self.module, found.name, *head)

    def _outer(self, found: Sum) -> None:
        assert found.a is not None
        f = self._function(found)
        a, a_k = self._operand(f, found.a, "a")
        b, b_k = self._operand(f, found.b, "b")
        acc = self.layout.buffer(f, found.part)
        with f.loop("stretch", 0, "%rows", _STRETCH) as begun:
            depth = f.minimum(f.sub("%rows", begun), _STRETCH, "depth")
            given = (f.at(a, f.mul(begun, a_k)), a_k, f.at(b, f.mul(begun, b_k)), b_k, depth)
            self._tiles(f, found, acc, *given)
        f.end()

    def _tiles(self, f: Function, found: Sum, acc: str, a: str, a_k: str, b: str, b_k: str, depth: Value) -> None:
        """All of a sum's tiles, those of one block of columns after the other."""
        module, tiles = self.module, self._tiling(found)
        stride = module.padded(found.width)
        most = min(tiles.most, found.height)
        block = 0
        for many, wide in shared_out(module.blocks(found.width), tiles.width(most)):
            with f.loop("block", block, block + many * wide, wide) as first:
                row, column = 0, f.mul(first, module.block)
                for count, height in shared_out(found.height, most):
                    name = outer_name(module, height, wide)
                    begin, end = (f.add(f.mul(tile, height), row) for tile in f.share(count, "%me", "%crew"))
                    with f.loop("row", begin, end, height) as at:
                        here = f.at(f.at(acc, f.mul(at, stride)), column)
                        own, other = f.at(a, f.mul(at, module.bytes)), f.at(b, column)
                        f.call(
                            name, f"ptr {here}", f"i64 {stride}", f"ptr {own}", f"i64 {a_k}", f"ptr {other}",
                            f"i64 {b_k}", f"i64 {depth}",
                        )  # fmt: skip
                    row += count * height
            block += many * wide

    def _row_sum(self, found: Sum) -> None:
        module = self.module
        f = self._function(found)
        b, b_k = self._operand(f, found.b, "b")
        acc = self.layout.buffer(f, found.part)
        for first in range(0, module.blocks(found.width), 8):
            many = min(8, module.blocks(found.width) - first)
            turn = f.let("turn", f"urem i64 {first // 8}, %crew")
            with f.when("mine", f.let("is.mine", f"icmp eq i64 {turn}, %me")):
                self._add_rows(f, f.at(acc, first * module.block), f.at(b, first * module.block), b_k, many)
        f.end()

    def _add_rows(self, f: Function, acc: str, b: str, b_k: str, many: int) -> None:
        """Add up so many blocks of columns of all rows, in registers."""
        module = self.module
        places = [f.at(acc, block * module.block) for block in range(many)]
        first = [f.load(place, "so.far", module.block) for place in places]
        with f.loop_carrying("row", 0, "%rows", first) as (row, carried):
            here = f.at(b, f.mul(row, b_k))
            for block, old in enumerate(carried):
                value = f.load(f.at(here, block * module.block), "value", module.bytes)
                carried[block] = f.let("sum", f"fadd {module.vector} {old}, {value}")
        for place, value in zip(places, carried, strict=True):
            f.store(value, place, module.block)

    def _hand_over(self, f: Function, crew: Crew, found: Sum, source: str) -> None:
        """Bring a sum to its place in the caller's gradient, whatever its strides.

        A crew parts the rows of a gradient that one sum makes whole; where several add up, one thread adds in order.
        """
        module, layout, label = self.module, self.layout, found.label
        matrix = len(self.plan.graph[self.plan.graph.outputs[label]].type.shape) == 2
        dims = ("1", "0") if found.flipped else ("0", "1")
        strides = [layout.word(f, f"out.{label}.stride{dim}") for dim in (dims if matrix else "00")]
        start = layout.pointer(f, f"out.{label}.ptr")
        start = f.at(start, f.mul(strides[0], found.corner[0])) if matrix else start
        start = f.at(start, f.mul(strides[1], found.corner[1]))
        fresh = label in self.plan.covered()
        first, last = f.share(found.height, "%me", "%crew") if fresh else (0, found.height)
        with nullcontext() if fresh else crew.leader():
            f.call(
                self._add_to(fresh=fresh),
                f"ptr {f.at(start, f.mul(strides[0], first))}",
                f"i64 {strides[0]}",
                f"i64 {strides[1]}",
                f"ptr {f.at(source, f.mul(first, module.padded(found.width)))}",
                f"i64 {module.padded(found.width)}",
                f"i64 {f.sub(last, first)}",
                f"i64 {found.width}",
            )

    def _add_to(self, *, fresh: bool) -> str:
        """The function that adds rows of our own to a caller's matrix, or stores them in a ``fresh`` one.

        It takes vectors where the matrix's columns are neighbours.
        """
        module, name = self.module, "sum.store" if fresh else "sum.add"
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
