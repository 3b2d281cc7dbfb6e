"""Count the published cells that are compiled, in inference and in training, and that are right.

    pip install torchrecurrent ncps snntorch norse ...   # what is missing is skipped, and said
    python scripts/published_cells.py
    python scripts/published_cells.py --family spiking --only leaky
    PUBLISHED_CELLS_SIZE=64 python scripts/published_cells.py   # states of 64 features, in place of 16

Each cell is a package's own module, called as a user would, or a step written from a paper's equations. It is compared
with the plain Python loop: in float64 outputs, last states and all gradients to 1e-10, with lengths, with resets and in
chunks; in float32 its rounding errors with the loop's; its stream to the bit.
"""

from __future__ import annotations

import argparse
import sys

import torch
from published import tables
from published.measure import Outcome, measure
from published.report import family_table, summary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--family", help="only this family")
    parser.add_argument("--source", help="only cases whose package or paper has this in its name")
    parser.add_argument("--only", help="only cases with this in their name")
    parser.add_argument("--list", action="store_true", help="list the cases")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = [
        case
        for case in tables.all_cases()
        if (options.family is None or case.family == options.family)
        and (options.source is None or options.source.lower() in case.source.lower())
        and (options.only is None or options.only.lower() in case.name.lower())
    ]
    if options.list:
        print("\n".join(f"{case.family:20} {case.name:34} {case.source}" for case in cases))
        return 0
    outcomes: list[Outcome] = []
    for family in dict.fromkeys(case.family for case in cases):
        measured = [measure(case) for case in cases if case.family == family]
        outcomes += measured
        print(family_table(family, measured), flush=True)
    print(summary(outcomes))
    return 0 if all(outcome.right or outcome.skipped for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
