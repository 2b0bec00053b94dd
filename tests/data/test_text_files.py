from collections import Counter
from pathlib import Path

import pytest

from lightning_embcompress.data import TextFiles

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "wikitext-2"


def test_raw_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("It's raining\u2014again.\n\nIt stopped.\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("The end", encoding="utf-8")
    data = TextFiles(
        str(tmp_path / "*.txt"), tokenizer="words", lowercase=True, eos_token=None, cache_dir=tmp_path, batch_size=1
    )
    inputs, targets = next(iter(data.train_dataloader()))
    words = data.vocabulary.decode([*inputs[0, :1].tolist(), *targets.flatten().tolist()])
    assert words == ["it's", "raining", "\u2014", "again", ".", "it", "stopped", ".", "the", "end"]
    assert data.vocabulary.eos_id is None


def test_text_without_words(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("   \n")
    with pytest.raises(ValueError, match="only 0 tokens"):
        TextFiles(str(tmp_path / "*.txt"), eos_token=None, cache_dir=tmp_path / "cache").prepare_data()


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no WikiText-2 in {SHARED}")
def test_wikitext_2(tmp_path: Path) -> None:
    files = {f"{split}_files": str(SHARED / f"{split}.txt") for split in ("train", "valid", "test")}
    data = TextFiles(**files, eos_token="<eos>", unk_token="<unk>", cache_dir=tmp_path, eval_batch_size=1)  # type: ignore[arg-type]
    data.prepare_data()
    data.setup()
    assert data.vocab_size == 33_278
    assert int(data.token_counts.sum()) == 2_088_628
    valid, test = data.val_dataloader(), data.test_dataloader()
    assert not isinstance(valid, list)
    assert sum(targets.numel() for _, targets in valid) == 217_646 - 1
    assert sum(targets.numel() for _, targets in test) == 245_569 - 1
    lines = (SHARED / "train.txt").read_text(encoding="utf-8").split("\n")[:-1]
    counts = Counter(word for line in lines for word in (*line.split(), "<eos>"))
    ordered = sorted(counts, key=lambda word: (-counts[word], word))
    assert data.vocabulary.words == ordered
    assert data.token_counts.tolist() == [counts[word] for word in ordered]
