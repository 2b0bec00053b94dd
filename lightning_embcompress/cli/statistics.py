"""What a text says of the tables of a model of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_embcompress.calibration.statistics import Statistics, collect_statistics
from lightning_embcompress.cli.text import TokenizedText, vocab_size_of
from lightning_embcompress.cli.usage import UsageError
from lightning_embcompress.compression.report import say
from lightning_embcompress.methods.config import MethodConfig

if TYPE_CHECKING:
    from lightning_embcompress.cli.commands import Compress

# Moments of tokens of a text, and how much more a table may lose by them than by exact ones before they are enough: see
# `collect_statistics`. The excess falls as one over the number of tokens, and a CPU takes milliseconds for each.
_CPU_TOKENS, _CPU_TOLERANCE = 2**15, 0.1
_TOKENS, _TOLERANCE = 2**18, 0.03


def collect_from_text(
    model: Any, text: TokenizedText, block_size: int, token_counts: Tensor, tables: str | Sequence[str]
) -> Statistics:
    """Collect statistics from the part of a text that is counted, until the moments have settled.

    Args:
        model: A causal language model of transformers.
        text: Of which no more than some blocks are read, spread over the part to count.
        block_size: Tokens that the model reads at once.
        token_counts: `[vocab_size]` counts of the whole part.
        tables: See `lightning_embcompress.tables.finding.find_tables`.

    Raises:
        ValueError: If a table is never called, or no block has a finite loss.
    """
    vocab_size = vocab_size_of(model)
    device = text.device or next(model.parameters()).device
    most, tolerance = (_CPU_TOKENS, _CPU_TOLERANCE) if device.type == "cpu" else (_TOKENS, _TOLERANCE)
    batches = text.counted_batches(block_size, vocab_size, most)
    statistics = collect_statistics(model, batches, token_counts=token_counts, tables=tables, tolerance=tolerance)
    say(f"Statistics of {statistics.num_targets:,} tokens say what errors cost")
    return statistics


@dataclass(frozen=True)
class WantedStatistics:
    """Where `embcompress compress` has statistics from.

    Attributes:
        file: Where they are, or are to be kept; None where they are not.
    """

    file: Path | None

    @classmethod
    def of(cls, given: Compress, config: MethodConfig) -> WantedStatistics | None:
        """What a command line asks for; None if errors are weighed otherwise.

        Raises:
            UsageError: If they are needed and cannot be had, or given and not used.
        """
        limit = given.max_perplexity_increase
        needs = f"--method {given.method}" if config.needs_metric else ""
        reads_text = given.text is not None and not given.counts_only
        if not config.uses_metric:
            if given.statistics is not None:
                raise UsageError(
                    f"--statistics is for methods that weigh errors by what the loss grows by, and {given.method!r} "
                    "does not"
                )
            return None
        if limit is not None and not reads_text:
            raise UsageError(
                f"--max_perplexity_increase {limit} measures the perplexity: give a text with --text, without "
                "--counts_only"
            )
        file = None if given.statistics is None else Path(given.statistics).expanduser()
        if file is not None and file.is_file():
            return cls(file)
        if reads_text:
            if file is not None and not file.parent.is_dir():
                raise UsageError(f"--statistics {given.statistics}: there is no folder {str(file.parent)!r}")
            return cls(file)
        if file is not None:
            raise UsageError(
                f"--statistics {given.statistics}: there is no such file; to write it give a text with --text, without "
                "--counts_only"
            )
        if needs:
            raise UsageError(
                f"{needs} has to know what errors cost: give a text with --text, without --counts_only, or a file with "
                "--statistics"
            )
        if given.text is not None:
            say("Errors are weighed by the frequency of tokens alone: --counts_only leaves out what errors cost")
        return None

    @property
    def is_there(self) -> bool:
        """Whether they were collected before."""
        return self.file is not None and self.file.is_file()

    def find(
        self, model: Any, text: TokenizedText | None, token_counts: Tensor | None, tables: str | Sequence[str]
    ) -> Statistics:
        """Read them, or collect them from a text and keep them if a file is named.

        Raises:
            ValueError: If the file is damaged or cannot be written, or nothing can be collected.
        """
        if self.file is not None and self.is_there:
            return Statistics.load(self.file)
        assert text is not None
        assert token_counts is not None
        statistics = collect_from_text(model, text, text.block_size_of(model), token_counts, tables)
        if self.file is not None:
            try:
                statistics.save(self.file)
            except OSError as error:
                raise ValueError(str(error)) from error
            say(f"Written: {self.file}")
        return statistics
