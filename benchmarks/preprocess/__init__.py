"""Tokens from text, ours and Megatron-LM's way: `python -m benchmarks.preprocess`."""
