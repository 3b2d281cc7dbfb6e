"""How much faster other libraries train with fusecell: ``python -m benchmarks.integrations`` runs examples/recipes.

Each recipe's program runs with torch.nn and with fusecell in turns in one process, on one core, by its processor time;
the packages are in tests/integrations/requirements.txt. Names as arguments choose some.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from types import ModuleType

from tests.integrations.packages import missing

__all__ = ["FOLDER", "RECIPES", "load"]

FOLDER = Path(__file__).parents[1] / "examples" / "recipes"
RECIPES = {
    "sb3_recurrent_ppo": ("sb3_contrib",),
    "torchrl_memory": ("torchrl",),
    "lightning_torchscript": ("lightning",),
    "forecasting_deepar": ("pytorch_forecasting",),
    "speechbrain_ligru": ("speechbrain",),
    "deepfilternet": ("libdf", "loguru", "torchaudio"),  # df itself needs the line for torchaudio in the recipe
    "snntorch_spikes": ("snntorch",),
}
"""The recipes, and what each needs to import."""


def load(name: str) -> ModuleType:
    """Import a recipe, whose folder is no package."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return importlib.import_module(name)


def main() -> None:
    """Print how many times as fast each recipe is."""
    warnings.simplefilter("ignore")  # the libraries' own
    for name, modules in RECIPES.items():
        if len(sys.argv) > 1 and name not in sys.argv[1:]:
            continue
        reason = "; ".join(filter(None, map(missing, modules)))
        if reason:
            print(f"{name:24} {reason}")
            continue
        losses, times = load("side_by_side").run(load(name).program, 12)
        worst = max(abs(theirs - ours) / max(abs(theirs), 1e-6) for theirs, ours in losses)
        print(f"{name:24} {times:.2f} times as fast; losses differ by {worst:.0e} at most", flush=True)


if __name__ == "__main__":
    main()
