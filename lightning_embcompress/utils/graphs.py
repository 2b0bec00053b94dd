"""Whether operations run, or a graph is being made of them."""

from __future__ import annotations

import torch


def is_exporting() -> bool:
    """Whether a graph is being made that must not depend on values: distinct ids cannot be told from others there."""
    # Older versions of torch tell no difference between exporting and compiling.
    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
    return bool(exporting())
