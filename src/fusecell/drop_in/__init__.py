"""RNN, GRU and LSTM: torch.nn's layers, computed by fusecell's cells."""

from fusecell.drop_in.layers import GRU, LSTM, RNN

__all__ = ["GRU", "LSTM", "RNN"]
