"""Edit saved tapes, to make hostile ones."""

from __future__ import annotations

import json

from safetensors import safe_open
from safetensors.torch import load_file, save_file

__all__ = ["SCRIPT", "changed", "poisoned"]


def changed(saved, path, change):
    """Copy a saved tape with its content changed."""
    tensors = load_file(saved)
    with safe_open(saved, framework="pt") as file:
        about = file.metadata()
    tracks = json.loads(about["tracks"])
    change(tensors, tracks, about)
    about["tracks"] = about["tracks"] if about["tracks"].startswith("[[") else json.dumps(tracks)
    save_file(tensors, path, about)
    return path


SCRIPT = "<img src=x onerror='window.harmed = 1'></SCRIPT ><script>window.harmed = 1</script><!-- /*SCRIPT*/ /*PLOTLY*/"


def poisoned(tensors, tracks, about):
    """Put scripts into every text of a tape, names of states included."""
    about["labels"] = json.dumps([SCRIPT] * 7)
    tracks[0].update(kind=SCRIPT, source=SCRIPT, equation=f"{SCRIPT}' = h; {SCRIPT}")
    tracks[0]["names"].append(SCRIPT)
    tracks[0]["states"].append(SCRIPT)
    if tracks[0]["gradients"]:
        tracks[0]["gradients"].append(SCRIPT)
    for kind in ("value", "before", *(["gradient"] if tracks[0]["gradients"] else [])):
        tensors[f"0.{kind}.{SCRIPT}"] = tensors[f"0.{kind}.h"].clone()
