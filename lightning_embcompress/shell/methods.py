"""What a person at the shell can tell a method."""

from __future__ import annotations

from dataclasses import fields

from lightning_embcompress.factorizations import Method


def option_names(method: Method) -> list[str]:
    """Names of the options of a method.

    Example:
        >>> from lightning_embcompress.factorizations import get_method
        >>> option_names(get_method("low_rank"))
        ['rank']
    """
    names = [option.name for option in fields(method.factorization.options_class)]
    return [name for name in names if name not in method.fixed]
