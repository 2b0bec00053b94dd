"""`embcompress compress-table`: tables from file to file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_embcompress.cli.usage import UsageError, in_shell_terms
from lightning_embcompress.compression.budget import Budget
from lightning_embcompress.compression.report import say
from lightning_embcompress.integrations.table_files import TableSource, compress_tables, find_table
from lightning_embcompress.methods.registry import MethodConfig, Quantization, get_config
from lightning_embcompress.utils.tensor_files import TensorFile

if TYPE_CHECKING:
    from lightning_embcompress.cli.commands import CompressTable


def run_compress_table(command: CompressTable, files: list[str], target: Path) -> None:
    """Compress tables as a command says.

    Raises:
        UsageError: If an argument cannot be used.
        ValueError: If a table cannot be compressed.
    """
    config: MethodConfig | Quantization
    try:
        if command.integers is not None:
            config, budget = Quantization(bits=command.integers, group_size=command.group_size), None
        else:
            config = get_config(command.method, **command.options)
            budget = Budget.of(config, ratio=command.ratio, bits_per_weight=command.bits_per_weight)
    except ValueError as error:
        raise UsageError(in_shell_terms(str(error))) from error
    sources = []
    for index, said in enumerate(files):
        tensor, table = find_table(said)
        counts = None if command.counts is None else _counts(command.counts[index])
        # The path of the module that reads it, as far as its tensor says it.
        own = tensor.removesuffix("weight").removesuffix(".") or "table"
        name = own if command.names is None else command.names[index]
        sources.append(TableSource(name, table, counts))
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise UsageError(f"two tables are called the same, {', '.join(names)}: name them with --names")
    plan = compress_tables(sources, target, config, budget)
    for found in plan.tables:
        shape = f"{found.spec['vocab_size']:,} x {found.spec['dim']}"
        size = f"{found.dense_bytes / 1e6:,.1f} MB to {found.stored_bytes / 1e6:,.1f} MB"
        say(f"{found.name} ({shape}): {size}, {found.bits_per_weight:.3f} bits per weight ({found.ratio:.2f}x)")
    say(f"Written: {target}")
    say(f"Rows are read from the file by lightning_embcompress.load_compressed({str(target)!r}, rows='mmap')")


def _counts(file: str) -> Tensor:
    tensors = TensorFile(Path(file).expanduser())
    vectors = [name for name, entry in tensors.entries.items() if len(entry.shape) == 1]
    if len(vectors) != 1:
        raise UsageError(f"--counts {file!r} must hold one vector, it has {len(vectors)}")
    counts = tensors[vectors[0]].read()
    # Held all the time, beside tables that are larger than memory.
    return counts.int() if counts.dtype == torch.int64 and int(counts.max()) < 2**31 else counts
