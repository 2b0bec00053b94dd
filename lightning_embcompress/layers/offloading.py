"""Factors that accelerate has offloaded, brought back for a call of their layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor


def with_offloaded_factors(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make a layer's forward run the hooks of accelerate that its factors have.

    `accelerate.cpu_offload` and `disk_offload` hang a hook on every module with tensors of its own, which brings them
    back when that module is called. Factors are in modules that are read, not called: their layer is.

    Args:
        forward: Of a layer that has a `factorization`.
    """

    @functools.wraps(forward)
    def on_real_device(self: Any, *arguments: Any, **keywords: Any) -> Tensor:
        factorization = self.factorization
        if factorization.device.type != "meta":
            return forward(self, *arguments, **keywords)
        hooks = [(hook, part) for part in factorization.modules() if (hook := getattr(part, "_hf_hook", None))]
        for hook, part in hooks:
            # It also moves the arguments to where the factors are brought.
            arguments, keywords = hook.pre_forward(part, *arguments, **keywords)
        try:
            return forward(self, *arguments, **keywords)
        finally:
            for hook, part in hooks:
                hook.post_forward(part, None)

    return on_real_device
