"""What a text says about a model: how often each token occurs, and how well the next one is predicted."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from lightning_embcompress.data.blocks import IGNORE_INDEX, Block, TokenBlocks
from lightning_embcompress.data.cache import default_cache_dir
from lightning_embcompress.data.sources import text_files
from lightning_embcompress.data.text import find_files
from lightning_embcompress.data.tokenized import Ids, load_tokenizer, tokenize_subwords
from lightning_embcompress.integrations.contents import model_class
from lightning_embcompress.integrations.sources import Source
from lightning_embcompress.metrics.perplexity import LikelihoodSums, Perplexity
from lightning_embcompress.utils.progress import progress_bar

# Longer blocks are rare in practice, and their logits would fill the memory.
_MAX_BLOCK_SIZE = 1024
# 2^26 float32 logits are 256 MiB.
_LOGIT_ELEMENTS = 2**26
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")


class TokenizedText:
    """A text as ids: the first nine tenths to count, the last one to measure.

    Args:
        ids: The whole text, integers `[num_tokens]`.
        measure_all: Whether all of it is to be measured but the first token, which nothing is before.

    Raises:
        ValueError: If it is too short for that.

    Example:
        >>> text = TokenizedText(np.arange(30) % 3)
        >>> text.counts(5), text.num_measured
        (tensor([9, 9, 9, 0, 0]), 3)
    """

    def __init__(self, ids: Ids, measure_all: bool = False) -> None:
        """Divide it."""
        self.ids = ids
        self.num_counted = min(1, len(ids) - 1) if measure_all else len(ids) * 9 // 10
        self.num_measured = len(ids) - self.num_counted
        if self.num_counted < 1:
            raise ValueError(f"--text has only {len(ids)} tokens, of which no tenth is left to measure: give more")

    def counts(self, vocab_size: int) -> Tensor:
        """How often each id occurs in the part to count, `[vocab_size]`."""
        return torch.from_numpy(np.bincount(self.ids[: self.num_counted], minlength=vocab_size))

    def all_counted(self) -> TokenizedText:
        """The same text, of which everything is to be counted and nothing to be measured."""
        whole = TokenizedText(self.ids)
        whole.num_counted, whole.num_measured = len(self.ids), 0
        return whole

    def check_ids(self, vocab_size: int, tokenizer: str) -> None:
        """Check that a table has a row for every id.

        Raises:
            ValueError: If the text was cut by the tokenizer of another model.
        """
        largest = int(self.ids.max())
        if largest >= vocab_size:
            raise ValueError(
                f"tokenizer {tokenizer!r} gives the id {largest}, but the table has only {vocab_size} rows: give the "
                "tokenizer of the model with --tokenizer"
            )

    def limited(self, max_tokens: int | None) -> int:
        """Tokens that are measured if no more than some are."""
        return self.num_measured if max_tokens is None else min(max_tokens, self.num_measured)

    def counted_batches(self, block_size: int, vocab_size: int, max_tokens: int) -> list[Block]:
        """Blocks of the part to count, spread over all of it, in batches whose logits and gradients fit the memory.

        Args:
            block_size: Tokens of a block.
            vocab_size: Logits of a token.
            max_tokens: Of all blocks together.

        Returns:
            `input_ids` and `labels` as a model of transformers takes them.
        """
        blocks = TokenBlocks(self.ids[: self.num_counted], block_size)
        number = min(len(blocks), max(1, max_tokens // blocks.block_size))
        chosen = [index * len(blocks) // number for index in range(number)]
        return list(_batches(blocks, chosen, _LOGIT_ELEMENTS // 4 // vocab_size))

    def measured_ids(self, max_tokens: int | None = None) -> Ids:
        """The part to measure, after the one token from which its first one is predicted."""
        return self.ids[self.num_counted - 1 : self.num_counted + self.limited(max_tokens)]

    @torch.inference_mode()
    def perplexity(
        self,
        model: Any,
        block_size: int,
        title: str,
        max_tokens: int | None = None,
        metric: LikelihoodSums | None = None,
    ) -> float:
        """Perplexity of a model of transformers on the part to measure, each of whose tokens is predicted once.

        Args:
            model: A causal language model.
            block_size: Tokens that it reads at once.
            title: What the progress bar says.
            max_tokens: Only the first of the part to measure; None for all.
            metric: Adds up the likelihoods, starting from zero; one that does so by bands tells more than the result.
        """
        sums: Any = metric or Perplexity()
        blocks = TokenBlocks(self.measured_ids(max_tokens), block_size)
        vocab_size = int(model.get_output_embeddings().out_features)
        was_training = model.training
        model.eval()
        try:
            with progress_bar(title, total=len(blocks)) as advance:
                for batch in _batches(blocks, range(len(blocks)), _LOGIT_ELEMENTS // vocab_size):
                    # The logits keep their last position, whose target is ignored: cutting it off would copy them.
                    targets = batch["labels"].roll(-1, dims=1)
                    targets[:, -1] = IGNORE_INDEX
                    sums.update(model(input_ids=batch["input_ids"], use_cache=False).logits, targets)
                    advance(len(targets))
        finally:
            model.train(was_training)
        try:
            return math.exp(float(sums.nll_sum.sum()) / int(sums.count.sum()))
        except OverflowError:
            return math.inf


def _batches(blocks: TokenBlocks, numbers: Sequence[int], max_tokens: int) -> Iterator[Block]:
    size = max(1, max_tokens // blocks.block_size)
    for start in range(0, len(numbers), size):
        yield default_collate([blocks[number] for number in numbers[start : start + size]])


def read_text(patterns: Sequence[str], tokenizer: str, measure_all: bool = False) -> TokenizedText:
    """Tokenize text files, into a cache; an end follows each, if the tokenizer has a token for it.

    Args:
        patterns: Files or glob patterns.
        tokenizer: A directory or the name of a model on the hub.
        measure_all: See `TokenizedText`.

    Raises:
        FileNotFoundError: If a pattern matches no file.
        ValueError: If the text cannot be read or is too short, or there is no such tokenizer.
    """
    source, loaded = text_files(find_files(patterns, "--text")), load_tokenizer(tokenizer)
    eos_id = loaded.eos_token_id if isinstance(loaded.eos_token_id, int) else None
    tokens = tokenize_subwords(source, loaded, eos_id, "files", default_cache_dir(), "Tokenizing the text")
    return TokenizedText(tokens.ids[:], measure_all)


def tokenizer_of(source: Source, given: str | None) -> str:
    """The tokenizer of a model: the one that is given, or the one beside it.

    Raises:
        ValueError: If there is none.
    """
    if given is not None:
        return given
    if source.has_tokenizer:
        return str(source.path)
    raise ValueError(f"--text needs a tokenizer, and there is none in {source.name!r}: name one with --tokenizer DIR")


def check_measurable(source: Source) -> None:
    """Check that the perplexity of a model can be computed: of a causal language model of transformers.

    Raises:
        ValueError: If it cannot, with another way to measure it.
    """
    counts_only = "to use --text for its token counts alone add --counts_only"
    if source.kind == "checkpoint":
        raise ValueError(
            f"the perplexity of {source.name!r} cannot be measured with --text, because a checkpoint does not say how "
            "its model reads text: measure with `embcompress test --config RECIPE --ckpt_path TARGET` or Trainer.test; "
            + counts_only
        )
    if source.kind == "saved":
        raise ValueError(
            f"the perplexity of {source.name!r} cannot be measured with --text, because save_compressed does not write "
            "how a model reads text: measure in Python after load_compressed(TARGET, model); " + counts_only
        )
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    kind = model_class(source)
    if kind is not AutoModelForCausalLM and kind.__name__ not in CAUSAL.values():
        raise ValueError(
            f"the perplexity of {source.name!r} cannot be measured with --text, because a {kind.__name__} is no causal "
            "language model: measure its own task before and after; " + counts_only
        )


def block_size_of(model: Any) -> int:
    """Tokens that a model of transformers reads at once: its context, up to 1,024."""
    config = model.config
    known = [value for key in _CONTEXT_KEYS if isinstance(value := getattr(config, key, None), int) and value > 1]
    return min(known[0] if known else _MAX_BLOCK_SIZE, _MAX_BLOCK_SIZE)


def zipf_counts(vocab_size: int) -> Tensor:
    """Counts by Zipf's law, `1 / (id + 1)`, as if ids were sorted by falling frequency.

    Example:
        >>> zipf_counts(3)
        tensor([1.0000, 0.5000, 0.3333], dtype=torch.float64)
    """
    return 1 / torch.arange(1, vocab_size + 1, dtype=torch.float64)


def is_directory(name: str | None) -> Path | None:
    """A tokenizer's directory, if that is what it is and not a name on the hub."""
    path = None if name is None else Path(os.path.expanduser(name))
    return path if path is not None and path.is_dir() else None
