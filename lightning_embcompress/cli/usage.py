"""What is wrong with a command line or a recipe."""

from __future__ import annotations


class UsageError(ValueError):
    """A wrong command line or recipe; the message is one line, written for the person who typed it."""


def in_shell_terms(message: str) -> str:
    """A message about arguments of `compress` as one about options of the command."""
    return message.replace("as in tables=['encoder']", "as in --tables encoder").replace(
        "in tables=[...]", "with --tables"
    )
