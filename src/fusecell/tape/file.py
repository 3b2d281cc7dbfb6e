"""Read a saved tape, checking everything in the file before a ``Tape`` is built from it.

A tape may come from somebody else: nothing in its file is trusted, and every error says what was expected instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusecell.errors import quoted
from fusecell.strict_json import parse_json
from fusecell.tape.track import Track
from fusecell.tensor_file import is_text, read_tensor_file

__all__ = ["FORMAT", "TapeContent", "read"]

FORMAT = "fusecell tape 1"
_DTYPES = ("F16", "BF16", "F32", "F64", "I64")
# Far above any recorded layer, so that a hostile file costs neither time nor memory.
_MOST_NAME, _MOST_TRACKS, _MOST_DIRECTIONS, _MOST_DIMS = 256, 4096, 2, 18
_FIELDS = frozenset(("kind", "reverse", "states", "equation", "source", "layer", "names", "gradients"))


class TapeContent(NamedTuple):
    """The arguments of ``Tape``, read from a file; outputs aren't saved."""

    layers: list[list[Track]]
    lengths: Tensor | None
    labels: list[str] | None


def read(path: Path, max_bytes: int) -> TapeContent:
    """Read the content of a tape's file.

    Arguments:
        path: the file.
        max_bytes: the largest size the file may have.

    Raises:
        OSError: if the file can't be read.
        ValueError: if it is not a valid tape; the message says what is wrong, without the path.
    """
    file = read_tensor_file(path, _DTYPES, file_bytes=max_bytes)
    metadata, tensors = file.metadata, file.tensors()
    if metadata.get("format") != FORMAT:
        raise ValueError(f"its format is {quoted(metadata.get('format'))}, expected {FORMAT!r}")
    if metadata.keys() != {"format", "tracks", "labels"}:
        raise ValueError(f"its metadata are {quoted(sorted(metadata))}, expected format, tracks and labels")
    entries = parse_json(metadata["tracks"], 3)
    if not isinstance(entries, list) or not 0 < len(entries) <= _MOST_TRACKS:
        raise ValueError(f"its tracks are {quoted(entries)}, expected a list of 1 to {_MOST_TRACKS}")
    layers: list[list[Track]] = []
    for index, entry in enumerate(entries):
        try:
            track = _track(index, entry, tensors)
            _add(layers, entry["layer"], track)
        except ValueError as error:
            raise ValueError(f"its track {index} can't be read: {error}") from error
    first = next(iter(layers[0][0].values.values()))
    shape = tuple(first.shape[:2])
    for track in (track for tracks in layers for track in tracks):
        _check_shapes(track, shape)
    lengths = _lengths(tensors.pop("lengths", None), shape)
    # Every tensor read above was popped: what is left belongs to no track.
    if tensors:
        raise ValueError(f"no track has its tensor {quoted(min(tensors))}")
    return TapeContent(layers, lengths, _labels(parse_json(metadata["labels"], 1), shape[0]))


def _track(index: int, entry: Any, tensors: dict[str, Tensor]) -> Track:
    """Build the track that ``entry`` describes, popping its values from ``tensors``."""
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise ValueError(f"it is {quoted(entry)}, expected an object of {', '.join(sorted(_FIELDS))}")
    kind, reverse = entry["kind"], entry["reverse"]
    if not _is_name(kind):
        raise ValueError(f"its kind is {quoted(kind)}, expected up to {_MOST_NAME} characters that print")
    if not isinstance(reverse, bool):
        raise ValueError(f"its reverse is {quoted(reverse)}, expected true or false")
    for field in ("equation", "source"):
        if not _is_prose(entry[field]):
            raise ValueError(f"its {field} is {quoted(entry[field])}, expected a text")
    names, states, gradients = (_names(field, entry[field]) for field in ("names", "states", "gradients"))
    if not names or not set(states) | set(gradients) <= set(names):
        raise ValueError(f"its names, {quoted(names)}, are none, or lack some of its states and gradients")
    values, before = _pop(index, "value", names, tensors), _pop(index, "before", states, tensors)
    probes = {}
    for name, gradient in _pop(index, "gradient", gradients, tensors).items():
        value = values[name]
        if gradient.shape != value.shape or gradient.dtype != value.dtype:
            raise ValueError(f"the gradient of {quoted(name)} is {_spelled(gradient)}, the value {_spelled(value)}")
        # Tape.gradient reads the .grad of a probe, as after a backward.
        probe = probes[name] = torch.zeros_like(value)
        if not value.is_floating_point():
            raise ValueError(f"{quoted(name)} is {_spelled(value)}, which has no gradient")
        probe.grad = gradient
    return Track(kind, reverse, tuple(states), values, lambda: before, probes, entry["equation"], entry["source"])


def _pop(index: int, kind: str, names: Iterable[str], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove one kind of a track's tensors (value, before or gradient) from ``tensors``; return them by name."""
    popped = {}
    for name in names:
        key = f"{index}.{kind}.{name}"
        if key not in tensors:
            raise ValueError(f"the tensor {quoted(key)} is missing")
        popped[name] = tensors.pop(key)
    return popped


def _add(layers: list[list[Track]], layer: object, track: Track) -> None:
    """Append a track to its layer.

    Raises:
        ValueError: unless tracks come layer by layer, from the bottom, two to a layer at most.
    """
    if type(layer) is not int or layer not in (len(layers) - 1, len(layers)) or layer < 0:
        raise ValueError(f"its layer is {quoted(layer)}, expected {max(len(layers) - 1, 0)} or {len(layers)}")
    if layer == len(layers):
        layers.append([])
    layers[layer].append(track)
    if len(layers[layer]) > _MOST_DIRECTIONS:
        raise ValueError(f"it is the third of layer {layer}, which has {_MOST_DIRECTIONS} directions at most")


def _check_shapes(track: Track, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless all values are (T, N, ...) floats, and a state before a step is like that after it."""
    for name, value in (*track.values.items(), *track.before.items()):
        if not 2 <= value.dim() <= _MOST_DIMS or value.shape[:2] != shape or not value.is_floating_point():
            raise ValueError(f"{quoted(name)} of {track.kind} is {_spelled(value)}, expected numbers of {shape}, size")
    for name, value in track.before.items():
        if value.shape != track.values[name].shape or value.dtype != track.values[name].dtype:
            after = _spelled(track.values[name])
            raise ValueError(
                f"state {quoted(name)} of {track.kind} is {_spelled(value)} before a step, {after} after it"
            )


def _lengths(lengths: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """Return ``lengths``, or raise ValueError unless they fit values of shape (T, N)."""
    if lengths is None:
        return None
    if lengths.shape != shape[1:] or lengths.dtype != torch.int64:
        raise ValueError(f"its lengths are {_spelled(lengths)}, expected torch.int64 of shape {shape[1:]}")
    if lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= shape[0]:
        raise ValueError(f"its lengths are from {int(lengths.min())} to {int(lengths.max())}, of {shape[0]} steps")
    return lengths


def _labels(labels: Any, steps: int) -> list[str] | None:
    """Return ``labels``, or raise ValueError unless there is one for each step."""
    if labels is None:
        return None
    if not isinstance(labels, list) or len(labels) != steps or not all(map(_is_label, labels)):
        raise ValueError(f"its labels are {quoted(labels)}, expected a text or number for each of {steps} steps")
    return labels


def _is_label(value: object) -> bool:
    # JSON has no NaN, though Python's reader accepts one, and a page's script would not.
    return is_text(value) or isinstance(value, int) or (type(value) is float and math.isfinite(value))


def _is_name(value: object) -> bool:
    # No control characters: names are printed to terminals and written into pages.
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= _MOST_NAME


def _is_prose(value: object) -> bool:
    """Return whether a value is a text of printable characters, tabs and line ends."""
    return isinstance(value, str) and all(character.isprintable() or character in "\n\t" for character in value)


def _names(field: str, value: object) -> list[str]:
    """Return ``value``, or raise ValueError unless it is a list of names, each once."""
    if not isinstance(value, list) or not all(map(_is_name, value)) or len(set(value)) != len(value):
        raise ValueError(f"its {field} are {quoted(value)}, expected names, each once")
    return value


def _spelled(value: Tensor) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}"
