"""Models whose recurrent weights are stored in 16 or 8 bits, for inference over whole sequences."""

from fusecell.quantized.cell import QuantizedCell
from fusecell.quantized.convert import quantize

__all__ = ["QuantizedCell", "quantize"]
