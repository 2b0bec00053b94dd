"""The command on real text and GPT-2's own tokenizer, where they are at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from lightning_embcompress.compression.plan import plan_of

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
_TOKENIZER, _TEXT = SHARED / "gpt2-tokenizer", SHARED / "wikitext-2" / "valid.txt"


@pytest.mark.skipif(not (_TOKENIZER.is_dir() and _TEXT.is_file()), reason=f"{_TOKENIZER} or {_TEXT} is not there")
def test_wikitext_and_the_tokenizer_of_gpt2(shell: Any) -> None:
    torch.manual_seed(0)
    GPT2LMHeadModel(shell.config(vocab_size=50_257, n_embd=16)).save_pretrained("source")
    Path("text.txt").write_text(_TEXT.read_text(encoding="utf-8")[:30_000], encoding="utf-8")
    words = ["--method=group_reduce", "--ratio=2", "--refine_rounds=1", "--text", "text.txt", "--tokenizer", _TOKENIZER]
    assert shell("compress", "source", "out", *words) == 0
    report = shell.read("out/report.json")
    # A model that has learned nothing finds all tokens about as likely.
    assert report["perplexity"]["dense"] == pytest.approx(50_257, rel=0.05)
    assert report["perplexity"]["compressed"] == pytest.approx(50_257, rel=0.05)
    assert report["tables"][0]["ratio"] >= 2
    assert 500 < report["text"]["measured"] < 1000
    assert {"vocab.json", "merges.txt"} <= {path.name for path in Path("out").iterdir()}
    assert plan_of(AutoModelForCausalLM.from_pretrained("out")).tables[0].spec["vocab_size"] == 50_257
