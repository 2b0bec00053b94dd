"""`embcompress compare`: every method on one trained model, at equal stored bytes."""

from __future__ import annotations

from torch import nn

from lightning_embcompress.cli.arguments import Arguments
from lightning_embcompress.cli.compare import DEFAULT_METHODS, Result, compare, show_comparison, write_comparison
from lightning_embcompress.cli.measuring import open_measurable
from lightning_embcompress.cli.statistics import collect_from_text
from lightning_embcompress.compression.report import say
from lightning_embcompress.utils.files import staged


def run_compare(arguments: Arguments) -> int:
    """Compare methods on a model of transformers, and write the comparison into a folder.

    Raises:
        ValueError: If the model cannot be measured, or a method, a ratio or the text cannot be used. Nothing has been
            written then.
    """
    given = arguments.given
    opened = open_measurable(arguments, "compare methods on the model it was made of")

    def evaluate(model: nn.Module) -> float:
        return opened.text.perplexity(model, opened.block_size, "Perplexity", given.max_tokens)

    results = compare(
        opened.model,
        evaluate,
        given.methods or DEFAULT_METHODS,
        given.ratios,
        bits=given.bits,
        tables=opened.tables,
        token_counts=opened.token_counts,
        statistics=lambda: collect_from_text(
            opened.model, opened.counted_text, opened.block_size, opened.token_counts, opened.tables
        ),
        on_result=say_result,
    )
    show_comparison(results)
    with staged(arguments.target, directory=True) as folder:
        written = write_comparison(folder, results)
    if len(written) < 3:
        say("No plot: it needs matplotlib (pip install matplotlib)")
    say(f"Written: {', '.join(str(arguments.target / file.name) for file in written)}")
    return 0


def say_result(result: Result) -> None:
    """Print a line of a comparison as soon as it is known."""
    asked = "" if result.asked_ratio is None else f" at {result.asked_ratio:.2f}x"
    say(f"{result.method}{asked}: {result.note if result.perplexity is None else f'{result.perplexity:.2f}'}")
