"""``CELLS``, the list of all published cells: tests, documentation, benchmarks and the command line iterate over it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fusecell.cell import Cell
from fusecell.cells.gated import FastGRNNCell, MGUCell, MinGRUCell, UGRNNCell
from fusecell.cells.normed import LayerNormGRUCell, LayerNormLSTMCell, LiGRUCell
from fusecell.cells.oscillator import CoRNNCell
from fusecell.cells.peephole import PeepholeLSTMCell
from fusecell.cells.simple import AntisymmetricRNNCell, IndRNNCell, LeakyCell, SCRNCell
from fusecell.cells.torch_nn import GRUCell, LSTMCell, RNNCell

__all__ = ["CELLS", "ZooCell"]


@dataclass(frozen=True)
class ZooCell:
    """One entry of :data:`CELLS`: a cell class with its options, paper and equation.

    Example:
        >>> import fusecell as fc
        >>> entry = next(entry for entry in fc.CELLS if entry.name == "mgu")
        >>> entry.make(5, 10)
        MGUCell(5, 10)

    Attributes:
        name: its name on the command line.
        cell: its class.
        paper: the publication.
        summary: a description in one line.
        equation: the step in plain text, ``·`` for the elementwise product; biases are left out.
        options: maps hidden_size to the constructor arguments, besides the sizes, that make this variant of the class.
    """

    name: str
    cell: type[Cell]
    paper: str
    summary: str
    equation: str
    options: Callable[[int], dict[str, Any]] = lambda hidden_size: {}

    def make(self, input_size: int, hidden_size: int, **options: Any) -> Cell:
        """Build the cell; ``options`` are further arguments of its constructor, such as ``bias`` or ``dtype``."""
        cell: Cell = self.cell(input_size, hidden_size, **{**self.options(hidden_size), **options})
        return cell


# A list here rather than a decorator on each class: three classes have two entries, and the order, which is that of
# docs/cells.md, goes by kinship and not by file.
CELLS: tuple[ZooCell, ...] = (
    ZooCell(
        "rnn_tanh",
        RNNCell,
        "Elman, Finding structure in time, Cognitive Science 14 (1990)",
        "the plain recurrent network",
        "h' = tanh(W x + U h)",
    ),
    ZooCell(
        "rnn_relu",
        RNNCell,
        "Le, Jaitly, Hinton, arXiv:1504.00941",
        "the plain recurrent network with rectified units",
        "h' = relu(W x + U h)",
        lambda hidden_size: {"nonlinearity": "relu"},
    ),
    ZooCell(
        "gru",
        GRUCell,
        "Cho et al., arXiv:1406.1078v1",
        "torch.nn's GRU: the reset gate acts after the product",
        "r = σ(Wr x + Ur h); z = σ(Wz x + Uz h); n = tanh(Wn x + r·(Un h)); h' = (1-z)·n + z·h",
    ),
    ZooCell(
        "gru_reset_before",
        GRUCell,
        "Cho et al., arXiv:1406.1078v3",
        "the GRU as published: the reset gate acts before the product",
        "r = σ(Wr x + Ur h); z = σ(Wz x + Uz h); n = tanh(Wn x + Un (r·h)); h' = (1-z)·n + z·h",
        lambda hidden_size: {"reset_after": False},
    ),
    ZooCell(
        "lstm",
        LSTMCell,
        "Hochreiter, Schmidhuber, Neural Computation 9 (1997); Gers et al., Neural Computation 12 (2000)",
        "torch.nn's LSTM: a memory behind three gates",
        "i, f, o = σ(W x + U h); g = tanh(Wg x + Ug h); c' = f·c + i·g; h' = o·tanh(c')",
    ),
    ZooCell(
        "lstm_projected",
        LSTMCell,
        "Sak, Senior, Beaufays, arXiv:1402.1128",
        "an LSTM whose output is projected to fewer features",
        "i, f, o = σ(W x + U h); g = tanh(Wg x + Ug h); c' = f·c + i·g; h' = P (o·tanh(c'))",
        lambda hidden_size: {"proj_size": max(1, hidden_size // 2)},
    ),
    ZooCell(
        "lstm_peephole",
        PeepholeLSTMCell,
        "Gers, Schraudolph, Schmidhuber, JMLR 3 (2002)",
        "an LSTM whose gates look at its memory",
        "i, f = σ(W x + U h + p·c); g = tanh(Wg x + Ug h); c' = f·c + i·g; o = σ(Wo x + Uo h + po·c'); h' = o·tanh(c')",
    ),
    ZooCell(
        "lstm_layer_norm",
        LayerNormLSTMCell,
        "Ba, Kiros, Hinton, arXiv:1607.06450",
        "an LSTM with layer norm inside the step",
        "i, f, o = σ(LN(W x) + LN(U h)); g = tanh(LN(Wg x) + LN(Ug h)); c' = f·c + i·g; h' = o·tanh(LN(c'))",
    ),
    ZooCell(
        "gru_layer_norm",
        LayerNormGRUCell,
        "Ba, Kiros, Hinton, arXiv:1607.06450",
        "a GRU with layer norm inside the step",
        "r, z = σ(LN(W x) + LN(U h)); n = tanh(LN(Wn x) + r·LN(Un h)); h' = (1-z)·n + z·h",
    ),
    ZooCell(
        "mgu",
        MGUCell,
        "Zhou et al., arXiv:1603.09420",
        "the minimal gated unit: one gate forgets and resets",
        "f = σ(Wf x + Uf h); n = tanh(Wn x + Un (f·h)); h' = (1-f)·h + f·n",
    ),
    ZooCell(
        "ligru",
        LiGRUCell,
        "Ravanelli et al., arXiv:1803.10225",
        "the light GRU of speech recognition, with layer norm for batch norm",
        "z = σ(LN(Wz x) + Uz h); n = relu(LN(Wn x) + Un h); h' = z·h + (1-z)·n",
    ),
    ZooCell(
        "ugrnn",
        UGRNNCell,
        "Collins, Sohl-Dickstein, Sussillo, arXiv:1611.09913",
        "the plain recurrent network with an update gate",
        "g = σ(Wg x + Ug h + 1); n = tanh(Wn x + Un h); h' = g·h + (1-g)·n",
    ),
    ZooCell(
        "min_gru",
        MinGRUCell,
        "Feng et al., arXiv:2410.01201",
        "a GRU whose gates see only the input",
        "z = σ(Wz x); n = Wn x; h' = (1-z)·h + z·n",
    ),
    ZooCell(
        "fast_grnn",
        FastGRNNCell,
        "Kusupati et al., arXiv:1901.02358",
        "gate and candidate share their matrices, for tiny devices",
        "a = W x + U h; z = σ(a + bz); n = tanh(a + bn); h' = (σ(ζ)(1-z) + σ(ν))·n + z·h",
    ),
    ZooCell(
        "leaky",
        LeakyCell,
        "Yang et al., Nature Neuroscience 22 (2019)",
        "the continuous-time network of neuroscience",
        "h' = (1-α) h + α relu(W x + U h + noise)",
    ),
    ZooCell(
        "ind_rnn",
        IndRNNCell,
        "Li et al., arXiv:1803.04831",
        "units that see only themselves",
        "h' = relu(W x + u·h)",
    ),
    ZooCell(
        "antisymmetric",
        AntisymmetricRNNCell,
        "Chang et al., arXiv:1902.09689",
        "a step of a stable differential equation",
        "h' = h + ε tanh(W x + (U - Uᵀ - γI) h)",
    ),
    ZooCell(
        "co_rnn",
        CoRNNCell,
        "Rusch, Mishra, arXiv:2010.00951",
        "coupled oscillators: two states, no gates",
        "z' = z + Δt (tanh(W x + U [y, z]) - γ y - ε z); y' = y + Δt z'",
    ),
    ZooCell(
        "scrn",
        SCRNCell,
        "Mikolov et al., arXiv:1412.7753",
        "a plain recurrent network with a slow context",
        "s' = (1-α) B x + α s; h' = σ(W x + U h + P s'); output [h', s']",
    ),
)
