"""Time tokenization, ours and Megatron-LM's: `python -m benchmarks.preprocess`."""
