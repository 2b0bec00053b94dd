"""Find the tables of a model, replace them, and put them back.

`replacement` says what may be replaced, and by what; `layers.scaled_embeddings` which subclasses of `nn.Embedding` may.
"""
