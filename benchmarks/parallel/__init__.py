"""One layer between ranks: `python -m benchmarks.parallel`."""
