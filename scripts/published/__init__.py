"""Recurrent cells as people publish them: packages' own modules, and steps written from papers' equations."""
