"""Rows put together from centroids of their parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from lightning_embcompress.methods.base import Problem
from lightning_embcompress.methods.numerics.gram import row_weights
from lightning_embcompress.methods.numerics.metric import Metric
from lightning_embcompress.methods.product_quantization.config import ProductQuantizationConfig
from lightning_embcompress.methods.product_quantization.descent import descend, encode
from lightning_embcompress.methods.product_quantization.solver import product_quantization, subspace_sizes
from lightning_embcompress.methods.product_quantization.training_sample import Groups, Sample
from lightning_embcompress.methods.quantizers.factors import materialize
from lightning_embcompress.methods.quantizers.packing import bit_width, pack_bits, packed_bytes, unpack_bits
from lightning_embcompress.methods.sized import SizedFactorization, Sizes
from lightning_embcompress.methods.specs import positive_integers
from lightning_embcompress.utils.graphs import is_exporting

# Codes looked up for logits at a time.
_CODES = 2**18
# Hidden states, times subspaces over columns, up to which adding up products of centroids is faster than making rows.
_FEW_STATES = 16


class ProductQuantization(SizedFactorization[ProductQuantizationConfig]):
    """Product quantization: columns are cut into subspaces, and a row has the code of a centroid in each.

    A code takes `⌈log₂ centroids⌉` bits on disk; in memory codes are unpacked to one or two bytes. The codebook is
    trained by gradients, the codes stay what they are. Rare tokens may have fewer centroids to choose from, and shorter
    codes (MGQE, Kang et al. 2020, arXiv 2002.09131).

    It is for storage. Logits: for a few hidden states all their products with centroids are computed, and added up by
    the codes, a lookup for each of them, which on a CPU takes several times as long as the product with the dense
    table; for many, rows are put together a piece at a time and multiplied. To serve it, make the table dense again
    (`densify`), or compress by `transform_coding`, whose codes `optimize_for_inference` lays out to be multiplied.

    Args:
        vocab_size: Rows of the table.
        dim: Columns of the table.
        subspaces: Parts of a row, from 1 to `dim`, of equal sizes or of two that differ by one.
        centroids: Centroids of a subspace, at most as many as rows.
        rare_centroids: How many of them rare tokens use, the first ones.
        rare_tokens: How many tokens are rare.
        dtype: Dtype of the codebook.
        device: Device of the codebook and the codes.

    Raises:
        ValueError: If one is out of its range.

    Example:
        >>> table, counts = torch.randn(1000, 64), torch.arange(1000, 0, -1)
        >>> quantized = ProductQuantization.decompose(table, table.nbytes // 8, counts)
        >>> quantized.codebook.shape, quantized.codes.shape
        (torch.Size([32, 64]), torch.Size([1000, 37]))
        >>> quantized.rows(torch.tensor([3, 999])).shape, quantized.logits(torch.randn(2, 64)).shape
        (torch.Size([2, 64]), torch.Size([2, 1000]))
    """

    kind = "product_quantization"
    config_class = ProductQuantizationConfig
    entries = ("subspaces", "centroids")
    divides = True
    packed_codes: Tensor
    packed_rare_codes: Tensor
    packed_rare: Tensor
    codes: Tensor

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        subspaces: int,
        centroids: int,
        rare_centroids: int = 0,
        rare_tokens: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        """Build it empty."""
        super().__init__(vocab_size, dim)
        for name, value, least, most in (
            ("subspaces", subspaces, 1, dim),
            ("centroids", centroids, 1, min(vocab_size, 2**15)),
            ("rare_tokens", rare_tokens, 0, vocab_size),
            ("rare_centroids", rare_centroids, min(1, rare_tokens), centroids if rare_tokens else 0),
        ):
            if not least <= value <= most:
                raise ValueError(f"{name} must be from {least} to {most}, it is {value}")
        self.subspaces, self.centroids = subspaces, centroids
        self.rare_centroids, self.rare_tokens = rare_centroids, rare_tokens
        self.codebook = nn.Parameter(torch.zeros(centroids, dim, dtype=dtype, device=device))
        # All codes are 0, and so are their bytes.
        parts = [("packed_codes", vocab_size - rare_tokens, centroids)]
        if rare_tokens:
            parts.append(("packed_rare_codes", rare_tokens, rare_centroids))
        for name, tokens, values in parts:
            size = packed_bytes(tokens * subspaces, bit_width(values))
            self.register_buffer(name, torch.zeros(size, dtype=torch.uint8, device=device))
        if rare_tokens:
            self.register_buffer("packed_rare", self._last_are_rare())
        codes = torch.zeros(vocab_size, subspaces, dtype=_code_dtype(centroids), device=device)
        self.register_buffer("codes", codes, persistent=False)

    def _last_are_rare(self) -> Tensor:
        """Which tokens are rare where nobody has said so yet, packed."""
        if self.device.type == "meta":
            # Only its shape is wanted.
            return torch.empty(packed_bytes(self.vocab_size, 1), dtype=torch.uint8, device="meta")
        ids = torch.arange(self.vocab_size, device=self.device)
        return pack_bits(ids >= self.vocab_size - self.rare_tokens, 1)

    def _keep(self, codes: Tensor, rare: Tensor, device: torch.device | None = None) -> None:
        """Set the codes, and which tokens are rare; on the device of the codebook where none is given."""
        device = device or self.device
        self.codes = codes.to(device, _code_dtype(self.centroids))
        if not self.rare_tokens:
            self.packed_codes = pack_bits(codes.flatten(), bit_width(self.centroids)).to(device)
            return
        self.packed_codes = pack_bits(codes[~rare].flatten(), bit_width(self.centroids)).to(device)
        self.packed_rare_codes = pack_bits(codes[rare].flatten(), bit_width(self.rare_centroids)).to(device)
        self.packed_rare = pack_bits(rare, 1).to(device)

    @property
    def is_rare(self) -> Tensor:
        """`[vocab_size]` bool: which tokens use only the first centroids."""
        if not self.rare_tokens:
            return torch.zeros(self.vocab_size, dtype=torch.bool, device=self.packed_codes.device)
        return unpack_bits(self.packed_rare, 1, self.vocab_size, torch.bool)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        # The codes follow from all of them, whichever is loaded last.
        packed = [name for name in self._buffers if name.startswith("packed_")]
        if not any(prefix + name in state_dict for name in packed) or any(
            getattr(self, name).is_meta for name in packed
        ):
            return
        error_msgs: list[str] = args[-1]
        rare = self.is_rare
        if int(rare.sum()) != self.rare_tokens:
            error_msgs.append(f"{prefix}packed_rare is damaged: {self.rare_tokens} tokens are rare by the plan")
            return
        codes = torch.empty(self.vocab_size, self.subspaces, dtype=torch.int16, device=rare.device)
        parts = [("packed_codes", ~rare, self.centroids)]
        if self.rare_tokens:
            parts.append(("packed_rare_codes", rare, self.rare_centroids))
        for name, rows, centroids in parts:
            count = int(rows.sum()) * self.subspaces
            found = unpack_bits(getattr(self, name), bit_width(centroids), count, torch.int16)
            if bool((found >= centroids).any()):
                error_msgs.append(f"the codes {prefix}{name} are damaged: there are {centroids} centroids by the plan")
                return
            codes[rows] = found.view(-1, self.subspaces)
        # The codebook may not be loaded yet, and still be on the meta device.
        self._keep(codes, rare, codes.device)

    def _tables(self, codebook: Tensor) -> list[tuple[slice, Tensor]]:
        """Subspaces of one size each: which they are, and their `[centroids, subspaces, size]` centroids."""
        sizes = subspace_sizes(self.dim, self.subspaces)
        larger, size = sizes.count(sizes[0]), sizes[-1]
        first, second = torch.split(codebook, [larger * sizes[0], self.dim - larger * sizes[0]], dim=1)
        tables = [(slice(0, larger), first.reshape(self.centroids, larger, sizes[0]))]
        if larger < self.subspaces:
            rest = slice(larger, self.subspaces)
            tables.append((rest, second.reshape(self.centroids, self.subspaces - larger, size)))
        return tables

    def _rows_of(self, codes: Tensor, codebook: Tensor) -> Tensor:
        """Rows of codes, `[count, subspaces]`."""
        parts = []
        for subspaces, table in self._tables(codebook):
            centroids, count, size = table.shape
            # Centroids of a subspace one after the other.
            index = codes[:, subspaces].int() + torch.arange(count, dtype=torch.int32, device=codes.device) * centroids
            parts.append(F.embedding(index, table.transpose(0, 1).reshape(-1, size)).reshape(-1, count * size))
        return torch.cat(parts, dim=1)

    def rows(self, ids: Tensor, sparse: bool = False) -> Tensor:
        """Rows of the table, see `Factorization.rows`; every distinct id is computed once."""
        if is_exporting():
            rows = self._rows_of(self.codes.index_select(0, ids.flatten()), materialize(self.codebook))
            return rows.reshape(*ids.shape, self.dim)
        distinct, inverse = torch.unique(ids, return_inverse=True)
        codes, codebook = self.codes.index_select(0, distinct), materialize(self.codebook, sparse)
        return F.embedding(inverse, self._rows_of(codes, codebook))

    def logits(self, hidden: Tensor) -> Tensor:
        """`h Wᵀ`, see `Factorization.logits`."""
        states, codebook = hidden.reshape(-1, self.dim), materialize(self.codebook)
        if not is_exporting() and states.shape[0] * self.subspaces > _FEW_STATES * self.dim:
            return self.logits_of_rows(hidden, self._rows_between, codebook)
        # Products with all centroids, `[subspaces, centroids, states]`.
        products = []
        columns = 0
        for _, table in self._tables(codebook):
            _, count, size = table.shape
            parts = states[:, columns : columns + count * size].reshape(-1, count, size)
            products.append(torch.bmm(table.transpose(0, 1), parts.permute(1, 2, 0)))
            columns += count * size
        logits = self._sums(torch.cat(products))
        return logits.reshape(*hidden.shape[:-1], self.vocab_size)

    def _sums(self, products: Tensor) -> Tensor:
        """Add up what the codes name, `[states, vocab_size]`."""
        subspaces, centroids, states = products.shape
        if is_exporting():
            # One sum after the other: runtimes know no sum over a bag.
            total = products[0].index_select(0, self.codes[:, 0].int())
            for subspace in range(1, subspaces):
                total = total + products[subspace].index_select(0, self.codes[:, subspace].int())
            return total.T
        flat = products.reshape(subspaces * centroids, states)
        offsets = torch.arange(subspaces, dtype=torch.int32, device=self.codes.device) * centroids
        pieces = torch.split(self.codes, max(1, _CODES // subspaces))
        return torch.cat([F.embedding_bag(piece.int() + offsets, flat, mode="sum") for piece in pieces]).T

    def _rows_between(self, start: int, stop: int, codebook: Tensor) -> Tensor:
        return self._rows_of(self.codes[start:stop], codebook)

    def structure(self) -> dict[str, Any]:
        """See `Factorization.structure`; without rare tokens nothing is said of them."""
        spec = super().structure()
        rare = {"rare_centroids": self.rare_centroids, "rare_tokens": self.rare_tokens}
        return spec | rare if self.rare_tokens else spec

    @classmethod
    def from_spec(cls, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | None = None) -> Self:
        """Build it empty, see `Factorization.from_spec`."""
        vocab_size, dim, subspaces, centroids = positive_integers(spec, "vocab_size", "dim", "subspaces", "centroids")
        rare = [0, 0]
        if "rare_tokens" in spec or "rare_centroids" in spec:
            rare = positive_integers(spec, "rare_centroids", "rare_tokens")
        return cls(vocab_size, dim, subspaces, centroids, rare[0], rare[1], dtype, device)

    @classmethod
    def sizes(cls, vocab_size: int, dim: int, config: ProductQuantizationConfig) -> Sizes:
        """The subspaces asked for, or any, with the fewest centroids that the config allows."""
        layout, subspaces = config.centroids(vocab_size, config.widths[-1]), config.subspaces
        if subspaces is None:
            return Sizes(dim, lambda size: (size, *layout))
        if subspaces > dim:
            raise ValueError(f"subspaces must be at most the {dim} columns of the table, it is {subspaces}")
        return Sizes(1, lambda _: (subspaces, *layout))

    @classmethod
    def _decompose(cls, problem: Problem[ProductQuantizationConfig]) -> Self:
        """K-means in as many subspaces as fit.

        The codebook may take half of the bytes: the bits of a code are the most at which it does not take more.
        """
        (vocab_size, dim), itemsize = problem.weight.shape, problem.weight.element_size()
        for bits in problem.config.widths:
            some = replace(problem.config, bits=bits)
            codebook = some.centroids(vocab_size, bits)[0] * dim * itemsize
            if max(2 * codebook, cls.smallest_bytes(vocab_size, dim, itemsize, some)) <= problem.max_bytes:
                break
        return super()._decompose(replace(problem, config=some))

    def _solve(self, problem: Problem[ProductQuantizationConfig], refine: bool) -> None:
        """K-means from the codebook there is, or a new one.

        With a metric its row weights take the place of those of the token counts, which still say who is rare.
        """
        weight, config, metric, advance = problem.weight, problem.config, problem.metric, problem.advance
        weights = row_weights(problem.token_counts, self.vocab_size, weight.device)
        start = self.codebook.to(weight.device) if refine else None
        rare = self.is_rare.to(weight.device)
        if not refine:
            order = torch.argsort(weights, descending=True, stable=True)
            rare = torch.zeros_like(rare).index_fill_(0, order[self.vocab_size - self.rare_tokens :], True)
        if metric is not None:
            weights = metric.weights.to(weight.device)
        groups = Groups([(~rare).nonzero().flatten()], [self.centroids])
        if self.rare_tokens:
            groups = Groups([*groups.rows, rare.nonzero().flatten()], [self.centroids, self.rare_centroids])
        sample = Sample.of(weights, groups, self.centroids)
        rows = weight if sample.rows.numel() == self.vocab_size else weight[sample.rows]
        of_rows = None if metric is None else Metric(metric.matrix, sample.weights)
        rounds = 0 if metric is None else config.metric_rounds
        # K-means takes about as long as three rounds; all rows are read three times.
        parts = [3.0 * rows.shape[0], float(rounds * rows.shape[0]), 3.0 * (self.vocab_size - rows.shape[0])]

        def advance_in(part: int) -> Callable[[float], None]:
            return lambda share: advance(share * parts[part] / sum(parts))

        codebook, codes = product_quantization(
            rows,
            sample.weights,
            self.subspaces,
            self.centroids,
            sample.groups,
            start,
            config.max_iterations,
            advance_in(0),
            of_rows,
        )
        if of_rows is not None and rounds:
            descend(rows, of_rows, codebook, codes, sample.groups, rounds, advance_in(1))
        if rows is not weight:
            codes = encode(weight, codebook, self.subspaces, groups, metric if rounds else None, advance_in(2))
        self.codebook.copy_(codebook)
        self._keep(codes, rare)


def _code_dtype(centroids: int) -> torch.dtype:
    return torch.uint8 if centroids <= 256 else torch.int16
