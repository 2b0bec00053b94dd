"""Compressed embeddings and projections, and everything that reads them: losses, decoding, generation.

`compressed` has the layers, `scaled_embeddings` the classes that multiply their rows, `chunked_loss` and `fused_loss`
the two engines of losses.
"""
