"""Which tests the check mode, ``make check``, leaves out."""

__all__ = ["RUN_NO_KERNELS"]

RUN_NO_KERNELS = {
    **dict.fromkeys(
        (
            "cells",
            "contract",
            "contract_layers",
            "contract_sequences",
            "drop_in_errors",
            "reference_numbers",
            "testing",
        ),
        "they are about the Python loop",
    ),
    **dict.fromkeys(
        ("cache", "cache_faults", "golden", "interpret", "isa", "keys", "machine", "primitives", "target", "trace"),
        "they are about the compiler's texts and files, and run functions of their own at most",
    ),
    **dict.fromkeys(("first_call", "golden_cost", "memory"), "they count what the check mode adds to"),
    **dict.fromkeys(
        (
            "benchmarks",
            "cell_tree",
            "cli",
            "compiler_page",
            "config",
            "demo",
            "demo_baselines",
            "docs",
            "examples",
            "runtime_package",
            "speed",
        ),
        "their calls are of forms that other tests run",
    ),
    **dict.fromkeys(("memcheck", "peers", "simd"), "numbers and accesses are held to something else there"),
    **dict.fromkeys(("tape_files", "tape_page"), "they are about files and a browser"),
}
"""Files of tests that the check mode leaves out, by name, and why: all others run kernels in forms of their own."""
