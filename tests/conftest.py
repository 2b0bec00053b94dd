"""What all tests share."""

import torch

# Two busy threads make tiny tensors many times slower: tests use one, benchmarks choose for themselves.
torch.set_num_threads(1)
