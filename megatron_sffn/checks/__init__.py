"""Everything that is refused before a run starts."""
