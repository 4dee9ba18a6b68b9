"""Time one layer on several ranks: `python -m benchmarks.parallel`."""
