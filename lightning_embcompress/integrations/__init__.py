"""transformers, checkpoints of Lightning, sharded training, models in files.

All files record the plan of `compression.plan`. `checkpoint` puts it into checkpoints of Lightning and `checkpoint_io`
writes those, `saved` makes directories of `save_compressed`, `huggingface` and `huggingface_quantizer` those of
transformers; `opening` opens any of them.
"""
