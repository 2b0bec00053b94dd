"""Text for transformers' causal language models: any tokenizer, local files or datasets, in packed blocks."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lightning_embcompress.data.blocks import TokenBlocks
from lightning_embcompress.data.loading import ResumableLoader, ResumableSampler, make_loader
from lightning_embcompress.data.module import TextDataModule, check_least
from lightning_embcompress.data.sources import Split, TextSource, dataset_rows, load_splits
from lightning_embcompress.data.tokenized import TokenizerVocabulary, Tokens, load_tokenizer, tokenize_subwords


class HuggingFaceText(TextDataModule):
    """Text as packed blocks of token ids, from files or from a dataset, for any tokenizer of transformers.

    Documents, each with ``eos_token`` after it, form one stream, which is cut into blocks without padding. A batch is
    ``{"input_ids", "labels"}``, both int64 ``[batch_size, block_size]``, labels to be shifted by the model as
    transformers does. Neighbouring blocks share one token, so that every token but the very first is predicted exactly
    once in an epoch, also in validation and test (:class:`~lightning_embcompress.data.blocks.TokenBlocks`). Training
    blocks come in an order drawn for each epoch. In distributed training every process has ``batch_size`` blocks of its
    own.

    The text is tokenized once, into a cache that training maps into memory; long documents in pieces of whole lines of
    about 64 kB, which only concerns tokens that would reach over such a cut. ``tokenizer``, ``vocabulary``,
    ``vocab_size`` and ``token_counts`` can be used at any time: they prepare what they need.

    Args:
        tokenizer: A directory, or a name on the Hugging Face hub: whatever `AutoTokenizer` loads, and a directory with
            GPT-2's ``vocab.json`` and ``merges.txt`` alone. Recipes in which it is ``None`` take that of the model, if
            this is a pretrained one.
        train_files: Paths or glob patterns of UTF-8 text; ``~`` is the home directory. They are read in the order
            given, sorted by name within a pattern.
        valid_files: The same for validation; ``None`` for none.
        test_files: The same for the test; ``None`` for none.
        dataset: In place of files: a name on the Hugging Face hub, or a folder that the package `datasets` loads.
        dataset_config: Which configuration of the dataset, if it has several.
        text_column: The column with the text.
        train_split: Name of the dataset's split for training.
        valid_split: The same for validation; ``None`` for none.
        test_split: The same for the test; ``None`` for none.
        documents: Where ``eos_token`` stands: after each of the ``files``, or after each of the ``lines`` that are not
            empty. Rows of a dataset are its lines, and a split is its file. ``None``: ``files`` for files, ``lines``
            for a dataset.
        eos_token: A token of the tokenizer; ``None`` for what it says itself.
        max_vocab_size: Rows of the model's table, where its tokenizer has more tokens, as some do for images; the text
            must have none of these. ``None`` for any number.
        block_size: Tokens in a block, at most what the model has positions for.
        batch_size: Blocks in a batch, per process.
        shuffle_seed: Of the order of the training blocks, together with the number of the epoch; ``None`` leaves them
            in the order of the text.
        options: ``eval_batch_size``, ``num_workers`` and ``cache_dir`` of
            :class:`~lightning_embcompress.data.module.TextDataModule`.

    Raises:
        ValueError: If there is no tokenizer, an argument is out of range, or not exactly one of ``train_files`` and
            ``dataset`` is given.

    Example:
        >>> data = HuggingFaceText("gpt2", train_files="novels/*.txt", block_size=256)
        >>> data.documents
        'files'
    """

    vocabulary_options = "tokenizer"

    def __init__(
        self,
        tokenizer: str | None = None,
        train_files: str | list[str] | None = None,
        valid_files: str | list[str] | None = None,
        test_files: str | list[str] | None = None,
        dataset: str | None = None,
        dataset_config: str | None = None,
        text_column: str = "text",
        train_split: str = "train",
        valid_split: str | None = "validation",
        test_split: str | None = "test",
        documents: Literal["files", "lines"] | None = None,
        eos_token: str | None = None,
        max_vocab_size: int | None = None,
        block_size: int = 512,
        batch_size: int = 8,
        shuffle_seed: int | None = 0,
        **options: Any,
    ) -> None:
        """Check and keep the arguments."""
        super().__init__(batch_size, **options)
        check_least(2, block_size=block_size)
        files: dict[Split, str | list[str] | None] = {"train": train_files, "valid": valid_files, "test": test_files}
        _check_source(dataset, files)
        if documents not in (None, "files", "lines"):
            raise ValueError(f"documents={documents!r} is not known: use 'files' or 'lines', or null for the default.")
        if tokenizer is None:
            raise ValueError(
                "tokenizer is null, and there is no pretrained model to take it from: name a directory, or a model on "
                "the Hugging Face hub."
            )
        self.tokenizer_name = tokenizer
        self.max_vocab_size = max_vocab_size
        self.patterns = files
        self.dataset = dataset
        self.dataset_config = dataset_config
        self.text_column = text_column
        self.split_names: dict[Split, str | None] = {"train": train_split, "valid": valid_split, "test": test_split}
        self.documents: Literal["files", "lines"] = documents or ("files" if dataset is None else "lines")
        self.eos_token = eos_token
        self.block_size = block_size
        self.shuffle_seed = shuffle_seed

    def __str__(self) -> str:
        """Name the text. Lightning's own description would load and tokenize it, also within an error message."""
        text = self.patterns["train"] if self.dataset is None else self.dataset
        return f"{type(self).__name__}(tokenizer={self.tokenizer_name!r}, {text!r})"

    def source(self, split: Split) -> TextSource | None:
        """Give the text of one part of the corpus; ``None`` if it has no such part.

        Raises:
            FileNotFoundError: If a pattern matches no file.
            ValueError: If the files are all empty, or the dataset cannot be loaded or has no such split or column.
        """
        if self.dataset is None:
            return super().source(split)
        name = self.split_names[split]
        if name is None:
            return None
        if name not in self._rows:
            raise ValueError(
                f"{split}_split={name!r} is not in the dataset {self.dataset!r}, which has the splits "
                f"{', '.join(map(repr, self._rows))}: name one of them, or null for none."
            )
        place = str(Path(self.dataset) / (self.dataset_config or "") / name)
        return dataset_rows(self._rows[name], self.text_column, place)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; loaded at the first use."""
        return load_tokenizer(self.tokenizer_name)

    @cached_property
    def vocabulary(self) -> TokenizerVocabulary:
        """The tokens, by their number and a fingerprint."""
        return TokenizerVocabulary(self.tokenizer, self.max_vocab_size)

    @cached_property
    def _rows(self) -> dict[str, Any]:
        _ = self.tokenizer  # one that does not load is told before a dataset is loaded
        return load_splits(str(self.dataset), self.dataset_config)

    def _tokenize(self, source: TextSource, split: Split) -> Tokens:
        eos_id = self._eos_id()
        description = f"Tokenizing {split} text"
        tokens = tokenize_subwords(source, self.tokenizer, eos_id, self.documents, self.cache_dir, description)
        beyond = tokens.counts[len(self.vocabulary) :].nonzero()
        if len(beyond):
            raise ValueError(
                f"{description}: it has the token {len(self.vocabulary) + int(beyond[0])}, but the model's table only "
                f"max_vocab_size={self.max_vocab_size} rows. Use the tokenizer that belongs to the model."
            )
        return replace(tokens, counts=tokens.counts[: len(self.vocabulary)])

    def _loader(self, tokens: Tokens, split: Split, rank: int, world_size: int) -> ResumableLoader[Any]:
        blocks = TokenBlocks(tokens.ids, self.block_size)
        shuffle = split == "train" and self.shuffle_seed is not None
        fixed_by = "text, tokenizer, batch_size and block_size"
        sampler = ResumableSampler(len(blocks), fixed_by, shuffle, self.shuffle_seed or 0, rank, world_size)
        return make_loader(blocks, sampler, self.batch_size_of(split), self.num_workers)

    def _eos_id(self) -> int:
        if self.eos_token is None:
            if self.tokenizer.eos_token_id is None:
                raise ValueError(
                    f"tokenizer={self.tokenizer_name!r} has no eos_token to put after documents: name one of its "
                    f"tokens with eos_token."
                )
            return int(self.tokenizer.eos_token_id)
        eos_id = self.tokenizer.get_vocab().get(self.eos_token)
        if eos_id is None:
            raise ValueError(
                f"eos_token={self.eos_token!r} is not a token of tokenizer={self.tokenizer_name!r}: name one that is"
                + ("." if self.tokenizer.eos_token is None else f", such as {self.tokenizer.eos_token!r}.")
            )
        return int(eos_id)


def _check_source(dataset: str | None, files: dict[Split, str | list[str] | None]) -> None:
    given = [f"{split}_files" for split, patterns in files.items() if patterns is not None]
    if dataset is not None and given:
        raise ValueError(
            f"dataset={dataset!r} and {', '.join(given)} are both given: text comes from one of them; set the other to "
            "null."
        )
    if dataset is None and files["train"] is None:
        raise ValueError("There is no text: name files with train_files, or a dataset with dataset.")
