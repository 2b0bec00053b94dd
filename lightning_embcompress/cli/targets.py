"""Where the shell's commands write: checked before any work."""

from __future__ import annotations

import os
from pathlib import Path

from lightning_embcompress.integrations.sources import CONFIG_FILE, REPORT_FILE, Source, module_folders


def report_path(target: Path, source: Source) -> Path:
    """Where the report is: in a directory, or beside a checkpoint under its name."""
    # Not `report.json`: several checkpoints may lie in one folder, and the callback's report beside them.
    return target / REPORT_FILE if source.is_directory else target.with_suffix(".report.json")


def check_target(target: Path, source: Source, overwrite: bool | None) -> str:
    """Look whether there is room for what is to be made.

    Args:
        target: The directory or file to make.
        source: What it is made of.
        overwrite: Whether a model may be replaced; None for commands that have no such option.

    Returns:
        What is wrong, with the remedy; nothing if it can be written.
    """
    problem = _wrong_kind(target, source) or _unwritable(target)
    if problem:
        return problem
    if source.is_directory:
        if not target.is_dir() or not any(target.iterdir()):
            return ""
        if overwrite is None:
            return f"FOLDER {str(target)!r} is not empty: choose another"
        if not overwrite:
            return f"TARGET {str(target)!r} is not empty: choose another, or replace it with --overwrite"
        return _irreplaceable(target, source)
    taken = [path for path in (target, report_path(target, source)) if path.exists() and path.stat().st_size]
    if taken and not overwrite:
        return f"{str(taken[0])!r} exists: choose another TARGET, or replace it with --overwrite"
    return ""


def _wrong_kind(target: Path, source: Source) -> str:
    if source.is_directory and target.is_file():
        return f"TARGET {str(target)!r} is a file, but a directory is made of {source.name!r}: choose another"
    if source.is_directory and target.suffix in (".ckpt", ".pt", ".safetensors") and not target.is_dir():
        return f"TARGET {str(target)!r} is called like a file, but a directory is made of {source.name!r}"
    if not source.is_directory and target.is_dir():
        example = target / f"compressed{source.path.suffix or '.ckpt'}"
        return f"TARGET {str(target)!r} is a directory: name the checkpoint to write, for example {str(example)!r}"
    return ""


def _unwritable(target: Path) -> str:
    if target.resolve() == Path.cwd():
        return f"TARGET {str(target)!r} is the current folder, which would be replaced: name a folder in it"
    existing = target.absolute().parent
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        return f"TARGET {str(target)!r} cannot be written: {str(existing)!r} is a file"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"TARGET {str(target)!r} cannot be written: no permission to write in {str(existing)!r}"
    return ""


def _irreplaceable(target: Path, source: Source) -> str:
    """Why a directory is not replaced, which removes all there is in it."""
    here = target.resolve()
    if here in source.path.resolve().parents or here in Path.cwd().parents:
        return f"TARGET {str(target)!r} holds SOURCE or the current folder: choose another"
    modules = module_folders(target)
    other = next((path for path in target.iterdir() if path.is_dir() and path.name not in modules), None)
    if other is not None or not (target / CONFIG_FILE).is_file():
        found = f"it has no {CONFIG_FILE}" if other is None else f"it has the folder {other.name!r}"
        return f"TARGET {str(target)!r} is not only a model ({found}): remove it yourself, or choose another"
    return ""
