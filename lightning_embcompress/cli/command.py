"""The ``lightning`` command: ``lightning run RECIPE`` is ours, everything else is lightning-sdk's.

Lightning itself installs no ``lightning`` command since 2.5.1; the name is shared with lightning-sdk, whose command
must keep working where both are installed. Nothing heavy is imported before a command line is known to be ours.
"""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution

# `lightning run job` and `lightning run mmt` belong to lightning-sdk; `lightning run model` belonged to Fabric until
# Lightning 2.5.0 gave it up. A recipe of such a name is run by its path (`lightning run ./model.yaml`).
_RUN_OF_OTHERS = frozenset({"model", "job", "mmt"})

_HELP = """\
Usage: lightning run RECIPE.yaml|NAME [options]

Fit the model of a recipe, then test its final weights; the same as `embcompress run`.

  lightning run quickstart                              a shipped recipe (`embcompress list` names them)
  lightning run my_recipe.yaml --trainer.max_epochs 3   a file; the options of LightningCLI override it
  lightning run my_recipe.yaml --ckpt_path last.ckpt    resume from a checkpoint

`embcompress run --help` lists every option.
Every other `lightning` command, and `lightning run model|job|mmt`, is handed to lightning-sdk where it is installed.
"""


def main() -> int | str | None:
    """Run a recipe, or hand the unchanged command line to lightning-sdk's own command.

    Returns:
        What the script passes to ``sys.exit``; 2 where neither this package nor an installed lightning-sdk answers.
    """
    arguments = sys.argv[1:]
    if arguments[:1] != ["run"] or arguments[1:2] and arguments[1] in _RUN_OF_OTHERS:
        return _hand_over(arguments)
    if len(arguments) == 1:
        sys.stderr.write(_HELP)
        return 2
    if arguments[1] in ("-h", "--help"):
        sys.stdout.write(_HELP)
        return 0
    from lightning_embcompress.cli.main import main as embcompress

    return embcompress()


def _hand_over(arguments: list[str]) -> int | str | None:
    command = _sdk_command()
    if command is not None:
        # As its own script would: called without arguments, it reads sys.argv, and its result is the exit code.
        result: int | str | None = command.load()()
        return result
    wanted = " ".join(["lightning", *arguments[:2]])
    fabric = "; a Fabric script starts with `fabric run`" if arguments[:2] == ["run", "model"] else ""
    sys.stderr.write(
        "lightning: lightning-embcompress answers only `lightning run RECIPE.yaml|NAME`; "
        f"`{wanted}` is for lightning-sdk, which is not installed (pip install lightning-sdk){fabric}\n"
    )
    return 2


def _sdk_command() -> EntryPoint | None:
    try:
        entry_points = distribution("lightning-sdk").entry_points
    except PackageNotFoundError:
        return None
    scripts = {entry.name: entry for entry in entry_points if entry.group == "console_scripts"}
    # Every release so far has `lightning`; the newer ones install the same function as `lightning-sdk` too.
    return scripts.get("lightning") or scripts.get("lightning-sdk")
