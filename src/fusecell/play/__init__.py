"""A cell to play with: trained cells that run in a web page, where every gate can be seen, held and changed.

models (train) → cell (the step with its values let out and its weights let in) → page (one file), a file each.
"""

from fusecell.play.cell import PlayCell
from fusecell.play.models import KINDS, Model, train_models
from fusecell.play.page import page, write_page

__all__ = ["KINDS", "Model", "PlayCell", "page", "train_models", "write_page"]
