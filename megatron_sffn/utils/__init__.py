"""Helpers that know nothing of models: errors, files, sizes, hashes."""
