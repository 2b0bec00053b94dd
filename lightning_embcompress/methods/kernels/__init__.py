"""The inner loops of logits and losses, in torch and as Triton kernels for GPUs; rows are looked up elsewhere."""
