"""Finding a recipe by its name or its path. Imports nothing heavy: the command line asks before torch is loaded."""

from __future__ import annotations

import difflib
from pathlib import Path

import yaml

from lightning_embcompress.cli.usage import UsageError

_SUFFIXES = (".yaml", ".yml")


def available_recipes() -> dict[str, Path]:
    """Return the shipped recipes by name (the file's stem), in alphabetical order.

    A wheel carries them inside the package. In a clone or an editable install they lie beside it, in ``recipes/``.

    Example:
        >>> all(path.suffix == ".yaml" for path in available_recipes().values())
        True
    """
    package = Path(__file__).resolve().parents[1]
    folder = package / "recipes"
    # Beside an installed package lie the folders of other packages: only a clone has its pyproject.toml there.
    if not folder.is_dir() and (package.parent / "pyproject.toml").is_file():
        folder = package.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def recipe_description(path: Path) -> str:
    """Return the first comment line of a recipe, without its ``#``; an empty string where it has none."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("#"):
            return line.lstrip().lstrip("#").strip()
    return ""


def find_recipe(recipe: str) -> Path:
    """Return the file that a person means by a path or by the name of a shipped recipe.

    A bare word is a name first and a file second; anything with a YAML suffix or a folder is a path.

    Args:
        recipe: ``"quickstart"``, ``"recipes/quickstart.yaml"``, ``"./my_recipe"``.

    Returns:
        The path of an existing file that holds a YAML mapping.

    Raises:
        UsageError: If there is no such recipe or file, or the file is not a YAML mapping.
    """
    recipes = available_recipes()
    path = Path(recipe)
    is_path = path.suffix.lower() in _SUFFIXES or path.name != recipe
    if not is_path and recipe in recipes:
        return recipes[recipe]
    if path.is_file():
        _check_mapping(path)
        return path
    if path.is_dir():
        raise UsageError(f"{recipe} is a folder; give the recipe's file, for example {path / 'recipe.yaml'}")
    kind = "recipe file" if is_path else "recipe"
    raise UsageError(f"no {kind} {recipe!r}; {_suggestions(path.stem if is_path else recipe, list(recipes))}")


def _check_mapping(path: Path) -> None:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not a text file: a recipe is a YAML file in UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise UsageError(f"{path}{where}: not valid YAML ({getattr(error, 'problem', None) or error})") from None
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise UsageError(
            f"{path} holds {found}, not a mapping: a recipe has the top-level keys of a LightningCLI configuration "
            "(seed_everything, trainer, model, data)"
        )


def _suggestions(name: str, names: list[str]) -> str:
    if not names:
        return "this installation ships no recipes, give the path of a YAML file"
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    meant = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{meant}Shipped recipes, run by name: {', '.join(names)}"
