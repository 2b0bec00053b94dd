"""`embcompress compare`: every method on one trained model, at equal stored bytes."""

from __future__ import annotations

from torch import nn

from lightning_embcompress.compare import DEFAULT_METHODS, Result, compare, show_comparison, write_comparison
from lightning_embcompress.plan import plan_of
from lightning_embcompress.report import say
from lightning_embcompress.shell.arguments import Arguments
from lightning_embcompress.shell.models import in_shell_terms, open_model
from lightning_embcompress.shell.targets import staged
from lightning_embcompress.shell.text import block_size_of, check_measurable, read_text, tokenizer_of
from lightning_embcompress.tables import find_tables


def run_compare(arguments: Arguments) -> int:
    """Compare methods on a model of transformers, and write the comparison into a folder.

    Raises:
        ValueError: If the model cannot be measured, or a method, a ratio or the text cannot be used. Nothing has been
            written then.
    """
    given = arguments.given
    check_measurable(arguments.source)
    tokenizer = tokenizer_of(arguments.source, given.tokenizer)
    opened = open_model(arguments.source, given.dtype)
    if compressed := plan_of(opened.model).tables:
        names = ", ".join(table.name for table in compressed)
        raise ValueError(
            f"{arguments.source.name!r} is compressed already ({names}): compare methods on the model it was made of"
        )
    tables = "auto" if given.tables is None else list(given.tables)
    try:
        (vocab_size,) = {table.shape[0] for table in find_tables(opened.model, tables)}
    except ValueError as error:
        raise ValueError(in_shell_terms(str(error))) from error
    measured = read_text(given.text, tokenizer, measure_all=given.counts_text is not None)
    counted = None if given.counts_text is None else read_text(given.counts_text, tokenizer)
    for text in (measured, counted or measured):
        text.check_ids(vocab_size, tokenizer)
    counts = measured.counts(vocab_size) if counted is None else counted.all_counts(vocab_size)
    block_size = block_size_of(opened.model)
    say(
        f"{arguments.source.name}: {type(opened.model).__name__}; perplexity on {measured.limited(given.max_tokens):,} "
        f"tokens, counts from {int(counts.sum()):,}"
    )

    def evaluate(model: nn.Module) -> float:
        return measured.perplexity(model, block_size, "Perplexity", given.max_tokens)

    def say_result(result: Result) -> None:
        asked = "" if result.asked_ratio is None else f" at {result.asked_ratio:.2f}x"
        say(f"{result.method}{asked}: {result.note if result.perplexity is None else f'{result.perplexity:.2f}'}")

    results = compare(
        opened.model,
        evaluate,
        given.methods or DEFAULT_METHODS,
        given.ratios,
        bits=given.bits,
        tables=tables,
        token_counts=counts,
        on_result=say_result,
    )
    show_comparison(results)
    with staged(arguments.target, directory=True) as folder:
        written = write_comparison(folder, results)
    if len(written) < 3:
        say("No plot: it needs matplotlib (pip install matplotlib)")
    say(f"Written: {', '.join(str(arguments.target / file.name) for file in written)}")
    return 0
