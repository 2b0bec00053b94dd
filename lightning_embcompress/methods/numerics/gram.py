"""Weighted second moments of a table and their leading eigenvectors: the way around tall SVDs.

The right singular vectors of `diag(q)^½ W` are the eigenvectors of the `d × d` matrix `S = Wᵀ diag(q) W`, so one pass
of `2 V d²` operations over the rows replaces an SVD of the `V × d` table, and coefficients need no division by `√q`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_embcompress.utils.division import deal, deal_lists
from lightning_embcompress.utils.tensor_files import Rows

# About 4 MiB of float32 a chunk: large enough for full matrix-product speed, small enough to stay out of the way.
_CHUNK_ELEMENTS = 2**20
# As many times that are read at once where the rows of all blocks are filled: of each there are then some hundreds.
_WINDOW_CHUNKS = 8

# Most parts into which rows or columns are cut for processes to share: enough to be shared evenly by many, few enough
# for the exchange of one to be a small part of computing it.
_ROW_UNITS = 64
_COLUMN_UNITS = 8

# Weight of a row that never occurs, relative to the rarest row that does: the optimum of the rows that occur stays
# what it is, and directions which they leave free go to the others instead of to chance.
_UNSEEN_WEIGHT = 1e-6

# Directions beyond those that are asked for which a subspace iteration turns too, and drops.
_OVERSAMPLING = 8


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a table is solved: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_chunks(num_rows: int, dim: int) -> Iterator[slice]:
    """Cut `num_rows` rows of `dim` elements into slices of bounded size."""
    step = max(1, _CHUNK_ELEMENTS // max(1, dim))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def row_units(num_rows: int, dim: int) -> list[list[slice]]:
    """The slices of `row_chunks` in up to 64 runs of equal length, for processes to share, see `utils.division`."""
    chunks = list(row_chunks(num_rows, dim))
    step = max(1, -(-len(chunks) // _ROW_UNITS))
    return [chunks[first : first + step] for first in range(0, len(chunks), step)]


def row_windows(num_rows: int, dim: int, multiple: int = 1) -> Iterator[slice]:
    """Cut rows into slices that are some times as long as those of `row_chunks`, of a multiple of so many rows."""
    step = max(1, _WINDOW_CHUNKS * _CHUNK_ELEMENTS // max(1, dim) // multiple) * multiple
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def run_of(chunks: Sequence[slice]) -> slice:
    """The rows of neighbouring slices."""
    return slice(chunks[0].start, chunks[-1].stop)


def row_weights(token_counts: Tensor | None, vocab_size: int, device: torch.device | None = None) -> Tensor:
    """Turn token counts into row weights `q` of mean 1 (GroupReduce, eq. 2).

    Args:
        token_counts: `[vocab_size]` non-negative counts, or None for equal weights.
        vocab_size: Number of rows of the table.
        device: Where the weights are wanted.

    Returns:
        `[vocab_size]` float64 weights, all positive: a row that never occurs gets a millionth of the weight of the
        rarest row that does. They are equal if no row occurs at all.
    """
    if token_counts is None:
        return torch.ones(vocab_size, dtype=torch.float64, device=device)
    counts = token_counts.to(device=device, dtype=torch.float64)
    seen = counts > 0
    if not bool(seen.any()):
        return torch.ones_like(counts)
    weights = torch.where(seen, counts, _UNSEEN_WEIGHT * counts[seen].min())
    return weights * (vocab_size / weights.sum())


def gram_matrix(weight: Rows, weights: Tensor, rows: Tensor | None = None) -> Tensor:
    """Weighted second moment `S = Σ_i q_i w_i w_iᵀ` over all rows of a table, or over some.

    Products run in the table's compute dtype, chunk by chunk, and are summed in float64. Of a large matrix over all
    rows only the upper triangle is computed, in strips of columns, which processes share (see `utils.division`).

    Args:
        weight: `[vocab_size, dim]` table of any floating dtype.
        weights: `[vocab_size]` row weights `q`.
        rows: Ids of the rows to sum over; None for all.

    Returns:
        `[dim, dim]` float64 matrix.
    """
    dim = weight.shape[1]
    total = torch.zeros(dim, dim, dtype=torch.float64, device=weight.device)
    width = -(-dim // (64 * _COLUMN_UNITS)) * 64
    if rows is not None or width >= dim:
        add_gram(total, weight, weights, rows)
        return total
    columns = [slice(start, min(start + width, dim)) for start in range(0, dim, width)]
    # A strip goes from the first row down to the diagonal; each is one piece of memory, to be sent as it is.
    strips = [total.new_zeros(strip.stop, strip.stop - strip.start) for strip in columns]

    def compute(units: Sequence[int]) -> None:
        for part in _weighted_chunks(weight, weights, None):
            for unit in units:
                strips[unit] += part[:, : columns[unit].stop].T @ part[:, columns[unit]]

    deal_lists([[strip] for strip in strips], [strip.stop for strip in columns], compute)
    for strip, values in zip(columns, strips, strict=True):
        total[: strip.stop, strip] = values
        total[strip, : strip.start] = values[: strip.start].T
    return total


def add_gram(
    total: Tensor, weight: Rows, weights: Tensor, rows: Tensor | None = None, sign: Literal[1, -1] = 1
) -> None:
    """Add the weighted second moment of rows to a matrix in place, or subtract it; arguments as `gram_matrix`."""
    product = total.new_empty(total.shape, dtype=compute_dtype(weight.dtype))
    for part in _weighted_chunks(weight, weights, rows):
        total.add_(torch.mm(part.T, part, out=product), alpha=sign)


def _weighted_chunks(weight: Rows, weights: Tensor, rows: Tensor | None) -> Iterator[Tensor]:
    """Rows times the roots of their weights, in the compute dtype: the product of a chunk with itself is symmetric."""
    dtype = compute_dtype(weight.dtype)
    for chunk in row_chunks(weight.shape[0] if rows is None else rows.numel(), weight.shape[1]):
        ids = chunk if rows is None else rows[chunk]
        yield weight[ids].to(dtype) * weights[ids].sqrt().to(dtype).unsqueeze(1)


def project(weight: Rows, basis: Tensor, rows: Tensor | None = None) -> Tensor:
    """Coefficients `w_i Bᵀ` of a table's rows in an orthonormal basis.

    Args:
        weight: `[vocab_size, dim]` table.
        basis: `[rank, dim]` orthonormal rows, or whatever else the rows are to be multiplied with.
        rows: Ids of the rows wanted; None for all.

    Returns:
        `[rows, rank]` in the table's dtype.
    """
    num_rows = weight.shape[0] if rows is None else rows.numel()
    dtype = compute_dtype(weight.dtype)
    right = basis.to(dtype).T
    out = torch.empty(num_rows, basis.shape[0], dtype=weight.dtype, device=weight.device)
    units = row_units(num_rows, weight.shape[1])

    def compute(unit: int) -> None:
        for chunk in units[unit]:
            ids = chunk if rows is None else rows[chunk]
            out[chunk] = (weight[ids].to(dtype) @ right).to(weight.dtype)

    runs = [run_of(chunks) for chunks in units]
    deal([[out[run]] for run in runs], [run.stop - run.start for run in runs], compute)
    return out


class PackedSymmetric:
    """Several symmetric matrices of one size, each stored as its upper triangle.

    Args:
        count: How many matrices.
        dim: Their size.
        dtype: Dtype they are stored in.
        device: Where they are.
    """

    def __init__(self, count: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        """Reserve the memory in one piece."""
        self.dim = dim
        row, column = torch.triu_indices(dim, dim, device=device)
        self._place = row * dim + column
        self._mirror = column * dim + row
        self._values = torch.zeros(count, self._place.numel(), dtype=dtype, device=device)

    def __len__(self) -> int:
        """Number of matrices."""
        return self._values.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype they are stored in."""
        return self._values.dtype

    def __getitem__(self, index: int) -> Tensor:
        """One matrix, `[dim, dim]`."""
        matrix = self._values.new_zeros(self.dim, self.dim)
        matrix.view(-1)[self._place] = self._values[index]
        matrix.view(-1)[self._mirror] = self._values[index]
        return matrix

    def __setitem__(self, index: int, matrix: Tensor) -> None:
        """Store one matrix; its lower triangle is not looked at."""
        self._values[index] = matrix.reshape(-1)[self._place].to(self._values.dtype)

    def stored(self, index: int) -> Tensor:
        """One matrix as it is stored, `[dim (dim + 1) / 2]`, to be written to."""
        return self._values[index]

    def trace(self, index: int) -> float:
        """Trace of one matrix."""
        diagonal = self._place % (self.dim + 1) == 0
        return float(self._values[index][diagonal].sum(dtype=torch.float64))


def top_eigenvectors(gram: Tensor, rank: int) -> Tensor:
    """The `rank` leading eigenvectors of a symmetric positive semi-definite matrix.

    Args:
        gram: `[dim, dim]` matrix.
        rank: How many, from 0 to `dim`.

    Returns:
        `[rank, dim]`, orthonormal rows in the matrix' dtype, the largest eigenvalue first.
    """
    if rank == 0:
        return gram.new_zeros(0, gram.shape[0])
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors[:, -rank:].flip(1).T.contiguous()


def thin_svd(matrix: Tensor, n_eigenvecs: int, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triplets of a matrix that is much longer one way than the other, through its Gram matrix.

    An SVD of the unfoldings of a table would take minutes. The signature is that of TensorLy's SVDs.

    Args:
        matrix: `[m, n]`, float32 or float64.
        n_eigenvecs: How many, at most `min(m, n)`.

    Returns:
        Left vectors `[m, count]`, values `[count]` and right vectors `[count, n]`.
    """
    if matrix.shape[0] > matrix.shape[1]:
        right, values, left = thin_svd(matrix.T, n_eigenvecs)
        return left.T, values, right.T
    gram = torch.zeros(len(matrix), len(matrix), dtype=torch.float64, device=matrix.device)
    add_gram(gram, matrix.T, gram.new_ones(matrix.shape[1]))
    vectors = top_eigenvectors(gram, n_eigenvecs).to(matrix.dtype)
    products = vectors @ matrix
    values = products.norm(dim=1)
    return vectors.T, values, products / values.clamp(min=torch.finfo(matrix.dtype).tiny)[:, None]


def warm_eigenvectors(gram: Tensor, rank: int, basis: Tensor) -> Tensor:
    """Leading eigenvectors by subspace iteration from the basis of a similar matrix.

    A refit after a few rows moved changes its subspace a little, so two iterations with a Rayleigh-Ritz step do what
    a full decomposition would, at a fraction of its time. Above half of `dim` the full one is the cheaper.

    Args:
        gram: `[dim, dim]` symmetric positive semi-definite matrix.
        rank: How many eigenvectors.
        basis: `[old_rank, dim]` starting directions; missing ones are filled with the columns of the matrix that
            carry the most of its trace.

    Returns:
        `[rank, dim]`, orthonormal rows.
    """
    dim = gram.shape[0]
    width = min(dim, rank + _OVERSAMPLING)
    if rank == 0 or 2 * width > dim:
        return top_eigenvectors(gram, rank)
    missing = width - min(basis.shape[0], width)
    fill = gram.diagonal().topk(missing).indices if missing else gram.new_empty(0, dtype=torch.long)
    block = torch.cat([basis[:width].T, torch.nn.functional.one_hot(fill, dim).T.to(gram.dtype)], dim=1)
    for _ in range(2):
        block = torch.linalg.qr(gram @ block).Q
    return (block @ top_eigenvectors(block.T @ gram @ block, rank).T).T.contiguous()
