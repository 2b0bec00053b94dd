"""The inner loops that torch alone runs in several passes: each in torch, and as one Triton kernel for GPUs."""
