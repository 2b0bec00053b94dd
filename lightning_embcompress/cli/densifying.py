"""`embcompress densify`: a compressed model in files as an ordinary one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_embcompress.compression.plan import densify, plan_of
from lightning_embcompress.compression.report import say
from lightning_embcompress.integrations.opening import open_model
from lightning_embcompress.integrations.sources import Source
from lightning_embcompress.layers.sizes import model_bytes
from lightning_embcompress.utils.files import explaining_failure, replacing

if TYPE_CHECKING:
    from lightning_embcompress.cli.commands import Densify


def run_densify(given: Densify, source: Source, target: Path) -> None:
    """Make a model dense.

    Args:
        given: The command line.
        source: The model.
        target: What is made, which can be written.

    Raises:
        ValueError: If it is not compressed, or cannot be read. Nothing has been written then.
    """
    opened = open_model(source, trust=given.trust_source)
    plan = plan_of(opened.model)
    if not plan.tables:
        raise ValueError(f"{source.name!r} has no compressed tables: it is an ordinary model already")
    before = model_bytes(opened.model)["stored_bytes"]
    densify(opened.model)
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with explaining_failure(target), replacing(target, directory=source.is_directory) as path:
        opened.write(path)
    after = model_bytes(opened.model)["stored_bytes"]
    names = ", ".join(" = ".join(table.modules) for table in plan.tables)
    say(f"Made dense: {names}; {before / 1e6:,.3f} MB became {after / 1e6:,.3f} MB")
    say(f"Written: {target}")
