"""Published recurrent cells, torch.nn's three among them, each one step in plain torch; ``CELLS`` lists them all."""

from fusecell.cells.gated import FastGRNNCell, MGUCell, MinGRUCell, UGRNNCell
from fusecell.cells.normed import LayerNormGRUCell, LayerNormLSTMCell, LiGRUCell
from fusecell.cells.oscillator import CoRNNCell
from fusecell.cells.peephole import PeepholeLSTMCell
from fusecell.cells.registry import CELLS, ZooCell
from fusecell.cells.simple import AntisymmetricRNNCell, IndRNNCell, LeakyCell, SCRNCell
from fusecell.cells.torch_nn import GRUCell, LSTMCell, RNNCell

__all__ = [
    "CELLS",
    "ZooCell",
    "RNNCell",
    "GRUCell",
    "LSTMCell",
    "PeepholeLSTMCell",
    "LayerNormGRUCell",
    "LayerNormLSTMCell",
    "MGUCell",
    "LiGRUCell",
    "UGRNNCell",
    "MinGRUCell",
    "FastGRNNCell",
    "LeakyCell",
    "IndRNNCell",
    "AntisymmetricRNNCell",
    "CoRNNCell",
    "SCRNCell",
]
