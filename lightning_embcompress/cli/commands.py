"""The commands for models in files, from `compress` to `sweep`. Imports nothing heavy."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from lightning_embcompress.cli.parsing import Command
from lightning_embcompress.cli.sweep_record import can_hold_sweep
from lightning_embcompress.cli.targets import check_target
from lightning_embcompress.cli.usage import UsageError
from lightning_embcompress.integrations.sources import Source, find_source


@dataclass(frozen=True)
class Compress(Command):
    """Compress the embedding and softmax tables of a model in files.

    `source` decides what `target` is: a Hugging Face directory, which AutoModelForCausalLM.from_pretrained loads after
    `import lightning_embcompress`; a Lightning checkpoint, for `embcompress test --ckpt_path` and load_from_checkpoint;
    or a directory for load_compressed. report.json is written into it, or as NAME.report.json beside a checkpoint.

    Attributes:
        source: A directory that save_pretrained has written, or the name of a model on the Hugging Face hub; a
            checkpoint of Lightning's Trainer, of any LightningModule; or a directory that save_compressed has written.
        target: The directory or file to make, of the same kind as source; must not exist, or be empty.
        method: A method that `embcompress list` shows. Its options are shown by `--method NAME --help`.
        ratio: Dense bytes over stored bytes: of all tables together where text or statistics say what errors cost, else
            of every table.
        size: In place of a ratio, bytes of all tables together, such as 80MB (MB = 1,000,000).
        bits_per_weight: In place of a ratio, stored bits over the numbers of the tables: 4 is 8x of float32.
        max_perplexity_increase: In place of a size, the most that the perplexity on text may grow by, such as 1%: the
            smallest tables within it are searched for.
        tables: Modules to compress; by default the embedding and the softmax.
        tie: Whether a table that embedding and softmax share stays one.
        text: Plain text in UTF-8, files or glob patterns: its first nine tenths are counted for methods that weight by
            frequency, its last tenth is for the perplexity before and after. Tokenized once, into a cache.
        statistics: What errors in the tables cost, as Statistics.save has written it; if there is no such file, it is
            written from text. By default it follows from text for methods that use it, and is not kept.
        tokenizer: Directory or hub name; by default the files in source.
        keep_rows: Ids of tokens that are kept finely however seldom text has them, as special tokens of the model and
            its tokenizer are; for methods that weight by frequency.
        counts_only: Whether tokens in text are counted, but no perplexity is measured, which is only possible for
            causal language models of transformers.
        dtype: Of the whole result, and what is computed in; by default that of source.
        device: Where the model is called and tables are solved; auto takes a GPU where there is one. A model that is
            larger than its memory goes through it block by block, by accelerate.
        batch_tokens: Tokens that the model gets at once: fewer need less memory, and with fewer than its context it
            reads shorter blocks. By default what the memory has room for.
        max_tokens: Tokens that the perplexity is measured on; by default 16,384 on a CPU and 262,144 on a GPU.
        overwrite: Whether target is replaced if it is a model already; it stays as it is until the new one is complete.
        trust_source: Whether a checkpoint is read that holds more than tensors and plain values; it can then run code:
            only for files that you trust.
        options: Of the method.
    """

    examples: ClassVar[str] = """\
embcompress compress gpt2 gpt2-small --method tensor_train --max_rank 4 --text novels/*.txt
embcompress compress last.ckpt small.ckpt --method group_reduce --ratio 6.6 --groups 20 --tables encoder decoder
embcompress compress my_model my_model-4x --method low_rank --size 80MB --tie untie
embcompress compress my_model my_model-1% --method auto --max_perplexity_increase 1% --text novels/*.txt
"""
    source: str
    target: str
    method: str = "transform_coding"
    ratio: float | None = None
    size: str | None = None
    bits_per_weight: float | None = None
    max_perplexity_increase: str | None = None
    tables: list[str] | None = None
    tie: Literal["keep", "untie", "auto"] = "keep"
    text: list[str] | None = None
    statistics: str | None = None
    tokenizer: str | None = None
    keep_rows: list[int] | None = None
    counts_only: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    batch_tokens: int | None = None
    max_tokens: int | None = None
    overwrite: bool = False
    trust_source: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Compress."""
        _check_numbers(self.batch_tokens, self.max_tokens)
        source, target = _places(self.source, self.target, self.overwrite)
        from lightning_embcompress.cli.compressing import run_compress

        run_compress(self, source, target)


@dataclass(frozen=True)
class CompressTable(Command):
    """Compress tables of any size from file to file, without a model, in memory that does not grow with their rows.

    The table is read a few rows at a time, some times over, and what is made of it is written a few rows at a time. A
    run that was interrupted goes on where it was when it is started again with the same arguments.

    Attributes:
        file: FILE or FILE:TENSOR, where FILE is a file of safetensors, the directory of a model or the index of its
            shards, or an array of NumPy (.npy). TENSOR may be left out where there is one matrix.
        target: The directory to make, for load_compressed; must not exist, or be empty.
        more: Further tables, as FILE or FILE:TENSOR; each gets the size that is asked for.
        method: One that streams: transform_coding, shared_basis or group_reduce. Its options are shown by `--method
            NAME --help`.
        ratio: Dense bytes over stored bytes.
        bits_per_weight: In place of a ratio, stored bits over the numbers of the table.
        integers: In place of a method and a size, bits of the integers that the numbers themselves become, 2 to 8.
        group_size: Numbers that share a scale, of integers.
        counts: How often every row occurs, a file for each table: an array of NumPy (.npy), or a file of safetensors
            with one vector.
        names: What the tables are called in the target, the paths of the modules that read them; by default by their
            tensors.
        overwrite: Whether target is replaced if it is a model already; it stays as it is until the new one is complete.
        options: Of the method.
    """

    examples: ClassVar[str] = """\
embcompress compress-table model.safetensors:model.embed_tokens.weight small --bits_per_weight 3 --counts counts.npy
embcompress compress-table items.npy small --integers 4
"""
    file: str
    target: str
    more: list[str] | None = None
    method: str = "transform_coding"
    ratio: float | None = None
    bits_per_weight: float | None = None
    integers: int | None = None
    group_size: int = 32
    counts: list[str] | None = None
    names: list[str] | None = None
    overwrite: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Compress."""
        files = [self.file, *(self.more or [])]
        for name, given in (("counts", self.counts), ("names", self.names)):
            if given is not None and len(given) != len(files):
                raise UsageError(f"--{name} names {len(given)}, there must be one for each of {len(files)} tables")
        if self.integers is not None and (self.ratio or self.bits_per_weight or self.options):
            raise UsageError("--integers says the size itself: leave out --ratio, --bits_per_weight and options")
        target = Path(os.path.expanduser(self.target))
        if problem := check_target(target, Source(self.file, Path(self.file), "saved"), self.overwrite):
            raise UsageError(problem)
        from lightning_embcompress.cli.compressing_tables import run_compress_table

        run_compress_table(self, files, target)


@dataclass(frozen=True)
class Inspect(Command):
    """Show the tables of a model in files: how they are stored, their bytes, and their share of the model's bytes.

    For a model that is not compressed: the tables that `embcompress compress` would take.

    Attributes:
        source: What `embcompress compress` takes as source.
        json: Whether JSON is printed: what report.json has, and every table's share.
        trust_source: Whether a checkpoint is read that can run code: only for files that you trust.
    """

    source: str
    json: bool = False
    trust_source: bool = False

    def run(self) -> None:
        """Show."""
        source = find_source(self.source)
        from lightning_embcompress.cli.inspecting import run_inspect

        run_inspect(self, source)


@dataclass(frozen=True)
class Densify(Command):
    """Make a compressed model in files an ordinary one again, of the same kind.

    A Hugging Face directory or a Lightning checkpoint needs this package no longer then. Of what save_compressed has
    written, the same with ordinary tables: model.safetensors with the state dict, and config.json with the second names
    of tensors that have several ("aliases").

    Attributes:
        source: What `embcompress compress` has made.
        target: The directory or file to make, of the same kind; must not exist, or be empty.
        overwrite: Whether target is replaced if it is a model already; it stays as it is until the new one is complete.
        trust_source: Whether a checkpoint is read that can run code: only for files that you trust.
    """

    source: str
    target: str
    overwrite: bool = False
    trust_source: bool = False

    def run(self) -> None:
        """Make it dense."""
        source, target = _places(self.source, self.target, self.overwrite)
        from lightning_embcompress.cli.compressing import run_densify

        run_densify(self, source, target)


@dataclass(frozen=True)
class Sweep(Command):
    """Compress copies of a trained model by many methods to many sizes, and measure each, without training.

    Perplexity against stored bytes, also by how frequent the tokens are, so that one sees who pays. The folder gets
    sweep.json with every point as soon as it is known, and at the end sweep.csv and, where matplotlib is installed,
    sweep.png, which marks the points that nothing smaller beats. Started again with the same model and text, it goes on
    where it was interrupted, or adds what is newly asked for.

    Attributes:
        source: A causal language model of transformers: a directory that save_pretrained has written, or its name on
            the hub.
        folder: Where the points are written; must not exist, be empty, or have a sweep of the same model and text.
        text: Plain text in UTF-8, files or glob patterns, for the perplexity: all of it with counts_text, else the last
            tenth, and the rest is counted.
        counts_text: Text that the model was trained on, for the token counts.
        methods: What to try, each as METHOD or METHOD:NAME=VALUE,...; by default every method.
        ratios: Dense bytes over stored bytes of the tables; by default 4, 8, 16 and 32, or none with bits_per_weight.
        bits_per_weight: Stored bits over numbers of the tables, beside ratios or in place of them.
        bits: Widths of plain quantization of the tables, 2 to 8.
        match_bits: Whether every method is also tried at the very bytes of plain quantization.
        bands: Last frequency rank of each band of tokens but the last one.
        max_tokens: Measure no more than so many tokens.
        tables: Modules to compress; by default the embedding and the softmax.
        statistics: File of what errors cost, as `collect_statistics` and compress write it: read where it is, else made
            of the counted text; by default in folder.
        tokenizer: Directory or hub name; by default the files in source.
        dtype: Of the model, and what is computed in; by default that of source.
        device: Where models are called and tables are solved, see `embcompress compress --help`.
        batch_tokens: Tokens that a model gets at once; by default what the memory has room for.
    """

    examples: ClassVar[str] = """\
embcompress sweep my_model points --text valid.txt --counts_text train.txt --ratios 4 8 16 32 --bits 8 4 3 2
embcompress sweep my_model points --text all.txt --bits_per_weight 3 2 --methods transform_coding group_reduce:groups=20
"""
    source: str
    folder: str
    text: list[str] = field(default_factory=list)
    counts_text: list[str] | None = None
    methods: list[str] | None = None
    ratios: list[float] | None = None
    bits_per_weight: list[float] | None = None
    bits: list[int] = field(default_factory=lambda: [8, 4, 3, 2])
    match_bits: bool = False
    bands: list[int] = field(default_factory=lambda: [100, 1_000, 10_000])
    max_tokens: int | None = None
    tables: list[str] | None = None
    statistics: str | None = None
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    batch_tokens: int | None = None

    @property
    def sizes(self) -> list[float]:
        """Ratios that are asked for."""
        return self.ratios or ([] if self.bits_per_weight else [4.0, 8.0, 16.0, 32.0])

    def run(self) -> None:
        """Measure."""
        if not self.text:
            raise UsageError("--text is missing: name the files to measure on")
        _check_numbers(self.batch_tokens, self.max_tokens)
        source, folder = find_source(self.source), Path(self.folder).expanduser()
        # The only command that writes into a folder instead of replacing it.
        if not (folder.is_dir() and can_hold_sweep(folder)) and (problem := check_target(folder, source, None)):
            raise UsageError(problem)
        from lightning_embcompress.cli.sweeping import run_sweep

        run_sweep(self, source, folder)


COMMANDS: dict[str, type[Command]] = {
    "compress": Compress,
    "compress-table": CompressTable,
    "inspect": Inspect,
    "densify": Densify,
    "sweep": Sweep,
}


def _check_numbers(batch_tokens: int | None, max_tokens: int | None) -> None:
    # A block has a token to read and one to predict.
    if batch_tokens is not None and batch_tokens < 2:
        raise UsageError(f"--batch_tokens {batch_tokens}: must be 2 or more")
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"--max_tokens {max_tokens}: must be 1 or more")


def _places(source: str, target: str, overwrite: bool) -> tuple[Source, Path]:
    """What a command starts from, and room for what it makes.

    Raises:
        UsageError: If the target is taken.
    """
    found, path = find_source(source), Path(os.path.expanduser(target))
    if problem := check_target(path, found, overwrite):
        raise UsageError(problem)
    return found, path
