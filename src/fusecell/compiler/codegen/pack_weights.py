"""Bringing weights into panels, in the order in which tiles read them."""

from __future__ import annotations

from collections.abc import Iterable

from fusecell.compiler.codegen.kernel_abi import Layout, Panel
from fusecell.compiler.codegen.llvm_builder import LANES, Function, Module

__all__ = ["emit_packing", "pack_panel_name"]


def emit_packing(module: Module, layout: Layout, panels: Iterable[Panel]) -> None:
    """Write the function of every panel that packs some of its column blocks, from one on, to an address."""
    for panel in panels:
        f = Function(module, pack_panel_name(panel), "ptr %args", "i64 %block0", "i64 %blocks", "ptr %to")
        f.comment(", ".join(name for name, *_ in panel.weights))
        step = len(panel.weights) * module.block
        pack = _pack(module, len(panel.weights))
        for position, (name, transposed, (k0, _), (f0, _)) in enumerate(panel.weights):
            strides = [layout.word(f, f"weight.{name}.stride{d}") for d in (0, 1)]
            column, k = strides if transposed else strides[::-1]
            source = f.at(layout.pointer(f, f"weight.{name}.ptr"), f.mul(k, k0))
            source = f.at(source, f.mul(column, f0))
            with f.loop("b", 0, "%blocks") as b:
                done = f.mul(f.add("%block0", b), LANES)
                columns = f.minimum(f.sub(panel.width, done), LANES, "columns")
                f.call(
                    pack,
                    f"ptr {f.at(f.at('%to', f.mul(b, panel.depth * step)), position * module.block)}",
                    f"ptr {f.at(source, f.mul(column, done))}",
                    f"i64 {k}",
                    f"i64 {column}",
                    f"i64 {columns}",
                    f"i64 {panel.depth}",
                )
        f.end()


def pack_panel_name(panel: Panel) -> str:
    """The function that packs a panel."""
    return f"pack.{panel.name}"


def _pack(module: Module, products: int) -> str:
    """The function that packs one of so many products, emitted on first use.

    Column by column where k is contiguous, row by row where columns are; columns beyond the weight's are zero.
    """
    name = f"pack.{products}"
    if name in module.made:
        return name
    module.made.add(name)
    to_k = products * module.block
    f = Function(
        module, name, "ptr noalias %to", "ptr %from", "i64 %from.k", "i64 %from.column", "i64 %columns", "i64 %depth"
    )
    scalar, size = module.scalar, module.bytes
    contiguous = f.let("contiguous", f"icmp eq i64 %from.column, {size}")
    mask = f.first_lanes("%columns")
    with f.when("rows", contiguous), f.loop("k", 0, "%depth") as k:
        value = f.load_masked(f.at("%from", f.mul(k, "%from.k")), mask, "row")
        f.store(value, f.at("%to", f.mul(k, to_k)), module.block)
    other = f.let("other", f"xor i1 {contiguous}, true")
    with f.when("columns", other):
        by_k = f.let("by.k", f"icmp eq i64 %from.k, {size}")
        whole = f.let("whole", f"icmp eq i64 %columns, {LANES}")
        squares = f.let("squares", f"and i1 {by_k}, {whole}")
        most = f.let("most", f"and i64 %depth, {-LANES}")
        done = f.let("done", f"select i1 {squares}, i64 {most}, i64 0")
        _transpose(f, done, to_k)
        with f.loop("k", done, "%depth") as k:
            f.store("zeroinitializer", f.at("%to", f.mul(k, to_k)), module.block)
        with f.loop("column", 0, "%columns") as column:
            source = f.at("%from", f.mul(column, "%from.column"))
            target = f.at("%to", f.mul(column, size))
            with f.loop("k", done, "%depth") as k:
                pointer = f.at(source, f.mul(k, "%from.k"))
                value = f.let("value", f"load {scalar}, ptr {pointer}, align {size}")
                f.do(f"store {scalar} {value}, ptr {f.at(target, f.mul(k, to_k))}, align {size}")
    f.end()
    return name


def _transpose(f: Function, most: str, to_k: int) -> None:
    """Sixteen columns of as many k at a time, turned over in registers: pairs of rows 8, 4, 2, 1 apart trade halves."""
    columns = [f.mul("%from.column", lane) for lane in range(LANES)]
    below = [row * to_k for row in range(LANES)]
    with f.loop("square", 0, most, LANES) as k:
        source = f.at("%from", f.mul(k, f.module.bytes))
        rows = [f.load(f.at(source, column), "column", f.module.bytes) for column in columns]
        target = f.at("%to", f.mul(k, to_k))
        for row, offset in zip(_turned_over(f, rows), below, strict=True):
            f.store(row, f.at(target, offset), f.module.block)


def _turned_over(f: Function, rows: list[str]) -> list[str]:
    apart = LANES // 2
    while apart:
        low = [lane if not lane & apart else LANES + lane - apart for lane in range(LANES)]
        high = [lane + apart if not lane & apart else LANES + lane for lane in range(LANES)]
        for row in range(LANES):
            if not row & apart:
                a, b = rows[row], rows[row + apart]
                rows[row], rows[row + apart] = (_shuffle(f, a, b, lanes) for lanes in (low, high))
        apart //= 2
    return rows


def _shuffle(f: Function, a: str, b: str, lanes: list[int]) -> str:
    vector = f.module.vector
    chosen = ", ".join(f"i32 {lane}" for lane in lanes)
    return f.let("turned", f"shufflevector {vector} {a}, {vector} {b}, <{LANES} x i32> <{chosen}>")
