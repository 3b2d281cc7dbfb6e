"""Interface to LLVM: the host's CPU, text to object code, object code to addresses.

The one file that imports llvmlite. Its functions take and return strings, bytes and integers only.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import llvmlite
import llvmlite.binding as binding

from fusecell.errors import CompilerError
from fusecell.forks import new_lock

__all__ = [
    "FULL_EFFORT",
    "VERSIONS",
    "Host",
    "Library",
    "assembly",
    "host",
    "link",
    "lock",
    "object_code",
    "program_object",
]

VERSIONS = f"llvmlite {llvmlite.__version__}, LLVM {'.'.join(map(str, binding.llvm_version_info))}"


# LLVM's own calls are serialised by llvmlite; this lock spans whole compilations, so that a text is
# compiled once and a fork never copies a half-made LLVM state into the child.
lock = new_lock()

FULL_EFFORT = 3
EFFORT = 0 if os.environ.get("FUSECELL_OPTIMISE") == "0" else FULL_EFFORT
"""LLVM's optimisation level. At 0 it takes a quarter of its time, for slow code with the same bits: for programs that
are tested rather than used."""

# LLJIT accepts each name of a library only once.
_library_numbers = itertools.count()


class Host(NamedTuple):
    """This machine for LLVM: the CPU's name, its features (a set, and LLVM's text), the triple."""

    cpu: str
    features: frozenset[str]
    feature_text: str
    triple: str


@functools.cache
def _initialise() -> None:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    binding.initialize_native_asmparser()  # inline assembly


@functools.cache
def host() -> Host:
    """Return the CPU's name and features; virtual machines mask some, so the name alone is not enough."""
    with lock:
        _initialise()
        table = binding.get_host_cpu_features()
        present = frozenset(name for name, has in table.items() if has)
        return Host(binding.get_host_cpu_name(), present, table.flatten(), binding.get_process_triple())


def object_code(
    text: str, names: Sequence[str], cpu: str, features: str, triple: str, effort: int = FULL_EFFORT
) -> bytes:
    """Compile LLVM text that defines the functions ``names`` to a relocatable object.

    Arguments:
        effort: LLVM's optimisation level, 0 to 3.

    Raises:
        CompilerError: the text doesn't parse or verify, is for another triple, or lacks one of the names.
    """
    with lock, _optimised(text, names, cpu, features, triple, effort) as (module, machine):
        return bytes(machine.emit_object(module))


def assembly(text: str, names: Sequence[str], cpu: str, features: str, triple: str, effort: int = FULL_EFFORT) -> str:
    """Return the assembly of the object code that :func:`object_code` returns for the same arguments."""
    with lock, _optimised(text, names, cpu, features, triple, effort) as (module, machine):
        return str(machine.emit_assembly(module))


@contextmanager
def _optimised(
    text: str, names: Sequence[str], cpu: str, features: str, triple: str, effort: int
) -> Iterator[tuple[Any, Any]]:
    _initialise()
    # The default code model of llvmlite is the large one: a 64-bit move for every constant.
    machine = binding.Target.from_triple(triple).create_target_machine(
        cpu=cpu, features=features, opt=effort, reloc="pic", codemodel="small"
    )
    with _verified(text, names) as module:
        _set_target(module, triple, str(machine.target_data))
        _optimise(module, machine, effort)
        yield module, machine


def program_object(
    main: str,
    kernels: Mapping[str, str],
    names: Sequence[str],
    *,
    cpu: str,
    features: str,
    triple: str,
    abi: str = "",
    static: bool = False,
) -> tuple[bytes, str]:
    """Compile a program of several texts, optimised as a whole, to a relocatable object, for any of LLVM's targets.

    Only ``names`` are exported, and only what these need is compiled.

    Arguments:
        main: a text that calls kernels.
        kernels: by the name that ``main`` calls it under, the text of each, which defines ``run``.
        names: the functions and constants of ``main`` to export.
        abi: LLVM's name of the calling convention, where the triple leaves it open.
        static: for code at a fixed address, as without an operating system.

    Returns:
        The object, and the optimised text.

    Raises:
        CompilerError: a text doesn't parse or verify, or lacks one of the names.
    """
    with lock:
        _initialise_all()
        machine = binding.Target.from_triple(triple).create_target_machine(
            cpu=cpu,
            features=features,
            opt=FULL_EFFORT,
            reloc="static" if static else "pic",
            codemodel="small",
            abiname=abi,
        )
        context = binding.create_context()
        with _verified(main, (), context) as program:
            _set_target(program, triple, str(machine.target_data))
            for name, text in kernels.items():
                kernel = _verified(text, ("run",), context)
                _set_target(kernel, triple, str(machine.target_data))
                kernel.get_function("run").name = name
                for function in kernel.functions:
                    if not function.is_declaration and function.name != name:
                        function.linkage = "internal"
                program.link_in(kernel)
            _export_only(program, names)
            _optimise_program(program, machine)
            text = str(program)
            return bytes(machine.emit_object(program)), text


def _export_only(module: Any, names: Sequence[str]) -> None:
    """Make everything internal that is defined and not to be exported."""
    missing = set(names)
    for value in (*module.functions, *module.global_variables):
        missing.discard(value.name)
        if not value.is_declaration and value.name not in names and not value.name.startswith("llvm."):
            value.linkage = "internal"
    if missing:
        raise CompilerError(f"The program should define {', '.join(sorted(missing))}, and doesn't.")


def _optimise_program(module: Any, machine: Any) -> None:
    """Specialise kernels to the one way in which the program calls them, then run LLVM's pipeline.

    Constants go through calls first, so that what only a team of threads needs is gone before functions are inlined.
    Then the argument block dissolves, in two turns, as some of its addresses are chosen by others of its values; LLVM's
    own pipeline leaves it in memory, and with it ten times the code.
    """
    tuning = binding.create_pipeline_tuning_options(speed_level=3)
    # As in kernels: vectors and the form of loops have been chosen.
    tuning.loop_vectorization = tuning.slp_vectorization = tuning.loop_unrolling = False
    builder = binding.create_pass_builder(machine, tuning)
    passes = binding.create_new_module_pass_manager()
    passes.add_ipsccp_pass()
    passes.add_simplify_cfg_pass()
    passes.add_global_dead_code_eliminate_pass()
    passes.add_always_inliner_pass()
    for _ in range(2):
        passes.add_sroa_pass()
        passes.add_sccp_pass()
        passes.add_simplify_cfg_pass()
        passes.add_sroa_pass()
        passes.add_instruction_combine_pass()
        passes.add_simplify_cfg_pass()
    passes.run(module, builder)
    builder.getModulePassManager().run(module, builder)


@functools.cache
def _initialise_all() -> None:
    _initialise()
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()


def _verified(text: str, names: Sequence[str], context: Any = None) -> Any:
    try:
        # A context of its own: names of types and metadata of one kernel don't pile up for the next.
        # Only the module holds it, for LLVM crashes if a context goes before its modules.
        module = binding.parse_assembly(text, context or binding.create_context())
        module.verify()
    except RuntimeError as error:
        raise CompilerError(_refusal(text, str(error))) from None
    defined = {function.name for function in module.functions if not function.is_declaration}
    missing = sorted(set(names) - defined)
    if missing:
        raise CompilerError(
            f"The LLVM text should define {', '.join(missing)}; it defines {', '.join(sorted(defined)) or 'nothing'}."
        )
    return module


def _refusal(text: str, message: str) -> str:
    """Return LLVM's message with the line of the text that it is about."""
    lines = text.splitlines()
    position = re.search(r"<string>:(\d+):\d+: error: (.*)", message)
    if position:
        number, reason = int(position[1]), position[2]
    else:
        # The verifier prints the instruction itself, without its line number.
        printed = {line.strip() for line in message.splitlines()}
        numbers = (number for number, line in enumerate(lines, 1) if line.strip() and line.strip() in printed)
        number, reason = next(numbers, 0), message.strip()
    where = f" Line {number}: {lines[number - 1].strip()}" if 1 <= number <= len(lines) else ""
    return f"LLVM refused the emitted text: {reason}.{where}"


def _set_target(module: Any, triple: str, layout: str) -> None:
    for in_text, expected, kind in (
        (module.triple, triple, "triple"),
        (module.data_layout, layout, "data layout"),
    ):
        if in_text and in_text != expected:
            # Generating code for a foreign layout is an assertion in LLVM, which ends the process.
            raise CompilerError(
                f"The LLVM text is for the {kind} {in_text!r}, the target has {expected!r}: leave it out of the text."
            )
    module.triple = triple
    module.data_layout = layout


def _optimise(module: Any, machine: Any, effort: int) -> None:
    """Run the few passes that the text needs before instruction selection.

    Code generation has chosen vectors, register tiles, the form of loops and the location of values, and computes
    nothing twice. LLVM's whole pipeline, O3, takes as long again, for kernels that are 0 to 2 % faster
    (docs/performance.md).
    """
    passes = binding.create_new_module_pass_manager()
    passes.add_always_inliner_pass()  # vector functions: scheduled together with the code around them
    if effort:
        passes.add_instruction_combine_pass()  # constants into addresses, among others
        passes.add_simplify_cfg_pass()
    tuning = binding.create_pipeline_tuning_options(speed_level=effort)
    passes.run(module, binding.create_pass_builder(machine, tuning))


class Library:
    """Linked machine code and its addresses; it is unmapped when this object is collected."""

    def __init__(self, tracker: Any, names: Sequence[str]) -> None:
        self.addresses: dict[str, int] = {name: tracker[name] for name in names}
        # At exit other threads may still be inside the code: then nothing is unmapped.
        weakref.finalize(self, _unload, tracker).atexit = False


def _unload(tracker: Any) -> None:
    with lock:
        tracker.close()


@functools.cache
def _linker() -> Any:
    _initialise()
    # LLJIT as a linker alone: it neither optimises nor has a cache on disk. JITLink, as aarch64 needs it.
    target = binding.Target.from_triple(binding.get_process_triple())
    machine = target.create_target_machine(opt=3, reloc="pic", codemodel="small")
    return binding.create_lljit_compiler(machine, use_jit_link=True, suppress_errors=True)


def link(code: bytes, names: Sequence[str]) -> Library:
    """Map object code into the process, with the process's own symbols (libm) in reach.

    Raises:
        CompilerError: the object lacks one of the names or needs a symbol that nobody has.
    """
    with lock:
        builder = binding.JITLibraryBuilder().add_object_img(code).add_current_process()
        for name in names:
            builder.export_symbol(name)
        try:
            tracker = builder.link(_linker(), f"fusecell.{next(_library_numbers)}")
        except RuntimeError as error:
            raise CompilerError(
                f"The kernel's object code can't be linked: {error}. Either a function to export is internal, "
                f"or one that the kernel calls is not in this process."
            ) from None
        return Library(tracker, names)
