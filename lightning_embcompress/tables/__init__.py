"""Find the tables of a model, replace them, and put them back.

`finding` says which tables a model has and whether they may be replaced, `automatic` which are taken where nobody has
named them, and `replacement` puts compressed layers in their
place and dense ones back; `layers.scaled_embeddings` says which subclasses of `nn.Embedding` may be replaced.
"""
