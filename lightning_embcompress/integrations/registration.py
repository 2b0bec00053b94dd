"""Making transformers load compressed models once this package is imported, without importing anything heavy.

`from_pretrained` looks a quantization method up in tables of `transformers.quantizers.auto`. Entering ours there needs
that module, which imports torch; importing it here would make every command wait for it. So ours is entered right after
that module is imported, by whoever imports it first: transformers has no entry points that would do it, and a loader
that runs one more line after a module's own is how importlib means such a thing to be done.
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

_AWAITED = "transformers.quantizers.auto"
_OURS = "lightning_embcompress.integrations.huggingface_quantizer"
_FOLLOWS = "lightning_embcompress.integrations.huggingface"


def register() -> None:
    """Register the quantizer with transformers: now if it has been imported, otherwise when it is.

    Models of transformers are also kept in step with their layers from now on, whenever some are replaced.
    """
    add_listener(_follow)
    if _AWAITED in sys.modules:
        importlib.import_module(_OURS)
    else:
        # One, also where this module is imported anew: two would ask each other for ever.
        sys.meta_path[:] = [_Finder(), *_finders_of_others()]


def _follow(model: nn.Module) -> None:
    # Where nobody has imported transformers, no model of it can be there.
    if "transformers.modeling_utils" in sys.modules:
        importlib.import_module(_FOLLOWS).follow(model)


def _finders_of_others() -> list[Any]:
    # Ours are known by their name: of a module that is imported anew the class is another one.
    ours = (__name__, "_Finder")
    return [finder for finder in sys.meta_path if (type(finder).__module__, type(finder).__name__) != ours]


class _Finder(MetaPathFinder):
    """Finds one module, as the other finders do, and gives it a loader that registers the quantizer afterwards."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AWAITED:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module keeps no trace of this: its own loader answers for its source.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        sys.meta_path[:] = _finders_of_others()
        importlib.import_module(_OURS)
