"""What fusecell costs beside others, on shapes that people run: ``python -m benchmarks.run``."""
