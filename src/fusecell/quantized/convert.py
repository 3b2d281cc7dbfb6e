"""``quantize``: a copy of a model whose recurrent weights are stored in 16 or 8 bits."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from fusecell.cell import Cell
from fusecell.drop_in import GRU, LSTM, RNN
from fusecell.quantized.cell import QuantizedCell
from fusecell.quantized.layers import quantized_layer
from fusecell.shapes import Size
from fusecell.streaming.small_weights import FORMATS

__all__ = ["quantize"]

_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
_LAYER = re.compile(r"_l\d+(_reverse)?$")


def quantize(
    module: nn.Module,
    weights: str = "int8",
    *,
    keep: Collection[str] = (),
    input_sizes: Sequence[Size] | Mapping[str, Sequence[Size]] | None = None,
) -> nn.Module:
    r"""Return a copy of a model in eval mode, whose cells store their matrices in 16 or 8 bits.

    .. math:: \hat W_{jk} = s_j \, \mathrm{round}(W_{jk} / s_j), \quad s_j = \max_k |W_{jk}| / 127

    That is ``int8``; the other formats are :class:`fusecell.Stream`'s, and so are their errors. Arithmetic is in
    float32. The copy takes the model's arguments, whole sequences and single steps, lengths and resets included. Its
    weights are packed for the kernel once, not at each call. What isn't recurrent stays as it is;
    ``torch.ao.quantization`` is for that.

    Example:
        >>> import torch, fusecell as fc
        >>> model = torch.nn.ModuleDict({"rnn": fc.LSTM(7, 16, 2, bidirectional=True), "out": torch.nn.Linear(32, 5)})
        >>> small = fc.quantize(model, "int8", keep=["weight_ih_l0"])
        >>> x = torch.randn(50, 4, 7)
        >>> bool((small["rnn"](x)[0] - model["rnn"](x)[0]).abs().max() < 0.02)
        True
        >>> formats = {weight.name: weight.format for weight in small["rnn"].cells[0].weights}
        >>> formats["0.weight_ih"], formats["0.weight_hh"]
        ('float32', 'int8')

    Arguments:
        module: any module with cells, or layers of fusecell; :func:`fusecell.replace` makes these of torch.nn's.
        weights: "bfloat16", "float16", "int8" (a scale for each output), or "int8-dynamic", which also rounds what the
            matrices multiply, at each step, and adds whole numbers: the quickest where a CPU has VNNI or dot products.
        keep: names of weights that stay float32, such as ``"weight_hh"`` of all cells, ``"rnn.weight_ih_l0"``, or
            ``"decoder.cell.out.weight"``.
        input_sizes: the features or shape of each input of a cell that takes several; a dict by the names of cells in
            the model, ``{"encoder.cell": (5, 5, 1)}``, where more than one does.

    Returns:
        The copy. Its parameters are those of what isn't recurrent, and require no gradients; ``state_dict`` has the
        stored weights. A call whose input requires gradients runs as a Python loop.

    Raises:
        TypeError: if the module has no cells, a cell has several inputs without ``input_sizes``, or computes in another
            dtype than float32; for a subclass of GRU, LSTM or RNN.
        ValueError: for another format, a name in ``keep`` that no weight has, or in ``input_sizes`` that no cell has.
        NotCompilable: if the step of a cell can't be compiled.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"quantize takes a module, got {type(module).__name__}.")
    if weights not in FORMATS or weights == "float32":
        formats = ", ".join(name for name in FORMATS if name != "float32")
        raise ValueError(f"quantize stores weights as one of {formats}, got {weights!r}.")
    if isinstance(keep, str):
        raise TypeError(f"keep takes a list of names of weights, got the text {keep!r}: write keep=[{keep!r}].")
    parts = list(_recurrent(module))
    if not parts:
        raise TypeError(
            f"{type(module).__name__} has no cell and no layer of fusecell to quantize; fusecell.replace(module) puts "
            "fusecell's layers in the place of torch.nn's."
        )
    names = [_joined(path, name) for path, part in parts for name in _weight_names(part)]
    for name in keep:
        if not any(_is_named(each, name) for each in names):
            raise ValueError(f"keep names {name!r}, and the weights are {', '.join(names)}.")
    sizes = _sizes_by_path(parts, input_sizes)
    # What deepcopy finds by the identity of the original it takes for its copy.
    copies: dict[int, Any] = {id(part): _quantized(path, part, weights, keep, sizes.get(path)) for path, part in parts}
    copied: nn.Module = copy.deepcopy(module, copies)
    return copied.eval().requires_grad_(False)


def _recurrent(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Iterate over the outermost cells and drop-in layers in a module, with their paths."""
    if isinstance(module, Cell | GRU | LSTM | RNN):
        yield path, module
        return
    for name, part in module.named_children():
        yield from _recurrent(part, _joined(path, name))


def _sizes_by_path(
    parts: Sequence[tuple[str, nn.Module]], input_sizes: Sequence[Size] | Mapping[str, Sequence[Size]] | None
) -> Mapping[str, Sequence[Size]]:
    """Return the sizes of the inputs of those cells that take several, by their paths."""
    several = [path for path, part in parts if isinstance(part, Cell) and len(part.inputs) > 1]
    if input_sizes is None:
        return {}
    sizes = input_sizes if isinstance(input_sizes, Mapping) else dict.fromkeys(several, input_sizes)
    cells = ", ".join(map(repr, several)) or "none"
    if not isinstance(input_sizes, Mapping) and len(several) != 1:
        raise ValueError(f"input_sizes lists sizes of one cell, and those of several inputs are {cells}: pass a dict.")
    for path in sizes:
        if path not in several:
            raise ValueError(f"input_sizes names {path!r}, and the cells of several inputs are {cells}.")
    return sizes


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _suffixes(layer: GRU | LSTM | RNN) -> list[str]:
    """List what torch.nn's names of the weights of each cell end with."""
    directions = ("", "_reverse") if layer.bidirectional else ("",)
    return [f"_l{number}{direction}" for number in range(layer.num_layers) for direction in directions]


def _weight_names(part: nn.Module) -> list[str]:
    """List the names of the weights of a cell or a drop-in layer."""
    if isinstance(part, GRU | LSTM | RNN):
        names = (kind + suffix for suffix in _suffixes(part) for kind in _WEIGHTS)
        return [name for name in names if getattr(part, name, None) is not None]
    return [name for name, _ in (*part.named_parameters(), *part.named_buffers())]


def _is_named(full: str, name: str) -> bool:
    """Whether a name is a weight's: with its path, the end of it, or without the number of a layer."""
    return full == name or full.endswith(f".{name}") or _LAYER.sub("", full.rpartition(".")[2]) == name


def _quantized(
    path: str, part: nn.Module, weights: str, keep: Collection[str], input_sizes: Sequence[Size] | None
) -> nn.Module:
    """Return the replacement of a cell or a drop-in layer."""

    def float32_names(suffix: str) -> list[str]:
        names = [each.removesuffix(suffix) for each in _weight_names(part) if each.endswith(suffix)]
        return [each for each in names if any(_is_named(_joined(path, each + suffix), name) for name in keep)]

    if isinstance(part, GRU | LSTM | RNN):
        return quantized_layer(part, weights, [float32_names(suffix) for suffix in _suffixes(part)])
    assert isinstance(part, Cell)
    return QuantizedCell(part, weights, float32_names(""), input_sizes)
