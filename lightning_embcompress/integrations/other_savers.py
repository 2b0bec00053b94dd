"""Models that another library saves by itself: a state dict and the arguments of a class, without a plan.

What it writes of a compressed table no class of it can load. So its saving is refused, from the first table that is
compressed in a module to the last that is made dense again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from lightning_embcompress.integrations.huggingface import Hook
from lightning_embcompress.layers.compressed import CompressedLayer
from lightning_embcompress.tables.finding import all_modules
from lightning_embcompress.tables.transformers_models import pretrained_models

LIBRARIES = {"sentence_transformers": ("save", "save_torch_weights"), "huggingface_hub": ("_save_pretrained",)}
"""Methods that save a module with its tables, by the packages that define them."""
_SAVES_MODELS_BY_THEMSELVES = ("sentence_transformers",)
"""Packages that leave models of transformers to their own `save_pretrained`, see `huggingface`."""


class _RefusalHook(Hook):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if path := next(_lost(self.model, self.name), None):
            raise ValueError(
                f"{type(self.model).__name__} cannot be saved by {_library(self.model, self.name)}, which does not "
                f"keep how its table {path!r} is compressed and could not load it: use "
                "lightning_embcompress.save_compressed(model, path) and load_compressed(path, model), or make it dense "
                "with densify(model) before"
            )
        return self.original(*args, **kwargs)


def guard(root: nn.Module) -> None:
    """Refuse, or allow again, that other libraries save the modules of a model, after layers of it were replaced.

    Args:
        root: The module in which layers were replaced.
    """
    for module in root.modules():
        for name in {name for names in LIBRARIES.values() for name in names}:
            hook, is_lost = module.__dict__.get(name), any(_lost(module, name))
            if is_lost and hook is None:
                module.__dict__[name] = _RefusalHook(module, name)
            elif isinstance(hook, _RefusalHook) and not is_lost:
                hook.remove()


def _library(module: nn.Module, name: str) -> str:
    """The package whose method of this name a module has: one of its own may know what to do."""
    return str(getattr(getattr(type(module), name, None), "__module__", "")).partition(".")[0]


def _lost(module: nn.Module, name: str) -> Iterator[str]:
    """Paths of the compressed layers of a module whose structure is lost by a method, if it is one that saves."""
    library = _library(module, name)
    if name in LIBRARIES.get(library, ()):
        models = pretrained_models(module).values() if library in _SAVES_MODELS_BY_THEMSELVES else ()
        kept = {layer for model in models for layer in model.modules()}
        for path, layer in all_modules(module).items():
            if isinstance(layer, CompressedLayer) and layer not in kept:
                yield path
