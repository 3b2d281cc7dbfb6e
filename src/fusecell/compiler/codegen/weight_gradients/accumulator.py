"""Sums over all rows of all steps, for the gradients of weights.

Rows are taken in the order in which the steps run, in blocks of 512: a block is added up row by row, then added to
the total. So a sum has the same bits however the steps are cut into chunks, and long ones stay accurate.

Where a crew of two would part the rows of a call, and there are enough, each half of them is summed apart, whoever
does it, in blocks of as many whole steps as have 512 rows of a half; the halves are added at the end. Then each of two
threads sums the rows that it has just written, which are in its own cache.
"""

from __future__ import annotations

from contextlib import nullcontext

from fusecell.compiler.codegen.kernel_abi import ALIGNED, Layout
from fusecell.compiler.codegen.llvm_builder import LANES, Function, Module, Value
from fusecell.compiler.codegen.weight_gradients.kernels import add_to, flush
from fusecell.compiler.codegen.work_sharing import ThreadTeam
from fusecell.compiler.schedule.plan import Plan, Sum

__all__ = ["BLOCK", "SumEmitter"]

BLOCK = 512
# The rows from which sums by halves cost one thread little.
_ENOUGH_FOR_HALVES = 16


class SumEmitter:
    """The sums of a plan: what ``@work`` does with them at the start, per chunk, at the end."""

    def __init__(self, module: Module, layout: Layout, plan: Plan) -> None:
        self.module, self.layout, self.plan = module, layout, plan

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

    def part_halves(self, f: Function, crew: ThreadTeam) -> str:
        """Whether rows are summed by halves; which halves are for this thread; and who else takes part in these.

        Returns:
            Whether each thread reads nothing but what it has written.
        """
        many = f.let("are.many", f"icmp sge i64 {f.mul(self.layout.word(f, 'steps'), crew.rows)}, {BLOCK}")
        can = f.let("can.halve", f"and i1 {crew.regular}, {many if self.layout.halves == 2 else 'false'}")
        least = max(2 * crew.rows_each, _ENOUGH_FOR_HALVES)
        self._halved = f.let("is.halved", f"and i1 {can}, {f.let('is.enough', f'icmp sge i64 {crew.rows}, {least}')}")
        two = f.let("are.two", f"and i1 {f.let('is.pair', 'icmp eq i64 %threads, 2')}, {crew.rowwise}")
        self._private = private = f.let("is.private", f"and i1 {two}, {self._halved}")
        self._shared = f.let("is.shared.sum", f"xor i1 {private}, {crew.several}")
        most = f.let("halves", f"select i1 {self._halved}, i64 2, i64 1")
        self._from = f.let("half.from", f"select i1 {private}, i64 %thread, i64 0")
        self._to = f.let("half.to", f"select i1 {private}, i64 {f.add('%thread', 1)}, i64 {most}")
        self._me = f.let("sum.me", f"select i1 {private}, i64 0, i64 %thread")
        self._crew = f.let("sum.crew", f"select i1 {private}, i64 1, i64 %threads")
        return private

    def add_chunk(self, f: Function, crew: ThreadTeam, steps: Value, total: str, backwards: str) -> None:
        """Add the rows of a chunk, as many at a time as the open block still takes; a crew parts what they add to."""
        if not self.plan.sums:
            return
        chunk = self.layout.word(f, "chunk_steps")
        sharing = f.let("is.sharing", f"and i1 {crew.rowwise}, {self._shared}")
        crew.barrier(sharing)
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
                to_next = (f.mul(between, ahead), f.mul(unit, ahead))
                given = (first, kept, runs, *to_next, rows, row_step, half, self._me, self._crew)
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
        crew.barrier(sharing)

    def finish(self, f: Function, crew: ThreadTeam) -> None:
        """Close the last block and bring the sums to the caller's gradients."""
        if not self.plan.sums:
            return
        open_, closed = (
            f.let("is.some", f"icmp ne i64 {f.load_int(f.at(place, f.mul(self._from, 8)), 'some')}, 0")
            for place in (self._filled, self._closed)
        )
        with f.when("rest", open_), f.loop("half", self._from, self._to) as half:
            self._close(f, crew, half)
        with f.when("nothing", f.let("is.nothing", f"xor i1 {f.let('is.any', f'or i1 {open_}, {closed}')}, true")):
            self._clear(f)
            crew.barrier(self._shared)
        crew.barrier(self._private)
        for found in self.plan.sums:
            there = self._in_place.get(found.name, "false")
            with f.when("handed", f.let("is.elsewhere", f"xor i1 {there}, true")):
                self._hand_over(f, crew, found, self.layout.buffer(f, found.total))

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

    def _close(self, f: Function, crew: ThreadTeam, half: Value) -> None:
        """Close a block: from the second on it is added to the total."""
        closed_at = f.at(self._closed, f.mul(half, 8))
        closed = f.load_int(closed_at, "closed")
        f.store_int(f.add(closed, 1), closed_at)
        with f.when("later", f.let("is.later", f"icmp ne i64 {closed}, 0")):
            crew.barrier(self._shared)
            for found in self.plan.sums:
                share = f.share(self._bytes(found) // self.module.block, self._me, self._crew)
                begin, end = (f.mul(vector, self.module.block) for vector in share)
                offset = f.mul(half, self._bytes(found))
                places = (f"ptr {f.at(self.layout.buffer(f, name), offset)}" for name in (found.total, found.part))
                f.call(flush(self.module), *places, f"i64 {begin}", f"i64 {end}")
            crew.barrier(self._shared)

    def _clear(self, f: Function) -> None:
        """Sums of no rows."""
        first = f.let("is.first.of.half", f"icmp eq i64 {self._me}, 0")
        with f.when("clear", first), f.loop("half", self._from, self._to) as half:
            for found in self.plan.sums:
                start = f.at(self.layout.buffer(f, found.total), f.mul(half, self._bytes(found)))
                with f.loop("byte", 0, self._bytes(found), self.module.block) as byte:
                    f.store("zeroinitializer", f.at(start, byte), self.module.block)

    def _hand_over(self, f: Function, crew: ThreadTeam, found: Sum, source: str) -> None:
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
        first, last = f.share(found.height, "%thread", "%threads") if fresh else (0, found.height)
        with nullcontext() if fresh else crew.leader():
            rows = f.mul(first, module.padded(found.width))
            to = (f"ptr {f.at(start, f.mul(strides[0], first))}", f"i64 {strides[0]}", f"i64 {strides[1]}")
            size = (f"i64 {module.padded(found.width)}", f"i64 {f.sub(last, first)}", f"i64 {found.width}")
            f.call(add_to(module, fresh=fresh), *to, f"ptr {f.at(source, rows)}", *size)
            with f.when("halved", self._halved):
                other = f.at(f.at(source, self._bytes(found)), rows)
                f.call(add_to(module, fresh=False), *to, f"ptr {other}", *size)
