"""Documents to token ids, on one machine or on many."""
