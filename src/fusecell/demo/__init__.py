"""The main job: a character model learns Python from the machine's own standard library, on our GRU and on torch's.

corpus → model → train → race → baselines → sample → report, one file each; ``job`` runs them in that order.
"""

from fusecell.demo.main import run_demo
from fusecell.demo.settings import Settings

__all__ = ["Settings", "run_demo"]
