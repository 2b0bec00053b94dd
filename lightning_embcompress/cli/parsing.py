"""Command lines read by jsonargparse into typed, documented dataclasses. Imports nothing heavy."""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter

from lightning_embcompress.cli.usage import UsageError

_KEY = re.compile(r'Parser key "(\w+)":')
_VALUE = re.compile(r"(?:Given|Got) value: (.*)", re.DOTALL)
# Of argparse and jsonargparse, where shtab is installed for completion too.
_OTHERS = ("help", "config", "print_config", "print_shtab")


@dataclass(frozen=True)
class Command:
    """A command of the shell: fields are arguments, positional without a default, and the docstring is the help.

    With a field `method`, the fields of the method's config are arguments too, kept in the field `options`.
    """

    examples: ClassVar[str] = ""
    """Shown below the options."""

    def run(self) -> None:
        """Do it.

        Raises:
            ValueError: If a file, a model or a request cannot be used. Nothing has been written then.
        """
        raise NotImplementedError


CommandT = TypeVar("CommandT", bound=Command)


class _Formatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of descriptions and examples."""


class _Parser(ArgumentParser):
    known: dict[str, str]
    """Types of the arguments by their names."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """One line, as all mistakes, in place of the whole usage."""
        key, value = _KEY.search(message), _VALUE.search(message)
        if key and value and key[1] in self.known:
            message = f"--{key[1]} {value[1]!r} must be {self.known[key[1]]}"
        raise UsageError(f"{' '.join(message.split())} ({self.prog} --help)")


def parse(command: type[CommandT], words: Sequence[str], name: str = "") -> CommandT:
    """Read a command line.

    Args:
        command: What to read.
        words: What follows the command's name. Names may be written with dashes, lists as several words, and a bare
            name says yes.
        name: What messages call the command; by default by its class.

    Raises:
        UsageError: If the command line is wrong.
        SystemExit: After `--help`.

    Example:
        >>> @dataclass(frozen=True)
        ... class Count(Command):
        ...     '''Count words.
        ...
        ...     Attributes:
        ...         file: Text.
        ...         words: Which are counted; by default all.
        ...         quiet: Whether nothing is printed.
        ...     '''
        ...     file: str
        ...     words: list[str] | None = None
        ...     quiet: bool = False
        >>> parse(Count, ["a.txt", "--words", "sea", "sun", "--quiet"])
        Count(file='a.txt', words=['sea', 'sun'], quiet=True)
    """
    words = [re.sub(r"^--[^=]*", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in words]
    own = {one.name: str(one.type) for one in fields(command) if one.name != "options"}
    parser = _Parser(
        prog=f"embcompress {name or command.__name__.lower()}",
        # The docstring up to its attributes.
        description=(inspect.getdoc(command) or "").partition("\n\nAttributes:")[0],
        epilog=command.examples,
        formatter_class=_Formatter,
    )
    parser.known = dict(own)
    parser.add_argument("--config", action="config", help="YAML file with arguments by their names")
    parser.add_class_arguments(command, as_group=False, as_positional=True, skip={"options"})
    flags = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
    options: list[str] = []
    # The configs of methods import torch, for which help and mistakes need not wait.
    if "method" in own and not {"method", "config"}.isdisjoint(flags) or not {*own, *_OTHERS}.issuperset(flags):
        options = _add_method(parser, command, words)
    for flag in flags:
        if flag not in _OTHERS and flag not in parser.known:
            raise UsageError(_unknown(flag, parser, options))
    parsed = parser.parse_args(_plain(words, parser.known)).as_dict()
    given = {name: parsed[name] for name in own}
    if "method" in own:
        given["options"] = {name: parsed[name] for name in options if parsed[name] != parser.get_default(name)}
    return command(**given)


def _add_method(parser: _Parser, command: type[Command], words: Sequence[str]) -> list[str]:
    """Add the options of the method that a command line names, and give their names.

    Raises:
        UsageError: If there is no such method.
    """
    if "method" not in parser.known:
        return []
    from lightning_embcompress.methods.registry import get_method

    default = next(str(one.default) for one in fields(command) if one.name == "method")
    try:
        method = get_method(_value(words, "method") or default)
    except ValueError as error:
        raise UsageError(str(error)) from error
    options = {one.name: str(one.type) for one in fields(method.config)}
    parser.known |= options
    parser.add_class_arguments(method.config)
    return list(options)


def _value(words: Sequence[str], name: str) -> str:
    """The last value of an argument, on a command line or in a file that it names."""
    found = ""
    for word, after in zip(words, [*words[1:], ""], strict=True):
        flag, _, value = word.partition("=")
        value = value or after
        if flag == f"--{name}":
            found = value
        elif flag == "--config" and Path(value).is_file():
            content = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
            found = str(content.get(name, found)) if isinstance(content, Mapping) else found
    return found


def _unknown(flag: str, parser: _Parser, options: Sequence[str]) -> str:
    close = difflib.get_close_matches(flag, parser.known, n=1)
    meant = f"; did you mean --{close[0]}?" if close else ""
    of_method = f", of which the method's are {', '.join(f'--{name}' for name in options)}" if options else ""
    return f"there is no option --{flag}{meant} ({parser.prog} --help lists them{of_method})"


def _plain(words: Sequence[str], known: Mapping[str, str]) -> list[str]:
    """A command line in which every list is one word, and every yes or no is said."""
    plain: list[str] = []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        kind = known.get(word[2:], "") if word.startswith("--") else ""
        if kind == "bool":
            said = waiting.pop(0) if waiting[:1] in (["true"], ["false"]) else "true"
            plain.append(f"{word}={said}")
        elif kind.startswith(("list[", "Sequence[", "tuple[")):
            values: list[str] = []
            while waiting and not waiting[0].startswith("--"):
                values.append(waiting.pop(0))
            if len(values) != 1 or not values[0].startswith("["):
                values = [f"[{', '.join(map(json.dumps, values) if 'str' in kind else values)}]"]
            plain.append(f"{word}={values[0]}")
        else:
            plain.append(word)
    return plain
