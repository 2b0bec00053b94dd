"""Compressed embeddings and projections, and everything that reads them: losses, decoding, generation."""
