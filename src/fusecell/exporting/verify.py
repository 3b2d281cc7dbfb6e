"""Run an artefact, on this machine or an emulator, and hold its numbers to a stream's, bit by bit."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fusecell.compiler.backend import llvm
from fusecell.compiler.backend.isa import instruction_set
from fusecell.compiler.ir.sizes import ALIGNMENT, align_up
from fusecell.errors import ExportError
from fusecell.exporting.bare_metal import BOARDS, linker_script, startup_source
from fusecell.exporting.header import Interface
from fusecell.exporting.object_file import read_object
from fusecell.exporting.reference import SINGLE_STEPS, ReferenceNumbers
from fusecell.exporting.targets import ExportTarget
from fusecell.exporting.wasm_module import wasm_module
from fusecell.streaming.bound_step import Array

__all__ = ["NotRunnable", "run_c", "run_object", "run_wasm"]

_EMULATED = {
    "aarch64": ("aarch64-linux-gnu-gcc", "qemu-aarch64"),
    "aarch64-dotprod": ("aarch64-linux-gnu-gcc", "qemu-aarch64"),
    "riscv64": ("riscv64-linux-gnu-gcc", "qemu-riscv64"),
    "armv7": ("arm-linux-gnueabihf-gcc", "qemu-arm"),
}
"""By target: a compiler that links for it, and an emulator."""
_SECONDS = 300


class NotRunnable(Exception):
    """An artefact can't be run here; the text says why."""


def run_object(
    code: bytes, target: ExportTarget, interface: Interface, numbers: ReferenceNumbers, files: Sequence[Path]
) -> str:
    """Run an object file; return where it ran.

    Arguments:
        files: the object file, the header and the selftest's source.

    Raises:
        NotRunnable: if neither this machine nor an emulator that is installed can run it.
        ExportError: if a bit differs.
    """
    external = read_object(code).undefined
    if target.is_wasm:
        if external:
            raise NotRunnable(
                f"the JavaScript engine's {', '.join(external)} may differ from the stream's in a last bit"
            )
        p = interface.prefix
        names = [f"{p}_{name}" for name in ("init", "reset", "step", "push", "get_state", "set_state")]
        return run_wasm(wasm_module(code, names, interface.memory_bytes), interface, numbers)
    if _is_native(target):
        _run_here(code, interface, numbers)
        return "this machine"
    if target.name in _EMULATED:
        compiler, emulator = _EMULATED[target.name]
        _need(compiler, emulator)
        with tempfile.TemporaryDirectory() as folder:
            program = _linked([compiler, "-static"], files, interface, Path(folder), ["-lm"])
            _expect_success([emulator, str(program)], interface)
        return emulator
    if target.name in BOARDS:
        return _run_on_board(target, interface, files, [name for name in external if not name.startswith("__")])
    raise NotRunnable(f"nothing here runs {target.summary}")


def _need(*tools: str) -> None:
    for tool in tools:
        if shutil.which(tool) is None:
            raise NotRunnable(f"{tool} is not installed")


def _is_native(target: ExportTarget) -> bool:
    host = llvm.host()
    if target.name == "host":
        return True
    isa = instruction_set(host.triple)
    if isa.name != target.machine.isa.name or "linux" not in target.triple or "linux" not in host.triple:
        return False
    features = [feature.removeprefix("+") for feature in target.features.split(",")]
    return target.cpu not in isa.levels or host.features.issuperset(features)


def _run_here(code: bytes, interface: Interface, numbers: ReferenceNumbers) -> None:
    """Link an object file into this process, and call its functions."""
    prefix = interface.prefix
    names = {name: f"{prefix}_{name}" for name in ("init", "step", "push", "get_state", "set_state")}
    library = llvm.link(code, list(names.values()))
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    parameters = {
        "init": (pointer,),
        "step": (pointer, pointer, pointer),
        "push": (pointer, size, pointer, pointer),
        "get_state": (pointer, pointer),
        "set_state": (pointer, pointer),
    }
    call = {
        name: ctypes.CFUNCTYPE(ctypes.c_int, *kinds)(library.addresses[names[name]])
        for name, kinds in parameters.items()
    }
    memory = np.zeros(2 * align_up(interface.memory_bytes) + ALIGNMENT, np.uint8)
    stream = align_up(memory.ctypes.data)
    other = stream + align_up(interface.memory_bytes)
    if call["init"](stream) or call["init"](other):
        raise ExportError(f"{names['init']} refuses memory at a multiple of {ALIGNMENT} bytes.")
    inputs = np.ascontiguousarray(numbers.inputs)
    outputs, state = np.zeros_like(numbers.outputs), np.zeros_like(numbers.state)
    for t in range(SINGLE_STEPS):
        call["step"](stream, inputs[t].ctypes.data, outputs[t].ctypes.data)
    call["get_state"](stream, state.ctypes.data)
    call["set_state"](other, state.ctypes.data)
    rest = len(inputs) - SINGLE_STEPS
    call["push"](other, rest, inputs[SINGLE_STEPS:].ctypes.data, outputs[SINGLE_STEPS:].ctypes.data)
    call["get_state"](other, state.ctypes.data)
    _compare("outputs", outputs, numbers.outputs)
    _compare("states", state, numbers.state)


def _compare(what: str, values: Array, expected: Array) -> None:
    different = values.view(f"u{values.itemsize}") != expected.view(f"u{values.itemsize}")
    if different.any():
        first = np.argwhere(different)[0].tolist()
        count = int(different.sum())
        raise ExportError(
            f"The artefact differs from the stream in {count} of {values.size} {what}, first at {first}: "
            f"{values[tuple(first)]!r} in place of {expected[tuple(first)]!r}. This is a defect, please report it."
        )


def _linked(
    compiler: Sequence[str], files: Sequence[Path], interface: Interface, folder: Path, libraries: Sequence[str]
) -> Path:
    """Build the selftest as a program."""
    program = folder / "selftest"
    sources = [str(path) for path in files if path.suffix in (".c", ".o", ".obj")]
    main = f"-D{interface.macro}_SELFTEST_MAIN"
    _run([*compiler, "-O1", main, *sources, "-o", str(program), *libraries])
    return program


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode:
        raise ExportError(f"`{' '.join(command)}` failed: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done


def _expect_success(command: Sequence[str], interface: Interface) -> None:
    """Run a selftest."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode:
        text = (done.stdout + done.stderr).strip()[-500:]
        raise ExportError(
            f"{interface.prefix}_selftest differs from the stream, or didn't run: `{' '.join(command)}` ended with "
            f"{done.returncode}. {text}"
        )


_BOARD_OPTIONS = (
    "-mthumb", "-mfloat-abi=hard", "-O1", "-nostdlib", "-ffreestanding", "-Wl,-z,noexecstack",
)  # fmt: skip
_EMULATOR_OPTIONS = (
    "-nographic", "-monitor", "none", "-serial", "none", "-semihosting-config", "enable=on,target=native",
)  # fmt: skip


def _run_on_board(target: ExportTarget, interface: Interface, files: Sequence[Path], external: Sequence[str]) -> str:
    """Run the selftest on an emulated board, without an operating system."""
    _need("arm-none-eabi-gcc", "qemu-system-arm")
    if external:
        raise NotRunnable(f"it needs {', '.join(external)} of a C library")
    board, code, data = BOARDS[target.name]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "memory.ld").write_text(linker_script(code, data))
        (folder / "startup.c").write_text(startup_source(interface.prefix))
        program = folder / "selftest.elf"
        sources = [str(path) for path in files if path.suffix in (".c", ".o")]
        _run(
            ["arm-none-eabi-gcc", f"-mcpu={target.name}", *_BOARD_OPTIONS, "-T", str(folder / "memory.ld"),
             str(folder / "startup.c"), *sources, "-lgcc", "-o", str(program)]
        )  # fmt: skip
        _expect_success(["qemu-system-arm", "-M", board, *_EMULATOR_OPTIONS, "-kernel", str(program)], interface)
    return f"qemu-system-arm -M {board}"


def run_c(compiler: str, files: Sequence[Path], interface: Interface) -> None:
    """Compile a C artefact with its selftest by a compiler of this machine, and run it.

    Raises:
        NotRunnable: if the compiler is not installed.
        ExportError: if it doesn't compile, or a bit differs.
    """
    _need(compiler)
    with tempfile.TemporaryDirectory() as folder:
        flags = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-O2", "-ffp-contract=off"]
        program = _linked([compiler, *flags, "-march=native"], files, interface, Path(folder), ["-lm"])
        _expect_success([str(program)], interface)


def run_wasm(module: bytes, interface: Interface, numbers: ReferenceNumbers) -> str:
    """Run a WebAssembly module under Node.js."""
    _need("node")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "module.wasm").write_bytes(module)
        for label in ("inputs", "outputs", "state"):
            (folder / f"{label}.bin").write_bytes(getattr(numbers, label).tobytes())
        (folder / "run.mjs").write_text(_node_script(interface, numbers))
        _expect_success(["node", str(folder / "run.mjs"), str(folder)], interface)
    return "node"


def _node_script(interface: Interface, numbers: ReferenceNumbers) -> str:
    p, steps = interface.prefix, len(numbers.inputs)
    return f"""\
import {{ readFileSync }} from "node:fs";
const folder = process.argv[2], read = (name) => readFileSync(`${{folder}}/${{name}}`);
const inputs = read("inputs.bin"), outputs = read("outputs.bin"), states = read("state.bin");
const {{ instance }} = await WebAssembly.instantiate(read("module.wasm"), {{ env: Math }});
const e = instance.exports, up = (n) => (n + 63) & -64, size = up({interface.memory_bytes});
const stream = up(e.heap_base.value), other = stream + size, x = other + size, y = x + up(inputs.length);
const state = y + up(outputs.length), need = state + states.length - e.memory.buffer.byteLength;
if (need > 0) e.memory.grow(Math.ceil(need / 65536));
const memory = new Uint8Array(e.memory.buffer);
memory.set(inputs, x);
const steps = {steps}, single = {SINGLE_STEPS}, xs = inputs.length / steps, ys = outputs.length / steps;
if (e.{p}_init(stream) || e.{p}_init(other)) process.exit(99);
for (let t = 0; t < single; t++) e.{p}_step(stream, x + t * xs, y + t * ys);
e.{p}_get_state(stream, state);
e.{p}_set_state(other, state);
e.{p}_push(other, steps - single, x + single * xs, y + single * ys);
e.{p}_get_state(other, state);
const same = (at, expected) => Buffer.compare(Buffer.from(memory.slice(at, at + expected.length)), expected) === 0;
process.exit(same(y, outputs) && same(state, states) ? 0 : 1);
"""
