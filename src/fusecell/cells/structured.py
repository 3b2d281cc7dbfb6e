"""``STRUCTURED_CELLS``: the cells with heads, matrices, images, spikes or several inputs, and inputs for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fusecell.cell import Cell
from fusecell.cells.attention import AttentionGRUCell
from fusecell.cells.block_diagonal import BlockGRUCell
from fusecell.cells.convolutional import ConvGRUCell
from fusecell.cells.irregular import CfCCell, GRUDCell
from fusecell.cells.linear_attention import GatedDeltaNetCell, Mamba2Cell, RWKV7Cell
from fusecell.cells.linear_recurrence import LRUCell, RGLRUCell
from fusecell.cells.spiking import ALIFCell, LIFCell
from fusecell.cells.world_model import RSSMCell
from fusecell.cells.xlstm import MLSTMCell, SLSTMCell
from fusecell.shapes import Shape

__all__ = ["STRUCTURED_CELLS", "StructuredCell"]

Inputs = Tensor | tuple[Tensor, ...]


def _randn(steps: int, rows: int, features: int) -> Inputs:
    return torch.randn(steps, rows, features)


@dataclass(frozen=True)
class StructuredCell:
    """One entry of :data:`STRUCTURED_CELLS`.

    Example:
        >>> import fusecell as fc
        >>> entry = next(entry for entry in fc.cells.STRUCTURED_CELLS if entry.name == "mlstm")
        >>> y, state = fc.Recurrent(entry.make(8, 16))(entry.inputs(7, 3, 8))
        >>> y.shape
        torch.Size([7, 3, 16])

    Attributes:
        name: a short name.
        cell: its class.
        paper: the publication.
        summary: a description in one line.
        equation: the step in plain text.
        make: builds the cell for (features of x, features of its state), both multiples of the number of heads.
        inputs: random inputs of a sequence for such a cell: (steps, rows, features).
    """

    name: str
    cell: type[Cell]
    paper: str
    summary: str
    equation: str
    make: Callable[[int, int], Cell]
    inputs: Callable[[int, int, int], Inputs] = _randn

    def input_sizes(self, cell: Cell, features: int) -> tuple[Shape, ...] | None:
        """Return the shape of each input of a cell that it made, those included that it draws; None where it has one.

        That is what :class:`fusecell.Stream` takes as ``input_sizes``.
        """
        if len(cell.inputs) == 1:
            return None
        return tuple([tuple(value.shape[2:]) for value in (*self.inputs(1, 1, features), *cell.draw(1, 1))])


def _missing(steps: int, rows: int, features: int) -> Inputs:
    mask = (torch.rand(steps, rows, features) > 0.5).float()
    return torch.randn(steps, rows, features), mask, torch.rand(steps, rows, features)


STRUCTURED_CELLS: tuple[StructuredCell, ...] = (
    StructuredCell(
        "slstm",
        SLSTMCell,
        "Beck et al., arXiv:2405.04517",
        "xLSTM's LSTM with exponential gates, recurrent within heads",
        "m' = max(logσ(f) + m, i); c' = f·c + i·tanh(z); n' = f·n + i; h' = σ(o)·c'/n'",
        lambda features, size: SLSTMCell(features, size, heads=4),
    ),
    StructuredCell(
        "mlstm",
        MLSTMCell,
        "Beck et al., arXiv:2405.04517",
        "xLSTM's memory of matrices with exponential gates",
        "C' = f C + i v kᵀ; n' = f n + i k; h = σ(o)·C'q / max(|n'ᵀq|, e⁻ᵐ)",
        lambda features, size: MLSTMCell(features, size, heads=4),
    ),
    StructuredCell(
        "gated_delta_net",
        GatedDeltaNetCell,
        "Yang et al., arXiv:2412.06464",
        "a matrix memory that decays, and replaces what a key stood for",
        "S' = α S (I - β k kᵀ) + β v kᵀ; y = S' q",
        lambda features, size: GatedDeltaNetCell(features, size, heads=4),
    ),
    StructuredCell(
        "rwkv7",
        RWKV7Cell,
        "Peng et al., arXiv:2503.14456",
        "RWKV-7's time mixing: decay per channel, removal along a direction",
        "S' = S (diag(w) - κ (a·κ)ᵀ) + v kᵀ; y = S' r",
        lambda features, size: RWKV7Cell(features, size, heads=4),
    ),
    StructuredCell(
        "mamba2",
        Mamba2Cell,
        "Dao, Gu, arXiv:2405.21060",
        "one step of Mamba-2: a short convolution and decaying outer products",
        "S' = e^(ΔA) S + Δ x Bᵀ; y = S' C + D x",
        lambda features, size: Mamba2Cell(features, size, heads=4),
    ),
    StructuredCell(
        "rg_lru",
        RGLRUCell,
        "De et al., arXiv:2402.19427",
        "Griffin's gated linear recurrence",
        "a = σ(Λ)^(8σ(r)); h' = a·h + √(1-a²)·σ(i)·u",
        RGLRUCell,
    ),
    StructuredCell(
        "lru",
        LRUCell,
        "Orvieto et al., arXiv:2303.06349; Smith et al., arXiv:2208.04933",
        "complex states that turn and decay: LRU, S5",
        "s' = λ·s + γ·(B x); y = Re(C s') + D x",
        LRUCell,
    ),
    StructuredCell(
        "conv_gru",
        ConvGRUCell,
        "Ballas et al., arXiv:1511.06432",
        "a GRU over images, by convolutions",
        "z, r = σ(W * [x, h]); n = tanh(U * [x, r·h]); h' = (1-z)·h + z·n",
        lambda features, size: ConvGRUCell(features // 4, size // 8, size=(8, 8)),
        lambda steps, rows, features: torch.randn(steps, rows, features // 4, 8, 8),
    ),
    StructuredCell(
        "block_gru",
        BlockGRUCell,
        "Hafner et al., arXiv:2301.04104",
        "Dreamer's GRU with recurrent weights in blocks",
        "r, n, u = norm(W x + R h); n = tanh(σ(r)·n); u = σ(u-1); h' = u·n + (1-u)·h",
        lambda features, size: BlockGRUCell(features, size, blocks=4),
    ),
    StructuredCell(
        "lif",
        LIFCell,
        "Neftci et al., arXiv:1901.09948",
        "leaky integrate-and-fire neurons",
        "v' = β v + W x + U s - ϑ s; s' = [v' > ϑ]",
        LIFCell,
    ),
    StructuredCell(
        "alif",
        ALIFCell,
        "Bellec et al., arXiv:1803.09574",
        "integrate-and-fire neurons whose threshold adapts",
        "b' = ρ b + (1-ρ) s; v' = β v + (1-β)(W x + U s) - ϑ s; s' = [v' > ϑ0 + 1.8 b']",
        ALIFCell,
    ),
    StructuredCell(
        "gru_d",
        GRUDCell,
        "Che et al., arXiv:1606.01865",
        "a GRU for measurements with gaps",
        "x^ = m·x + (1-m)·(γ·last + (1-γ)·μ); h' = GRU([x^, m], γh·h)",
        GRUDCell,
        _missing,
    ),
    StructuredCell(
        "cfc",
        CfCCell,
        "Hasani et al., arXiv:2106.13898",
        "the closed-form continuous-time cell",
        "u = tanh(W [x, h]); σ = sigmoid(a t + b); h' = tanh(f)·(1-σ) + tanh(g)·σ",
        CfCCell,
        lambda steps, rows, features: (torch.randn(steps, rows, features), torch.rand(steps, rows, 1)),
    ),
    StructuredCell(
        "attention_gru",
        AttentionGRUCell,
        "Bahdanau et al., arXiv:1409.0473",
        "a GRU decoder that attends to a memory",
        "a = softmax(vᵀ tanh(W h + U m)); h' = GRU([x, Σ a m], h)",
        lambda features, size: AttentionGRUCell(features, size, memory=(11, features)),
        lambda steps, rows, features: (torch.randn(steps, rows, features), torch.randn(1, rows, 11, features)),
    ),
    StructuredCell(
        "rssm",
        RSSMCell,
        "Hafner et al., arXiv:1811.04551",
        "the world model's recurrent state space, with noise",
        "h' = GRU(W [z, a], h); z' = μ(h', e) + σ(h', e)·ε",
        lambda features, size: RSSMCell(2, features, size, size // 2),
        lambda steps, rows, features: (torch.randn(steps, rows, 2), torch.randn(steps, rows, features)),
    ),
)
