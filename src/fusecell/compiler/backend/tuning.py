"""Tuning: the sizes and rates of machines that kernels and their launches are fitted to.

None of them decides a bit of a result; the constants that do, such as the rows of a row panel, are in the code that
they belong to, as they must be the same on every machine.

Measured on an AMD EPYC (Zen 4) and an Intel Xeon with AVX-512 and 2 MiB of L2 a core; the figures, and what was tried
besides, are in docs/performance.md.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TUNING", "Tuning"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Tuning:
    """Machine-dependent constants, each with its unit and its reason.

    A chunk of steps (docs/performance.md, "What did not help"):

    Attributes:
        chunk_bytes: most bytes of a chunk's buffers, so that hoisted values are still in L2 when the loop reads them,
            of which they take three quarters at most. 1 or 2 MB: 2 to 8 % slower.
        only_chunk_bytes: bytes of the buffers of a whole call up to which it is one chunk, if its weights take as much:
            these then needn't be packed whole.
        large_panels_bytes: bytes of weights and sums from which each chunk reads them from L3, and so is to have at
            least the rows of the next three.
        panel_rows: least rows of such a chunk.
        sum_rows: the same in the backward, whose operands are to stay in L2; 64 rows were 3 to 7 % slower on the Xeon.
        sum_rows_small_l2: the same where L2 is smaller than ``large_l2_bytes``.
        large_l2_bytes: bytes of L2 that hold the operands of ``sum_rows`` rows.

    A call on one thread or several (rates: `python -m benchmarks.limits`):

    Attributes:
        short_call_macs: multiply-adds below which a kernel keeps Python's lock: letting go of it may cost more.
        short_step_macs: the same of a streamed step, which takes about a millisecond then.
        macs_per_us: multiply-adds of float32 that a core does in a microsecond, about.
        bytes_per_us: bytes of weights that it reads from L2 in a microsecond, about.
        team_call_us: microseconds that a call must take alone to be worth a team of threads.
        team_step_us: microseconds that a step must take, to be worth a team that has barriers in each.
        least_arrival_us, most_arrival_us: microseconds that a team's leader waits for the others at least and at most.
            Waking a thread takes some 50, after a pause several hundred.
        spins_per_us: turns of a waiting loop in a microsecond, about; CPUs make 7 to 30.
        spin_budget: turns at a barrier, some ten microseconds, before a thread yields its core.
        yields_every_us: a call counts as oversubscribed if a thread yields more often than once per so many
            microseconds.
        least_backoff_s, most_backoff_s: seconds without a team after two oversubscribed calls in a row, doubling.

    Memory:

    Attributes:
        small_scratch_bytes: least scratch memory of a thread.
        large_scratch_bytes: scratch memory beyond which it isn't reused by the next call.
        huge_scratch_bytes: scratch memory from which NumPy allocates it, on huge pages: their first touch costs a
            fraction.
        huge_result_bytes: the same of a result, such as a layer's outputs.
        thread_gap_bytes: bytes between what two threads write of a buffer: a page, within which caches prefetch.

    Microkernels (docs/performance.md, "What did not help"):

    Attributes:
        fma_units, load_units: vectors that a core multiplies and adds, and that it loads, in a cycle. All current cores
            of desktops and servers do two of each, of their widest vectors or of halves of these in turn.
        fma_latency: cycles from a multiply-add to the next that needs its sum.
        l2_bytes_per_cycle: bytes that it takes from the second in a cycle: of 32 there may be, a stream gets about 28.
        call_cycles: cycles of one microkernel's call, loop and turn of the loops around it.
        cache_line_bytes: bytes that a prefetch brings.
        prefetch_min_rows: rows of a tile from which it prefetches: smaller ones have no loads to spare.
        pack_row_group: rows of a gradient's operand that all tiles read before the next are packed: a tile's share of
            them, 8 numbers of each, stays in L1.
        pack_min_row_bytes: bytes of a gradient's operand's rows from which it is packed: 7 to 12 % of training on the
            Xeon, nothing on the EPYC.
        pack_min_groups: groups of 16 columns of the other operand from which it is.
    """

    chunk_bytes: int = 384 << 10
    only_chunk_bytes: int = 1280 << 10
    large_panels_bytes: int = 4 << 20
    panel_rows: int = 128
    sum_rows: int = 128
    sum_rows_small_l2: int = 64
    large_l2_bytes: int = 2 << 20

    short_call_macs: int = 1_000_000
    short_step_macs: int = 10_000_000
    macs_per_us: int = 75_000
    bytes_per_us: int = 130_000
    team_call_us: float = 100
    team_step_us: float = 3
    least_arrival_us: float = 50
    most_arrival_us: float = 2000
    spins_per_us: int = 20
    spin_budget: int = 512
    yields_every_us: int = 50
    least_backoff_s: float = 0.005
    most_backoff_s: float = 0.5

    small_scratch_bytes: int = 1 << 16
    large_scratch_bytes: int = 1 << 26
    huge_scratch_bytes: int = 1 << 22
    huge_result_bytes: int = 1 << 22
    thread_gap_bytes: int = 4096

    fma_units: int = 2
    load_units: int = 2
    fma_latency: int = 4
    l2_bytes_per_cycle: int = 28
    call_cycles: int = 30
    cache_line_bytes: int = 64
    prefetch_min_rows: int = 4
    pack_row_group: int = 128
    pack_min_row_bytes: int = 2048
    pack_min_groups: int = 16


TUNING = Tuning()
"""What is in force; tests replace it."""
