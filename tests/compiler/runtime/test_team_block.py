"""The team block that the threads of a call share: one layout for the runtime and for machine code."""

from __future__ import annotations

import ctypes
import itertools
import re
from array import array

import pytest
import torch

import fusecell as fc
from fusecell.compiler.backend.tuning import TUNING
from fusecell.compiler.codegen import kernel_abi, work_sharing
from fusecell.compiler.codegen.kernel_abi import SLOT_BYTES, TeamBlock
from fusecell.compiler.dispatch.runner import find_program
from fusecell.compiler.programs import launch
from fusecell.compiler.runtime import thread_team
from tests.compiler.tuned import tuned

CACHE_LINE = 64


def kernel():
    cell = fc.GRUCell(3, 5)
    return find_program(cell, (torch.zeros(1, 1, 3),)).kernel


def test_slots_do_not_overlap():
    spans = sorted((slot.offset, slot.offset + SLOT_BYTES) for slot in TeamBlock)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert len(TeamBlock.__members__) == len(TeamBlock), "two names for one slot"
    assert spans[-1][1] == SLOT_BYTES * TeamBlock.slots()
    assert spans[0][0] == 0, "the runtime gives the block's address to threads that count up its first word"
    assert array("q").itemsize == SLOT_BYTES


def test_arrival_and_barrier_slots_are_on_different_cache_lines():
    assert TeamBlock.ARRIVED.offset // CACHE_LINE != TeamBlock.BARRIER.offset // CACHE_LINE


def test_both_sides_use_one_definition():
    assert work_sharing.TeamBlock is kernel_abi.TeamBlock is thread_team.TeamBlock


def test_machine_code_touches_slots_only():
    """Every offset from the block, or from its barrier, in the text is that of a slot."""
    text = kernel().loaded.llvm
    functions = "\n".join(re.findall(r"^define .*?@(?:team|gather)\(.*?^}", text, re.M | re.S))
    offsets = {int(offset) for offset in re.findall(r"getelementptr i8, ptr %block, i64 (\d+)", functions)}
    waits = "\n".join(re.findall(r"^define .*?@(?:join|barrier)\(.*?^}", text, re.M | re.S))
    offsets |= {
        TeamBlock.BARRIER.offset + int(offset)
        for offset in re.findall(r"getelementptr i8, ptr %barrier, i64 (-?\d+)", waits)
    }
    assert offsets == {slot.offset for slot in TeamBlock if slot.offset}


def test_the_runtime_writes_what_machine_code_reads(monkeypatch):
    """A function in place of the kernel sees each slot as filled, and its answers are read back."""
    seen = {}

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def team(address):
        block = (ctypes.c_int64 * TeamBlock.slots()).from_address(address)
        seen.update({slot: block[slot] for slot in TeamBlock})
        block[TeamBlock.WORKED], block[TeamBlock.YIELDS] = 1, 10**9

    judged = []
    monkeypatch.setattr(thread_team._backoff, "judge", lambda now, *, late: judged.append(late))
    address = ctypes.cast(team, ctypes.c_void_p).value
    thread_team.run_team(address, 0x1230, 1, 100.0)
    assert seen[TeamBlock.ARGUMENTS] == 0x1230
    assert seen[TeamBlock.THREADS] == 1
    assert seen[TeamBlock.YIELD] == thread_team._yield()
    assert seen[TeamBlock.ARRIVAL_BUDGET] == 100 * TUNING.spins_per_us
    answers = (TeamBlock.ARRIVED, TeamBlock.TEAM_SIZE, TeamBlock.BARRIER, TeamBlock.WORKED, TeamBlock.YIELDS)
    assert [seen[slot] for slot in answers] == [0] * len(answers)
    assert judged == [True], "it gave its core away more often than a call has microseconds"


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_team_reports_how_many_threads_worked(threads, monkeypatch):
    """The kernel runs on Python threads that wait for all: as many work as requested."""
    monkeypatch.setattr(thread_team, "_openmp", lambda: None)
    late = []
    # Cores that others use are no matter here.
    tuned(monkeypatch, least_arrival_us=1e12, most_arrival_us=1e12, yields_every_us=0)
    monkeypatch.setattr(thread_team._backoff, "judge", lambda now, *, late_=late, late: late_.append(late))
    monkeypatch.setattr(launch, "crew_size", lambda *_: threads)
    layer, x = fc.Recurrent(fc.GRUCell(3, 37)), torch.randn(6, 13, 3)
    with torch.no_grad():
        y, _ = layer(x)
        with fc.runner("eager"):
            expected, _ = layer(x)
    torch.testing.assert_close(y, expected)
    assert late == [False] * (threads > 1)
