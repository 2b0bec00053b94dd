"""The ``embcompress`` command.

This file imports nothing heavy: help, ``list`` and most mistakes are answered before torch and Lightning are loaded.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from traceback import walk_tb

from lightning_embcompress import __version__
from lightning_embcompress.cli.recipes_index import available_recipes, find_recipe, recipe_description
from lightning_embcompress.cli.usage import UsageError

HELP = """\
Usage: embcompress COMMAND [options]

Train, compress, fine-tune and test models from recipes, which are plain LightningCLI configurations in YAML, and
compress models that are in files already.

Commands:
  run RECIPE.yaml|NAME   fit, then test the final weights
  fit                    fit only                          (--config RECIPE.yaml|NAME)
  validate               one pass over the validation set  (--config RECIPE.yaml|NAME --ckpt_path FILE)
  test                   one pass over the test set        (--config RECIPE.yaml|NAME --ckpt_path FILE)
  predict                one pass of prediction            (--config RECIPE.yaml|NAME --ckpt_path FILE)
  compress SOURCE TARGET compress the tables of a Hugging Face directory, Lightning checkpoint or saved model
  compress-table FILE OUT
                         compress one table of any size from file to file, without its model
  inspect PATH           show tables, methods, ranks, bytes and ratios of a model in files
  densify PATH TARGET    make a compressed model in files an ordinary one again
  export FORMAT IN OUT   write a model for llama.cpp (gguf), ONNX Runtime (onnx) or vLLM (compressed-tensors)
  sweep SOURCE FOLDER    measure perplexity against stored bytes over many ratios and bit widths; resumable
  list                   show the shipped recipes and the compression methods

`embcompress COMMAND --help` lists the options. From run to predict they are those of LightningCLI and override the
recipe, later ones win:
  embcompress run quickstart --trainer.max_epochs 3
  embcompress run my_recipe.yaml --config on_top.yaml --ckpt_path last.ckpt   (resume)
  embcompress run quickstart --print_config                                   (show, do not run)

Models in files need no recipe:
  embcompress compress gpt2 gpt2-small --method group_reduce --ratio 4 --text novels/*.txt
  embcompress inspect gpt2-small

Also as `lightning run RECIPE.yaml|NAME` and, for torchrun -m, as `python -m lightning_embcompress`.
A class_path may name a class of this package (LSTMLanguageModel) or any module importable from the current folder.

Exit code: 0 done, 1 the run failed, 2 the command line or the recipe is wrong. A mistake that is recognised is told in
one line; EMBCOMPRESS_TRACEBACK=1 shows where it was found.
"""

_TRAINER_COMMANDS = ("fit", "validate", "test", "predict", "run")
_FILE_COMMANDS = ("compress", "compress-table", "inspect", "densify", "sweep")


def main(args: Sequence[str] | None = None) -> int:
    """Run the ``embcompress`` command.

    Args:
        args: The command line after the program's name; None for that of this process.

    Returns:
        The exit code: 0 done, 1 the run failed, 2 the command line or the recipe is wrong.

    Raises:
        Exception: Any error of a run that is not a message for the user but a defect, or one in the user's own code.
        SystemExit: Where the option parser ends the process (``--help``, a wrong option).
    """
    try:
        return _dispatch(list(sys.argv[1:] if args is None else args))
    except KeyboardInterrupt:
        return 130  # as shells count an interrupt
    except Exception as error:
        if os.environ.get("EMBCOMPRESS_TRACEBACK") == "1" or not _is_message(error):
            raise
        sys.stderr.write(f"embcompress: error: {error}\n")
        return 2 if isinstance(error, UsageError) else 1


def _dispatch(arguments: list[str]) -> int:
    command = arguments[0] if arguments else ""
    if command in ("-h", "--help"):
        sys.stdout.write(HELP)
        return 0
    if command == "--version":
        sys.stdout.write(f"embcompress {__version__}\n")
        return 0
    if not command:
        sys.stderr.write(HELP)
        return 2
    if command == "list":
        return _list(arguments[1:])
    if command in _FILE_COMMANDS:
        from lightning_embcompress.cli.commands import COMMANDS
        from lightning_embcompress.cli.parsing import parse

        parse(COMMANDS[command], arguments[1:], command).run()
        return 0
    if command == "export":
        from lightning_embcompress.cli.export_commands import EXPORTS
        from lightning_embcompress.cli.parsing import parse

        name = arguments[1] if len(arguments) > 1 else ""
        if name in ("-h", "--help"):
            sys.stdout.write(
                f"Usage: embcompress export FORMAT ...\n\nFormats, each with --help: {', '.join(EXPORTS)}\n"
            )
            return 0
        if name not in EXPORTS:
            raise UsageError(f"`export` needs a format, one of {', '.join(EXPORTS)}: embcompress export gguf --help")
        parse(EXPORTS[name], arguments[2:], f"export {name}").run()
        return 0
    if command not in _TRAINER_COMMANDS:
        raise UsageError(_unknown_command(command))

    arguments = [command, *_resolve_configs(_recipe_first(arguments[1:]) if command == "run" else arguments[1:])]
    # The current folder, as for a script of one's own: `class_path: my_module.MyModel` is found beside the recipe.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    from lightning_embcompress.cli.lightning_cli import EmbcompressCLI, leave_process_group

    EmbcompressCLI(arguments)
    leave_process_group()
    return 0


def _recipe_first(options: list[str]) -> list[str]:
    """Turn the recipe of ``run RECIPE [options]`` into the ``--config`` that LightningCLI knows."""
    if options and not options[0].startswith("-"):
        return ["--config", str(find_recipe(options[0])), *options[1:]]
    has_config = any(option in ("-c", "--config") or option.startswith("--config=") for option in options)
    if has_config or any(option in ("-h", "--help") or option.startswith("--model") for option in options):
        return options
    raise UsageError("`run` needs a recipe: embcompress run RECIPE.yaml|NAME [options]; `embcompress list` names some")


def _resolve_configs(options: list[str]) -> list[str]:
    """Let ``--config`` take the name of a shipped recipe too, where there is no file of that name."""
    recipes = available_recipes()
    resolved: list[str] = []
    for option in options:
        name = option.removeprefix("--config=")
        is_config = name != option or (resolved and resolved[-1] in ("-c", "--config"))
        if is_config and name in recipes and not Path(name).is_file():
            option = option[: len(option) - len(name)] + str(recipes[name])
        resolved.append(option)
    return resolved


def _unknown_command(command: str) -> str:
    commands = (*_TRAINER_COMMANDS, *_FILE_COMMANDS, "export", "list")
    if Path(command).suffix in (".yaml", ".yml") or command in available_recipes():
        return f"{command} is a recipe: embcompress run {command}"
    if Path(command).suffix == ".ckpt" or (Path(command) / "config.json").is_file():
        return f"{command} is a model: embcompress inspect {command}, or compress or densify"
    close = difflib.get_close_matches(command, commands, n=1)
    meant = f"did you mean {close[0]}? " if close else ""
    return f"no command {command!r}; {meant}Commands: {', '.join(commands)}"


def _list(options: list[str]) -> int:
    if options:
        wants_help = options[0] in ("-h", "--help")
        stream = sys.stdout if wants_help else sys.stderr
        stream.write("Usage: embcompress list\n\nShow the shipped recipes and the compression methods.\n")
        return 0 if wants_help else 2
    from dataclasses import fields

    from rich.console import Console
    from rich.table import Table

    from lightning_embcompress.methods.registry import METHODS

    recipes = {name: recipe_description(path) for name, path in available_recipes().items()}
    methods = {
        name: "\n".join([method.config.description, " ".join(f"--{one.name}" for one in fields(method.config))]).strip()
        for name, method in METHODS.items()
    }
    console = Console()
    for title, rows in (("Recipes", recipes), ("Methods, with their options", methods)):
        table = Table(title, "", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name, description in rows.items():
            table.add_row(f"  {name}", description)
        console.print(table, "")
    return 0


def _is_message(error: Exception) -> bool:
    """Tell whether an error is a message to the person at the keyboard, rather than a defect or their own code's.

    It is one where this package or Lightning raised it for a wrong value or file, and it passed through nobody
    else's code on its way: a traceback would then show nothing that the message does not say.
    """
    if isinstance(error, UsageError):
        return True
    kinds: tuple[type[Exception], ...] = (ValueError, OSError, ImportError)
    if "lightning" in sys.modules:
        from lightning.fabric.utilities.exceptions import MisconfigurationException

        kinds = (*kinds, MisconfigurationException)
    frames = [str(frame.f_globals.get("__name__", "")).partition(".")[0] for frame, _ in walk_tb(error.__traceback__)]
    ours = {"lightning_embcompress", "lightning"}
    between = ours | {"__main__", "jsonargparse", "torch"} | sys.stdlib_module_names
    return isinstance(error, kinds) and frames[-1] in ours and between.issuperset(frames)
