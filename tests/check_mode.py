"""The tests that the check mode, ``make check``, skips."""

__all__ = ["RUN_NO_KERNELS"]

RUN_NO_KERNELS = {
    **dict.fromkeys(
        (
            "cells/test_cells",
            "cells/test_reference_numbers",
            "drop_in/test_errors",
            "layers/test_layers",
            "layers/test_scan",
            "test_cell",
            "testing/test_check_cell",
        ),
        "they are about the Python loop",
    ),
    **dict.fromkeys(
        (
            "compiler/backend/test_disk_cache",
            "compiler/backend/test_disk_cache_faults",
            "compiler/backend/test_isa",
            "compiler/backend/test_jit",
            "compiler/backend/test_target",
            "compiler/codegen/test_golden",
            "compiler/frontend/test_signature",
            "compiler/frontend/test_tracer",
            "compiler/ir/test_interpreter",
            "compiler/ir/test_primitives",
        ),
        "they are about the compiler's texts and files, and run functions of their own at most",
    ),
    **dict.fromkeys(
        (
            "compiler/codegen/test_golden_cost",
            "compiler/dispatch/test_first_call",
            "compiler/programs/test_training_memory",
        ),
        "they count what the check mode adds to",
    ),
    **dict.fromkeys(
        (
            "benchmarks/test_benchmarks",
            "benchmarks/test_levels",
            "cli/test_cli",
            "demo/test_baselines",
            "demo/test_demo",
            "documentation/test_compiler_page",
            "documentation/test_docs",
            "documentation/test_examples",
            "inspection/test_benchmark",
            "integrations/test_recipes",
            "integrations/test_tools",
            "inspection/test_environment",
            "streaming/test_runtime_package",
            "test_cell_tree",
        ),
        "their calls are of forms that other tests run",
    ),
    **dict.fromkeys(("streaming/test_machine_code",), "the check mode compiles the graph, whatever code a file has"),
    **dict.fromkeys(
        ("compiler/codegen/test_vector_math", "drop_in/test_peers", "reliability/test_memcheck"),
        "numbers and accesses are held to something else there",
    ),
    **dict.fromkeys(
        (
            "exporting/test_c_source",
            "exporting/test_memory",
            "exporting/test_object_file",
            "exporting/test_soft_fma",
            "exporting/test_targets",
            "exporting/test_web",
        ),
        "exported steps run in memory of their own, which exporting/test_memory guards",
    ),
    **dict.fromkeys(("tape/test_page", "tape/test_tape_files"), "they are about files and a browser"),
}
"""Files of tests that the check mode leaves out, by their place in ``tests/``, and why: all others run kernels in
forms of their own."""
