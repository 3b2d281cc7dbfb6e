"""RNN, GRU and LSTM: torch.nn's layers, computed by fusecell's cells."""

from fusecell.drop_in.layers import GRU, LSTM, RNN
from fusecell.drop_in.quantization import register_drop_ins

__all__ = ["GRU", "LSTM", "RNN"]

register_drop_ins()
