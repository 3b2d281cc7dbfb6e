"""Kernels in this process: compiled, given their arguments, run by a team of threads."""
