"""The two roles of a compressed table: embedding and softmax projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_embcompress.layers.decoding import Best, decoding_rows, log_prob, sample, topk
from lightning_embcompress.layers.offloading import with_offloaded_factors
from lightning_embcompress.layers.scaled_embeddings import Scale
from lightning_embcompress.layers.state_entry import table_entry, what_does_not_fit
from lightning_embcompress.layers.table_weight import TableWeight, table_weight
from lightning_embcompress.methods.registry import Factorization
from lightning_embcompress.methods.tiles import TileMaker, Tiles
from lightning_embcompress.utils.graphs import is_exporting
from lightning_embcompress.utils.storage import holds_views, is_sharded


class CompressedLayer(nn.Module):
    """What both roles share: the factorization, which tied layers hold in common."""

    def __init__(self, factorization: Factorization[Any]) -> None:
        """Keep the factorization."""
        super().__init__()
        self.factorization = factorization

    @property
    def weight(self) -> TableWeight:
        """What stands for the table where others read the weight of a layer, see `TableWeight`.

        Tied layers have one. Assigning that of another layer ties them; nothing else can be assigned.
        """
        return table_weight(self.factorization)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a weight that is assigned is that of a layer to be tied to.

        Raises:
            ValueError: If the weight is not that of a compressed layer, or of another shape.
        """
        if name != "weight":
            super().__setattr__(name, value)
            return
        table = self.factorization
        if not isinstance(value, TableWeight) or not value.view_of.is_plain:
            raise ValueError(
                f"the weight of a {type(self).__name__} cannot be a {type(value).__name__}: its table of "
                f"{table.vocab_size} x {table.dim} is stored as {type(table).__name__}. Assign the weight of another "
                "compressed layer to tie them, or make the model dense with densify(model), assign, and compress again"
            )
        if value.shape != self.weight.shape:
            raise ValueError(
                f"the weight of a {type(self).__name__} of {table.vocab_size} x {table.dim} cannot be tied to one of "
                f"shape {tuple(value.shape)}: tied layers have tables of one shape"
            )
        self.factorization = value.factorization

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # While a model is being loaded, tied layers are without theirs.
        factors = self._modules.get("factorization")
        if factors is not None and (entry := table_entry(self, factors)) is not None:
            destination[f"{prefix}weight"] = entry

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if problem := what_does_not_fit(self, self.factorization, state_dict, prefix, unexpected_keys):
            error_msgs.append(problem)


class CompressedEmbedding(CompressedLayer):
    """Drop-in for `nn.Embedding` that computes rows from a factorization.

    Args:
        factorization: The table, `[num_embeddings, embedding_dim]`.
        padding_idx: Id whose row is read without a gradient, as in `nn.Embedding`. What a compressed table has of it is
            the row as it was, whatever is trained, see `ConstantRows`.
        max_norm: Rows of a larger norm are scaled down to it when they are read.
        norm_type: The p of that norm.
        scale: What rows are multiplied by, if the embedding was of a class that does so; the factors are those of the
            table as it is stored, which a tied softmax reads without the scale.
        sparse: Whether the gradients of all factors are sparse tensors, as that of the weight of an `nn.Embedding` with
            `sparse=True`. Factors with rows for every token get those of the ids that are looked up and no others, so
            that a step of `torch.optim.SparseAdam`, or of `SGD` without momentum, takes no longer for a larger
            vocabulary. Factors that all tokens share get all of their rows. A softmax that reads the same table adds
            dense gradients to them, and the sum is dense. `DistributedDataParallel` knows sparse gradients of
            `nn.Embedding` alone: under it the first lookup is refused.

    Example:
        >>> from lightning_embcompress.methods.registry import LowRank
        >>> layer = CompressedEmbedding(LowRank(vocab_size=100, dim=16, rank=4), sparse=True)
        >>> layer(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 16])
        >>> layer(torch.tensor([7, 5, 7])).sum().backward()
        >>> layer.factorization.coefficients.grad.coalesce().indices()
        tensor([[5, 7]])
    """

    def __init__(
        self,
        factorization: Factorization[Any],
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale: Scale | None = None,
        sparse: bool = False,
    ) -> None:
        """Keep the factorization and what the embedding had beside its weight."""
        super().__init__(factorization)
        self.num_embeddings = factorization.vocab_size
        self.embedding_dim = factorization.dim
        self.padding_idx = padding_idx
        self.max_norm = max_norm
        self.norm_type = norm_type
        self.scale = scale
        self.sparse = sparse

    @with_offloaded_factors
    def forward(self, input: Tensor) -> Tensor:
        """Rows of the table for ids, `[*] -> [*, embedding_dim]`, in the dtype of the factors.

        Raises:
            RuntimeError: If gradients are sparse, under `DistributedDataParallel`.
        """
        # `input` as in `nn.Embedding`: foreign code may pass it by name.
        ids = input
        with torch.autocast(ids.device.type, enabled=False):
            rows: Tensor = self.factorization.read(ids, sparse=self.sparse and not is_exporting())
            if self.sparse and rows.requires_grad:
                _refuse_data_parallel(type(self).__name__)
            padding = self.padding_idx
            if rows.requires_grad and padding is not None and padding not in self.factorization.padding_ids:
                is_padding: Tensor = ids == padding
                rows = torch.where(is_padding.unsqueeze(-1), rows.detach(), rows)
            if self.max_norm is not None:
                norms = rows.detach().norm(p=self.norm_type, dim=-1, keepdim=True)
                rows = rows * (self.max_norm / (norms + 1e-7)).clamp(max=1.0)
            return rows if self.scale is None else self.scale(rows)

    def extra_repr(self) -> str:
        """Arguments for `print(module)`."""
        padding = f", padding_idx={self.padding_idx}" if self.padding_idx is not None else ""
        scale = f", scale={self.scale.value:g}" if self.scale is not None else ""
        sparse = ", sparse=True" if self.sparse else ""
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}{scale}{sparse}"


def _refuse_data_parallel(name: str) -> None:
    """Say what `DistributedDataParallel` would end with in the backward pass, in words that name no layer."""
    if DistributedDataParallel._get_active_ddp_module() is not None:  # type: ignore[no-untyped-call]
        raise RuntimeError(
            f"{name} has sparse=True, but DistributedDataParallel takes sparse gradients of nn.Embedding alone: set "
            "`sparse = False` on the layer and train its factors with an optimizer of dense gradients, such as Adam; "
            "or train on one device"
        )


class CompressedLinear(CompressedLayer):
    """Drop-in for the `nn.Linear` of a softmax, `h Wᵀ + b`, from a factorization of `W`.

    Args:
        factorization: The table, `[out_features, in_features]`.
        bias: The bias of the layer it replaces, kept as it is, or None.

    Example:
        >>> from lightning_embcompress.methods.registry import LowRank
        >>> layer = CompressedLinear(LowRank(vocab_size=100, dim=16, rank=4))
        >>> layer(torch.randn(2, 16)).shape
        torch.Size([2, 100])
    """

    bias: nn.Parameter | None
    best: int | None = None
    """How many tokens of every state get a logit where no gradient is wanted, see `generation.only_best`; None for all.
    """

    def __init__(self, factorization: Factorization[Any], bias: nn.Parameter | None = None) -> None:
        """Keep the factorization and the bias."""
        super().__init__(factorization)
        self.in_features = factorization.dim
        self.out_features = factorization.vocab_size
        self.register_parameter("bias", bias)

    @with_offloaded_factors
    def forward(self, input: Tensor, *, in_storage_order: bool = False) -> Tensor:
        """Logits of hidden states, `[*, in_features] -> [*, out_features]`.

        With `in_storage_order` they stay in the order in which the factorization keeps its rows, see
        `Factorization.storage_order`.
        """
        if self.best is not None and not torch.is_grad_enabled():
            found = self.topk(input, self.best)
            none = found.logits.new_full((*input.shape[:-1], self.out_features), -torch.inf)
            return none.scatter_(-1, found.ids, found.logits)
        logits: Tensor = self.factorization.score(input, in_storage_order)
        if self.bias is None:
            return logits
        bias: Tensor = self.bias
        storage_order = self.factorization.storage_order if in_storage_order else None
        if storage_order is not None:
            bias = torch.empty_like(bias).index_copy(0, storage_order, bias)
        # Under autocast the logits are narrower than the bias: as in `nn.Linear`, their dtype is the result's.
        return logits + bias.to(logits.dtype)

    def tiles(self, hidden: Tensor, tile_rows: int) -> Tiles:
        """All logits of `[N, in_features]` hidden states, for at most `tile_rows` words of the vocabulary at a time.

        Raises:
            ValueError: If FSDP has sharded the parameters.
        """
        _refuse_sharded(self)
        tiles = self.factorization.tiles(hidden, tile_rows)
        return tiles if self.bias is None else tiles.plus(self.bias)

    @torch.no_grad()
    def topk(self, hidden: Tensor, k: int) -> Best:
        """The tokens with the largest logits, without a logit being brought into the order of ids.

        Args:
            hidden: `[*, in_features]`.
            k: How many.

        Returns:
            `logits` and `ids`, `[*, k]`, the largest first.

        Raises:
            ValueError: If there are not so many tokens, or the hidden states do not fit.

        Example:
            >>> from lightning_embcompress.methods.registry import LowRank
            >>> head = CompressedLinear(LowRank.decompose(torch.randn(100, 16), 4000))
            >>> hidden = torch.randn(2, 16)
            >>> torch.equal(head.topk(hidden, 3).ids, head(hidden).topk(3).indices)
            True
        """
        flat, shape = self._flat(hidden), hidden.shape[:-1]
        found = [topk(self._decoded(part), k) for part in self._parts(flat)]
        logits, ids = (torch.cat(parts).view(*shape, k) for parts in zip(*found, strict=True))
        return Best(logits, ids)

    @torch.no_grad()
    def log_prob(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Logarithms of the probabilities of tokens, in nats, without a gradient.

        Args:
            hidden: `[*, in_features]`.
            ids: `[*]`, a token for every state, or `[*, m]`, some of them.

        Returns:
            Of the shape of `ids`, float32 at least.

        Raises:
            ValueError: If the shapes do not fit, or an id is out of range.

        Example:
            >>> from lightning_embcompress.methods.registry import LowRank
            >>> head = CompressedLinear(LowRank.decompose(torch.randn(100, 16), 4000))
            >>> hidden, ids = torch.randn(2, 16), torch.tensor([5, 7])
            >>> expected = head(hidden).log_softmax(-1).gather(1, ids.unsqueeze(1)).squeeze(1)
            >>> torch.testing.assert_close(head.log_prob(hidden, ids), expected.detach())
        """
        flat, shape = self._flat(hidden), hidden.shape[:-1]
        if ids.shape[: len(shape)] != shape or ids.ndim > len(shape) + 1:
            raise ValueError(
                f"hidden states of shape {tuple(hidden.shape)} need ids of shape {tuple(shape)}, or of one dimension "
                f"more; they have {tuple(ids.shape)}"
            )
        asked = ids.reshape(len(flat), -1) if ids.numel() else ids.new_empty(len(flat), 0)
        return log_prob(self.tiles(flat, decoding_rows(len(flat))), asked).view(ids.shape)

    @torch.no_grad()
    def sample(
        self,
        hidden: Tensor,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw a token for every state.

        Args:
            hidden: `[*, in_features]`.
            temperature: What logits are divided by.
            top_k: Draw from so many of the likeliest tokens only.
            top_p: Draw from the fewest of the likeliest tokens, of those that `top_k` leaves, whose probabilities add
                up to so much.
            generator: Where random numbers come from; None for that of the device.

        Returns:
            `[*]` int64.

        Raises:
            ValueError: If an argument is out of its range, the hidden states do not fit, or logits are NaN.

        Example:
            >>> from lightning_embcompress.methods.registry import LowRank
            >>> head = CompressedLinear(LowRank.decompose(torch.randn(100, 16), 4000))
            >>> head.sample(torch.randn(2, 16), temperature=0.8, top_p=0.9).shape
            torch.Size([2])
        """
        found = [
            sample(self._decoded(part), temperature, top_k, top_p, generator)
            for part in self._parts(self._flat(hidden))
        ]
        return torch.cat(found).view(hidden.shape[:-1])

    def product_factors(self) -> list[Tensor]:
        """Parameters whose rows are multiplied with states as they are; none while they are being quantized."""
        if self.factorization.is_prepared:
            return []
        states = torch.empty(0, self.in_features, dtype=self.factorization.dtype, device=self.factorization.device)
        tiles = self.factorization.tiles(states, self.out_features)
        return [tiles.owned[tile.owns[0][0]] for tile in tiles.tiles if tile.is_product]

    def _flat(self, hidden: Tensor) -> Tensor:
        """`[N, in_features]`."""
        if hidden.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"hidden states must have {self.in_features} numbers each, as the head reads them; theirs is the shape "
                f"{tuple(hidden.shape)}"
            )
        return hidden.reshape(-1, self.in_features)

    def _parts(self, states: Tensor) -> tuple[Tensor, ...]:
        """A few states at a time, so that all of their logits fit into memory."""
        return torch.split(states, decoding_rows(self.out_features))

    def _decoded(self, states: Tensor) -> Tiles:
        return self.tiles(states, decoding_rows(len(states)))

    def extra_repr(self) -> str:
        """Arguments for `print(module)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _refuse_sharded(head: nn.Module) -> None:
    # FSDP, not FSDP2, may also cut parameters.
    cut = isinstance(head, nn.Linear) and head.weight.shape != (head.out_features, head.in_features)
    if cut or holds_views(head) or is_sharded(head):
        raise ValueError(
            f"FSDP has sharded the parameters of this {type(head).__name__}, which are whole only while it is called: "
            "call it for its logits; for the loss, head_softmax_loss does so"
        )


def head_tiles(head: nn.Module, hidden: Tensor, tile_rows: int) -> Tiles:
    """All logits of a softmax head, compressed or dense, a tile of the vocabulary at a time.

    Args:
        head: A `CompressedLinear`, or an `nn.Linear`.
        hidden: `[N, in_features]`.
        tile_rows: Most tokens of the vocabulary in a tile.

    Raises:
        TypeError: If it is something else, of which nobody knows what it computes.
        ValueError: If FSDP has sharded its parameters.

    Example:
        >>> tiles = head_tiles(nn.Linear(16, 100), torch.randn(2, 16), tile_rows=30)
        >>> [tiles.logits(tile).shape[1] for tile in tiles.tiles]
        [25, 25, 25, 25]
    """
    if isinstance(head, CompressedLinear) and type(head).forward is CompressedLinear.forward:
        return head.tiles(hidden, tile_rows)
    if type(head) is not nn.Linear:
        raise TypeError(
            f"{type(head).__name__} is neither a CompressedLinear nor a torch.nn.Linear, so that its logits are not "
            "known tile by tile: call it, and compute the loss from its logits"
        )
    if "weight" not in head._parameters:
        raise TypeError(
            "the weight of this Linear is no parameter, but computed whenever the layer is called, as in pruning, or "
            "gathered, as by FSDP: call it, and compute the loss from its logits"
        )
    _refuse_sharded(head)
    maker = TileMaker(tile_rows)
    maker.add_product(head.weight, maker.share(hidden))
    tiles = maker.made()
    return tiles if head.bias is None else tiles.plus(head.bias)
