"""The size of L2, from what each operating system says."""

from __future__ import annotations

import struct
import sys

import pytest
import torch

import fusecell as fc
from fusecell.compiler.backend import l2_cache
from fusecell.compiler.dispatch.program_cache import PROGRAMS
from fusecell.compiler.runtime import kernel_calls
from fusecell.execution.options import Options


@pytest.fixture(autouse=True)
def _forget():
    l2_cache.l2_bytes.cache_clear()
    yield
    l2_cache.l2_bytes.cache_clear()


def test_linux_names_it_in_kilobytes(tmp_path, monkeypatch):
    for index, (level, size) in enumerate([("1", "32K"), ("1", "64K"), ("2", "512K"), ("3", "32768K")]):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        (folder / "level").write_text(level + "\n")
        (folder / "size").write_text(size + "\n")
    monkeypatch.setattr(l2_cache, "_CACHES", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert l2_cache.l2_bytes() == 512 << 10


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32", "freebsd14"])
def test_a_system_that_does_not_say_has_the_usual_one(platform, monkeypatch, tmp_path):
    monkeypatch.setattr(l2_cache, "_CACHES", str(tmp_path / "absent"))
    monkeypatch.setattr(sys, "platform", platform)
    assert l2_cache.l2_bytes() == 1 << 20  # on Linux there is neither of the others' functions


def test_a_cluster_of_a_mac_shares_it():
    numbers = {"hw.perflevel0.l2cachesize": 12 << 20, "hw.perflevel0.cpusperl2": 4, "hw.l2cachesize": 4 << 20}
    assert l2_cache._on_macos(lambda name: numbers.get(name, 0)) == 3 << 20
    of_intel = {"hw.l2cachesize": 256 << 10}
    assert l2_cache._on_macos(lambda name: of_intel.get(name, 0)) == 256 << 10


def test_windows_lists_caches_among_processors():
    def entry(mask: int, relation: int, level: int = 0, size: int = 0) -> bytes:
        # ULONG_PTR, enum and padding; then of a cache BYTE, BYTE, WORD, DWORD, enum, in a union of 16 bytes.
        return struct.pack("=QII", mask, relation, 0) + struct.pack("=BBHII", level, 8, 64, size, 0) + bytes(4)

    core, l1 = entry(0b11, 0), entry(0b11, 2, 1, 48 << 10)
    l2, l3 = entry(0b11, 2, 2, 1280 << 10), entry(0xFF, 2, 3, 24 << 20)
    assert l2_cache._on_windows(lambda: core + l1 + l2 + l3) == 1280 << 10
    assert l2_cache._on_windows(lambda: entry(0b1111, 2, 2, 2 << 20)) == 1 << 20
    assert l2_cache._on_windows(lambda: core + l1) == 0


def test_chunks_fit_a_small_cache(monkeypatch):
    layer, x = fc.Recurrent(fc.GRUCell(16, 40)), torch.randn(900, 8, 16)
    program = PROGRAMS.find(layer.cell, (x,))
    chunks, results = [], []
    for size in (256 << 10, 2 << 20):
        monkeypatch.setattr(kernel_calls, "l2_bytes", lambda size=size: size)
        chunks.append(program.kernel.chunk(900, 8))
        with torch.no_grad():
            results.append(program(layer.cell, (x,), (torch.zeros(8, 40),), Options())[0])
    assert chunks[0] * 2 == chunks[1] < 900
    assert torch.equal(*results)
