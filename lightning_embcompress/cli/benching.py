"""`embcompress bench`: what the package does at sizes for which there is no model at hand. Imports nothing heavy."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_embcompress.cli.arguments import UsageError, new_parser, parse_with_options

if TYPE_CHECKING:
    from lightning_embcompress.bench.speed import SpeedBench

_BENCHES = ("obw", "speed", "scaling", "corpus")

_BENCH = """\
Show how small, how fast and in how much memory tables are compressed and read, without their data: tables are made,
with values whose spectrum falls as that of trained ones and counts by Zipf's law.

  obw      the embedding and the softmax of the bigLSTM of the One Billion Word benchmark, and its bytes as a whole
  speed    rows, logits, best tokens, samples and losses of a table of your size, beside the dense one and peers
  scaling  the same of the compressed table as the vocabulary grows
  corpus   text of numbered words in the layout of that benchmark, to try its recipe out at the full vocabulary

`embcompress bench NAME --help` lists the options.
"""
_BENCH_EXAMPLES = """\
  embcompress bench obw --method group_reduce --ratio 6.6 --groups 20
  embcompress bench speed --vocab_size 32000 --dim 512 --method group_reduce --ratio 6
"""
_METHOD = """\
Options of the method (`embcompress list` shows them) are given as --option NAME=VALUE or simply as --NAME VALUE.
"""
_OBW = """\
Compress the embedding and the softmax of the bigLSTM of the One Billion Word benchmark, one in memory at a time (about
5 GB at the full size), and count the bytes of the whole model: its recurrent weights and the bias of the softmax count
as float16. Seconds are also given in products W^T W of the table in float32, measured in the same run; logits of one
state, and the loss of the softmax with its gradients, with what the machine takes at least.

"""
_OBW_EXAMPLES = """\
Minutes at the full size, seconds at a smaller one; the second is the published setting:
  embcompress bench obw --report obw.json
  embcompress bench obw --method group_reduce --ratio 6.6 --groups 20 --variant loss
  embcompress bench obw --vocab_size 20000 --dim 128 --cells 512 --method group_reduce --ratio 6.6 --groups 20
"""
_SPEED = """\
Measure a table of your size: rows of ids, with and without gradients, logits, best tokens and samples of a state, and
the loss of many tokens with its gradients. Compressed, as the dense table it was, and with what other packages offer
that are installed: tensorly-torch, torchao and bitsandbytes.

All ways to compute the same run in turn; times are medians, and ratios medians of those of every round. Every row says
its memory beyond parameters and gradients, its bytes, its error, and what the machine takes at least: the operations of
its products and its exponentials at the rates that are measured beside it, or its bytes at the speed of the memory.

"""
_SPEED_EXAMPLES = """\
  embcompress bench speed --vocab_size 32000 --dim 512 --method group_reduce --ratio 6 --threads 1 2 --plot speed.png
  embcompress bench speed --vocab_size 50257 --dim 768 --what logits topk --method transform_coding --ratio 16
"""
_SCALING = """\
Measure the compressed table as the vocabulary grows, all sizes in turn: milliseconds against stored bytes, and the
exponent of the bytes, which is 1 where time grows in proportion to them.

"""
_SCALING_EXAMPLES = """\
  embcompress bench scaling --vocab_sizes 10000 100000 800000 --dim 1024 --ratio 6.6 --groups 20 --what logits loss
"""
_CORPUS = """\
Write shards and a vocabulary file in the layout of the One Billion Word benchmark, of words that are drawn by Zipf's
law: `lightning run lstm_obw` runs on them at its full size, and what it takes can be seen without the benchmark.
"""
_CORPUS_EXAMPLES = """\
  embcompress bench corpus made_obw
  lightning run lstm_obw --data.data_dir made_obw --data.vocabulary_file 1b_word_vocab.txt
"""
_PLOTS = (".png", ".pdf", ".svg")
_WHAT = ("lookup", "lookup_backward", "logits", "topk", "sample", "loss")


def run_bench(arguments: Sequence[str]) -> int:
    """Run a bench, print its table, and write its report where one is asked for.

    Raises:
        UsageError: If the command line is wrong, or the method cannot do what is asked for. Nothing has been made then.
        SystemExit: After `--help`.
    """
    if not arguments or arguments[0] not in _BENCHES:
        # Tells what is wrong, or prints the help of all.
        _names().parse_args(arguments)
    name = arguments[0]
    if name == "corpus":
        return _make_corpus(arguments[1:])
    parser = _PARSERS[name]()
    given, options = parse_with_options(parser, arguments[1:])
    if given.groups is not None:
        options["groups"] = given.groups
    report, plot = _target("--report", given.report, given), _target("--plot", getattr(given, "plot", None), given)
    if plot is not None and plot.suffix not in _PLOTS:
        raise UsageError(f"--plot {str(plot)!r} must end in {', '.join(_PLOTS)}")
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'lightning-embcompress[plot]'")
    bench, draw = _RUNS[name](given, options)
    # Only now: it imports torch, for which help and mistakes need not wait.
    from lightning_embcompress.compression.report import say
    from lightning_embcompress.utils.files import explaining_failure, replacing

    found = bench()
    if report is not None:
        with explaining_failure(report), replacing(report) as temporary:
            temporary.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        say(f"Written: {report}")
    if plot is not None:
        with explaining_failure(plot), replacing(plot) as temporary:
            draw(found).savefig(temporary, dpi=150, format=plot.suffix[1:])
        say(f"Written: {plot}")
    return 0


def _make_corpus(arguments: Sequence[str]) -> int:
    given = _corpus_parser().parse_args(arguments)
    from lightning_embcompress.bench.made_corpus import VOCABULARY_FILE, make_corpus
    from lightning_embcompress.compression.report import say
    from lightning_embcompress.utils.progress import progress_bar

    folder = Path(given.folder).expanduser()
    try:
        with progress_bar("Writing text", total=1) as advance:
            make_corpus(folder, given.vocab_size, given.tokens, given.seed, advance)
    except ValueError as error:
        raise UsageError(str(error)) from error
    say(f"Written: {folder}, with {given.vocab_size:,} words in {VOCABULARY_FILE}")
    return 0


def _obw(given: argparse.Namespace, options: dict[str, Any]) -> tuple[Callable[[], dict[str, Any]], Any]:
    from lightning_embcompress.bench.obw import ObwBench, run_obw_bench, show_obw_bench
    from lightning_embcompress.compression.report import say

    sizes = ("vocab_size", "dim", "cells", "layers", "method", "ratio", "rows", "tokens", "rounds", "seed")
    try:
        bench = ObwBench(**{name: getattr(given, name) for name in sizes}, options=options)
    except ValueError as error:
        raise UsageError(str(error)) from error

    def tell(entry: dict[str, Any]) -> None:
        say(f"{entry['name']}: {entry['stored_bytes']:,} bytes, {entry['ratio']:.2f}x, {entry['seconds']:.1f} seconds")

    def run() -> dict[str, Any]:
        found = run_obw_bench(bench, mapped_in=given.mapped_in, on_table=tell)
        show_obw_bench(found)
        return found

    return run, None


def _speed(given: argparse.Namespace, options: dict[str, Any]) -> tuple[Callable[[], dict[str, Any]], Any]:
    from lightning_embcompress.bench.report import draw_speed, show_speed
    from lightning_embcompress.bench.speed import run_speed_bench

    bench = _speed_bench(given, options, ("vocab_size", "draw", "peers"))

    def run() -> dict[str, Any]:
        found = run_speed_bench(bench)
        show_speed(found)
        return found

    return run, draw_speed


def _scaling(given: argparse.Namespace, options: dict[str, Any]) -> tuple[Callable[[], dict[str, Any]], Any]:
    from lightning_embcompress.bench.report import draw_scaling, show_scaling
    from lightning_embcompress.bench.speed import run_scaling_bench, scaling_benches

    bench = _speed_bench(given, options, (), vocab_size=max(given.vocab_sizes))
    try:
        scaling_benches(bench, given.vocab_sizes)
    except ValueError as error:
        raise UsageError(str(error)) from error

    def run() -> dict[str, Any]:
        found = run_scaling_bench(bench, given.vocab_sizes)
        show_scaling(found)
        return found

    return run, draw_scaling


_RUNS = {"obw": _obw, "speed": _speed, "scaling": _scaling}


def _speed_bench(
    given: argparse.Namespace, options: dict[str, Any], further: Sequence[str], **fixed: Any
) -> SpeedBench:
    from lightning_embcompress.bench.speed import SpeedBench
    from lightning_embcompress.compression.budget import parse_size

    names = ("dim", "method", "ratio", "what", "ids", "tokens", "states", "k", "threads", "rounds", "seed", *further)
    try:
        most = None if given.max_memory is None else parse_size(given.max_memory)
        values = {name: getattr(given, name) for name in names}
        return SpeedBench(**values, **fixed, options=options, max_memory=most)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _target(flag: str, text: str | None, given: argparse.Namespace) -> Path | None:
    """A file that is to be written, if it can be."""
    if text is None:
        return None
    file = Path(text).expanduser()
    if file.is_dir():
        raise UsageError(f"{flag} {str(file)!r} is a folder: name a file in it")
    if file.exists() and not given.overwrite:
        raise UsageError(f"{flag} {str(file)!r} exists: choose another, or replace it with --overwrite")
    if not file.absolute().parent.is_dir():
        raise UsageError(f"{flag} {str(file)!r}: there is no folder {str(file.parent)!r}")
    if not os.access(file.absolute().parent, os.W_OK):
        raise UsageError(f"{flag} {str(file)!r}: the folder {str(file.absolute().parent)!r} cannot be written")
    return file


def _folder(text: str) -> Path:
    folder = Path(text).expanduser()
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no folder")
    return folder


def _names() -> argparse.ArgumentParser:
    parser = new_parser("bench", _BENCH, _BENCH_EXAMPLES)
    parser.add_argument("name", metavar="NAME", choices=_BENCHES, help="which bench: " + ", ".join(_BENCHES))
    return parser


def _obw_parser() -> argparse.ArgumentParser:
    parser = new_parser("bench obw", _OBW + _METHOD, _OBW_EXAMPLES)
    add = parser.add_argument
    add("--vocab_size", type=int, default=793_471, help="words (default: %(default)s)")
    add("--dim", type=int, default=1024, help="width of the tables (default: %(default)s)")
    add("--cells", type=int, default=8192, help="cells of a recurrent layer (default: %(default)s)")
    add("--layers", type=int, default=2, help="recurrent layers (default: %(default)s)")
    _add_method(parser, "transform_coding", 26.0)
    add("--rows", type=int, default=20_000, help="rows of a table on which its loss is measured (default: %(default)s)")
    add("--tokens", type=int, default=1024, help="tokens of the loss whose time is measured (default: %(default)s)")
    add("--rounds", type=int, default=5, help="how often logits and that loss are timed (default: %(default)s)")
    add("--mapped_in", type=_folder, metavar="FOLDER", help="keep a table in a mapped file there instead of in memory")
    return _with_results(parser)


def _speed_parser() -> argparse.ArgumentParser:
    parser = new_parser("bench speed", _SPEED + _METHOD, _SPEED_EXAMPLES)
    add = parser.add_argument
    add("--vocab_size", type=int, default=50_257, help="words (default: %(default)s)")
    _add_speed(parser, _WHAT)
    add("--draw", choices=("zipf", "uniform"), default="zipf", help="how ids are drawn (default: %(default)s)")
    add(
        "--no_peers",
        dest="peers",
        action="store_false",
        help="leave out other packages and nn.AdaptiveLogSoftmaxWithLoss",
    )
    add("--plot", metavar="FILE", help="draw times against bytes, such as speed.png")
    return _with_results(parser)


def _scaling_parser() -> argparse.ArgumentParser:
    parser = new_parser("bench scaling", _SCALING + _METHOD, _SCALING_EXAMPLES)
    add = parser.add_argument
    sizes = [10_000, 30_000, 100_000]
    add("--vocab_sizes", type=int, nargs="+", default=sizes, metavar="N", help="words (default: 10000 30000 100000)")
    _add_speed(parser, ("lookup_backward", "logits", "topk", "loss"))
    add("--plot", metavar="FILE", help="draw times against bytes, such as scaling.png")
    return _with_results(parser)


def _corpus_parser() -> argparse.ArgumentParser:
    parser = new_parser("bench corpus", _CORPUS, _CORPUS_EXAMPLES)
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="where it is written; must not exist, or be empty")
    add("--vocab_size", type=int, default=793_471, help="words, <S> and <UNK> among them (default: %(default)s)")
    add("--tokens", type=int, default=2_000_000, help="of the training text (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the text (default: %(default)s)")
    return parser


_PARSERS = {"obw": _obw_parser, "speed": _speed_parser, "scaling": _scaling_parser}


def _add_method(parser: argparse.ArgumentParser, method: str, ratio: float) -> None:
    add = parser.add_argument
    add("--method", default=method, help="see `embcompress list` (default: %(default)s)")
    add("--ratio", type=float, default=ratio, help="dense bytes over stored bytes of each table (default: %(default)s)")
    add("--groups", type=int, help="groups of words, for methods with groups; by default what the method chooses")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="another option of the method")


def _add_speed(parser: argparse.ArgumentParser, what: Sequence[str]) -> None:
    """Add what `speed` and `scaling` have in common."""
    add = parser.add_argument
    add("--dim", type=int, default=768, help="width of the table (default: %(default)s)")
    _add_method(parser, "group_reduce", 4.0)
    add(
        "--what",
        nargs="+",
        default=list(what),
        choices=_WHAT,
        metavar="WHAT",
        help=f"what to measure, some of {' '.join(_WHAT)} (default: {' '.join(what)})",
    )
    add("--ids", type=int, default=2048, help="ids that are looked up (default: %(default)s)")
    add("--tokens", type=int, default=1024, help="tokens of the loss (default: %(default)s)")
    add("--states", type=int, default=1, help="states of logits, best tokens and samples (default: %(default)s)")
    add("--k", type=int, default=10, help="how many of the best tokens (default: %(default)s)")
    add("--threads", type=int, nargs="+", default=[1], metavar="N", help="each measured by itself (default: 1)")
    add("--rounds", type=int, default=7, help="how often everything runs in turn (default: %(default)s)")
    add("--max_memory", metavar="SIZE", help="leave out what takes more, such as 8GB; by default what is free")


def _with_results(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of the values (default: %(default)s)")
    add("--report", metavar="FILE", help="write everything as JSON")
    add("--overwrite", action="store_true", help="replace files that are there")
    return parser
