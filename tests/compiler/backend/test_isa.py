"""Kernels for instruction sets that this machine needn't have: their text, and the object code LLVM makes of it."""

from __future__ import annotations

import functools
import re

import llvmlite.binding as binding
import pytest
import torch

import fusecell as fc
from fusecell.compiler.backend import llvm
from fusecell.compiler.backend.isa import instruction_set
from fusecell.compiler.backend.target import Target, target_of
from fusecell.compiler.codegen import emit
from fusecell.compiler.frontend import Traced, trace
from fusecell.compiler.schedule.scheduler import plan
from fusecell.compiler.transforms.passes import optimise
from tests.compiler.traced_cells import partitioned

MACHINES = {
    "x86_64-apple-darwin": ("haswell", {"avx2", "fma"}),
    "amd64-unknown-freebsd14": ("nehalem", {"sse4.2"}),
    "i686-unknown-linux-gnu": ("nehalem", {"sse4.2"}),
    "aarch64-unknown-linux-gnu": ("neoverse-n1", {"neon"}),
    "arm64-apple-darwin23": ("apple-m1", {"neon"}),
    "armv7l-unknown-linux-gnueabihf": ("cortex-a15", {"neon", "vfp4"}),
    "riscv64-unknown-linux-gnu": ("generic-rv64", {"m", "a", "f", "d"}),
    "powerpc64le-unknown-linux-gnu": ("pwr8", {"vsx"}),
}
# How the mode is written, and how a thread that waits says so, in each assembly.
WRITTEN = {
    "x86_64": (r"\bv?ldmxcsr\b", r"\bpause\b"),
    "i386": (r"\bv?ldmxcsr\b", r"\bpause\b"),
    "aarch64": (r"\bmsr\s+fpcr,", r"\byield\b"),
    "arm": (r"\bvmsr\s+fpscr,", r"\byield\b"),
}


def machine(triple: str) -> Target:
    cpu, features = MACHINES[triple]
    return target_of(cpu, ",".join(f"+{feature}" for feature in sorted(features)), triple, frozenset(features))


@functools.cache
def text_for(triple: str, backward: bool) -> str:
    torch.manual_seed(0)
    traced = trace(fc.GRUCell(3, 5), [(3,)], torch.float32, gradients=True)
    assert isinstance(traced, Traced)
    graphs = partitioned(traced)
    graph = graphs.backward if backward else graphs.forward
    return emit(plan(optimise(graph)[-1][1], backward=backward), machine(triple)).text


@pytest.fixture(scope="module", autouse=True)
def _all_targets():
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("triple", MACHINES)
def test_object_code(triple, backward):
    """LLVM compiles the text; denormals are flushed, the mode restored and spins hinted where the CPU can."""
    target, text = machine(triple), text_for(triple, backward)
    names = ("run", "team")
    if not backward:
        assert llvm.object_code(text, names, target.cpu, target.features, triple)
    assembly = llvm.assembly(text, names, target.cpu, target.features, triple)
    isa = target.isa
    assert isa.flushes_denormals == (isa.name in WRITTEN)
    if isa.name in WRITTEN:
        write, hint = WRITTEN[isa.name]
        assert len(re.findall(write, assembly, re.IGNORECASE)) == 2, "the mode is set once and put back once"
        assert len(re.findall(hint, assembly)) >= 2
    else:
        assert "llvm.x86" not in text
        assert "llvm.aarch64" not in text
        assert "llvm.arm" not in text
        assert f"denormals are kept on {isa.name}" in isa.about_denormals


@pytest.mark.parametrize(
    ("triples", "name"),
    [
        (("x86_64-unknown-linux-gnu", "amd64-unknown-openbsd", "x86_64h-apple-macosx"), "x86_64"),
        (("i686-pc-windows-msvc", "i386-unknown-linux-gnu"), "i386"),
        (("aarch64-unknown-linux-gnu", "arm64-apple-darwin23", "arm64e-apple-ios", "ARM64-pc-windows-msvc"), "aarch64"),
        (("armv7l-unknown-linux-gnueabihf", "armv7-linux-androideabi", "thumbv7-none-eabi"), "arm"),
        (("riscv64-unknown-linux-gnu",), "riscv64"),
        (("powerpc64le-unknown-linux-gnu", "ppc64le-redhat-linux"), "ppc64le"),
        (("sparcv9-sun-solaris",), "sparcv9"),
    ],
)
def test_spellings_of_instruction_sets(triples, name):
    assert {instruction_set(triple).name for triple in triples} == {name}


def test_arm64_and_aarch64_have_one_text():
    """The kernel for Apple's arm64 is the kernel for aarch64: only names of machines differ."""
    apple, linux = (text_for(triple, False) for triple in ("arm64-apple-darwin23", "aarch64-unknown-linux-gnu"))
    assert apple.splitlines()[1:] == linux.splitlines()[1:]
    assert "@llvm.aarch64.set.fpcr" in apple
    assert "@llvm.aarch64.hint" in apple


def test_reports_say_where_denormals_are_kept(monkeypatch):
    assert fc.show_config().denormals == instruction_set(llvm.host().triple).about_denormals
    host = llvm.host()
    monkeypatch.setattr(Target, "isa", property(lambda self: instruction_set("riscv64-unknown-linux-gnu")))
    assert host.triple  # the machine is what it was; only the record of its instruction set is another
    assert "denormals are kept on riscv64" in str(fc.show_config())
    text = str(fc.explain(fc.GRU(3, 5)))
    assert "denormals are kept on riscv64" in text


def test_explain_is_silent_where_denormals_are_flushed():
    if not instruction_set(llvm.host().triple).flushes_denormals:
        pytest.skip("denormals are kept here")
    assert "denormals" not in str(fc.explain(fc.GRU(3, 5)))
