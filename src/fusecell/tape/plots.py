"""Show a tape in a notebook: heatmaps, and a table of means and gate saturation."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fusecell.tape.tape import flat

if TYPE_CHECKING:
    from fusecell.tape.tape import Tape

__all__ = ["is_gate", "plot", "table"]


def is_gate(value: Any) -> bool:
    """Return whether all elements of a tensor are between 0 and 1, as a gate's are; those that are NaN don't count."""
    within = (value >= 0) & (value <= 1)
    return bool(within.any()) and bool((within | value.isnan()).all())


def plot(tape: Tape, names: Sequence[str] | None, layer: int, direction: int, row: int) -> Any:
    """Return the figure of :meth:`fusecell.Tape.plot`: a heatmap of units by steps for each name."""
    from matplotlib import pyplot as plt

    if names is None:
        names = [name for name in tape.names(layer) if name != "output"]
    if not 0 <= row < tape.rows:
        raise IndexError(f"The tape has {tape.rows} row(s), got row {row}.")
    # In inches: about a tenth per step, within what a notebook shows.
    width = max(6.0, min(16.0, 0.12 * tape.steps + 3))
    figure, axes = plt.subplots(
        len(names), 1, figsize=(width, 1.7 * len(names) + 0.6), squeeze=False, sharex=True, layout="constrained"
    )
    for axis, name in zip(axes[:, 0], names, strict=True):
        value = flat(tape.value(name, layer, direction))[:, row]
        # Gates from 0 to 1, so that their colours compare; other values on a symmetric scale, on which 0 is white.
        finite = value[value.isfinite()].abs()
        gate, most = is_gate(value), (float(finite.max()) if finite.numel() else 0.0) or 1.0
        image = axis.imshow(
            value.T.numpy(),
            aspect="auto",
            interpolation="nearest",
            cmap="viridis" if gate else "RdBu_r",
            vmin=0 if gate else -most,
            vmax=1 if gate else most,
        )
        axis.set_ylabel(name, rotation=0, labelpad=14)
        figure.colorbar(image, ax=axis, pad=0.01)
    bottom = axes[-1, 0]
    bottom.set_xlabel("step")
    if tape.labels is not None:
        bottom.set_xticks(range(tape.steps), tape.labels)
        bottom.set_xlabel("")
    figure.suptitle(f"{tape.kinds[layer]}, layer {layer}" + (", backward" if direction else ""))
    plt.close(figure)  # else a notebook shows it twice: as the result, and as an open figure
    return figure


def table(tape: Tape) -> str:
    """Return an HTML table of a tape's values: units and mean, and how often each gate is below 0.1 or above 0.9."""
    cells = ["layer", "direction", "cell", "value", "units", "mean", "&lt; 0.1", "&gt; 0.9"]
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in cells) + "</tr>"]
    for layer, direction, track in tape.tracks():
        for name, value in track.values.items():
            shares = ("", "")
            if is_gate(value):
                shut, open_ = tape.saturation(name, layer, direction)
                shares = (f"{shut:.0%}", f"{open_:.0%}")
            mean = f"{tape.valid(value).double().mean().item():.3f}"
            texts = [str(layer), str(direction), track.kind, name, str(math.prod(value.shape[2:])), mean, *shares]
            lines.append("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in texts) + "</tr>")
    about = f"Tape of {tape.steps} steps, {tape.rows} rows"
    return f"<p>{about}</p><table>{''.join(lines)}</table>"
