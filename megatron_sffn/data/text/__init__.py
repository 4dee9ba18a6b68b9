"""Text on disk: files, chunks of them, and the documents in a chunk."""
