"""Making transformers and Lightning load compressed models once this package is imported, without anything heavy.

`from_pretrained` looks a quantization method up in tables of `transformers.quantizers.auto`, and `load_from_checkpoint`
an instantiator among the trusted ones of `lightning.pytorch.core.saving`. Entering ours there needs those modules,
which import torch; importing them here would make every command wait for it. So ours are entered right after those
modules are imported, by whoever imports them first: there are no entry points that would do it, and a loader that runs
one more line after a module's own is how importlib means such a thing to be done.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lightning_embcompress.tables.listeners import add_listener

if TYPE_CHECKING:
    from torch import nn

_AWAITED = {
    "transformers.quantizers.auto": "lightning_embcompress.integrations.huggingface_quantizer",
    "lightning.pytorch.core.saving": "lightning_embcompress.integrations.instantiators",
}
"""Modules, and what is imported after each."""
_FOLLOWS = "lightning_embcompress.integrations.huggingface"
_GUARDS = "lightning_embcompress.integrations.other_savers"


def register() -> None:
    """Register the quantizer with transformers, and the instantiators with Lightning: now, or when it is imported.

    Models of transformers are also kept in step with their layers from now on, whenever some are replaced, and others
    that are saved by a library of their own are guarded.
    """
    add_listener(_follow)
    for awaited, ours in _AWAITED.items():
        if awaited in sys.modules:
            importlib.import_module(ours)
        else:
            # One, also where this module is imported anew: two would ask each other for ever.
            sys.meta_path[:] = [_Finder(awaited, ours), *_without(awaited)]


def _follow(model: nn.Module) -> None:
    # Where nobody has imported a library, no model of it can be there.
    if "transformers.modeling_utils" in sys.modules:
        importlib.import_module(_FOLLOWS).follow(model)
    if any(library in sys.modules for library in ("sentence_transformers", "huggingface_hub")):
        importlib.import_module(_GUARDS).guard(model)


def _without(awaited: str) -> list[Any]:
    """All finders but ours of a module."""
    # By its name: of a module that is imported anew the class is another one.
    ours = (__name__, "_Finder", awaited)
    return [
        finder
        for finder in sys.meta_path
        if (type(finder).__module__, type(finder).__name__, getattr(finder, "awaited", None)) != ours
    ]


class _Finder(MetaPathFinder):
    """Finds one module, as the other finders do, and gives it a loader that imports one of ours afterwards."""

    def __init__(self, awaited: str, ours: str) -> None:
        self.awaited, self.ours = awaited, ours

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.awaited:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self.ours)
                return spec
        return None


class _Loader(Loader):
    def __init__(self, loader: Loader, ours: str) -> None:
        self.loader, self.ours = loader, ours

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module keeps no trace of this: its own loader answers for its source.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        sys.meta_path[:] = _without(module.__name__)
        importlib.import_module(self.ours)
