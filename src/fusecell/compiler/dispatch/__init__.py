"""Choose how a call runs: cached kernels, a compiled program, or the Python loop."""
