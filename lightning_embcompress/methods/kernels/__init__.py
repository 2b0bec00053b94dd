"""The inner loops of logits and losses: each in torch, and as one Triton kernel for GPUs. Rows are looked up elsewhere."""
