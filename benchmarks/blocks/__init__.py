"""One layer with its routing given, ours and the peers: `python -m benchmarks.blocks`."""
