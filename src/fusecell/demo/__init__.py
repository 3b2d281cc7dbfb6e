"""The demo: train a character model on Python's standard library, with fusecell's GRU and with torch.nn's.

corpus → model → train → comparison → baselines → sample → report, a file each; ``main`` runs them in this order.
"""

from fusecell.demo.main import run_demo
from fusecell.demo.settings import Settings

__all__ = ["Settings", "run_demo"]
