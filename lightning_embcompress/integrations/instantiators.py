"""What `Class.load_from_checkpoint` of Lightning builds a module with when it reads a compressed checkpoint.

Lightning lets a checkpoint name a function that builds the module, from a list of those it trusts. Ours are entered
there by `registration`, in the middle of Lightning's own imports: whatever they need is imported when they are called.
In a process that has not imported this package Lightning refuses the checkpoint, and names it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from lightning_embcompress.integrations.sources import INSTANTIATORS

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


def instantiate(cls: type[LightningModule], arguments: dict[str, Any]) -> LightningModule:
    """Build a module that takes the structure of the checkpoint before its weights are loaded."""
    from lightning_embcompress.integrations.checkpoint import keep_structure

    module = cls(**arguments)
    keep_structure(module)
    return module


def instantiate_by_cli(cls: type[LightningModule], arguments: dict[str, Any]) -> LightningModule:
    """The same for a module that LightningCLI has built."""
    from lightning.pytorch.cli import instantiate_module

    from lightning_embcompress.integrations.checkpoint import keep_structure

    module = instantiate_module(cls, arguments)
    keep_structure(module)
    return module


_LIGHTNING: Any = sys.modules.get("lightning.pytorch.core.saving")
# Older versions of Lightning trust all.
getattr(_LIGHTNING, "_ALLOWED_INSTANTIATORS", set[str]()).update(INSTANTIATORS.values())
