"""Machine code in a stream's file: compile it when the stream is saved, check and map it when the file is loaded.

The metadata ``code`` is a JSON list with an entry for each CPU: its features, and for each step how its image is
called. The images, :mod:`fusecell.compiler.backend.object_image`, are tensors, ``code.<entry>.<step>``. What describes
an image is checked here in every detail; what the image does can't be.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from fusecell.compiler.backend.host_features import host_level_features, host_machine
from fusecell.compiler.backend.isa import instruction_set
from fusecell.compiler.backend.object_image import LIBRARY_FUNCTIONS
from fusecell.compiler.ir.graph import Graph
from fusecell.compiler.ir.sizes import SLOT_BYTES, Size
from fusecell.compiler.ir.storage import Storage
from fusecell.compiler.runtime.argument_block import Slots
from fusecell.compiler.runtime.kernel_calls import KernelCalls
from fusecell.compiler.runtime.mapped_code import MappedCode
from fusecell.errors import CompilerError, quoted
from fusecell.streaming.bound_step import Array
from fusecell.streaming.limits import Limits
from fusecell.strict_json import parse_json
from fusecell.tensor_file import TensorFile

__all__ = ["CpuCode", "StepCode", "compile_code", "misfit", "read_code"]

CALLING_CONVENTION = 1
"""Raise it whenever the meaning of a slot changes: older files are then compiled anew."""

_TRIPLE, _MACHINE = "x86_64-unknown-linux-gnu", "linux-x86_64"
# Those with a fused multiply-add: without one the code would call a library for it, and give other bits.
_V3, _V4 = (instruction_set(_TRIPLE).features_of(level) for level in ("x86-64-v3", "x86-64-v4"))
_LEVELS = {
    "x86-64-v3": _V3,
    "x86-64-v3-vnni": (*_V3, "avxvnni"),
    "x86-64-v4": _V4,
    "x86-64-v4-vnni": (*_V4, "avx512vnni"),
}
_BYTE_DOTS = "-vnni"
_FEATURES = frozenset(feature for level in _LEVELS.values() for feature in level)
_SIZES = ("fixed", "per_row", "per_chunk_row", "per_chunk_step", "per_thread", "gaps")
_STEP_KEYS = {"entry", "rebased", "imported", "slots", "scratch", "macs"}
_CODE_KEYS = {"target", "machine", "features", "convention", "steps"}
_MOST_TARGETS, _MOST_FEATURES, _MOST_TEXT = 16, 256, 256
_MOST_SLOTS, _MOST_REBASED = 1 << 16, 1 << 16
_POINTERS = ("in.", "weight.", "first.", "last.", "out.")


class StepCode(NamedTuple):
    """The machine code of a step, checked, not mapped yet."""

    graph: Graph
    image: bytes
    entry: int
    rebased: list[int]
    imported: dict[str, int]
    slots: Slots
    scratch: Size
    macs: int

    def load(self) -> KernelCalls:
        """Map the code into memory."""
        code = MappedCode(self.image, self.entry, self.rebased, self.imported)
        graph = self.graph
        return _MappedKernel(
            macs=self.macs,
            output_sizes={label: graph[graph.outputs[label]].size for label in self.slots.outputs},
            slots=self.slots,
            scratch=self.scratch,
            # PYFUNCTYPE holds the GIL during the call, CFUNCTYPE releases it.
            short=ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(code.address),
            long=ctypes.CFUNCTYPE(None, ctypes.c_void_p)(code.address),
            code=code,
        )


class CpuCode(NamedTuple):
    """The machine code of a stream for one kind of CPU.

    Attributes:
        target: its name.
        machine: the operating system and the architecture.
        features: what the CPU must have, by LLVM's names.
        convention: how the code is called.
        steps: the code of each step.
    """

    target: str
    machine: str
    features: frozenset[str]
    convention: int
    steps: list[StepCode]


@dataclass(frozen=True, kw_only=True)
class _MappedKernel(KernelCalls):
    """A kernel that came with a file; ``code`` keeps it mapped."""

    code: MappedCode


def compile_code(graphs: Sequence[Graph], names: Sequence[str]) -> tuple[str, dict[str, Array]]:
    """Compile the steps of a stream for some CPUs; return their description and the images.

    Arguments:
        names: of the CPUs, as :meth:`fusecell.Stream.save` takes them.

    Raises:
        ValueError: for an unknown name.
        CompilerError: if a step's code can't be linked.
    """
    if isinstance(names, str):
        raise ValueError(f"code_for takes a list of names, as in code_for=[{names!r}].")
    images: dict[str, Array] = {}
    described = []
    stored = {graph[leaf].attrs.get("stored") for graph in graphs for leaf in graph.leaves("weight")}
    levels = [_level(name, multiplies_bytes=Storage.I8_I8.value in stored) for name in names]
    for number, level in enumerate(dict.fromkeys(levels)):
        steps = []
        for place, graph in enumerate(graphs):
            step, images[f"code.{number}.{place}"] = _compile_step(graph, level)
            steps.append(step)
        about = {"target": level, "machine": _MACHINE, "convention": CALLING_CONVENTION}
        described.append({**about, "features": _LEVELS[level], "steps": steps})
    return json.dumps(described), images


def _compile_step(graph: Graph, level: str) -> tuple[dict[str, Any], Array]:
    """Compile a step for a level of x86-64; return its description and its image."""
    # Imported on use: who loads machine code needs no compiler.
    from fusecell.compiler.backend import llvm
    from fusecell.compiler.backend.object_image import image_of_object
    from fusecell.compiler.backend.target import target_of
    from fusecell.compiler.codegen import emit
    from fusecell.compiler.runtime.kernel import multiply_adds, schedule

    features = _LEVELS[level]
    target = target_of(
        level.removesuffix(_BYTE_DOTS), ",".join(f"+{name}" for name in features), _TRIPLE, frozenset(features)
    )
    plan = schedule(graph)
    emitted = emit(plan, target)
    # Optimised, whatever this process does with its own: others are to run it.
    code = llvm.object_code(emitted.text, ["run"], target.cpu, target.features, target.triple)
    image = image_of_object(code, "run")
    described = {
        "entry": image.entry,
        "rebased": list(image.rebased),
        "imported": image.imported,
        "slots": list(emitted.slots),
        "scratch": {name: getattr(emitted.scratch, name) for name in _SIZES},
        "macs": multiply_adds(plan),
    }
    return described, np.frombuffer(image.data, np.int8)


def _level(name: str, *, multiplies_bytes: bool) -> str:
    """Return the level of x86-64 that a name stands for; the host's has VNNI only if bytes are multiplied."""
    if name == "host":
        has = _usable_features() if host_machine() == _MACHINE else frozenset()
        levels = [level for level in _LEVELS if multiplies_bytes or not level.endswith(_BYTE_DOTS)]
        fitting = [level for level in levels if has.issuperset(_LEVELS[level])]
        if fitting:
            return fitting[-1]
        raise ValueError(
            f"code_for='host' is for Linux on x86-64 with AVX2, this is {host_machine()} or lacks it; name the CPU "
            f"that the stream will run on: {', '.join(_LEVELS)}."
        )
    if name not in _LEVELS:
        raise ValueError(f"code_for takes host, {', '.join(_LEVELS)}; got {quoted(name)}.")
    return name


def _usable_features() -> frozenset[str]:
    """Return what this machine has of the features that code can need, up to the level ``FUSECELL_TARGET`` names."""
    isa = instruction_set(_TRIPLE)
    chosen = os.environ.get("FUSECELL_TARGET", "")
    return host_level_features(frozenset(isa.features_of(chosen)) if chosen in isa.levels else _FEATURES)


def misfit(code: CpuCode) -> str:
    """Say why machine code can't run here; "" if it can."""
    if code.machine != host_machine():
        return f"it is for {code.machine}, this machine is {host_machine()}"
    if code.convention != CALLING_CONVENTION:
        return f"another version of fusecell wrote it (calling convention {code.convention}, here {CALLING_CONVENTION})"
    has = _usable_features()
    if code.features - has:
        return f"this CPU lacks {', '.join(sorted(code.features - has))}"
    return ""


def read_code(file: TensorFile, graphs: Sequence[Graph], limits: Limits) -> list[CpuCode]:
    """Check all machine code of a file, except for what it does.

    Raises:
        CompilerError: for a description that doesn't fit the steps, the images or the limits.
    """
    described = parse_json(file.metadata["code"], 6)
    if not isinstance(described, list) or not 0 < len(described) <= _MOST_TARGETS:
        raise CompilerError(f"its code is {quoted(described)}, expected a list of 1 to {_MOST_TARGETS} entries")
    images = file.arrays("code.")
    codes = [_cpu_code(number, entry, images, graphs, limits) for number, entry in enumerate(described)]
    if images:
        raise CompilerError(f"no step takes its machine code {quoted(min(images))}")
    return codes


def _cpu_code(number: int, entry: Any, images: dict[str, Array], graphs: Sequence[Graph], limits: Limits) -> CpuCode:
    if not isinstance(entry, dict) or entry.keys() != _CODE_KEYS:
        raise CompilerError(f"its code {number} is {quoted(entry)}, expected an object of {', '.join(_CODE_KEYS)}")
    target, machine, features = entry["target"], entry["machine"], entry["features"]
    if not (_is_text(target) and _is_text(machine) and _is_integer(entry["convention"], 1 << 32)):
        raise CompilerError(f"its code {number} is for {quoted(target)}, {quoted(machine)}, expected names")
    are_features = isinstance(features, list) and len(features) <= _MOST_FEATURES and all(map(_is_text, features))
    if not are_features or not isinstance(entry["steps"], list) or len(entry["steps"]) != len(graphs):
        raise CompilerError(f"its code {number} should list features, and a step for each of {len(graphs)}")
    known = machine == _MACHINE and entry["convention"] == CALLING_CONVENTION
    if not known or not _FEATURES.issuperset(features):
        # Of a machine or a version of fusecell that isn't known here: what its steps mean doesn't matter, see `misfit`.
        for place in range(len(graphs)):
            images.pop(f"code.{number}.{place}", None)
        return CpuCode(target, machine, frozenset(features), entry["convention"], [])
    left = limits.code_bytes
    steps = []
    for place, (graph, step) in enumerate(zip(graphs, entry["steps"], strict=True)):
        name = f"code.{number}.{place}"
        try:
            steps.append(_step_code(images.pop(name, None), step, graph, left))
        except CompilerError as error:
            raise CompilerError(f"its machine code {name} can't be used: {error}") from error
        left -= len(steps[-1].image)
    return CpuCode(target, machine, frozenset(features), entry["convention"], steps)


def _step_code(image: Array | None, entry: Any, graph: Graph, most_bytes: int) -> StepCode:
    """Check the description of one image."""
    if image is None or image.dtype != np.int8 or image.ndim != 1:
        raise CompilerError("its image is missing, or no list of bytes")
    size = image.size
    if not SLOT_BYTES <= size <= most_bytes:
        raise CompilerError(f"its image has {size:,} bytes, expected 8 to {most_bytes:,}")
    if not isinstance(entry, dict) or entry.keys() != _STEP_KEYS:
        raise CompilerError(f"it is described by {quoted(entry)}, expected {', '.join(sorted(_STEP_KEYS))}")
    if not _is_integer(entry["entry"], size):
        raise CompilerError(f"its function begins at {quoted(entry['entry'])} of {size} bytes")
    if not _is_integer(entry["macs"], 1 << 48):
        raise CompilerError(f"its multiply-adds are {quoted(entry['macs'])}, expected a number")
    data = image.tobytes()
    rebased, imported = _checked_words(entry["rebased"], entry["imported"], data)
    slots = _checked_slots(entry["slots"], graph)
    scratch = entry["scratch"]
    is_size = isinstance(scratch, dict) and scratch.keys() == set(_SIZES)
    if not is_size or not all(_is_integer(value, 1 << 48) for value in scratch.values()):
        raise CompilerError(f"its scratch memory is {quoted(scratch)}, expected sizes of {', '.join(_SIZES)}")
    return StepCode(graph, data, entry["entry"], rebased, imported, slots, Size(**scratch), entry["macs"])


def _checked_words(rebased: Any, imported: Any, data: bytes) -> tuple[list[int], dict[str, int]]:
    """Check the words that are written to when an image is mapped: in it, and none over another."""
    last = len(data) - SLOT_BYTES + 1
    if (
        not isinstance(rebased, list)
        or len(rebased) > _MOST_REBASED
        or not all(_is_integer(at, last) for at in rebased)
    ):
        raise CompilerError(f"its addresses lie at {quoted(rebased)}, expected places in {len(data)} bytes")
    are_imports = isinstance(imported, dict) and imported.keys() <= set(LIBRARY_FUNCTIONS)
    if not are_imports or not all(_is_integer(at, last) for at in imported.values()):
        raise CompilerError(f"it calls {quoted(imported)}, expected no more than {', '.join(LIBRARY_FUNCTIONS)}")
    places = sorted([*rebased, *imported.values()])
    if any(above - below < SLOT_BYTES for below, above in pairwise(places)):
        raise CompilerError("two of its addresses overlap")
    for at in rebased:
        if int.from_bytes(data[at : at + SLOT_BYTES], "little") >= len(data):
            raise CompilerError(f"its address at {at} leads out of its {len(data)} bytes")
    return rebased, imported


def _checked_slots(names: Any, graph: Graph) -> Slots:
    """Check the names of an argument block, which must have a slot for all that a stream binds, and no pointer more."""
    if not isinstance(names, list) or len(names) > _MOST_SLOTS or not all(_is_text(name) for name in names):
        raise CompilerError(f"its slots are {quoted(names)}, expected up to {_MOST_SLOTS:,} names")
    if len(set(names)) != len(names):
        raise CompilerError("two of its slots have one name")
    pointers = [name for name in names if name.startswith(_POINTERS) and name.endswith(".ptr")]
    states = [graph[index].name for index in graph.leaves("state")]
    try:
        return Slots(graph, states, names, pointers)
    except KeyError as error:
        raise CompilerError(f"it has no slot {error}") from error


def _is_integer(value: object, end: int) -> bool:
    """Whether a value is an integer from 0 on, below an end; a bool is an int to Python, and none here."""
    return type(value) is int and 0 <= value < end


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= _MOST_TEXT
