"""Benchmarks of fusecell against torch.nn and other runtimes, on published shapes: ``python -m benchmarks.run``."""
