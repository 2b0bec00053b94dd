from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_embcompress.data.text import LINE_END, TextFormat, find_files, read_blocks


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.text(st.characters(exclude_characters="\n\0", exclude_categories=["Cs"]), max_size=9), min_size=1))
def test_a_block_is_cut_like_its_lines(lines: list[str]) -> None:
    block = "\n".join(lines) + "\n"
    expected = [word for line in lines for word in (*line.split(), LINE_END)]
    assert TextFormat().tokens(block) == expected
    assert TextFormat(line_ends=False).tokens(block) == [word for word in expected if word != LINE_END]


def test_words_tokenizer() -> None:
    tokens = TextFormat("words", lowercase=True).tokens("Don't read a_file(x), \u00c9mile's 3.5!\n")
    assert tokens == ["don't", "read", "a_file", "(", "x", ")", ",", "\u00e9mile's", "3", ".", "5", "!", LINE_END]


def test_unknown_tokenizer() -> None:
    with pytest.raises(ValueError, match="tokenizer='bpe'"):
        TextFormat("bpe")  # type: ignore[arg-type]


@pytest.mark.parametrize("block_bytes", [1, 3, 7, 1000])
def test_blocks_hold_whole_lines(tmp_path: Path, block_bytes: int) -> None:
    path = tmp_path / "text"
    path.write_bytes("\ufeffa \u00e9\u00e9\n\nlonger line here\nno end".encode())
    blocks = list(read_blocks(path, block_bytes))
    assert "".join(text for text, _ in blocks) == "a \u00e9\u00e9\n\nlonger line here\nno end\n"
    assert sum(size for _, size in blocks) == path.stat().st_size
    assert all(text.endswith("\n") for text, _ in blocks)


@pytest.mark.parametrize("block_bytes", [2, 1000])
def test_not_utf8_tells_the_byte(tmp_path: Path, block_bytes: int) -> None:
    path = tmp_path / "latin1"
    path.write_bytes(b"good\nand caf\xe9\n")
    with pytest.raises(ValueError, match=r"latin1' is not UTF-8: byte 12"):
        list(read_blocks(path, block_bytes))


def test_find_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b", "a", "c[1]"):
        (tmp_path / name).write_text("text")
    (tmp_path / "directory").mkdir()
    found = find_files(["b", "*"], "train_files", tmp_path)
    assert [path.name for path in found] == ["b", "a", "c[1]"]
    assert [path.name for path in find_files("c[1]", "train_files", tmp_path)] == ["c[1]"]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert find_files("~/a", "train_files") == [(tmp_path / "a").resolve()]


def test_find_files_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train_files='\*\.txt' matches no file"):
        find_files("*.txt", "train_files", tmp_path)
    with pytest.raises(ValueError, match="valid_files is an empty list"):
        find_files([], "valid_files", tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match=r"test_files=\['empty'\].*is empty"):
        find_files("empty", "test_files", tmp_path)
