"""A tensor train for the vector of every token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from lightning_embcompress.methods.base import Problem
from lightning_embcompress.methods.quantizers.factors import materialize, pieces, read_rows
from lightning_embcompress.methods.sized import SizedFactorization, Sizes
from lightning_embcompress.methods.specs import integers, positive_integers
from lightning_embcompress.methods.tensor_train.config import TensorTrainConfig
from lightning_embcompress.methods.tensor_train.solver import (
    core_sizes,
    tensor_train,
    train_logits,
    train_ranks,
    train_rows,
)
from lightning_embcompress.methods.tiles import TileMaker, Tiles
from lightning_embcompress.utils.division import deal
from lightning_embcompress.utils.graphs import is_exporting

# Tokens whose cores are solved or read at once: their intermediate products stay in a core's cache.
_CHUNK_TOKENS = 1024
# Hidden states up to which it is faster to meet them in the middle of the trains than to compute the rows.
_FEW_STATES = 4


class TensorTrain(SizedFactorization[TensorTrainConfig]):
    """TensorGPT: the vector of every token, folded to a tensor, as a tensor train of its own (arXiv 2307.00526).

    No core is shared between tokens. The cores of a token stand in one row of a `[vocab_size, floats]` parameter, so
    that a lookup reads one piece of memory a token.

    Logits: for a few hidden states the trains are multiplied up to their middles from both ends and meet the state
    there; for many, rows are computed a piece at a time and multiplied. Both cost more than the product with a dense
    table does for one state, and hardly more for many.

    Args:
        vocab_size: Rows of the table.
        dim: Columns of the table.
        shape: Sizes of the modes, with a product of at least `dim`.
        ranks: Ranks of the bonds, one more than there are modes; the first and the last are 1.
        dtype: Dtype of the factors.
        device: Device of the factors.

    Raises:
        ValueError: If shape or ranks are not possible.

    Example:
        >>> table = torch.randn(1000, 768)
        >>> trains = TensorTrain.decompose(table, table.nbytes, config=TensorTrainConfig(max_rank=4))
        >>> trains.rows(torch.tensor([3, 999])).shape, trains.logits(torch.randn(2, 768)).shape
        (torch.Size([2, 768]), torch.Size([2, 1000]))
        >>> round(table.numel() / trains.cores.numel(), 2)
        3.31
    """

    kind = "tensor_train"
    config_class = TensorTrainConfig
    entries = ("shape", "ranks")
    divides = True

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        shape: Sequence[int],
        ranks: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        """Build it empty."""
        super().__init__(vocab_size, dim)
        if not shape or min(shape) < 1 or math.prod(shape) < dim:
            raise ValueError(f"shape {list(shape)} must be sizes of 1 or more with a product of at least {dim}")
        largest = train_ranks(shape, math.prod(shape))
        if len(ranks) != len(largest) or any(not 1 <= rank <= most for rank, most in zip(ranks, largest, strict=True)):
            raise ValueError(f"ranks {list(ranks)} must be from 1 to {largest} for the shape {list(shape)}")
        self.shape = list(shape)
        self.ranks = list(ranks)
        self.cores = nn.Parameter(torch.zeros(vocab_size, sum(core_sizes(shape, ranks)), dtype=dtype, device=device))

    def rows(self, ids: Tensor, sparse: bool = False) -> Tensor:
        """Rows of the table, see `Factorization.rows`; every distinct id is computed once."""
        if is_exporting():
            rows = train_rows(read_rows(self.cores, ids.flatten()), self.shape, self.ranks, self.dim)
            return rows.reshape(*ids.shape, self.dim)
        distinct, inverse = torch.unique(ids, return_inverse=True)
        cores = read_rows(self.cores, distinct, sparse)
        return F.embedding(inverse, train_rows(cores, self.shape, self.ranks, self.dim))

    def logits(self, hidden: Tensor) -> Tensor:
        """`h Wᵀ`, see `Factorization.logits`."""
        states = hidden.reshape(-1, self.dim)
        if is_exporting():
            logits = train_logits(materialize(self.cores), states, self.shape, self.ranks)
        elif states.shape[0] > _FEW_STATES:
            return self.logits_of_rows(hidden, self._read, by_row=self.cores)
        else:
            parts = pieces(self.cores, _CHUNK_TOKENS)
            logits = torch.cat([train_logits(cores, states, self.shape, self.ranks) for cores in parts], dim=-1)
        return logits.reshape(*hidden.shape[:-1], self.vocab_size)

    def _tiles(self, hidden: Tensor, tile_rows: int) -> Tiles:
        maker = TileMaker(tile_rows)
        maker.add_product(
            self.cores, maker.share(hidden), lambda cores: train_rows(cores, self.shape, self.ranks, self.dim)
        )
        return maker.made()

    def _read(self, start: int, stop: int, cores: Tensor) -> Tensor:
        return train_rows(cores, self.shape, self.ranks, self.dim)

    @classmethod
    def from_spec(cls, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | None = None) -> Self:
        """Build it empty, see `Factorization.from_spec`."""
        vocab_size, dim = positive_integers(spec, "vocab_size", "dim")
        return cls(vocab_size, dim, integers(spec, "shape"), integers(spec, "ranks"), dtype, device)

    @classmethod
    def sizes(cls, vocab_size: int, dim: int, config: TensorTrainConfig) -> Sizes:
        """The largest rank asked for, or any."""
        shape = config.shape_for(dim)
        most, rank = max(train_ranks(shape, math.prod(shape))), config.max_rank
        if rank is None:
            return Sizes(most, lambda size: (shape, train_ranks(shape, size)))
        if rank > most:
            raise ValueError(
                f"max_rank must be at most {most} for vectors folded to {' x '.join(map(str, shape))}, it is {rank}"
            )
        return Sizes(1, lambda _: (shape, train_ranks(shape, rank)))

    def _solve(self, problem: Problem[TensorTrainConfig], refine: bool) -> None:
        """TT-SVD of every row."""
        starts = range(0, self.vocab_size, _CHUNK_TOKENS)
        chunks = [slice(start, min(start + _CHUNK_TOKENS, self.vocab_size)) for start in starts]

        def compute(unit: int) -> None:
            chunk = chunks[unit]
            cores = tensor_train(problem.weight[chunk], self.shape, self.ranks)
            if refine:
                cores = self._with_signs_of(self.cores[chunk].to(cores), cores)
            self.cores[chunk] = cores.to(self.cores.dtype)

        # Processes share the tokens.
        costs = [chunk.stop - chunk.start for chunk in chunks]
        deal([[self.cores[chunk]] for chunk in chunks], costs, compute, problem.advance)

    def _with_signs_of(self, reference: Tensor, cores: Tensor) -> Tensor:
        """Choose the signs of singular vectors, which are free, like those of other cores of the same tokens.

        An optimizer's state for the cores goes on to fit.
        """
        sizes = core_sizes(self.shape, self.ranks)
        signs = cores.new_ones(cores.shape[0], 1)
        pieces = []
        for mode, (piece, old) in enumerate(
            zip(torch.split(cores, sizes, 1), torch.split(reference, sizes, 1), strict=True)
        ):
            left, right = self.ranks[mode : mode + 2]
            piece = piece.reshape(-1, left, self.shape[mode], right) * signs[:, :, None, None]
            if mode < len(self.shape) - 1:
                # The next core takes the sign back; the last one has none after it.
                agreement = (piece * old.reshape(piece.shape)).sum(dim=(1, 2))
                signs = torch.where(agreement < 0, -1.0, 1.0).to(cores)
                piece = piece * signs[:, None, None]
            pieces.append(piece.flatten(1))
        return torch.cat(pieces, dim=1)
