"""A tape in a notebook: heatmaps, and a table of what the gates do."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusecell.tape.tape import Tape

__all__ = ["is_gate", "plot", "table"]


def is_gate(value: Any) -> bool:
    """Whether all of a value lies between 0 and 1, as a gate's does."""
    return bool(value.numel()) and bool((value >= 0).all()) and bool((value <= 1).all())


def plot(tape: Tape, names: Sequence[str] | None, layer: int, direction: int, row: int) -> Any:
    """The figure of :meth:`fusecell.Tape.plot`."""
    from matplotlib import pyplot as plt

    known = [name for name in tape.names(layer) if name != "output"]
    chosen = known if names is None else list(names)
    if not 0 <= row < tape.rows:
        raise IndexError(f"The tape has {tape.rows} row(s), got row {row}.")
    width = max(6.0, min(16.0, 0.12 * tape.steps + 3))
    figure, axes = plt.subplots(
        len(chosen), 1, figsize=(width, 1.7 * len(chosen) + 0.6), squeeze=False, sharex=True, layout="constrained"
    )
    for axis, name in zip(axes[:, 0], chosen, strict=True):
        value = tape.value(name, layer, direction)[:, row]
        gate, most = is_gate(value), float(value.abs().max()) or 1.0
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
    plt.close(figure)  # a notebook shows the figure that is returned, and not a second time
    return figure


def table(tape: Tape) -> str:
    """The HTML of a tape in a notebook: of each value its size and mean, of each gate how often it is shut or open."""
    cells = ["layer", "direction", "cell", "value", "units", "mean", "&lt; 0.1", "&gt; 0.9"]
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in cells) + "</tr>"]
    for layer, direction, track in tape.tracks():
        for name, value in track.values.items():
            shares = ("", "")
            if is_gate(value):
                shut, open_ = tape.saturation(name, layer, direction)
                shares = (f"{shut:.0%}", f"{open_:.0%}")
            mean = f"{tape.valid(value).double().mean().item():.3f}"
            texts = [str(layer), str(direction), track.kind, name, str(value.shape[-1]), mean, *shares]
            lines.append("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in texts) + "</tr>")
    about = f"Tape of {tape.steps} steps, {tape.rows} rows"
    return f"<p>{about}</p><table>{''.join(lines)}</table>"
