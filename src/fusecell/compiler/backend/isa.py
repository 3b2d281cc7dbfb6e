"""Instruction sets, a record each: levels of CPUs, how to flush denormals and to pause, which LLVM doesn't tell.

To support another, add a record to ``_INSTRUCTION_SETS`` and the spellings of its triples to its ``spellings``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

__all__ = ["ByteDot", "DenormalControl", "InstructionSet", "PairDot", "instruction_set"]


@dataclass(frozen=True)
class DenormalControl:
    """The register that says whether denormals count as zero, and how LLVM reads and writes it.

    Attributes:
        read: the intrinsic that reads the register.
        write: the intrinsic that writes it.
        bits: the register's width.
        flush: the bits that, set, make denormals count as zero.
        through_memory: whether the intrinsics take the address of the value, as x86's do, not the value.
    """

    read: str
    write: str
    bits: int
    flush: int
    through_memory: bool = False

    @property
    def declarations(self) -> set[str]:
        """The intrinsics, declared."""
        if self.through_memory:
            return {f"declare void {self.read}(ptr)", f"declare void {self.write}(ptr)"}
        return {f"declare i{self.bits} {self.read}()", f"declare void {self.write}(i{self.bits})"}


@dataclass(frozen=True)
class ByteDot:
    """The instruction that adds the products of four bytes with four others, for each sum of 32 bits of a vector.

    Attributes:
        feature: that a CPU with it has.
        intrinsic: LLVM's name of it, without ``llvm.``.
        bits: the width of its vectors.
        signed: whether the bytes of both operands are signed; else those of the first are not.
        takes_words: whether the operands are vectors of words to LLVM, each of four bytes; else of bytes.
    """

    feature: str
    intrinsic: str
    bits: int
    signed: bool = False
    takes_words: bool = True

    @property
    def sums(self) -> str:
        """LLVM's type of the sums."""
        return f"<{self.bits // 32} x i32>"

    @property
    def bytes(self) -> str:
        """LLVM's type of a vector of bytes."""
        return f"<{self.bits // 8} x i8>"

    @property
    def operand(self) -> str:
        """LLVM's type of an operand."""
        return self.sums if self.takes_words else self.bytes


@dataclass(frozen=True)
class PairDot:
    """The instruction that adds the products of two bfloat16 numbers with two others, for each float32 sum of a vector.

    Attributes:
        feature: that a CPU with it has.
        intrinsic: LLVM's name of it, without ``llvm.``.
        bits: the width of its vectors.
    """

    feature: str
    intrinsic: str
    bits: int

    @property
    def sums(self) -> str:
        """LLVM's type of the sums."""
        return f"<{self.bits // 32} x float>"

    @property
    def operand(self) -> str:
        """LLVM's type of an operand: two numbers for each sum, neighbours in memory."""
        return f"<{self.bits // 16} x bfloat>"


@dataclass(frozen=True, eq=False)
class InstructionSet:
    """Properties of an instruction set that kernels use.

    Attributes:
        name: LLVM's name of the architecture.
        spellings: how triples begin that mean it; its name where none is listed.
        vector_registers: how many there are, without extensions.
        always_fused: whether a multiply-add with one rounding is part of the base.
        fused_features: features each of which brings one.
        half_features: features each of which brings instructions that convert float16 to float32; None: the base does.
        byte_dots: instructions that multiply bytes, the widest first.
        pair_dots: instructions that multiply pairs of bfloat16 numbers, the widest first.
        denormals: how denormals are made to count as zero; None where nothing does it.
        spin_hint: the declaration, and the call, of the hint that a core is in a spin loop; None where there is none.
        levels: the targets that can be named, and the features that each adds to the one before.
    """

    name: str
    spellings: tuple[str, ...] = ()
    vector_registers: int = 16
    always_fused: bool = False
    fused_features: frozenset[str] = frozenset()
    half_features: frozenset[str] | None = frozenset()
    byte_dots: tuple[ByteDot, ...] = ()
    pair_dots: tuple[PairDot, ...] = ()
    denormals: DenormalControl | None = None
    spin_hint: tuple[str, str] | None = None
    levels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def flushes_denormals(self) -> bool:
        """Whether denormals count as zero in kernels."""
        return self.denormals is not None

    @property
    def about_denormals(self) -> str:
        """How kernels treat denormals, in words."""
        if self.flushes_denormals:
            return "count as zero inside kernels"
        return f"denormals are kept on {self.name}, which has no switch for them that fusecell knows"

    def features_of(self, level: str) -> tuple[str, ...]:
        """List all features of a level, those of the levels below it included."""
        names = list(self.levels)
        return tuple(feature for name in names[: names.index(level) + 1] for feature in self.levels[name])


_MXCSR = DenormalControl(  # bit 15, flush to zero: denormal results; bit 6, denormals are zero: denormal operands
    "@llvm.x86.sse.stmxcsr", "@llvm.x86.sse.ldmxcsr", 32, 0x8040, through_memory=True
)
_X86_PAUSE = ("declare void @llvm.x86.sse2.pause()", "call void @llvm.x86.sse2.pause()")

_INSTRUCTION_SETS = (
    InstructionSet(
        "x86_64",
        ("x86_64", "x86_64h", "amd64"),
        fused_features=frozenset({"fma"}),
        half_features=frozenset({"f16c"}),
        byte_dots=(
            ByteDot("avx512vnni", "x86.avx512.vpdpbusd.512", 512),
            ByteDot("avxvnni", "x86.avx512.vpdpbusd.256", 256),
        ),
        pair_dots=(PairDot("avx512bf16", "x86.avx512bf16.dpbf16ps.512", 512),),
        denormals=_MXCSR,
        spin_hint=_X86_PAUSE,
        # The levels of the x86-64 psABI in LLVM's names.
        levels=MappingProxyType(
            {
                "x86-64-v2": ("cx16", "popcnt", "sahf", "sse3", "ssse3", "sse4.1", "sse4.2"),
                "x86-64-v3": ("avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "xsave"),
                "x86-64-v4": ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
            }
        ),
    ),
    InstructionSet(
        "i386",
        ("i386", "i486", "i586", "i686", "x86"),
        vector_registers=8,
        fused_features=frozenset({"fma"}),
        denormals=_MXCSR,
        spin_hint=_X86_PAUSE,
    ),
    InstructionSet(
        "aarch64",
        ("aarch64", "aarch64_be", "arm64", "arm64e", "arm64ec"),
        vector_registers=32,
        always_fused=True,
        half_features=None,
        byte_dots=(ByteDot("dotprod", "aarch64.neon.sdot.v4i32.v16i8", 128, signed=True, takes_words=False),),
        denormals=DenormalControl("@llvm.aarch64.get.fpcr", "@llvm.aarch64.set.fpcr", 64, 1 << 24),  # bit FZ
        spin_hint=("declare void @llvm.aarch64.hint(i32)", "call void @llvm.aarch64.hint(i32 1)"),  # yield
    ),
    InstructionSet(
        "arm",
        (
            "arm",
            "armv6",
            "armv6l",
            "armv7",
            "armv7a",
            "armv7l",
            "armv7s",
            "armv7k",
            "armv8l",
            "thumbv7",
            "thumbv7a",
            "thumbv7em",
            "thumbv8m.main",
            "thumbv8.1m.main",
        ),
        fused_features=frozenset({"vfp4"}),
        half_features=frozenset({"vfp4"}),
        denormals=DenormalControl("@llvm.arm.get.fpscr", "@llvm.arm.set.fpscr", 32, 1 << 24),
        spin_hint=("declare void @llvm.arm.hint(i32)", "call void @llvm.arm.hint(i32 1)"),  # yield
    ),
    # None of these has a mode that flushes scalar numbers and vectors alike.
    InstructionSet("riscv64", vector_registers=32, fused_features=frozenset({"d"})),
    InstructionSet("ppc64le", ("powerpc64le", "ppc64le"), vector_registers=32, fused_features=frozenset({"vsx"})),
    InstructionSet("s390x", fused_features=frozenset({"vector"})),
    InstructionSet("loongarch64", fused_features=frozenset({"d"})),
)
_BY_SPELLING = {spelling: isa for isa in _INSTRUCTION_SETS for spelling in isa.spellings or (isa.name,)}


@functools.cache
def instruction_set(triple: str) -> InstructionSet:
    """Return the instruction set of a target triple, however that spells it; one that isn't listed has the defaults.

    Example:
        >>> from fusecell.compiler.backend.isa import instruction_set
        >>> instruction_set("arm64-apple-darwin23").name
        'aarch64'
    """
    spelling = triple.split("-", 1)[0].lower()
    return _BY_SPELLING.get(spelling) or InstructionSet(spelling)
