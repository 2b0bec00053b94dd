import sysconfig
from pathlib import Path

import pytest

from lightning_embcompress.data import PythonDocs, python_docs
from lightning_embcompress.data.python_docs import docstrings, extract_documentation, paragraphs, split_of, topics
from lightning_embcompress.data.sources import Split

SPLITS: tuple[Split, ...] = ("train", "valid", "test")


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small standard library with a module in each part of the corpus."""
    root = tmp_path / "library"
    root.mkdir()
    for number in range(80):
        text = f'"""Module {number}.\n\nShared paragraph.\n"""\ndef f():\n    """Do {number}."""\n'
        (root / f"module{number:02}.py").write_text(text)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root if name == "stdlib" else tmp_path / name))
    return root


def test_sources_are_data() -> None:
    source = '"""M."""\nclass A:\n    """A."""\n    async def b(self):\n        """B."""\n'
    source += 'if True:\n    def c():\n        "C."\ndef d(): pass\n'
    assert list(docstrings(source)) == ["M.", "A.", "B.", "C."]
    assert topics("# comment\ntopics = {'b': 'B' 'b', 'a': r'''A'''}\n") == {"b": "Bb", "a": "A"}
    assert topics("x = 1") == {}
    assert list(paragraphs("One\n  paragraph.\n\n\n>>> 1 + 1\n2\n\n  Two.")) == ["One paragraph.", "Two."]


def test_split_is_fixed() -> None:
    # The quickstart's figures depend on it.
    assert [split_of(name) for name in ("abc", "argparse", "ast", "keyword")] == ["train", "train", "valid", "test"]
    names = [f"module{number}" for number in range(2000)]
    shares = {split: sum(split_of(name) == split for name in names) / 2000 for split in ("train", "valid", "test")}
    assert shares["train"] == pytest.approx(0.9, abs=0.03)
    assert shares["valid"] == pytest.approx(0.05, abs=0.02)


def test_extraction(library: Path) -> None:
    (library / "test").mkdir()
    (library / "test" / "test_x.py").write_text('"""Never."""')
    (library / "broken.py").write_text('"""Never."""\nprint "python 2"\n')
    (library / "latin.py").write_bytes(b'# -*- coding: latin-1 -*-\n"""Caf\xe9."""\n')
    (library / "pydoc_data").mkdir()
    (library / "pydoc_data" / "topics.py").write_text("topics = {'if': 'The if statement.'}")
    (library / "module00.py").write_text("raise SystemExit('sources are never run')")
    texts = extract_documentation(library)
    lines = [line for split in texts.values() for line in split]
    assert len(set(lines)) == len(lines)
    assert lines.count("Shared paragraph.\n") == 1
    assert "Caf\u00e9.\n" in lines
    assert "The if statement.\n" in lines
    assert "Never.\n" not in lines
    for number in range(1, 80):
        assert f"Do {number}.\n" in texts[split_of(f"module{number:02}")]
    assert texts == extract_documentation(library)


def all_text(data: PythonDocs) -> str:
    return "".join(piece.text for split in SPLITS for piece in data.source(split).pieces("files", 1000))


def test_installed_packages_are_an_option(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "purelib" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('"""An installed package."""')
    for installed in (False, True):
        data = PythonDocs(include_installed=installed, cache_dir=tmp_path / "cache", batch_size=2)
        text = all_text(data)
        assert ("An installed package.\n" in text) == installed
        # Extracted once.
        with monkeypatch.context() as patch:
            patch.setattr(python_docs, "extract_documentation", None)
            again = PythonDocs(include_installed=installed, cache_dir=tmp_path / "cache")
            assert all_text(again) == text


def test_without_sources(library: Path, tmp_path: Path) -> None:
    for path in library.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="standard library were not found.*TextFiles"):
        PythonDocs(cache_dir=tmp_path / "cache").prepare_data()
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock"}
