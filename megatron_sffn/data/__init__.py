"""Data sets and batches for Megatron's training loop."""
