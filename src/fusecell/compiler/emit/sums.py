"""Sums over all rows of all steps, for the gradients of weights.

Rows are taken in the order in which the steps run, in blocks of 512: a block is added up row by row, then added to
the total. So a sum has the same bits however the steps are cut into chunks, and long ones stay accurate.

Where a crew of two would part the rows of a call, and there are enough, each half of them is summed apart, whoever
does it, in blocks of as many whole steps as have 512 rows of a half; the halves are added at the end. Then each of two
threads sums the rows that it has just written, which are in its own cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace

from fusecell.compiler.emit.crew import Crew
from fusecell.compiler.emit.layout import ALIGNED, Layout, row_address
from fusecell.compiler.emit.strips import PIECE, STRETCH, STRIPS, emit_strips, has_strips, strip_bytes, strips_bytes
from fusecell.compiler.emit.text import LANES, Function, Module, Value
from fusecell.compiler.emit.tiles import Tiling, outer_name, shared_out, tiling
from fusecell.compiler.plan import Plan, Sum

__all__ = ["BLOCK", "SumEmitter"]

BLOCK = 512
# The rows from which sums by halves cost one thread little.
_ENOUGH_FOR_HALVES = 16
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

    def beside(self, f: Function, count: Value, bytes_: int) -> _Rows:
        """The same so many times ``bytes_`` further on."""
        return replace(self, start=f.at(self.start, f.mul(count, bytes_)))


def _heights(height: int, most: int) -> Iterator[tuple[int, int, int, int]]:
    """Features shared out to tiles: how many tiles of which height, the first of them, and its first feature."""
    tile, row = 0, 0
    for count, each in shared_out(height, most):
        yield count, each, tile, row
        tile, row = tile + count, row + count * each


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

    def begin(self, f: Function) -> None:
        """Begin with nothing."""
        if not self.plan.sums:
            return
        self._filled, self._closed = (f.let(name, "alloca [2 x i64]") for name in ("filled", "closed"))
        self._done = f.let("done", "alloca i64")
        for place in (self._filled, self._closed):
            f.store_int(0, place)
            f.store_int(0, f.at(place, 8))
        self._in_place = {found.name: self._add_in_place(f, found) for found in self._whole_gradients()}

    def part_halves(self, f: Function, crew: Crew) -> str:
        """Whether rows are summed by halves; which halves are for this thread; and who else takes part in these.

        Returns:
            Whether each thread reads nothing but what it has written.
        """
        many = f.let("are.many", f"icmp sge i64 {f.mul(self.layout.word(f, 'steps'), crew.rows)}, {BLOCK}")
        can = f.let("can.halve", f"and i1 {crew.regular}, {many if self.layout.halves == 2 else 'false'}")
        least = max(2 * crew.rows_each, _ENOUGH_FOR_HALVES)
        self._halved = f.let("is.halved", f"and i1 {can}, {f.let('is.enough', f'icmp sge i64 {crew.rows}, {least}')}")
        two = f.let("are.two", f"and i1 {f.let('is.pair', 'icmp eq i64 %crew, 2')}, {crew.rowwise}")
        self._private = private = f.let("is.private", f"and i1 {two}, {self._halved}")
        self._shared = f.let("is.shared.sum", f"xor i1 {private}, {crew.several}")
        most = f.let("halves", f"select i1 {self._halved}, i64 2, i64 1")
        self._from = f.let("half.from", f"select i1 {private}, i64 %me, i64 0")
        self._to = f.let("half.to", f"select i1 {private}, i64 {f.add('%me', 1)}, i64 {most}")
        self._me = f.let("sum.me", f"select i1 {private}, i64 0, i64 %me")
        self._crew = f.let("sum.crew", f"select i1 {private}, i64 1, i64 %crew")
        return private

    def add_chunk(self, f: Function, crew: Crew, steps: Value, total: str, backwards: str) -> None:
        """Add the rows of a chunk, as many at a time as the open block still takes; a crew parts what they add to."""
        if not self.plan.sums:
            return
        chunk = self.layout.word(f, "chunk_steps")
        sharing = f.let("is.sharing", f"and i1 {crew.rowwise}, {self._shared}")
        crew.meet(sharing)
        halved = self._halved
        # What is counted: rows, or of halves the steps, so that both close their blocks together.
        units = f.let("units", f"select i1 {halved}, i64 {steps}, i64 {total}")
        whole_steps = f.let("whole.steps", f"udiv i64 {2 * BLOCK}, {f.maximum(crew.rows, 1)}")
        most = f.let("block.units", f"select i1 {halved}, i64 {f.maximum(whole_steps, 1)}, i64 {BLOCK}")
        unit = f.let("unit", f"select i1 {halved}, i64 {crew.rows}, i64 1")
        ahead = f.let("ahead", f"select i1 {backwards}, i64 -1, i64 1")
        row_step = f.let("row.step", f"select i1 {halved}, i64 1, i64 {ahead}")
        blocks = f.let("most.blocks", f"udiv i64 {units}, {most}")
        middle, odd = f.let("middle", f"lshr i64 {crew.rows}, 1"), f.let("odd", f"and i64 {crew.rows}, 1")
        with f.loop("half", self._from, self._to) as half:
            filled_at, closed_at = (f.at(place, f.mul(half, 8)) for place in (self._filled, self._closed))
            begins = f.mul(half, middle)
            size = f.add(middle, f.mul(half, odd), "half.rows")
            f.store_int(0, self._done)
            with f.loop("turn", 0, f.add(blocks, 2)):
                done, filled = f.load_int(self._done, "done"), f.load_int(filled_at, "filled")
                count = f.minimum(f.sub(most, filled), f.sub(units, done), "count")
                mirrored = f.sub(f.sub(units, 1), done, "mirrored")
                here = f.let("here", f"select i1 {backwards}, i64 {mirrored}, i64 {done}")
                kept = f.add(f.mul(here, unit), begins, "first.kept")
                own = f.add(f.mul(here, size), f.mul(begins, chunk), "first.own")
                first = f.let("first.row", f"select i1 {crew.apart}, i64 {own}, i64 {kept}")
                between = f.let("between", f"select i1 {crew.apart}, i64 {size}, i64 {unit}")
                runs = f.let("runs", f"select i1 {halved}, i64 {count}, i64 1")
                rows = f.let("run.rows", f"select i1 {halved}, i64 {size}, i64 {count}")
                steps_ = (f.mul(between, ahead), f.mul(unit, ahead))
                given = (first, kept, runs, *steps_, rows, row_step, half, self._me, self._crew)
                opens = f.let("opens", f"icmp eq i64 {filled}, 0")
                begun = f.let("is.first.block", f"icmp eq i64 {f.load_int(closed_at, 'closed')}, 0")
                for found in self.plan.sums:
                    acc = self._block_of(f, found, half, begun)
                    f.call(found.name, "ptr %args", f"ptr {acc}", f"i1 {opens}", *(f"i64 {value}" for value in given))
                f.store_int(f.add(done, count), self._done)
                now = f.add(filled, count, "filled")
                full = f.let("is.full", f"icmp eq i64 {now}, {most}")
                f.store_int(f.let("kept", f"select i1 {full}, i64 0, i64 {now}"), filled_at)
                with f.when("full", full):
                    self._close(f, crew, half)
        crew.meet(sharing)

    def finish(self, f: Function, crew: Crew) -> None:
        """Close the last block and bring the sums to the caller's gradients."""
        if not self.plan.sums:
            return
        open_, closed = (
            f.let("is.some", f"icmp ne i64 {f.load_int(f.at(place, f.mul(self._from, 8)), 'some')}, 0")
            for place in (self._filled, self._closed)
        )
        with f.when("rest", open_), f.loop("half", self._from, self._to) as half:
            self._close(f, crew, half)
        with f.when("nothing", f.let("is.nothing", f"icmp eq i1 {f.let('is.any', f'or i1 {open_}, {closed}')}, false")):
            self._clear(f)
            crew.meet(self._shared)
        crew.meet(self._private)
        for found in self.plan.sums:
            there = self._in_place.get(found.name, "false")
            with f.when("handed", f.let("is.elsewhere", f"xor i1 {there}, true")):
                self._hand_over(f, crew, found, self.layout.buffer(f, found.total))

    # Parts.

    def _whole_gradients(self) -> list[Sum]:
        """The sums that are a whole gradient, its rows whole vectors."""
        covered = self.plan.covered()
        return [
            found
            for found in self.plan.sums
            if found.label in covered and not found.flipped and not found.width % LANES
        ]

    def _add_in_place(self, f: Function, found: Sum) -> str:
        """Have a sum's total be the caller's gradient, if that lies in memory as the total does and is all there is."""
        layout, bytes_ = self.layout, self.module.bytes
        strides = [(0, self.module.padded(found.width)), (1, bytes_)] if found.a is not None else [(0, bytes_)]
        here = f.let("low.bits", f"and i64 {layout.word(f, f'out.{found.label}.ptr')}, {ALIGNED - 1}")
        whole = f.let("is.whole", f"xor i1 {self._halved}, true")
        fits = f.let("fits", f"and i1 {whole}, {f.let('is.aligned', f'icmp eq i64 {here}, 0')}")
        for dim, stride in strides:
            given = layout.word(f, f"out.{found.label}.stride{dim}")
            fits = f.let("fits", f"and i1 {fits}, {f.let('is.so', f'icmp eq i64 {given}, {stride}')}")
        with f.when("in.place", fits):
            layout.place(f, found.total, layout.pointer(f, f"out.{found.label}.ptr"))
        return fits

    def _bytes(self, found: Sum) -> int:
        return found.height * self.module.padded(found.width)

    def _block_of(self, f: Function, found: Sum, half: Value, is_first: str) -> str:
        """Where a half's open block is: the first begins the total, the others are added to it."""
        total, part = (self.layout.buffer(f, name) for name in (found.total, found.part))
        here = f.let("block", f"select i1 {is_first}, ptr {total}, ptr {part}")
        return f.at(here, f.mul(half, self._bytes(found)), "acc")

    def _close(self, f: Function, crew: Crew, half: Value) -> None:
        """Close a block: from the second on it is added to the total."""
        closed_at = f.at(self._closed, f.mul(half, 8))
        closed = f.load_int(closed_at, "closed")
        f.store_int(f.add(closed, 1), closed_at)
        with f.when("later", f.let("is.later", f"icmp ne i64 {closed}, 0")):
            crew.meet(self._shared)
            for found in self.plan.sums:
                share = f.share(self._bytes(found) // self.module.block, self._me, self._crew)
                begin, end = (f.mul(vector, self.module.block) for vector in share)
                offset = f.mul(half, self._bytes(found))
                places = (f"ptr {f.at(self.layout.buffer(f, name), offset)}" for name in (found.total, found.part))
                f.call("sum.flush", *places, f"i64 {begin}", f"i64 {end}")
            crew.meet(self._shared)

    def _flush(self) -> None:
        module = self.module
        f = Function(module, "sum.flush", "ptr noalias %total", "ptr noalias %part", "i64 %from", "i64 %to")
        with f.loop("byte", "%from", "%to", module.block) as byte:
            total, part = f.at("%total", byte), f.at("%part", byte)
            old, more = f.load(total, "total", module.block), f.load(part, "part", module.block)
            f.store(f.let("sum", f"fadd {module.vector} {old}, {more}"), total, module.block)
        f.end()

    def _clear(self, f: Function) -> None:
        """Sums of no rows."""
        first = f.let("is.first.of.half", f"icmp eq i64 {self._me}, 0")
        with f.when("clear", first), f.loop("half", self._from, self._to) as half:
            for found in self.plan.sums:
                start = f.at(self.layout.buffer(f, found.total), f.mul(half, self._bytes(found)))
                with f.loop("byte", 0, self._bytes(found), self.module.block) as byte:
                    f.store("zeroinitializer", f.at(start, byte), self.module.block)

    def _operand(self, f: Function, index: int, name: str) -> tuple[str, Value, Value]:
        """Where an operand's first row is, the bytes to the next run, and to the next row."""
        place = self.plan.place(index, "post")
        assert place is not None, f"{self.plan.graph[index].name}, an operand of a sum, is nowhere in memory"
        base, stride, _ = row_address(
            f, self.layout, self.module, place.buffer, t="0", base="%first", kept="%kept", slot="0"
        )
        run = "%kept.rows" if place.buffer.scope == "saved" else "%run.rows"
        start = f.at(base, place.offset * self.module.bytes, name)
        return start, f.mul(run, stride, f"{name}.run"), f.mul("%row.step", stride, f"{name}.k")

    def _outer(self, found: Sum) -> None:
        assert found.a is not None
        f = Function(self.module, found.name, *_GIVEN)
        a, a_run, a_k = self._operand(f, found.a, "a")
        b, b_run, b_k = self._operand(f, found.b, "b")
        few = f.let("few", f"udiv i64 {STRETCH}, {f.maximum('%rows', 1)}")
        at_once = f.maximum(few, 1, "at.once")
        with f.loop("run", 0, "%runs", at_once) as run:
            runs = f.minimum(f.sub("%runs", run), at_once, "runs")
            a_here, b_here = f.at(a, f.mul(run, a_run)), f.at(b, f.mul(run, b_run))
            with f.loop("stretch", 0, "%rows", STRETCH) as begun:
                depth = f.minimum(f.sub("%rows", begun), STRETCH, "depth")
                a_walk = _Rows(f.at(a_here, f.mul(begun, a_k)), a_k, a_run)
                b_walk = _Rows(f.at(b_here, f.mul(begun, b_k)), b_k, b_run)
                is_first = f.let("is.first", f"icmp eq i64 {f.add(run, begun)}, 0")
                opens = f.let("opens", f"and i1 %opens, {is_first}")
                self._tiles(f, found, opens, (a_walk, b_walk), (depth, runs))
        f.end()

    def _tiles(
        self, f: Function, found: Sum, opens: str, operands: tuple[_Rows, _Rows], size: tuple[Value, Value]
    ) -> None:
        """All of a sum's tiles, those of one block of columns after the other.

        Arguments:
            opens: whether the accumulators begin at zero.
            size: the rows of a run, and how many runs there are.
        """
        module, tiles = self.module, self._tiling(found)
        (a, b), stride, most = operands, module.padded(found.width), min(self._tiling(found).most, found.height)
        start_row = f.let("start.row", f"select i1 {opens}, i64 0, i64 {stride}")
        strips = self._strips(f, found, a, size) if has_strips(module, self.plan, found) else None
        zeros = module.zeros(tiles.width(most) * module.block)
        block = 0
        for many, wide in shared_out(module.blocks(found.width), tiles.width(most)):
            with f.loop("block", block, block + many * wide, wide) as first:
                column = f.mul(first, module.block)
                for count, height, tile, row in _heights(found.height, most):
                    name = outer_name(module, height, wide)
                    begin, end = f.share(count, "%me", "%crew")
                    with f.loop("tile", begin, end) as turn:
                        at = f.add(f.mul(turn, height), row)
                        here = f.at(f.at("%acc", f.mul(at, stride)), column)
                        start = f.let("start", f"select i1 {opens}, ptr {zeros}, ptr {here}")
                        own = a.beside(f, at, module.bytes)
                        if strips is not None:
                            own = strips.beside(f, f.add(turn, tile), strip_bytes(module))
                        other = f.at(b.start, column)
                        numbers = (stride, start_row, own.k, b.k, *size, own.run, b.run)
                        places = (f"ptr {place}" for place in (here, start, own.start, other))
                        f.call(name, *places, *(f"i64 {value}" for value in numbers))
            block += many * wide

    def _strips(self, f: Function, found: Sum, a: _Rows, size: tuple[Value, Value]) -> _Rows:
        """Have the first operand's rows in strips, of a crew each thread those of its own tiles."""
        module, (depth, runs) = self.module, size
        piece = PIECE * module.bytes
        start = f.at(self.layout.buffer(f, STRIPS), f.mul("%half", strips_bytes(module, found)))
        strips = _Rows(start, piece, f.mul(depth, piece))
        most = min(self._tiling(found).most, found.height)
        with f.loop("run", 0, runs) as run:
            source, target = f.at(a.start, f.mul(run, a.run)), f.at(strips.start, f.mul(run, strips.run))
            for count, height, tile, row in _heights(found.height, most):
                begin, end = f.share(count, "%me", "%crew")
                to = f.at(target, f.mul(f.add(begin, tile), strip_bytes(module)))
                own = f.at(source, f.mul(f.add(f.mul(begin, height), row), module.bytes))
                numbers = (a.k, depth, f.sub(end, begin), height * module.bytes)
                f.call(emit_strips(module), f"ptr {to}", f"ptr {own}", *(f"i64 {value}" for value in numbers))
        return strips

    def _row_sum(self, found: Sum) -> None:
        module = self.module
        f = Function(module, found.name, *_GIVEN)
        b, b_run, b_k = self._operand(f, found.b, "b")
        zeros = module.zeros(8 * module.block)
        for first in range(0, module.blocks(found.width), 8):
            many = min(8, module.blocks(found.width) - first)
            turn = f.let("turn", f"urem i64 {first // 8}, %crew")
            with f.when("mine", f.let("is.mine", f"icmp eq i64 {turn}, %me")):
                acc = f.at("%acc", first * module.block)
                start = f.let("start", f"select i1 %opens, ptr {zeros}, ptr {acc}")
                self._add_rows(f, (start, acc), f.at(b, first * module.block), b_run, b_k, many)
        f.end()

    def _add_rows(self, f: Function, acc: tuple[str, str], b: str, b_run: Value, b_k: Value, many: int) -> None:
        """Add up so many blocks of columns of all rows, in registers, from one place to another."""
        module = self.module
        before, places = ([f.at(start, block * module.block) for block in range(many)] for start in acc)
        first = [f.load(place, "so.far", module.block) for place in before]
        with f.loop_carrying("run", 0, "%runs", first) as (run, sums):
            begin = f.at(b, f.mul(run, b_run))
            with f.loop_carrying("row", 0, "%rows", sums) as (row, carried):
                here = f.at(begin, f.mul(row, b_k))
                for block, old in enumerate(carried):
                    value = f.load(f.at(here, block * module.block), "value", module.bytes)
                    carried[block] = f.let("sum", f"fadd {module.vector} {old}, {value}")
            sums[:] = carried
        for place, value in zip(places, sums, strict=True):
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
            rows = f.mul(first, module.padded(found.width))
            to = (f"ptr {f.at(start, f.mul(strides[0], first))}", f"i64 {strides[0]}", f"i64 {strides[1]}")
            size = (f"i64 {module.padded(found.width)}", f"i64 {f.sub(last, first)}", f"i64 {found.width}")
            f.call(self._add_to(fresh=fresh), *to, f"ptr {f.at(source, rows)}", *size)
            with f.when("halved", self._halved):
                other = f.at(f.at(source, self._bytes(found)), rows)
                f.call(self._add_to(fresh=False), *to, f"ptr {other}", *size)

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
