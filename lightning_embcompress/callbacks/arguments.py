"""Callbacks of single methods, made from their configs: signatures and docstrings, as command lines read them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

from lightning_embcompress.methods.config import MethodConfig

# Arguments of the general callback in the place of which the fields of a config are.
_REPLACED = ("method", "options")


def init_of(general: type, config: type[MethodConfig]) -> Callable[..., None]:
    """The `__init__` of a callback that has the fields of a config as typed arguments.

    Args:
        general: The callback of all methods, with `method` as its first argument and `**options`.
        config: Of the method.
    """

    def __init__(self: Any, **arguments: Any) -> None:
        general.__init__(self, config.method, **arguments)  # type: ignore[misc]

    known, hints = inspect.signature(general.__init__).parameters, get_type_hints(general.__init__)  # type: ignore[misc]
    types = get_type_hints(config)
    parameters = [one.replace(annotation=hints.get(name, one.annotation)) for name, one in known.items()]
    parameters = [one for one in parameters if one.name not in _REPLACED]
    parameters += [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=types[field.name],
        )
        for field in fields(config)
    ]
    __init__.__signature__ = inspect.Signature(parameters, return_annotation=None)  # type: ignore[attr-defined]
    __init__.__annotations__ = {one.name: one.annotation for one in parameters if one.name != "self"}
    return __init__


def doc_of(callback: type, general: type, config: type[MethodConfig]) -> str:
    """The docstring of a callback with all its arguments, those of the config first."""
    own, _, example = inspect.cleandoc(callback.__doc__ or "").partition("\n\nExample:\n")
    arguments = _entries(config, "Attributes:") | _entries(general, "Args:")
    lines = [text for name, text in arguments.items() if name.lstrip("*") not in _REPLACED]
    parts = [own, "Args:\n" + "\n".join(lines), "Example:\n" + example]
    return "\n\n".join(parts)


def _entries(documented: type, section: str) -> dict[str, str]:
    """The lines of every entry of a section of a docstring in Google's style, by its name."""
    _, _, rest = inspect.cleandoc(documented.__doc__ or "").partition(f"\n{section}\n")
    found = re.findall(r"^    (\*{0,2}\w+): .*(?:\n {8}.*)*", rest.partition("\n\n")[0], re.MULTILINE)
    texts = re.split(r"^(?=    \*{0,2}\w+: )", rest.partition("\n\n")[0], flags=re.MULTILINE)
    return dict(zip(found, (text.rstrip("\n") for text in texts if text.strip()), strict=True))
