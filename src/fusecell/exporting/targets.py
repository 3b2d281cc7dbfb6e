"""The machines that streams are exported for, a record each."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from fusecell.compiler.backend import llvm
from fusecell.compiler.backend.isa import instruction_set
from fusecell.compiler.backend.target import Target, target_of

__all__ = ["TARGETS", "ExportTarget", "target_named"]


@dataclass(frozen=True, kw_only=True)
class ExportTarget:
    """A machine, and what an object file for it needs.

    Attributes:
        name: what users call it.
        summary: the machine in words.
        triple, cpu, features: as LLVM has them.
        has: the features by which vectors and multiply-adds are chosen, a subset.
        abi: LLVM's name of the calling convention, where the triple leaves it open.
        small: whether size goes before speed, and no C library is assumed: a microcontroller.
        doubles: whether it computes in float64 by itself.
        suffix: of its object files.
    """

    name: str
    summary: str
    triple: str
    cpu: str = ""
    features: str = ""
    has: frozenset[str] = frozenset()
    abi: str = ""
    small: bool = False
    doubles: bool = True
    suffix: str = ".o"

    @functools.cached_property
    def machine(self) -> Target:
        """The target as the compiler has it; a kernel's caller sets how denormals are treated."""
        target = target_of(self.cpu, self.features, self.triple, self.has)
        return replace(target, sets_denormal_mode=False)

    @property
    def pointer_bits(self) -> int:
        """Bits of an address."""
        return 64 if self.triple.split("-")[0] in ("x86_64", "aarch64", "arm64", "riscv64") else 32

    @property
    def is_wasm(self) -> bool:
        """Whether it is WebAssembly."""
        return self.triple.startswith("wasm")

    @property
    def numbers(self) -> str:
        """What the bits of its results are equal to, in a sentence."""
        if self.machine.fma:
            text = "The bits of fusecell.Stream, and of every target whose multiply-adds round once"
        else:
            text = "The bits of targets whose multiply-adds round twice, such as x86-64-v2"
        if not self.machine.isa.flushes_denormals:
            text += "; denormals are kept, where others count them as zero"
        return f"{text}."


def _x86(level: str, summary: str, has: frozenset[str] = frozenset(), more: str = "") -> ExportTarget:
    """Return a level of x86-64 on Linux, or the level with VNNI, whose feature is ``more``."""
    triple = "x86_64-unknown-linux-gnu"
    added = [more] if more else []
    names = [*instruction_set(triple).features_of(level), *added]
    return ExportTarget(
        name=f"{level}-vnni" if more else level,
        summary=summary,
        triple=triple,
        cpu=level,
        features=",".join(f"+{feature}" for feature in names),
        has=has.union(added),
    )


_AVX2 = frozenset({"avx2", "f16c", "fma"})
_AVX512 = _AVX2 | {"avx512f", "avx512vl"}
_FUSED = frozenset({"vfp4"})

_ALL = (
    _x86("x86-64-v2", "x86-64 with SSE4.2, Linux"),
    _x86("x86-64-v3", "x86-64 with AVX2 and FMA, Linux", _AVX2),
    _x86("x86-64-v4", "x86-64 with AVX-512, Linux", _AVX512),
    _x86("x86-64-v3", "x86-64 with AVX2, FMA and AVX-VNNI for int8-dynamic, Linux", _AVX2, "avxvnni"),
    _x86("x86-64-v4", "x86-64 with AVX-512 and its VNNI for int8-dynamic, Linux", _AVX512, "avx512vnni"),
    ExportTarget(name="aarch64", summary="64-bit ARM, Linux", triple="aarch64-unknown-linux-gnu", cpu="generic"),
    ExportTarget(
        name="aarch64-dotprod",
        summary="64-bit ARM with dot products for int8-dynamic (ARMv8.2 and later), Linux",
        triple="aarch64-unknown-linux-gnu",
        cpu="generic",
        features="+v8.2a,+dotprod",
        has=frozenset({"dotprod"}),
    ),
    ExportTarget(
        name="arm64-apple",
        summary="Apple silicon, macOS 11 and later",
        triple="arm64-apple-macosx11.0.0",
        cpu="apple-m1",
        has=frozenset({"dotprod"}),
    ),
    ExportTarget(
        name="armv7",
        summary="32-bit ARM with NEON and VFPv4, hard-float Linux",
        triple="armv7-unknown-linux-gnueabihf",
        cpu="cortex-a7",
        features="+neon,+vfp4",
        has=_FUSED,
    ),
    ExportTarget(
        name="cortex-m4",
        summary="ARM Cortex-M4F, bare metal",
        triple="thumbv7em-none-eabihf",
        cpu="cortex-m4",
        has=_FUSED,
        small=True,
        doubles=False,
    ),
    ExportTarget(
        name="cortex-m7",
        summary="ARM Cortex-M7 with the FPU for both formats, bare metal",
        triple="thumbv7em-none-eabihf",
        cpu="cortex-m7",
        has=_FUSED,
        small=True,
    ),
    ExportTarget(
        name="cortex-m33",
        summary="ARM Cortex-M33 with FPU, bare metal",
        triple="thumbv8m.main-none-eabihf",
        cpu="cortex-m33",
        has=_FUSED,
        small=True,
        doubles=False,
    ),
    ExportTarget(
        name="cortex-m55",
        summary="ARM Cortex-M55 with FPU, without Helium's vectors, bare metal",
        triple="thumbv8.1m.main-none-eabihf",
        cpu="cortex-m55",
        features="-mve,-mve.fp",
        has=_FUSED,
        small=True,
    ),
    ExportTarget(
        name="riscv64",
        summary="64-bit RISC-V (rv64gc), Linux",
        triple="riscv64-unknown-linux-gnu",
        cpu="generic-rv64",
        features="+m,+a,+f,+d,+c",
        has=frozenset({"d"}),
        abi="lp64d",
    ),
    ExportTarget(
        name="wasm32",
        summary="WebAssembly with 128-bit vectors",
        triple="wasm32-unknown-unknown",
        features="+simd128,+bulk-memory,+mutable-globals,+sign-ext,+nontrapping-fptoint",
    ),
    ExportTarget(
        name="windows",
        summary="x86-64 with AVX2 and FMA, Windows",
        triple="x86_64-pc-windows-msvc",
        cpu="x86-64-v3",
        features=",".join(f"+{feature}" for feature in instruction_set("x86_64").features_of("x86-64-v3")),
        has=_AVX2,
        suffix=".obj",
    ),
)
TARGETS: Mapping[str, ExportTarget] = MappingProxyType({target.name: target for target in _ALL})
"""Every target but ``host``, by name."""


def target_named(name: str) -> ExportTarget:
    """Return a target by its name; ``host`` is this machine.

    Example:
        >>> from fusecell.exporting.targets import target_named
        >>> target_named("riscv64").triple
        'riscv64-unknown-linux-gnu'

    Raises:
        ValueError: for any other name.
    """
    if name == "host":
        host = llvm.host()
        return ExportTarget(
            name="host",
            summary=f"this machine, {host.cpu}",
            triple=host.triple,
            cpu=host.cpu,
            features=host.feature_text,
            has=host.features,
            suffix=".obj" if "windows" in host.triple else ".o",
        )
    if name not in TARGETS:
        raise ValueError(f"No target is called {name!r}; there are: host, {', '.join(TARGETS)}.")
    return TARGETS[name]
