from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_embcompress.data import Vocabulary


def test_order_is_by_count_then_word() -> None:
    vocabulary = Vocabulary.from_counts({"b": 2, "a": 2, "c": 5, "</S>": 3})
    assert vocabulary.words == ["c", "</S>", "a", "b", "<UNK>"]
    # What is left out counts as unknown.
    assert Vocabulary.from_counts({"a": 3, "b": 2, "c": 2}, min_count=3).words == ["<UNK>", "a", "</S>"]
    assert (vocabulary.eos_id, vocabulary.unk_id, vocabulary.bos_id) == (1, 4, None)


@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=4), st.integers(1, 20), min_size=1),
    st.integers(1, 10),
    st.none() | st.integers(3, 12),
)
def test_frequent_words_are_kept(counts: dict[str, int], min_count: int, max_size: int | None) -> None:
    vocabulary = Vocabulary.from_counts(counts, min_count=min_count, max_size=max_size)
    assert max_size is None or len(vocabulary) <= max_size
    kept = set(vocabulary.words) - {"<UNK>", "</S>"}
    assert all(counts[word] >= min_count for word in kept)
    left_out = [count for word, count in counts.items() if count >= min_count and word not in kept]
    assert not left_out or max(left_out) <= min(counts[word] for word in kept)


def test_special_tokens_survive_min_count() -> None:
    vocabulary = Vocabulary.from_counts(
        {"a": 9, "<unk>": 1}, min_count=5, unk_token="<unk>", eos_token="<eos>", bos_token="<bos>"
    )
    assert set(vocabulary.words) == {"a", "<unk>", "<eos>", "<bos>"}


def test_fingerprint_depends_on_order_only() -> None:
    first = Vocabulary(["a", "<UNK>"], eos_token=None)
    assert first.fingerprint == Vocabulary(["a", "<UNK>"], unk_token="a", eos_token=None).fingerprint
    assert first.fingerprint != Vocabulary(["<UNK>", "a"], eos_token=None).fingerprint
    assert len(first.fingerprint) == 64


def test_decode_undoes_encode() -> None:
    vocabulary = Vocabulary(["a", "</S>", "<UNK>"])
    assert vocabulary.decode(vocabulary.encode(["a", "b", "</S>"])) == ["a", "<UNK>", "</S>"]
    with pytest.raises(IndexError, match="-1"):
        vocabulary.decode([-1])


@pytest.mark.parametrize("end", ["\n", "", "\r\n"])
def test_file_with_and_without_counts(tmp_path: Path, end: str) -> None:
    path = tmp_path / "words.txt"
    line_end = "\r\n" if end == "\r\n" else "\n"
    path.write_bytes((line_end.join(["the 5", "</S> 3", "<UNK> 9"]) + end).encode())
    vocabulary = Vocabulary.from_file(path)
    assert vocabulary.words == ["the", "</S>", "<UNK>"]
    path.write_bytes((line_end.join(["the", "</S>", "<UNK>"]) + end).encode())
    assert Vocabulary.from_file(path).words == vocabulary.words


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"the 5\n</S> x\n<UNK> 1\n", r"line 2: .*'</S> x'"),
        (b"the 5\n</S> -1\n<UNK> 1\n", "line 2: .*'</S> -1'"),
        (b"the 5\n</S>\n<UNK> 1\n", "line 2: expected a word and its count"),
        (b"the\nNew York\n", "line 2: expected one word, found 'New York'"),
        (b"the\n\n<UNK>\n", "line 2"),
        (b"the\n<UNK>\nthe\n", "line 3: the word 'the' is already on line 1"),
        (b"the\n</S>\n", r"no '<UNK>' \(unk_token\)"),
        (b"the\n<UNK>\n", r"no '</S>' \(eos_token\)"),
        (b"caf\xe9\n", r"not UTF-8 \(byte 3\)"),
    ],
)
def test_bad_file_names_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        Vocabulary.from_file(path)
    assert "words.txt" in str(error.value)


@pytest.mark.parametrize(("words", "message"), [([], "no words"), (["<UNK>", "a", "a"], "'a' more than once")])
def test_bad_words(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Vocabulary(words, eos_token=None)


def test_bad_arguments() -> None:
    with pytest.raises(FileNotFoundError, match="vocabulary_file='nowhere'"):
        Vocabulary.from_file("nowhere")
    with pytest.raises(ValueError, match="=0"):
        Vocabulary.from_counts({"a": 1}, min_count=0)
    with pytest.raises(ValueError, match="=2"):
        Vocabulary.from_counts({"a": 1}, max_size=2)
