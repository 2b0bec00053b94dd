"""Made text in the layout of the One Billion Word benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_embcompress.bench.made_corpus import VOCABULARY_FILE, make_corpus
from lightning_embcompress.cli.main import main
from lightning_embcompress.data import OneBillionWord


def test_the_data_module_reads_it(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "corpus"
    shares: list[float] = []
    make_corpus(folder, 300, 30_000, advance=shares.append)
    assert sum(shares) == pytest.approx(1)
    data = OneBillionWord(folder, vocabulary_file=VOCABULARY_FILE, cache_dir=tmp_path / "cache", batch_size=4)
    assert data.vocab_size == 300
    counts = data.token_counts
    # Sentences are ended by the token that begins them, and no word is unknown.
    assert counts[1] == 0
    assert int(counts.sum()) == pytest.approx(30_000, rel=0.01)
    words = counts[2:].double()
    wanted = 1 / torch.arange(1, 299, dtype=torch.float64)
    wanted *= words.sum() / wanted.sum()
    assert bool(((words - wanted).abs() < 6 * wanted.sqrt() + 1).all())
    data.setup("fit")
    inputs, targets = next(iter(data.train_dataloader()))
    assert inputs.shape == targets.shape == (4, 20)
    for split in ("valid", "test"):
        assert data.files(split) != data.files("train")
        assert data.files(split)[0].read_text() != data.files("train")[0].read_text()


def test_a_seed_is_a_text(tmp_path: Path) -> None:
    texts = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_corpus(tmp_path / name, 50, 1000, seed)
        files = sorted((tmp_path / name).rglob("news*"))
        texts.append({str(file.relative_to(tmp_path / name)): file.read_bytes() for file in files})
    assert texts[0] == texts[1] != texts[2]


def test_what_is_there_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    assert main(["bench", "corpus", str(tmp_path / "full")]) == 2
    assert "full' exists and is not an empty folder: choose another" in capsys.readouterr().err
    assert [file.name for file in tmp_path.rglob("*")] == ["full", "thesis.txt"]
    with pytest.raises(ValueError, match="vocab_size must be above 2"):
        make_corpus(tmp_path / "small", 2, 1000)
    with pytest.raises(ValueError, match="tokens must be at least 25"):
        make_corpus(tmp_path / "small", 50, 24)
    assert not (tmp_path / "small").exists()


def test_nothing_half_is_left(tmp_path: Path) -> None:
    def fail(_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_corpus(tmp_path / "made", 50, 1000, advance=fail)
    assert list(tmp_path.iterdir()) == []


def test_empty_folders_are_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("here", "real"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    make_corpus(tmp_path / "link", 50, 500)
    assert (tmp_path / "real" / VOCABULARY_FILE).is_file()
    monkeypatch.chdir(tmp_path / "here")
    make_corpus(Path("."), 50, 500)
    assert (tmp_path / "here" / VOCABULARY_FILE).is_file()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "made").mkdir()
    arguments = ["bench", "corpus", str(tmp_path / "made"), "--vocab_size", "60", "--tokens", "500", "--seed", "3"]
    assert main(arguments) == 0
    assert "60 words in 1b_word_vocab.txt" in " ".join(capsys.readouterr().out.split())
    assert len((tmp_path / "made" / VOCABULARY_FILE).read_text().splitlines()) == 60
