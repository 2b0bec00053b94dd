"""The command lines of `compress`, `inspect`, `densify` and `sweep`. Imports nothing heavy."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from lightning_embcompress.cli.sweep_record import can_hold_sweep
from lightning_embcompress.cli.targets import check_target
from lightning_embcompress.integrations.sources import Source, find_source

_SOURCE_HELP = (
    "a directory that save_pretrained has written, or the name of a model on the Hugging Face hub; a checkpoint of "
    "Lightning's Trainer, of any LightningModule; or a directory that save_compressed has written"
)
_TARGET_HELP = "what is made: of the same kind as SOURCE, a directory or a file; must not exist, or be empty"
_OVERWRITE_HELP = "replace TARGET if it is a model already; it stays as it is until the new one is complete"
_TRUST_HELP = (
    "read a checkpoint that holds more than tensors and plain values; it can then run code: only for files that you "
    "trust"
)
_OPTION = re.compile(r"--([A-Za-z_]\w*)(?:=(.*))?", re.DOTALL)

_COMPRESS = """\
Compress the embedding and softmax tables of a model in files.

SOURCE decides what TARGET is: a Hugging Face directory, which AutoModelForCausalLM.from_pretrained loads after
`import lightning_embcompress`; a Lightning checkpoint, for `embcompress test --ckpt_path` and load_from_checkpoint; or
a directory for load_compressed. report.json is written into TARGET, or as NAME.report.json beside a checkpoint.
"""
_COMPRESS_EXAMPLES = """\
Options of the methods (`embcompress list` shows them) are given as --option NAME=VALUE or simply as --NAME VALUE:
  embcompress compress gpt2 gpt2-small --method tensor_train --max_rank 4 --text novels/*.txt
  embcompress compress last.ckpt small.ckpt --ratio 6.6 --groups 20 --tables encoder decoder
  embcompress compress my_model my_model-4x --method low_rank --size 80MB --tie untie
  embcompress compress my_model my_model-1% --method auto --max_perplexity_increase 1% --text novels/*.txt
"""
_INSPECT = """\
Show the tables of a model in files: how they are stored, their bytes, and their share of the model's bytes. For a model
that is not compressed: the tables that `embcompress compress` would take.
"""
_DENSIFY = """\
Make a compressed model in files an ordinary one again, of the same kind: a Hugging Face directory or a Lightning
checkpoint that need this package no longer, or, of what save_compressed has written, the same with ordinary tables:
model.safetensors with the state dict, and config.json with the second names of tensors that have several ("aliases").
"""
_SWEEP = """\
Compress copies of a trained model by many methods to many sizes, and measure each, without training: perplexity against
stored bytes, also by how frequent the tokens are, so that one sees who pays.

SOURCE is a causal language model of transformers. FOLDER gets sweep.json with every point as soon as it is known, and
at the end sweep.csv and, where matplotlib is installed, sweep.png, which marks the points that nothing smaller beats.
Started again with the same model and text, it goes on where it was interrupted, or adds what is newly asked for.
"""
_SWEEP_EXAMPLES = """\
A method may be given with options, and several times with others:
  embcompress sweep my_model points --text valid.txt --counts_text train.txt --ratios 4 8 16 32 --bits 8 4 3 2
  embcompress sweep my_model points --text all.txt --methods group_reduce:groups=20 product_quantization
"""


class UsageError(ValueError):
    """A command line that is wrong; the message is one line, written for the person who typed it."""


@dataclass(frozen=True)
class Arguments:
    """A command line that was read.

    Attributes:
        source: The model to start from.
        target: What is to be made; the current folder for `inspect`, which makes nothing.
        options: Options of the method by their names.
        given: Everything else, by the names of the options.
    """

    source: Source
    target: Path
    options: dict[str, Any] = field(default_factory=dict)
    given: argparse.Namespace = field(default_factory=argparse.Namespace)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as all mistakes, in place of the whole usage."""
        raise UsageError(f"{message} ({self.prog} --help)")


def parse(command: str, arguments: Sequence[str]) -> Arguments:
    """Read a command line, and look whether there is what it starts from and room for what it makes.

    Raises:
        UsageError: If the command line is wrong, or TARGET is taken.
        FileNotFoundError: If there is no such SOURCE.
        ValueError: If SOURCE is no model.
        SystemExit: After `--help`.
    """
    parser = _PARSERS[command]()
    given, options = parse_with_options(parser, arguments, has_method=command == "compress")
    max_tokens = getattr(given, "max_tokens", None)
    if max_tokens is not None and max_tokens < 1:
        parser.error(f"--max_tokens {max_tokens}: must be 1 or more")
    source = find_source(given.source)
    target = Path()
    if command != "inspect":
        target = Path(os.path.expanduser(given.target))
        # The only command that writes into a folder instead of replacing it.
        goes_on = command == "sweep" and target.is_dir() and can_hold_sweep(target)
        problem = "" if goes_on else check_target(target, source, getattr(given, "overwrite", None))
        if problem:
            raise UsageError(problem)
    return Arguments(source, target, options, given)


def parse_with_options(
    parser: argparse.ArgumentParser, arguments: Sequence[str], has_method: bool = True
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Read a command line that may have options of a method.

    Args:
        parser: Of all other options; with a method it has `--option`, a list.
        arguments: The command line.
        has_method: Whether what the parser does not know is an option of a method.

    Returns:
        Everything, by the names of the options, and the options of the method.

    Raises:
        UsageError: If the command line is wrong.
        SystemExit: After `--help`.
    """
    # As in the names of methods' options, and of those of Lightning: both spellings are understood.
    words = [re.sub(r"^--[^=]*", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in arguments]
    options: dict[str, Any] = {}
    if has_method:
        words, options = _method_options(parser, words)
    given = parser.parse_args(words)
    for text in getattr(given, "option", []):
        name, separator, value = text.partition("=")
        if not separator or not name.isidentifier():
            parser.error(f"--option {text!r}: must be NAME=VALUE, such as --option groups=20")
        options[name] = _value(parser, name, value)
    return given, options


def _method_options(parser: argparse.ArgumentParser, words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Take out what the parser does not know: options of the method, which are looked up when it is known."""
    rest: list[str] = []
    options: dict[str, Any] = {}
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        match = _OPTION.fullmatch(word)
        if match is None or f"--{match[1]}" in parser._option_string_actions:
            rest.append(word)
            continue
        name, value = match[1], match[2]
        if value is None:
            if not waiting or waiting[0].startswith("--"):
                parser.error(f"--{name} needs a value")
            value = waiting.pop(0)
        options[name] = _value(parser, name, value)
    return rest, options


def _value(parser: argparse.ArgumentParser, name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        parser.error(f"{name}={text!r}: must be a value in YAML or JSON, such as 20, 0.1, true or [2, 3]")


def new_parser(command: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """A parser of a command's options, which tells mistakes in one line."""
    return _Parser(
        prog=f"embcompress {command}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # A shortened name would hide an option of a method.
        allow_abbrev=False,
    )


def _compress_parser() -> argparse.ArgumentParser:
    parser = new_parser("compress", _COMPRESS, _COMPRESS_EXAMPLES)
    add = parser.add_argument
    add("source", metavar="SOURCE", help=_SOURCE_HELP)
    add("target", metavar="TARGET", help=_TARGET_HELP)
    add("--method", default="group_reduce", help="a method that `embcompress list` shows (default: %(default)s)")
    add(
        "--ratio",
        type=float,
        help="dense bytes over stored bytes: of all tables together where --text or "
        "--statistics say what errors cost, else of every table",
    )
    add("--size", help="in place of a ratio, bytes of all tables together, such as 80MB (MB = 1,000,000)")
    add(
        "--max_perplexity_increase",
        metavar="INCREASE",
        help="in place of a size, the most that the perplexity on --text may grow by, such as 1%%: the smallest tables "
        "within it are searched for",
    )
    add("--tables", nargs="+", metavar="PATH", help="modules to compress; by default the embedding and the softmax")
    add(
        "--tie",
        choices=("keep", "untie", "auto"),
        default="keep",
        help="whether a table that embedding and softmax share stays one (default: %(default)s)",
    )
    add(
        "--text",
        nargs="+",
        metavar="FILE",
        help="plain text in UTF-8, files or glob patterns: its first nine tenths are counted for methods that weight "
        "by frequency, its last tenth is for the perplexity before and after. Tokenized once, into a cache",
    )
    add(
        "--statistics",
        metavar="FILE",
        help="what errors in the tables cost, as Statistics.save has written it; if there is no such file, it is "
        "written from --text. By default it follows from --text for methods that use it, and is not kept",
    )
    add("--tokenizer", metavar="DIR", help="directory or hub name; by default the files in SOURCE")
    add(
        "--counts_only",
        action="store_true",
        help="count tokens in --text, but measure no perplexity, which is only possible for causal language models "
        "of transformers",
    )
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the whole result; by default that of SOURCE")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the method")
    add("--overwrite", action="store_true", help=_OVERWRITE_HELP)
    add("--trust_source", action="store_true", help=_TRUST_HELP)
    return parser


def _inspect_parser() -> argparse.ArgumentParser:
    parser = new_parser("inspect", _INSPECT)
    parser.add_argument("source", metavar="PATH", help=_SOURCE_HELP)
    parser.add_argument("--json", action="store_true", help="print JSON: what report.json has, and every table's share")
    parser.add_argument("--trust_source", action="store_true", help=_TRUST_HELP)
    return parser


def _densify_parser() -> argparse.ArgumentParser:
    parser = new_parser("densify", _DENSIFY)
    parser.add_argument("source", metavar="PATH", help=_SOURCE_HELP)
    parser.add_argument("target", metavar="TARGET", help=_TARGET_HELP)
    parser.add_argument("--overwrite", action="store_true", help=_OVERWRITE_HELP)
    parser.add_argument("--trust_source", action="store_true", help=_TRUST_HELP)
    return parser


def _sweep_parser() -> argparse.ArgumentParser:
    parser = new_parser("sweep", _SWEEP, _SWEEP_EXAMPLES)
    _add_measuring(parser)
    parser.add_argument(
        "--bands",
        nargs="+",
        type=int,
        default=[100, 1_000, 10_000],
        metavar="RANK",
        help="last frequency rank of each band of tokens but the last one (default: 100 1000 10000)",
    )
    return parser


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a directory that save_pretrained has written, or a name on the hub")
    add(
        "target",
        metavar="FOLDER",
        help="where the points are written; must not exist, be empty, or have a sweep of the same model and text",
    )
    add(
        "--text",
        nargs="+",
        metavar="FILE",
        required=True,
        help="plain text in UTF-8, files or glob patterns, for the perplexity: all of it with --counts_text, else the "
        "last tenth, and the rest is counted",
    )
    add("--counts_text", nargs="+", metavar="FILE", help="text that the model was trained on, for the token counts")
    add("--methods", nargs="+", metavar="METHOD[:NAME=VALUE,...]", help="what to try; by default every method")
    add(
        "--ratios",
        nargs="+",
        type=float,
        default=[4.0, 8.0, 16.0, 32.0],
        metavar="RATIO",
        help="dense bytes over stored bytes of the tables (default: 4 8 16 32)",
    )
    add(
        "--bits",
        nargs="*",
        type=int,
        default=[8, 4, 3, 2],
        metavar="BITS",
        help="widths of plain quantization, 2 to 8 (default: 8 4 3 2)",
    )
    add("--match_bits", action="store_true", help="also try every method at the very bytes of plain quantization")
    add("--max_tokens", type=int, metavar="N", help="measure no more than so many tokens")
    add("--tables", nargs="+", metavar="PATH", help="modules to compress; by default the embedding and the softmax")
    add("--tokenizer", metavar="DIR", help="directory or hub name; by default the files in SOURCE")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the model; by default that of SOURCE")


_PARSERS = {
    "compress": _compress_parser,
    "inspect": _inspect_parser,
    "densify": _densify_parser,
    "sweep": _sweep_parser,
}


def in_shell_terms(message: str) -> str:
    """A message about arguments of `compress` as one about options of the command."""
    return message.replace("as in tables=['encoder']", "as in --tables encoder").replace(
        "in tables=[...]", "with --tables"
    )
