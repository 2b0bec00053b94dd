"""What a text says about a model: how often each token occurs, and how well the next one is predicted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from lightning_embcompress.calibration.special_tokens import tokens_of_tokenizer
from lightning_embcompress.data.blocks import IGNORE_INDEX, Block, TokenBlocks
from lightning_embcompress.data.cache import default_cache_dir
from lightning_embcompress.data.sources import text_files
from lightning_embcompress.data.text import find_files
from lightning_embcompress.data.tokenized import Ids, load_tokenizer, tokenize_subwords
from lightning_embcompress.integrations.contents import model_class
from lightning_embcompress.integrations.sources import Source
from lightning_embcompress.metrics.perplexity import LikelihoodSums, Perplexity
from lightning_embcompress.utils.devices import free_memory
from lightning_embcompress.utils.progress import progress_bar

# Longer blocks are rare in practice, and their logits would fill the memory.
_MAX_BLOCK_SIZE = 1024
# 2^26 float32 logits are 256 MiB. On a GPU they are an eighth of the free memory, up to 4 GiB.
_LOGIT_ELEMENTS, _GPU_LOGIT_ELEMENTS = 2**26, 2**30
# However small a vocabulary is: what a model computes before its logits takes memory too.
_MOST_BATCH_TOKENS = 2**14
# A random model is no worse than a guess among all tokens by more than that, in nats.
_WORSE_THAN_GUESSING = 1.0
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")


@dataclass(frozen=True)
class TokenizedText:
    """A text as ids: a part to count, and a part to measure.

    Attributes:
        counted: Ids to count, `[num_counted]`.
        measured: Ids to measure, after the one from which the first of them is predicted, `[num_measured + 1]`.
        special: Ids that the tokenizer has for ends, masks and the like.
        device: Where models are called; None for where they are.
        batch_tokens: Tokens that a model gets at once; blocks are no longer. None for what the memory of the device has
            room for.

    Example:
        >>> text = TokenizedText(np.arange(27) % 3, np.arange(4) % 3)
        >>> text.counts(5), text.num_measured
        (tensor([9, 9, 9, 0, 0]), 3)
    """

    counted: Ids
    measured: Ids
    special: tuple[int, ...] = ()
    device: torch.device | None = None
    batch_tokens: int | None = None

    @property
    def num_measured(self) -> int:
        """How many tokens are measured."""
        return len(self.measured) - 1

    def limited(self, max_tokens: int | None) -> TokenizedText:
        """The same text, of which no more than some tokens are measured."""
        return self if max_tokens is None else replace(self, measured=self.measured[: max_tokens + 1])

    def placed(self, device: torch.device, batch_tokens: int | None) -> TokenizedText:
        """The same text for models on a device, in batches of some tokens; None for what its memory has room for."""
        return replace(self, device=device, batch_tokens=batch_tokens)

    def counts(self, vocab_size: int) -> Tensor:
        """How often each id occurs in the part to count, `[vocab_size]`."""
        return torch.from_numpy(np.bincount(self.counted, minlength=vocab_size))

    def check_ids(self, vocab_size: int, tokenizer: str) -> None:
        """Check that a table has a row for every id.

        Raises:
            ValueError: If the text was cut by the tokenizer of another model.
        """
        largest = max(int(self.counted.max()), int(self.measured.max()))
        if largest >= vocab_size:
            raise ValueError(
                f"tokenizer {tokenizer!r} gives the id {largest}, but the table has only {vocab_size} rows: give the "
                "tokenizer of the model with --tokenizer"
            )

    def check_length(self, block_size: int) -> None:
        """Check that there is a whole block of text, counted and measured parts together.

        Raises:
            ValueError: If it is shorter.
        """
        there = len(self.counted) + self.num_measured
        if there < block_size:
            raise ValueError(
                f"the text has {there:,} tokens, fewer than a block of {block_size:,}, which the model reads at once: "
                "give more text, or take shorter blocks with --batch_tokens"
            )

    def block_size_of(self, model: Any) -> int:
        """Tokens that a model of transformers reads at once: its context, up to 1,024, and no more than a batch has."""
        known = (getattr(model.config, key, None) for key in _CONTEXT_KEYS)
        context = next((value for value in known if isinstance(value, int) and value > 1), _MAX_BLOCK_SIZE)
        return min(context, _MAX_BLOCK_SIZE, self.batch_tokens or context)

    def tokens_at_once(self, vocab_size: int, passes: int = 1) -> int:
        """Tokens of a batch.

        Args:
            vocab_size: Logits of a token.
            passes: How many times as much memory a token takes as in a forward pass.
        """
        if self.batch_tokens is not None:
            return self.batch_tokens
        elements = _LOGIT_ELEMENTS
        if self.device is not None and self.device.type != "cpu" and (free := free_memory(self.device)) is not None:
            elements = max(elements, min(_GPU_LOGIT_ELEMENTS, free // 32))
        return min(elements // vocab_size, _MOST_BATCH_TOKENS) // passes

    def workspace(self, block_size: int, vocab_size: int) -> int:
        """Bytes of the logits of a batch, in float32."""
        return 4 * vocab_size * max(block_size, self.tokens_at_once(vocab_size))

    def counted_batches(self, block_size: int, vocab_size: int, max_tokens: int) -> list[Block]:
        """Blocks of the part to count, from all over it in no order, in batches whose gradients fit the memory.

        Args:
            block_size: Tokens of a block.
            vocab_size: Logits of a token.
            max_tokens: Of all blocks together.

        Returns:
            `input_ids` and `labels` as a model of transformers takes them.
        """
        blocks = TokenBlocks(self.counted, block_size)
        number = min(len(blocks), max(1, max_tokens // blocks.block_size))
        # As many as are read before a pass ends early are from all over the text, too.
        order = torch.randperm(number, generator=torch.Generator().manual_seed(0)).tolist()
        chosen = [index * len(blocks) // number for index in order]
        return list(_batches(blocks, chosen, self.tokens_at_once(vocab_size, passes=4)))

    @torch.inference_mode()
    def perplexity(self, model: Any, block_size: int, title: str, metric: LikelihoodSums | None = None) -> float:
        """Perplexity of a model of transformers on the part to measure, each of whose tokens is predicted once.

        Args:
            model: A causal language model.
            block_size: Tokens that it reads at once.
            title: What the progress bar says.
            metric: Adds up the likelihoods, starting from zero, and is moved to the device; one that does so by bands
                tells more than the result.
        """
        device = self.device or next(model.parameters()).device
        sums: Any = (metric or Perplexity()).to(device)
        blocks = TokenBlocks(self.measured, block_size)
        vocab_size = vocab_size_of(model)
        was_training = model.training
        model.eval()
        try:
            with progress_bar(title, total=self.num_measured, unit="tokens") as advance:
                for batch in _batches(blocks, range(len(blocks)), self.tokens_at_once(vocab_size)):
                    # The logits keep their last position, whose target is ignored: cutting it off would copy them.
                    targets = batch["labels"].roll(-1, dims=1).to(device)
                    targets[:, -1] = IGNORE_INDEX
                    sums.update(model(input_ids=batch["input_ids"].to(device), use_cache=False).logits, targets)
                    advance(int((targets != IGNORE_INDEX).sum()))
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


def check_perplexity(perplexity: float, vocab_size: int, tokenizer: str) -> None:
    """Check that a model knows the tokens of a text at all: that it predicts them better than by guessing.

    Args:
        perplexity: Of the model as it is.
        vocab_size: Among so many tokens it would guess.
        tokenizer: What the text was cut by.

    Raises:
        ValueError: If the text was cut by the tokenizer of another model, or the perplexity is not a number.
    """
    if not perplexity <= vocab_size * math.exp(_WORSE_THAN_GUESSING):
        raise ValueError(
            f"the perplexity of the model as it is is {perplexity:,.0f}, worse than a guess among its {vocab_size:,} "
            f"tokens: tokenizer {tokenizer!r} is that of another model, or the weights are damaged; give the tokenizer "
            "of the model with --tokenizer, or add --counts_only to measure nothing"
        )


def read_text(patterns: Sequence[str], tokenizer: str, counted_tenths: int = 9) -> TokenizedText:
    """Tokenize text files, into a cache; an end follows each, if the tokenizer has a token for it.

    Args:
        patterns: Files or glob patterns.
        tokenizer: A directory or the name of a model on the hub.
        counted_tenths: How much of the text is counted, at least a token. The rest is measured.

    Raises:
        FileNotFoundError: If a pattern matches no file.
        ValueError: If the text cannot be read or is too short, or there is no such tokenizer.
    """
    source, loaded = text_files(find_files(patterns, "--text")), load_tokenizer(tokenizer)
    eos_id = loaded.eos_token_id if isinstance(loaded.eos_token_id, int) else None
    ids = tokenize_subwords(source, loaded, eos_id, "files", default_cache_dir(), "Tokenizing the text").ids[:]
    num_counted = max(1, len(ids) * counted_tenths // 10)
    special = {token for token in tokens_of_tokenizer(loaded).values() if isinstance(token, int)}
    return TokenizedText(ids[:num_counted], ids[num_counted - 1 :], tuple(sorted(special)))


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
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    if source.kind == "checkpoint":
        reason = "a checkpoint does not say how its model reads text"
        remedy = "measure with `embcompress test --config RECIPE --ckpt_path TARGET` or Trainer.test"
    elif source.kind == "saved":
        reason = "save_compressed does not write how a model reads text"
        remedy = "measure in Python after load_compressed(TARGET, model)"
    else:
        kind = model_class(source)
        if kind is AutoModelForCausalLM or kind.__name__ in CAUSAL.values():
            return
        reason = f"a {kind.__name__} is no causal language model"
        remedy = "measure its own task before and after"
    raise ValueError(
        f"the perplexity of {source.name!r} cannot be measured with --text, because {reason}: {remedy}; to use --text "
        "for its token counts alone add --counts_only"
    )


def vocab_size_of(model: Any) -> int:
    """How many logits a model of transformers gives for a token."""
    return int(model.get_output_embeddings().out_features)
