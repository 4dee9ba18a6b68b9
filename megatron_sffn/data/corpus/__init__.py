"""A corpus before it is tokenized: duplicates removed, parts held out."""
