"""Kernels in this process: compile them, bind their arguments, run them on a team of threads."""
