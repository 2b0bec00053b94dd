"""`embcompress bench`: what the package does at sizes for which there is no model at hand. Imports nothing heavy."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_embcompress.shell.arguments import UsageError, new_parser

_BENCH = """\
Show how small, how fast and in how much memory tables of a published size are compressed, without their data.

obw: the embedding and the softmax of the bigLSTM of the One Billion Word benchmark, with values whose spectrum falls as
that of trained tables and counts by Zipf's law, one in memory at a time (about 5 GB at the full size). Its recurrent
weights and the bias of the softmax count as float16.
"""
_BENCH_EXAMPLES = """\
Minutes at the full size, seconds at a smaller one:
  embcompress bench obw --report obw.json
  embcompress bench obw --vocab_size 20000 --dim 128 --cells 512 --method group_reduce --ratio 6.6 --groups 20
"""


def run_bench(arguments: Sequence[str]) -> int:
    """Run a bench, print its table, and write its report where one is asked for.

    Raises:
        UsageError: If the command line is wrong.
        ValueError: If the method cannot do what is asked for. Nothing has been made then.
        SystemExit: After `--help`.
    """
    # Both spellings of an option are understood.
    words = [re.sub(r"^--[^=]*", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in arguments]
    given = _parser().parse_args(words)
    report = None if given.report is None else Path(given.report).expanduser()
    if report is not None and report.exists() and not given.overwrite:
        raise UsageError(f"--report {str(report)!r} exists: choose another, or replace it with --overwrite")
    if report is not None and not report.absolute().parent.is_dir():
        raise UsageError(f"--report {str(report)!r}: there is no folder {str(report.parent)!r}")
    # Only now: it imports torch, for which help and mistakes need not wait.
    from lightning_embcompress.files import explaining_failure, replacing
    from lightning_embcompress.obw_bench import ObwBench, run_obw_bench, show_obw_bench
    from lightning_embcompress.report import say

    sizes = ("vocab_size", "dim", "cells", "layers", "method", "ratio", "rows", "seed")
    options = {} if given.groups is None else {"groups": given.groups}
    try:
        bench = ObwBench(**{name: getattr(given, name) for name in sizes}, options=options)
    except ValueError as error:
        raise UsageError(str(error)) from error

    def tell(entry: dict[str, Any]) -> None:
        say(f"{entry['name']}: {entry['stored_bytes']:,} bytes, {entry['ratio']:.2f}x, {entry['seconds']:.1f} seconds")

    found = run_obw_bench(bench, mapped_in=given.mapped_in, on_table=tell)
    show_obw_bench(found)
    if report is not None:
        with explaining_failure(report), replacing(report) as temporary:
            temporary.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        say(f"Written: {report}")
    return 0


def _folder(text: str) -> Path:
    folder = Path(text).expanduser()
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no folder")
    return folder


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("bench", _BENCH, _BENCH_EXAMPLES)
    add = parser.add_argument
    add("name", metavar="NAME", choices=("obw",), help="which bench: obw")
    add("--vocab_size", type=int, default=793_471, help="words (default: %(default)s)")
    add("--dim", type=int, default=1024, help="width of the tables (default: %(default)s)")
    add("--cells", type=int, default=8192, help="cells of a recurrent layer (default: %(default)s)")
    add("--layers", type=int, default=2, help="recurrent layers (default: %(default)s)")
    add("--method", default="transform_coding", help="see `embcompress list` (default: %(default)s)")
    add("--ratio", type=float, default=26.0, help="dense bytes over stored bytes of each table (default: %(default)s)")
    add("--groups", type=int, help="groups of words, for methods with groups; by default what the method chooses")
    add("--rows", type=int, default=20_000, help="rows of a table on which its loss is measured (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the values (default: %(default)s)")
    add("--mapped_in", type=_folder, metavar="FOLDER", help="keep a table in a mapped file there instead of in memory")
    add("--report", metavar="FILE", help="write everything as JSON")
    add("--overwrite", action="store_true", help="replace the report if there is one")
    return parser
