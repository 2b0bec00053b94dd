"""`embcompress export`: tables of a model in the formats of other engines."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.cli.memory import default_max_tokens, named_device, what_to_lower
from lightning_embcompress.cli.statistics import WantedStatistics
from lightning_embcompress.cli.text import TokenizedText, check_perplexity, read_text, vocab_size_of
from lightning_embcompress.cli.usage import UsageError
from lightning_embcompress.compression.budget import parse_perplexity_increase
from lightning_embcompress.compression.report import say
from lightning_embcompress.integrations.export.gguf import OUTPUT_TABLE, TOKEN_TABLE, WrittenTable, export_gguf
from lightning_embcompress.integrations.export.gguf_file import GgufFile
from lightning_embcompress.integrations.opening import open_model
from lightning_embcompress.integrations.placement import Placement
from lightning_embcompress.integrations.sources import find_source
from lightning_embcompress.utils.devices import explaining_out_of_memory

if TYPE_CHECKING:
    from lightning_embcompress.cli.export_commands import GGUF

# Part of the tokens in which a tokenizer may differ from that of the file: names of unused ones do.
_RENAMED = 0.02


@dataclass(frozen=True)
class _Reader:
    """A model of transformers that reads the text.

    Attributes:
        model: A causal language model.
        text: To count, and to measure.
        placement: On its device.
    """

    model: Any
    text: TokenizedText
    placement: Placement

    @classmethod
    def of(cls, given: GGUF, model: Any, tokenizer: str, device: torch.device) -> _Reader:
        assert given.text is not None
        text = read_text(given.text, tokenizer).placed(device, given.batch_tokens)
        text.check_ids(vocab_size_of(model), tokenizer)
        text.check_length(text.block_size_of(model))
        most = default_max_tokens(device) if given.max_tokens is None else given.max_tokens
        workspace = text.workspace(text.block_size_of(model), vocab_size_of(model))
        return cls(model.eval(), text.limited(most), Placement(model, device, workspace))

    def statistics(self, wanted: WantedStatistics) -> Statistics:
        """What errors cost, from the part to count."""
        counts = self.text.counts(vocab_size_of(self.model))
        with self.placement.running():
            return wanted.find(self.model, self.text, counts, "auto")

    def perplexity(self, name: str) -> float:
        """Of the part to measure."""
        with self.placement.running():
            return self.text.perplexity(self.model, self.text.block_size_of(self.model), f"Perplexity, {name}")

    @torch.no_grad()
    def replace(self, tables: dict[str, Tensor]) -> None:
        """Put values into embedding and head."""
        self.model.to("cpu")
        for name, layer in _layers(self.model).items():
            if name in tables:
                layer.weight.copy_(tables[name])


def run_gguf(given: GGUF, source: Path, target: Path) -> None:
    """Export to GGUF.

    Args:
        given: The command line.
        source: The file.
        target: What is made, which can be written.

    Raises:
        UsageError: If an option is out of its range.
        ValueError: If the request cannot be met. Nothing has been written then.
    """
    try:
        if given.max_perplexity_increase is not None:
            parse_perplexity_increase(given.max_perplexity_increase)
    except ValueError as error:
        raise UsageError(str(error)) from error
    wanted = _wanted(given)
    device = named_device(given.device)
    file = GgufFile.open(source)
    say(f"{source}: {file.architecture}, {source.stat().st_size / 1e6:,.3f} MB")
    with (
        explaining_out_of_memory(device, what_to_lower(given.batch_tokens)),
        _opened(given, file) as (model, tokenizer),
    ):
        tables = None
        if given.model is not None:
            _check_tokens(file, tokenizer)
            tables = {name: layer.weight.detach() for name, layer in _layers(model).items() if name in file.tensors}
        reader = None if given.text is None else _Reader.of(given, model, tokenizer, device)
        before = None
        if reader is not None:
            before = reader.perplexity("before")
            check_perplexity(before, vocab_size_of(model), tokenizer)
        statistics = None
        if wanted is None:
            say("No --text and no --statistics: all columns count the same, and errors cost more than they have to")
        elif wanted.is_there:
            assert wanted.file is not None
            statistics = Statistics.load(wanted.file)
        else:
            assert reader is not None
            statistics = reader.statistics(wanted)
        limit = given.max_perplexity_increase
        written = export_gguf(source, target, given.type, statistics, tables=tables, max_perplexity_increase=limit)
        for one in written:
            _say_written(one)
        if reader is not None:
            reader.replace({one.name: torch.from_numpy(GgufFile.open(target).values(one.name)) for one in written})
            after = reader.perplexity("after")
            assert before is not None
            say(
                f"Perplexity on the last tenth of the text, {reader.text.num_measured:,} tokens: {before:.2f} before, "
                f"{after:.2f} after ({after / before - 1:+.1%})"
            )
    say(f"Written: {target}, {target.stat().st_size / 1e6:,.3f} MB")


def _wanted(given: GGUF) -> WantedStatistics | None:
    """Where statistics are from; None for none."""
    if given.statistics is None:
        return None if given.text is None else WantedStatistics(None)
    file = Path(given.statistics).expanduser()
    if not file.is_file() and given.text is None:
        raise UsageError(f"--statistics {given.statistics}: there is no such file; to write it give a text with --text")
    if not file.absolute().parent.is_dir():
        raise UsageError(f"--statistics {given.statistics}: there is no folder {str(file.parent)!r}")
    return WantedStatistics(file)


@contextmanager
def _opened(given: GGUF, file: GgufFile) -> Iterator[tuple[Any, str]]:
    """The model by transformers and its tokenizer, where they are needed."""
    if given.model is not None:
        source = find_source(given.model)
        if source.kind != "pretrained":
            raise UsageError(f"--model {given.model}: must be a directory that save_pretrained has written")
        yield open_model(source, "float32").model, str(source.path)
        return
    if given.text is None:
        yield None, ""
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(file.path.absolute().parent), file.path.name
    say(f"Reading {file.path} by transformers")
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except (ValueError, KeyError, NotImplementedError, ImportError, OSError, RuntimeError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"transformers cannot read the architecture {file.architecture!r} from {str(file.path)!r} ({said}): give "
            "its Hugging Face directory with --model, or what errors cost with --statistics, without --text"
        ) from error
    # Text is tokenized by a directory, whose contents name its place in the cache.
    with tempfile.TemporaryDirectory() as place:
        tokenizer.save_pretrained(place)
        yield model, place


def _layers(model: Any) -> dict[str, Any]:
    """Embedding and head of a model by the tensors of a GGUF file that hold their tables."""
    return {TOKEN_TABLE: model.get_input_embeddings(), OUTPUT_TABLE: model.get_output_embeddings()}


def _check_tokens(file: GgufFile, tokenizer: str) -> None:
    """Check that a directory is of the same vocabulary as a file.

    Raises:
        ValueError: If it is not.
    """
    from lightning_embcompress.data.tokenized import load_tokenizer

    there = file.metadata("tokenizer.ggml.tokens")
    if not there or not find_source(tokenizer).has_tokenizer:
        return
    vocabulary = load_tokenizer(tokenizer).get_vocab()
    ids = [(token, number) for token, number in vocabulary.items() if number < len(there)]
    others = sum(there[number] != token for token, number in ids)
    if others > _RENAMED * max(1, len(ids)) or len(ids) < (1 - _RENAMED) * len(vocabulary):
        raise ValueError(
            f"--model {tokenizer}: {others:,} of its {len(vocabulary):,} tokens are others than in {str(file.path)!r}: "
            "it is another model"
        )


def _say_written(one: WrittenTable) -> None:
    rows, columns = one.shape
    predicted = "" if one.predicted_loss is None else f", predicted {math.expm1(one.predicted_loss):+.2%} of perplexity"
    say(
        f"{one.name} [{rows:,} x {columns:,}]: {one.before} became {one.type}, {one.bits_per_weight:.2f} bits per "
        f"weight{predicted}"
    )
