"""Lightning checkpoints compressed, inspected and made dense again from the shell."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from transformers import AutoTokenizer

from lightning_embcompress.compression.plan import compress, plan_of
from lightning_embcompress.data import TextFiles
from lightning_embcompress.integrations.checkpoint import RECORD_KEY, load_from_checkpoint
from lightning_embcompress.integrations.instantiators import INSTANTIATORS
from lightning_embcompress.layers.compressed import CompressedLinear
from lightning_embcompress.modules import HuggingFaceCausalLM, LSTMLanguageModel
from toys import LanguageModel, dataset, loaders, quiet_trainer

_VOCAB = 300
_IDS = torch.randint(_VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))


class Foreign(LanguageModel):
    """A LightningModule that knows nothing of this package, and has more than parameters."""

    def __init__(self, **given: Any) -> None:
        padding = {} if given.get("tied") else {"padding_idx": 0}
        super().__init__(**{"vocab_size": _VOCAB, "bias": False, **padding, **given})
        if padding:
            # As torch makes it, which is all that a checkpoint says of it.
            nn.init.zeros_(self.encoder.weight[0])
        self.register_buffer("nothing", torch.empty(0))
        self.norm = nn.BatchNorm1d(16)

    def get_extra_state(self) -> dict[str, Any]:
        return {"words": ["a", "b"]}

    def set_extra_state(self, state: Any) -> None:
        assert state == {"words": ["a", "b"]}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Checkpoints of foreign modules, not tied and tied."""
    folder = tmp_path_factory.mktemp("foreign")
    paths = {tied: folder / f"{'tied' if tied else 'separate'}.ckpt" for tied in (False, True)}
    for tied, path in paths.items():
        trainer = quiet_trainer(folder, max_epochs=1, limit_train_batches=1, limit_val_batches=0)
        trainer.fit(Foreign(tied=tied), **loaders(dataset(vocab_size=_VOCAB)))
        trainer.save_checkpoint(path)
    return paths


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_of_a_foreign_class(shell: Any, tied: bool, foreign: dict[bool, Path]) -> None:
    path = foreign[tied]
    options = ["--method", "low_rank", "--rank", 3]
    assert shell("compress", path, "small.ckpt", *options) == 0
    said = shell.printed()
    assert "Not in small.ckpt: callbacks, lr_schedulers, optimizer_states." in said
    assert shell.files() == {"small.ckpt", "small.report.json"}
    before, after = (torch.load(file, weights_only=True) for file in (path, "small.ckpt"))
    assert before.keys() - after.keys() == {"callbacks", "lr_schedulers", "optimizer_states"}
    assert after.keys() - before.keys() == {RECORD_KEY}
    assert after["hyper_parameters"].pop("_instantiator") == INSTANTIATORS[None]
    for key in ("epoch", "global_step", "loops", "hyper_parameters", "pytorch-lightning_version"):
        assert after[key] == before[key]
    assert after["state_dict"]._metadata == before["state_dict"]._metadata
    assert after["state_dict"]["_extra_state"] == {"words": ["a", "b"]}
    # As in Python.
    dense = Foreign.load_from_checkpoint(path).eval()
    plan = compress(dense, "low_rank", rank=3)
    model = load_from_checkpoint(Foreign, "small.ckpt").eval()
    assert plan_of(model) == plan
    assert model.encoder.factorization.padding_ids == (() if tied else (0,))
    assert model.hparams == dense.hparams
    assert torch.equal(model(_IDS), dense(_IDS))
    assert (model.encoder.factorization is model.decoder.factorization) == tied
    # One copy of what is shared, and nothing of what was mapped besides.
    unique = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values() if isinstance(tensor, Tensor)}
    assert os.path.getsize("small.ckpt") < sum(unique.values()) + 20_000
    report, inspected = shell.read("small.report.json"), shell.inspected("small.ckpt")
    assert inspected["kind"] == "checkpoint"
    assert [{**table, "share": 0} for table in inspected["tables"]] == [
        {**table, "share": 0} for table in report["tables"]
    ]
    assert inspected["model"] == report["model"]
    # And back.
    assert shell("densify", "small.ckpt", "dense.ckpt") == 0
    assert RECORD_KEY not in torch.load("dense.ckpt", weights_only=True)
    restored = Foreign.load_from_checkpoint("dense.ckpt").eval()
    assert torch.allclose(restored(_IDS), dense(_IDS), atol=1e-6)
    assert (restored.decoder.weight is restored.encoder.weight) == tied
    sizes = [table["stored_bytes"] for table in shell.inspected("dense.ckpt")["tables"]]
    assert sizes == [4 * _VOCAB * 16] * (1 if tied else 2)


def test_a_checkpoint_of_a_model_of_transformers(shell: Any, tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": 32}
    dense = HuggingFaceCausalLM(config=config, vocab_size=_VOCAB).eval()
    trainer = quiet_trainer(tmp_path)
    trainer.strategy.connect(dense)
    trainer.save_checkpoint("source.ckpt")
    assert shell("compress", "source.ckpt", "small.ckpt", "--method", "low_rank", "--rank", 3) == 0
    model = HuggingFaceCausalLM.load_from_checkpoint("small.ckpt").eval()
    assert plan_of(model) == compress(dense, "low_rank", rank=3)
    assert torch.equal(model(_IDS), dense(_IDS))


def test_tables_can_be_named_and_untied(shell: Any, foreign: dict[bool, Path]) -> None:
    assert shell("compress", foreign[False], "one.ckpt", "--method=low_rank", "--rank=3", "--tables", "decoder") == 0
    model = load_from_checkpoint(Foreign, "one.ckpt")
    assert isinstance(model.decoder, CompressedLinear)
    assert type(model.encoder) is nn.Embedding
    # The other beside it, which stays as it is; then only one of them, which makes the other dense.
    shell.printed()
    options = ["--method=low_rank", "--rank=2", "--tables", "encoder"]
    assert shell("compress", "one.ckpt", "two.ckpt", *options) == 0
    assert "Tables that are compressed already stay as they are: decoder (low_rank, " in shell.printed()
    both = load_from_checkpoint(Foreign, "two.ckpt")
    assert [(table.name, table.spec["rank"]) for table in plan_of(both).tables] == [("encoder", 2), ("decoder", 3)]
    assert torch.equal(both.decoder.factorization.basis, model.decoder.factorization.basis)
    assert shell("compress", "two.ckpt", "three.ckpt", *options) == 0
    assert "Not named in --tables, and therefore dense from now on: decoder" in shell.printed()
    assert [table.name for table in plan_of(load_from_checkpoint(Foreign, "three.ckpt")).tables] == ["encoder"]
    assert shell("compress", foreign[True], "untied.ckpt", "--method=low_rank", "--rank=2", "--tie=untie") == 0
    untied = load_from_checkpoint(Foreign, "untied.ckpt")
    assert [(table.modules, table.untied) for table in plan_of(untied).tables] == [
        (("encoder",), "encoder"),
        (("decoder",), "encoder"),
    ]


def test_tied_tables_that_were_written_twice_are_tied(shell: Any, foreign: dict[bool, Path]) -> None:
    checkpoint = torch.load(foreign[True], weights_only=True)
    checkpoint["state_dict"]["decoder.weight"] = checkpoint["state_dict"]["decoder.weight"].clone()
    torch.save(checkpoint, "gathered.ckpt")
    assert shell("compress", "gathered.ckpt", "small.ckpt", "--method=low_rank", "--rank=2") == 0
    model = load_from_checkpoint(Foreign, "small.ckpt")
    assert model.encoder.factorization is model.decoder.factorization


def test_an_lstm_is_tested_from_the_compressed_checkpoint(
    shell: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # set by a run, taken back with the test
        monkeypatch.setenv(variable, "0")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    files = {"train_files": str(text), "test_files": str(text), "batch_size": 2, "cache_dir": "ids"}
    recipe = {
        "trainer": {"accelerator": "cpu", "max_steps": 2, "default_root_dir": "run", **quiet},
        "model": {"class_path": "LSTMLanguageModel", "init_args": {"embedding_dim": 8, "hidden_size": 8}},
        "data": {"class_path": "TextFiles", "init_args": files},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert shell("fit", "--config", "recipe.yaml") == 0
    (checkpoint,) = Path("run/checkpoints").iterdir()
    assert shell("compress", checkpoint, "small.ckpt", "--method", "low_rank", "--rank", 2) == 0
    shell.printed()
    assert shell("test", "--config", "recipe.yaml", "--ckpt_path", "small.ckpt") == 0
    measured = shell.printed()
    # The same measurement by hand.
    dense = LSTMLanguageModel.load_from_checkpoint(checkpoint)
    plan = compress(dense, "low_rank", rank=2)
    assert plan_of(LSTMLanguageModel.load_from_checkpoint("small.ckpt")) == plan
    (metrics,) = quiet_trainer(tmp_path).test(dense, TextFiles(**files), verbose=False)
    assert f"{metrics['test_perplexity']:.6f}"[:7] in measured
    # Training cannot go on, and Lightning says why.
    with pytest.raises(KeyError, match="checkpoint contains only the model"):
        shell("fit", "--config", "recipe.yaml", "--trainer.max_steps=3", "--ckpt_path", "small.ckpt")


def test_counts_of_a_text_for_a_checkpoint(shell: Any, foreign: dict[bool, Path], gpt2: Path, text: Path) -> None:
    words = ["compress", foreign[False], "small.ckpt", "--method=weighted_low_rank", "--rank=2", "--text", text]
    shell.refuses(*words, says="a checkpoint does not say how its model reads text")
    shell.refuses(*words, "--counts_only", says="--text needs a tokenizer, and there is none in ")
    assert shell(*words, "--counts_only", "--tokenizer", gpt2) == 0
    report = shell.read("small.report.json")
    ids = torch.tensor(AutoTokenizer.from_pretrained(gpt2)(shell.sentences)["input_ids"] + [0])
    start = len(ids) * 9 // 10
    assert report["token_counts"] == "text"
    assert report["text"] == {"counted": start, "measured": 0, "block_size": None}
    dense = Foreign.load_from_checkpoint(foreign[False])
    counts = torch.bincount(ids[:start], minlength=_VOCAB)
    compress(dense, "weighted_low_rank", rank=2, token_counts=counts)
    model = load_from_checkpoint(Foreign, "small.ckpt")
    assert torch.equal(model.encoder.factorization.basis, dense.encoder.factorization.basis)


class _Secret:
    """What a checkpoint may hold that is not plain."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Secret)


def test_a_checkpoint_with_objects_needs_trust(
    shell: Any, foreign: dict[bool, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, _Secret.__module__, sys.modules[__name__])
    checkpoint = torch.load(foreign[False], weights_only=True)
    checkpoint["hyper_parameters"]["secret"] = _Secret()
    torch.save(checkpoint, "objects.ckpt")
    for words in (["compress", "objects.ckpt", "small.ckpt", "--ratio=2"], ["inspect", "objects.ckpt"]):
        shell.refuses(*words, says="'objects.ckpt' holds more than tensors and plain values (")
        shell.refuses(*words, says="--trust_source")
    assert shell("inspect", "objects.ckpt", "--trust_source") == 0
    words = ["compress", "objects.ckpt", "small.ckpt", "--ratio=2", "--trust_source"]
    assert shell(*words) == 0
    assert torch.load("small.ckpt", weights_only=False)["hyper_parameters"]["secret"] == _Secret()
