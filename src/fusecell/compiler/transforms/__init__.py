"""From graph to graph: simplifying passes, and the partition into forward and backward."""
