"""`embcompress export`: tables of a model in the formats of other engines."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_embcompress.cli.memory import default_max_tokens, named_device, what_to_lower
from lightning_embcompress.cli.statistics import WantedStatistics
from lightning_embcompress.cli.text import (
    TokenizedText,
    check_measurable,
    check_perplexity,
    read_text,
    tokenizer_of,
    vocab_size_of,
)
from lightning_embcompress.cli.usage import UsageError
from lightning_embcompress.compression.budget import parse_perplexity_increase
from lightning_embcompress.compression.report import say
from lightning_embcompress.integrations.contents import model_class, quiet_transformers
from lightning_embcompress.integrations.export.compressed_tensors import export_compressed_tensors
from lightning_embcompress.integrations.export.gguf import OUTPUT_TABLE, TOKEN_TABLE, export_gguf
from lightning_embcompress.integrations.export.gguf_file import GgufFile
from lightning_embcompress.integrations.export.onnx import export_onnx
from lightning_embcompress.integrations.export.written import WrittenTable
from lightning_embcompress.integrations.opening import open_model
from lightning_embcompress.integrations.placement import Placement
from lightning_embcompress.integrations.sources import Source, find_source
from lightning_embcompress.utils.devices import explaining_out_of_memory

if TYPE_CHECKING:
    from lightning_embcompress.cli.export_commands import GGUF, CompressedTensors

# Part of the tokens in which a tokenizer may differ from that of the file: names of unused ones do.
_RENAMED = 0.02


class _Known:
    """What errors cost, and what the model says of a text before and after, as far as a command line asks for it.

    Args:
        given: The command line.
        wanted: Where statistics are from, as `_wanted` says.
        model: A causal language model of transformers; None where nothing is to be called.
        tokenizer: Its directory or name.

    Attributes:
        statistics: None without a text and a file.
    """

    def __init__(
        self, given: GGUF | CompressedTensors, wanted: WantedStatistics | None, model: Any, tokenizer: str
    ) -> None:
        """Measure and collect."""
        self.statistics = None
        self._text: TokenizedText | None = None
        device = named_device(given.device)
        counts = None
        if given.text is not None:
            text = read_text(given.text, tokenizer).placed(device, given.batch_tokens)
            vocab_size = vocab_size_of(model)
            text.check_ids(vocab_size, tokenizer)
            self._block_size = text.block_size_of(model.eval())
            text.check_length(self._block_size)
            self._text = text.limited(default_max_tokens(device) if given.max_tokens is None else given.max_tokens)
            self._placement = Placement(model, device, text.workspace(self._block_size, vocab_size))
            self._before = self._perplexity("before")
            check_perplexity(self._before, vocab_size, tokenizer)
            counts = text.counts(vocab_size)
        if wanted is None:
            say("No --text and no --statistics: all columns count the same, and errors cost more than they have to")
            return
        with nullcontext() if wanted.is_there else self._placement.running():
            self.statistics = wanted.find(model, self._text, counts, "auto")
        if model is not None:
            model.to("cpu")

    def _perplexity(self, name: str) -> float:
        assert self._text is not None
        with self._placement.running():
            return self._text.perplexity(self._placement.model, self._block_size, f"Perplexity, {name}")

    def say_perplexity(self, model: Any) -> None:
        """Say the perplexity of a model before and after, if there is a text."""
        if self._text is None:
            return
        self._placement = Placement(model.eval(), self._placement.device, self._placement.workspace)
        after = self._perplexity("after")
        say(
            f"Perplexity on the last tenth of the text, {self._text.num_measured:,} tokens: {self._before:.2f} before, "
            f"{after:.2f} after ({after / self._before - 1:+.1%})"
        )


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
    file = GgufFile.open(source)
    say(f"{source}: {file.architecture}, {source.stat().st_size / 1e6:,.3f} MB")
    with _explaining(given), _opened(given, file) as (model, tokenizer):
        tables = None
        if given.model is not None:
            _check_tokens(file, tokenizer)
            # Copies: the model is going to read other values.
            layers = _layers(model)
            tables = {name: layers[name].weight.detach().clone() for name in layers if name in file.tensors}
        known = _Known(given, wanted, model, tokenizer)
        limit = given.max_perplexity_increase
        written = export_gguf(
            source, target, given.type, known.statistics, tables=tables, max_perplexity_increase=limit
        )
        _say_written(written)
        if given.text is not None:
            made, layers = GgufFile.open(target), _layers(model)
            with torch.no_grad():
                for one in written:
                    layers[one.name].weight.copy_(torch.from_numpy(made.values(one.name)))
            known.say_perplexity(model)
    say(f"Written: {target}, {target.stat().st_size / 1e6:,.3f} MB")


def run_compressed_tensors(given: CompressedTensors, source: Source, target: Path) -> None:
    """Export to compressed-tensors.

    Args:
        given: The command line.
        source: The model.
        target: What is made, which can be written.

    Raises:
        ValueError: If the request cannot be met. Nothing has been written then.
    """
    wanted = _wanted(given)
    tokenizer = ""
    if given.text is not None:
        check_measurable(source)
        tokenizer = tokenizer_of(source, given.tokenizer)
    with _explaining(given):
        opened = open_model(source, given.dtype)
        known = _Known(given, wanted, opened.model, tokenizer)
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        written = export_compressed_tensors(
            opened.model,
            target,
            4 if given.bits == 4 else 8,
            known.statistics,
            group_size=given.group_size,
            tie=given.tie,
            files=opened.beside(),
        )
        _say_written(written)
        if given.text is not None and find_spec("compressed_tensors") is not None:
            with quiet_transformers():
                made = model_class(source).from_pretrained(target)
            known.say_perplexity(made)
    say(f"Written: {target}")


def run_onnx(source: Source, target: Path) -> None:
    """Export to ONNX.

    Args:
        source: The model.
        target: What is made, which can be written.

    Raises:
        ValueError: If it cannot be read, or made a graph. Nothing has been written then.
    """
    check_measurable(source)
    export_onnx(open_model(source, "float32").model, target)
    say(f"Written: {target}, {target.stat().st_size / 1e6:,.3f} MB")


def _explaining(given: GGUF | CompressedTensors) -> AbstractContextManager[None]:
    return explaining_out_of_memory(named_device(given.device), what_to_lower(given.batch_tokens))


def _wanted(given: GGUF | CompressedTensors) -> WantedStatistics | None:
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
    if find_spec("accelerate") is None:
        raise ImportError("transformers reads GGUF with accelerate: pip install 'lightning-embcompress[export]'")
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


def _say_written(tables: Sequence[WrittenTable]) -> None:
    for one in tables:
        rows, columns = one.shape
        said = f"{one.name} [{rows:,} x {columns:,}]: {one.before} became {one.type}, "
        said += f"{one.bits_per_weight:.2f} bits per weight"
        if one.predicted_loss is not None:
            said += f", predicted {math.expm1(one.predicted_loss):+.2%} of perplexity"
        say(said)
