"""transformers, checkpoints of Lightning, sharded training, models in files."""
