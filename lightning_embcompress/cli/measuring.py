"""What `compare` and `sweep` start from: a model of transformers with a text to count and one to measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_embcompress.cli.arguments import Arguments
from lightning_embcompress.cli.models import in_shell_terms, open_model
from lightning_embcompress.cli.text import TokenizedText, block_size_of, check_measurable, read_text, tokenizer_of
from lightning_embcompress.compression.plan import plan_of
from lightning_embcompress.compression.report import say
from lightning_embcompress.tables.replacement import find_tables


@dataclass(frozen=True)
class MeasurableModel:
    """A trained model and its text.

    Attributes:
        model: A causal language model of transformers.
        tables: See `lightning_embcompress.tables.replacement.find_tables`.
        text: Whose last part is measured.
        counted_text: Whose first part is counted: `text` too, or one of its own, all of which is.
        token_counts: `[vocab_size]` int64.
        block_size: Tokens that the model reads at once.
    """

    model: Any
    tables: str | Sequence[str]
    text: TokenizedText
    counted_text: TokenizedText
    token_counts: Tensor
    block_size: int


def open_measurable(arguments: Arguments, advice: str) -> MeasurableModel:
    """Open the model and the text of a command line, and say what is measured.

    Args:
        arguments: With `text`, `counts_text`, `tables`, `tokenizer`, `dtype` and `max_tokens`.
        advice: What to do with a model that is compressed already, for the error.

    Raises:
        ValueError: If the model cannot be measured, is compressed already, or the text cannot be used.
    """
    given = arguments.given
    check_measurable(arguments.source)
    tokenizer = tokenizer_of(arguments.source, given.tokenizer)
    opened = open_model(arguments.source, given.dtype)
    if compressed := plan_of(opened.model).tables:
        names = ", ".join(table.name for table in compressed)
        raise ValueError(f"{arguments.source.name!r} is compressed already ({names}): {advice}")
    tables = "auto" if given.tables is None else list(given.tables)
    try:
        (vocab_size,) = {table.shape[0] for table in find_tables(opened.model, tables)}
    except ValueError as error:
        raise ValueError(in_shell_terms(str(error))) from error
    measured = read_text(given.text, tokenizer, measure_all=given.counts_text is not None)
    counted = measured if given.counts_text is None else read_text(given.counts_text, tokenizer).all_counted()
    for text in (measured, counted):
        text.check_ids(vocab_size, tokenizer)
    counts = counted.counts(vocab_size)
    say(
        f"{arguments.source.name}: {type(opened.model).__name__}; perplexity on {measured.limited(given.max_tokens):,} "
        f"tokens, counts from {int(counts.sum()):,}"
    )
    return MeasurableModel(opened.model, tables, measured, counted, counts, block_size_of(opened.model))
