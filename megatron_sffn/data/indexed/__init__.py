"""Megatron's `.bin/.idx` pairs: format, search, merge and statistics."""
