"""transformers, checkpoints of Lightning, sharded training, models in files.

All files record the plan of `compression.plan`. `checkpoint` puts it into checkpoints of Lightning, `checkpoint_io`
writes those, and `instantiators` lets Lightning itself load them. `saved` makes directories of `save_compressed`,
`huggingface` and `huggingface_quantizer` those of transformers; `opening` opens any of them. `other_savers` refuses
what other libraries would write without a plan.
"""
