"""The sizes of caches, from what each operating system says, and what follows them."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest
import torch

import fusecell as fc
from fusecell.compiler.backend import cache_sizes as module
from fusecell.compiler.backend.cache_sizes import USUAL, CacheSizes, cache_sizes
from fusecell.compiler.backend.target import target_of
from fusecell.compiler.codegen.tile_cost import Product, TileCost
from fusecell.compiler.dispatch.program_cache import PROGRAMS
from fusecell.compiler.ir.sizes import DType
from fusecell.compiler.runtime import kernel_calls
from fusecell.execution.options import Options

_OF_ZEN_3 = (("1", "Data", "32K", "0-1"), ("1", "Instruction", "64K", "0-1"), ("2", "Unified", "512K", "0-1"))


@pytest.fixture
def linux(tmp_path, monkeypatch):
    """Return a function that makes the files of a Linux machine."""
    monkeypatch.setattr(module, "_CACHES", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_THREADS_OF_A_CORE", str(tmp_path / "thread_siblings_list"))
    monkeypatch.setattr(sys, "platform", "linux")

    def write(*caches: tuple[str, str, str, str], threads: str = "0-1") -> None:
        (tmp_path / "thread_siblings_list").write_text(f"{threads}\n")
        for index, values in enumerate(caches):
            folder = tmp_path / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, value in zip(("level", "type", "size", "shared_cpu_list"), values, strict=True):
                Path(folder, name).write_text(f"{value}\n")

    cache_sizes.cache_clear()
    yield write
    cache_sizes.cache_clear()


@pytest.mark.parametrize(
    ("caches", "threads", "expected"),
    [
        (_OF_ZEN_3, "0-1", CacheSizes(32 << 10, 512 << 10)),
        ([("1", "Data", "48K", "0"), ("2", "Unified", "2048K", "0"), ("3", "Unified", "266240K", "0-9")], "0",
         CacheSizes(48 << 10, 2 << 20)),
        # Threads of a core that are far apart, and an L2 of two such cores.
        ([("1", "Data", "32K", "0,8"), ("2", "Unified", "4096K", "0-1,8-9")], "0,8", CacheSizes(32 << 10, 2 << 20)),
        ([("1", "Data", "64K", "0")], "0", CacheSizes(64 << 10, USUAL.l2)),
        ([("2", "Unified", "?", "0")], "0", USUAL),
    ],
)  # fmt: skip
def test_linux_names_them_in_kilobytes(linux, caches, threads, expected):
    linux(*caches, threads=threads)
    assert cache_sizes() == expected


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32", "freebsd14"])
def test_a_system_that_does_not_say_has_the_usual_ones(platform, linux, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    assert cache_sizes() == USUAL  # on Linux there is neither of the others' functions


def test_a_cluster_of_a_mac_shares_its_second():
    numbers = {
        "hw.perflevel0.l1dcachesize": 128 << 10, "hw.perflevel0.l2cachesize": 12 << 20,
        "hw.perflevel0.cpusperl2": 4, "hw.l1dcachesize": 64 << 10, "hw.l2cachesize": 4 << 20,
    }  # fmt: skip
    assert module._on_macos(lambda name: numbers.get(name, 0)) == (128 << 10, 3 << 20)
    of_intel = {"hw.l1dcachesize": 32 << 10, "hw.l2cachesize": 256 << 10}
    assert module._on_macos(lambda name: of_intel.get(name, 0)) == (32 << 10, 256 << 10)


def test_windows_lists_caches_among_processors():
    unified, instruction, data = 0, 1, 2

    def entry(mask: int, relation: int, level: int = 0, size: int = 0, kind: int = unified) -> bytes:
        # ULONG_PTR, enum and padding; then of a cache BYTE, BYTE, WORD, DWORD, enum, in a union of 16 bytes.
        return struct.pack("=QII", mask, relation, 0) + struct.pack("=BBHII", level, 8, 64, size, kind) + bytes(4)

    core = entry(0b11, 0) + entry(0b11, 2, 1, 64 << 10, instruction)
    l1, l2, l3 = entry(0b11, 2, 1, 48 << 10, data), entry(0b11, 2, 2, 1280 << 10), entry(0xFF, 2, 3, 24 << 20)
    assert module._on_windows(lambda: core + l1 + l2 + l3) == (48 << 10, 1280 << 10)
    assert module._on_windows(lambda: entry(0b1111, 2, 2, 2 << 20)) == (0, 1 << 20)
    assert module._on_windows(lambda: core + l1) == (48 << 10, 0)


def test_a_panel_that_fits_a_larger_first_cache_is_read_from_it():
    features = frozenset(("avx2", "fma"))
    target = target_of("x86-64-v3", "+avx2,+fma", "x86_64-unknown-linux-gnu", features)
    product, heights = Product(fused=2, depth=192), [(4, 1)]  # 24 kB of weights: half of 48, not of 32
    cycles = []
    for l1_bytes in (32 << 10, 48 << 10):
        cost = TileCost(target, DType.F32)
        cost.l1_bytes = l1_bytes
        cycles.append(cost.portion(heights, product, 1))
    assert cycles[0] > cycles[1]


def test_chunks_fit_a_small_cache(monkeypatch):
    layer, x = fc.Recurrent(fc.GRUCell(16, 40)), torch.randn(900, 8, 16)
    program = PROGRAMS.find(layer.cell, (x,))
    chunks, results = [], []
    for size in (256 << 10, 2 << 20):
        monkeypatch.setattr(kernel_calls, "cache_sizes", lambda size=size: CacheSizes(USUAL.l1, size))
        chunks.append(program.kernel.chunk(900, 8))
        with torch.no_grad():
            results.append(program(layer.cell, (x,), (torch.zeros(8, 40),), Options())[0])
    assert chunks[0] * 2 == chunks[1] < 900
    assert torch.equal(*results)
