"""What the arguments of the LSTM language model must be, told before anything large is made or trained."""

from __future__ import annotations

import math

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import nn


def check_sizes(
    vocab_size: int, embedding_dim: int, hidden_size: int, projection_size: int, num_layers: int, tie_weights: bool
) -> None:
    """Refuse what the layers would refuse late, unclearly or never."""
    sizes = {"vocab_size": vocab_size, "embedding_dim": embedding_dim, "hidden_size": hidden_size}
    for name, value in {**sizes, "num_layers": num_layers}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    if not 0 <= projection_size < hidden_size:
        raise ValueError(
            f"projection_size={projection_size} must be smaller than hidden_size={hidden_size}. Set it to 0 for an LSTM"
            " without projection."
        )
    head_dim = projection_size or hidden_size
    if tie_weights and head_dim != embedding_dim:
        raise ValueError(
            f"tie_weights=True needs embedding_dim={embedding_dim} to equal the width of the head, {head_dim}. Set"
            f" embedding_dim={head_dim}, or projection_size={embedding_dim} where hidden_size is larger."
        )


def check_training(
    vocab_size: int,
    dropout: float,
    table_init_range: float,
    softmax: str,
    num_sampled: int,
    lstm_gradient_clip: float | None,
) -> None:
    """Refuse what would otherwise show in training only."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} must be at least 0 and below 1; it is the probability of dropping.")
    if not 0 < table_init_range < math.inf:
        raise ValueError(f"table_init_range={table_init_range} must be above 0 and finite; 0.1 is a good start.")
    if softmax not in ("full", "sampled"):
        raise ValueError(f"softmax={softmax!r} must be 'full' or 'sampled'.")
    if softmax == "sampled" and not 1 <= num_sampled <= vocab_size:
        raise ValueError(
            f"num_sampled={num_sampled} must be within 1 and vocab_size={vocab_size}. Lower it, or set softmax='full'."
        )
    if lstm_gradient_clip is not None and lstm_gradient_clip <= 0:
        raise ValueError(f"lstm_gradient_clip={lstm_gradient_clip} must be above 0. Leave it out for no clipping.")


def check_optimizer(make: OptimizerCallable) -> None:
    """Take a step with a sparse and a dense gradient of one number: what fails would else do so after the first batch.

    Raises:
        ValueError: If the optimizer takes no such gradients.
    """
    sparse, dense = (nn.Parameter(torch.zeros(1, 1)) for _ in range(2))
    optimizer = make([sparse, dense])
    sparse.grad = torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1), (1, 1))
    dense.grad = torch.ones(1, 1)
    try:
        optimizer.step()
    except Exception as error:  # every optimizer finds out in its own way
        raise ValueError(
            f"sparse_gradients=True needs an optimizer that takes sparse gradients beside dense ones, which "
            f"{type(optimizer).__name__} as it is set does not ({error}): take Adagrad or SGD, without "
            "weight_decay and fused, or set sparse_gradients to False."
        ) from error
