"""Published recurrent cells, torch.nn's three among them, each one step in plain torch.

``CELLS`` lists those with vectors as states and one input, ``STRUCTURED_CELLS`` those with heads, matrices, images,
spikes or several inputs.
"""

from fusecell.cells.attention import AttentionGRUCell
from fusecell.cells.block_diagonal import BlockGRUCell
from fusecell.cells.convolutional import ConvGRUCell
from fusecell.cells.gated import FastGRNNCell, MGUCell, MinGRUCell, UGRNNCell
from fusecell.cells.irregular import CfCCell, GRUDCell
from fusecell.cells.linear_attention import GatedDeltaNetCell, Mamba2Cell, RWKV7Cell
from fusecell.cells.linear_recurrence import LRUCell, RGLRUCell
from fusecell.cells.normed import LayerNormGRUCell, LayerNormLSTMCell, LiGRUCell
from fusecell.cells.oscillator import CoRNNCell
from fusecell.cells.peephole import PeepholeLSTMCell
from fusecell.cells.registry import CELLS, ZooCell
from fusecell.cells.simple import AntisymmetricRNNCell, IndRNNCell, LeakyCell, SCRNCell
from fusecell.cells.spiking import ALIFCell, LIFCell
from fusecell.cells.structured import STRUCTURED_CELLS, StructuredCell
from fusecell.cells.torch_nn import GRUCell, LSTMCell, RNNCell
from fusecell.cells.world_model import RSSMCell
from fusecell.cells.xlstm import MLSTMCell, SLSTMCell

__all__ = [
    "CELLS",
    "STRUCTURED_CELLS",
    "StructuredCell",
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
    "SLSTMCell",
    "MLSTMCell",
    "GatedDeltaNetCell",
    "RWKV7Cell",
    "Mamba2Cell",
    "RGLRUCell",
    "LRUCell",
    "ConvGRUCell",
    "BlockGRUCell",
    "LIFCell",
    "ALIFCell",
    "GRUDCell",
    "CfCCell",
    "AttentionGRUCell",
    "RSSMCell",
]
