"""From a graph to a plan: phases, stages and buffers."""
