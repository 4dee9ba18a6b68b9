"""Time one layer with given routing, ours and other packages': `python -m benchmarks.blocks`."""
