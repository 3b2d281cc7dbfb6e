"""``python -m fusecell.play page.html``: what ``fusecell play`` does, without the packages of the command line."""

import sys

from fusecell.play.page import write_page

write_page(sys.argv[1])
