from pathlib import Path

import pytest
import torch

from lightning_embcompress.data import OneBillionWord

HELD_OUT = "heldout-monolingual.tokenized.shuffled"
TRAINING = "training-monolingual.tokenized.shuffled"


@pytest.fixture
def benchmark_dir(tmp_path: Path) -> Path:
    for name, text in (
        (f"{TRAINING}/news.en-00001-of-00100", "a b\nc\n"),
        (f"{TRAINING}/news.en-00002-of-00100", "a d e\n"),
        (f"{HELD_OUT}/news.en.heldout-00000-of-00050", "test b\n"),
        (f"{HELD_OUT}/news.en.heldout-00001-of-00050", "a valid\n"),
    ):
        path = tmp_path / "benchmark" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "benchmark"


def make(directory: Path, cache_dir: Path, **options: object) -> OneBillionWord:
    return OneBillionWord(directory, cache_dir=cache_dir, **{"batch_size": 1, **options})  # type: ignore[arg-type]


def words(data: OneBillionWord, ids: torch.Tensor) -> str:
    return " ".join(data.vocabulary.decode(ids.flatten().tolist()))


def test_sentences_are_read_from_s_and_predicted_to_end(benchmark_dir: Path, tmp_path: Path) -> None:
    data = make(benchmark_dir, tmp_path)
    data.prepare_data()
    data.setup()
    ((inputs, targets),) = list(data.train_dataloader())
    assert words(data, inputs) == "<S> a b <S> c <S> a d e"
    assert words(data, targets) == "a b </S> c </S> a d e </S>"
    loader = data.val_dataloader()
    assert not isinstance(loader, list)
    assert words(data, next(iter(loader))[1]) == "a <UNK> </S>"
    assert words(data, next(iter(data.test_dataloader()))[1]) == "<UNK> b </S>"
    counts = dict(zip(data.vocabulary.words, data.token_counts.tolist(), strict=True))
    assert counts == {"a": 2, "b": 1, "c": 1, "d": 1, "e": 1, "<S>": 3, "</S>": 3, "<UNK>": 0}
    assert data.vocabulary.words[:3] == ["</S>", "<S>", "a"]


def test_one_token_for_both_ends(benchmark_dir: Path, tmp_path: Path) -> None:
    (benchmark_dir / "words").write_text("a 2\n<S> 3\n<UNK> 4\n")
    data = make(benchmark_dir, tmp_path, vocabulary_file="words")
    inputs, targets = next(iter(data.train_dataloader()))
    assert words(data, inputs) == "<S> a <UNK> <S> <UNK> <S> a <UNK> <UNK>"
    assert words(data, targets) == "a <UNK> <S> <UNK> <S> a <UNK> <UNK> <S>"
    assert data.token_counts.tolist() == [2, 3, 4]
    data = make(benchmark_dir, tmp_path, begin_token=None)
    assert words(data, next(iter(data.train_dataloader()))[0]) == "</S> a b </S> c </S> a d e"
    assert "<S>" not in data.vocabulary


def test_vocabulary_file_beside_the_current_directory(
    benchmark_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, text, tokens in ((tmp_path, "<S>\n</S>\n<UNK>\n", 3), (benchmark_dir, "a\n<S>\n</S>\n<UNK>\n", 4)):
        (folder / "mine.txt").write_text(text)
        assert make(benchmark_dir, tmp_path, vocabulary_file="mine.txt").vocab_size == tokens


def test_errors(benchmark_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="data_dir='nowhere' is not a directory"):
        make(Path("nowhere"), tmp_path).prepare_data()
    with pytest.raises(FileNotFoundError, match=r"train_files='\*\.gz' matches no file"):
        make(benchmark_dir, tmp_path, train_files="*.gz").prepare_data()
    (benchmark_dir / HELD_OUT / "news.en.heldout-00000-of-00050").unlink()
    data = make(benchmark_dir, tmp_path)
    data.prepare_data()
    with pytest.raises(ValueError, match="no test text"):
        data.setup("test")
    (benchmark_dir / "words").write_text("a\n</S>\n<UNK>\n")
    with pytest.raises(ValueError, match=r"words': The vocabulary has no '<S>' \(bos_token\)"):
        _ = make(benchmark_dir, tmp_path, vocabulary_file="words").vocabulary
