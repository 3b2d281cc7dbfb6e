"""Which results and users of a graph count, where values that are only saved for the backward change nothing."""

from __future__ import annotations

from fusecell.compiler.ir.graph import SAVED, Graph

__all__ = ["results", "users_of"]


def results(graph: Graph) -> set[int]:
    """Return the outputs but for saved values: that one is saved must not change how, and to which bits, others are."""
    return {index for label, index in graph.outputs.items() if not label.startswith(SAVED)}


def users_of(graph: Graph) -> list[list[int]]:
    """List, for each node, its users, except those that are computed only to be saved."""
    needed = graph.needed(results(graph))
    return [[user for user in users if needed[user]] for users in graph.users()]
