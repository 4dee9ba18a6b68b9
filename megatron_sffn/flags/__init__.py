"""The command line: our flags beside Megatron's, and the configs that they describe."""
