"""A training run: Megatron's loop with our model, data and callbacks."""
