"""Token ids to batches, as Megatron's loop draws them."""
