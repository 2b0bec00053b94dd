"""Finding recipes by name and by path."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightning_embcompress.cli import recipes_index
from lightning_embcompress.cli.recipes_index import UsageError, find_recipe

RECIPE = "# A toy that trains in no time\n\ntrainer:\n  max_epochs: 1 # a comment of its own\n"


def test_recipes_of_a_clone_and_of_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "lightning_embcompress"
    for folder in (package, tmp_path / "recipes"):
        folder.mkdir()
    (tmp_path / "recipes" / "beside.yaml").write_text(RECIPE)
    monkeypatch.setattr(recipes_index, "__file__", str(package / "cli" / "recipes_index.py"))
    assert recipes_index.available_recipes() == {}, "site-packages/recipes is somebody else's"
    (tmp_path / "pyproject.toml").touch()
    assert list(recipes_index.available_recipes()) == ["beside"]
    (package / "recipes").mkdir()
    (package / "recipes" / "inside.yaml").write_text(RECIPE)
    assert list(recipes_index.available_recipes()) == ["inside"]
    assert recipes_index.recipe_description(package / "recipes" / "inside.yaml") == "A toy that trains in no time"


@pytest.fixture
def quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "shipped" / "quickstart.yaml"
    path.parent.mkdir()
    path.write_text(RECIPE)
    monkeypatch.setattr(recipes_index, "available_recipes", lambda: {"quickstart": path})
    monkeypatch.chdir(tmp_path)
    return path


def test_a_bare_word_is_a_name_first_and_a_file_second(quickstart: Path) -> None:
    for file in ("mine", "quickstart", "mine.yaml"):
        Path(file).write_text(RECIPE)
    assert find_recipe("quickstart") == quickstart
    assert find_recipe("./quickstart") == Path("quickstart")
    assert find_recipe("mine") == Path("mine")
    assert find_recipe("mine.yaml") == Path("mine.yaml")


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        ("quikstart", "no recipe 'quikstart'; did you mean quickstart?"),
        ("something", "Shipped recipes, run by name: quickstart"),
        ("recipes/quickstart.yml", "no recipe file 'recipes/quickstart.yml'; did you mean quickstart?"),
        ("list.yaml", "list.yaml holds a list"),
        ("empty.yaml", "empty.yaml holds nothing"),
        ("broken.yaml", "broken.yaml, line 2, column 1"),
        ("binary.yaml", "binary.yaml is not a text file"),
        (".", ". is a folder"),
    ],
)
def test_what_is_no_recipe_is_told_in_one_line(quickstart: Path, recipe: str, named: str) -> None:
    for name, content in (("list", b"- 1\n"), ("empty", b"# no\n"), ("broken", b"a: [1,\n"), ("binary", b"\xff\xfe")):
        Path(f"{name}.yaml").write_bytes(content)
    with pytest.raises(UsageError, match=re.escape(named)) as error:
        find_recipe(recipe)
    assert "\n" not in str(error.value)


def test_without_shipped_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes_index, "available_recipes", dict)
    with pytest.raises(UsageError, match="quickstart"):
        find_recipe("quickstart")
