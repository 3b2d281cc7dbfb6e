"""Target: the CPU that kernels are compiled for, this machine's or one that is asked for."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, replace

from fusecell.compiler.backend import llvm, tuning
from fusecell.compiler.backend.cache_sizes import USUAL, cache_sizes
from fusecell.compiler.backend.isa import ByteDot, InstructionSet, PairDot, instruction_set
from fusecell.compiler.backend.tuning import Tuning

__all__ = ["Target", "host_target", "target_of"]

NATIVE = "native"


@dataclass(frozen=True)
class Target:
    """CPU as code generation and LLVM need to know it.

    Attributes:
        cpu: LLVM's name of the CPU, which also chooses its scheduling model.
        features: LLVM's feature text, ``"+avx2,+fma"``.
        triple: LLVM's target triple.
        vector_bits: width of the widest vector worth using: 512, 256 or 128.
        fma: whether a multiply-add is one instruction with one rounding.
        registers: number of vector registers.
        converts_half: whether it has instructions that convert float16 to float32.
        byte_dot: the instruction that multiplies bytes, x86's VNNI or ARM's dot product; None if it has none.
        pair_dot: the instruction that multiplies pairs of bfloat16 numbers; None if it has none.
        l1_bytes: bytes of a core's first cache for data, by which tiles are chosen.
        sets_denormal_mode: whether a kernel makes denormals count as zero itself; else its caller does.
    """

    cpu: str
    features: str
    triple: str
    vector_bits: int
    fma: bool
    registers: int
    converts_half: bool = False
    byte_dot: ByteDot | None = None
    pair_dot: PairDot | None = None
    l1_bytes: int = USUAL.l1
    sets_denormal_mode: bool = True

    @property
    def name(self) -> str:
        """A short label: the level's name, or ``"host"`` and the CPU's."""
        return self.cpu if self.cpu in self.isa.levels else f"host {self.cpu}"

    @property
    def tuning(self) -> Tuning:
        """Sizes and rates that kernels are fitted to; the same for every CPU so far."""
        return tuning.TUNING

    @property
    def isa(self) -> InstructionSet:
        """The instruction set, by the triple."""
        return instruction_set(self.triple)


def host_target() -> Target:
    """Return the target that ``FUSECELL_TARGET`` names: ``native`` (the default) or an x86-64 level.

    The variable is read at every call.

    Example:
        >>> from fusecell.compiler.backend.target import host_target
        >>> host_target().vector_bits in (128, 256, 512)
        True

    Raises:
        ValueError: the value is unknown, or names a level above what this CPU has.
    """
    return _target_named(os.environ.get("FUSECELL_TARGET", "") or NATIVE)


@functools.cache
def _target_named(choice: str) -> Target:
    host = llvm.host()
    if choice == NATIVE:
        target = target_of(host.cpu, host.feature_text, host.triple, host.features)
        return replace(target, l1_bytes=cache_sizes().l1)
    isa = instruction_set(host.triple)
    if choice not in isa.levels:
        raise ValueError(
            f"FUSECELL_TARGET is {choice!r}, but this CPU ({host.cpu}, {host.triple}) has no such level; "
            f"expected one of {', '.join((NATIVE, *isa.levels))}."
        )
    # A text compiled for features that the CPU lacks would end the process with an illegal instruction.
    needed = isa.features_of(choice)
    missing = [feature for feature in needed if feature not in host.features]
    if missing:
        fitting = [level for level in isa.levels if host.features.issuperset(isa.features_of(level))]
        raise ValueError(
            f"FUSECELL_TARGET is {choice!r}, but this CPU ({host.cpu}, {host.triple}) lacks "
            f"{', '.join(missing)}; here it can be {' or '.join((NATIVE, *fitting))}."
        )
    return target_of(choice, ",".join(f"+{feature}" for feature in needed), host.triple, frozenset(needed))


def target_of(cpu: str, features: str, triple: str, has: frozenset[str]) -> Target:
    """Return the target of a CPU with these features, which need not be this machine's.

    Arguments:
        cpu: LLVM's name of the CPU.
        features: LLVM's feature text.
        triple: LLVM's target triple.
        has: the features as a set.
    """
    isa = instruction_set(triple)
    avx512 = {"avx512f", "avx512vl"} <= has
    avx2 = {"avx2", "fma"} <= has
    # AVX-512 doubles the vector registers, in 64-bit code alone.
    registers = 32 if avx512 and isa.name == "x86_64" else isa.vector_registers
    vector_bits = 512 if avx512 else 256 if avx2 else 128
    byte_dots = (dot for dot in isa.byte_dots if dot.feature in has and dot.bits <= vector_bits)
    pair_dots = (dot for dot in isa.pair_dots if dot.feature in has and dot.bits <= vector_bits)
    return Target(
        cpu=cpu,
        features=features,
        triple=triple,
        vector_bits=vector_bits,
        fma=isa.always_fused or avx512 or bool(isa.fused_features & has),
        registers=registers,
        converts_half=isa.half_features is None or bool(isa.half_features & has),
        byte_dot=next(byte_dots, None),
        pair_dot=next(pair_dots, None),
    )
