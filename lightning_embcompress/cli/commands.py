"""The commands `compress`, `inspect`, `densify` and `sweep`: without writing Python."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_embcompress.cli.arguments import parse

__all__ = ["run"]


def run(command: str, arguments: Sequence[str]) -> int:
    """Run one of the commands.

    Args:
        command: `"compress"`, `"inspect"`, `"densify"` or `"sweep"`.
        arguments: What follows it on the command line.

    Returns:
        The exit code.

    Raises:
        UsageError: If the command line is wrong.
        ValueError: If a file, a model or a request cannot be used. Nothing has been written then.
        SystemExit: After `--help`.
    """
    parsed = parse(command, arguments)
    # Only now: they import torch, for which help and mistakes need not wait.
    if command == "compress":
        from lightning_embcompress.cli.compressing import run_compress

        return run_compress(parsed)
    if command == "inspect":
        from lightning_embcompress.cli.inspecting import run_inspect

        return run_inspect(parsed)
    if command == "sweep":
        from lightning_embcompress.cli.sweeping import run_sweep

        return run_sweep(parsed)
    from lightning_embcompress.cli.densifying import run_densify

    return run_densify(parsed)
