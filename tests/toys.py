"""Toy models, data and Trainers of all tests: `from toys import LanguageModel, loaders, ...`.

They know nothing of compression, as the models of users do not. Every model is small enough for a test of a tenth of a
second, is the same for the same `seed`, and takes the sizes it should have.
"""

from __future__ import annotations

import json
import random
import resource
from collections import UserList
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric

VOCAB_SIZE, DIM = 150, 16


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers, the same for all dtypes but for their rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def falling_table(vocab_size: int = VOCAB_SIZE, dim: int = DIM, last: float = 0.1, seed: int = 0) -> Tensor:
    """A random table `[vocab_size, dim]` whose columns fall in scale from 1 to `last`, so that low rank helps."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(vocab_size, dim, generator=generator) * torch.logspace(0, 1, dim, base=last)


def falling_counts(vocab_size: int = VOCAB_SIZE, seed: int | None = None) -> Tensor:
    """Token counts `[vocab_size]` after Zipf's law, from the first id to the last, or shuffled by `seed`."""
    counts = (10_000 / torch.arange(1, vocab_size + 1)).long()
    return counts if seed is None else counts[torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))]


def loss_metric(vocab_size: int, dim: int, rank: int | None = None, seed: int = 0, condition: float = 100.0) -> Any:
    """A metric of directions of very different weight, not along the columns, and of rows by falling counts.

    Args:
        vocab_size: Rows of the table; the second half of them never occurs.
        dim: Columns of the table.
        rank: Directions that have a weight; None for all.
        seed: By which the directions are drawn.
        condition: Largest over smallest weight.
    """
    from lightning_embcompress.methods.numerics.metric import Metric, smoothed_frequencies

    vectors = torch.linalg.qr(normal(dim, dim, seed=seed)).Q
    values = torch.logspace(0, -1, dim, dtype=torch.float64) ** torch.tensor(condition).log10()
    values[dim if rank is None else rank :] = 0
    counts = falling_counts(vocab_size)
    counts[vocab_size // 2 :] = 0
    return Metric((vectors * values) @ vectors.T, smoothed_frequencies(counts))


def token_ids(lines: int = 96, length: int = 7, vocab_size: int = VOCAB_SIZE, seed: int = 3) -> Tensor:
    """Ids `[lines, length]` of falling frequency, of which four in five follow from the one before."""
    generator = torch.Generator().manual_seed(seed)
    ids = (vocab_size ** torch.rand(lines, length, generator=generator)).long() - 1
    follows = torch.rand(lines, length, generator=generator) < 0.8
    for column in range(1, length):
        ids[:, column] = torch.where(
            follows[:, column], (ids[:, column - 1] * 7 + 3) % (vocab_size // 3), ids[:, column]
        )
    return ids.clamp_(0, vocab_size - 1)


def dataset(lines: int = 96, length: int = 7, vocab_size: int = VOCAB_SIZE, seed: int = 3) -> TensorDataset:
    """Pairs of inputs and targets, each `[length - 1]`, from `token_ids`."""
    ids = token_ids(lines, length, vocab_size, seed)
    return TensorDataset(ids[:, :-1], ids[:, 1:])


def loaders(data: TensorDataset | None = None, batch_size: int = 8, **changes: Any) -> dict[str, Any]:
    """Arguments of `Trainer.fit`: shuffled training data, and half of it in order for validation."""
    data = dataset() if data is None else data
    half = TensorDataset(*(tensor[: len(data) // 2] for tensor in data.tensors))
    return {
        "train_dataloaders": DataLoader(data, **{"batch_size": batch_size, "shuffle": True, **changes}),
        "val_dataloaders": DataLoader(half, batch_size=batch_size),
    }


def adam(module: nn.Module) -> torch.optim.Optimizer:
    """Adam over all parameters."""
    return torch.optim.Adam(module.parameters(), lr=0.01)


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    """Plain gradient descent, which has no state, so that a plain loop can do the same."""
    return torch.optim.SGD(module.parameters(), lr=0.5)


class LanguageModel(LightningModule):
    """Embedding, a tanh or recurrent layer, dropout and softmax, with plain layers and a plain loss.

    Batches are pairs of inputs and targets, as `dataset` gives them. It logs `train_loss` and `val_loss`.

    Args:
        vocab_size: Rows of both tables.
        dim: Columns of both tables.
        tied: Whether the softmax reads the embedding's weight.
        bias: Whether the softmax has a bias.
        dropout: Probability of dropout before the softmax.
        cell: Name of a recurrent layer of `torch.nn` (LSTM, GRU, RNN) in the place of the tanh layer; its state starts
            at zero in every batch.
        layers: How many recurrent layers there are.
        last: Scale of the last column of the tables, with that of the first being 1.
        seed: By which weights are drawn; the global random state is left alone.
        optimizer: What `configure_optimizers` returns, made from the module.
        **embedding: Further arguments of `nn.Embedding`, such as `padding_idx` or `sparse`.
    """

    def __init__(
        self,
        vocab_size: int = VOCAB_SIZE,
        dim: int = DIM,
        *,
        tied: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        cell: str | None = None,
        layers: int = 1,
        last: float = 0.1,
        seed: int = 0,
        optimizer: Callable[[Any], Any] = adam,
        **embedding: Any,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = nn.Embedding(vocab_size, dim, **embedding)
            self.mix = nn.Linear(dim, dim) if cell is None else getattr(nn, cell)(dim, dim, layers, batch_first=True)
            self.dropout = nn.Dropout(dropout)
            self.decoder = nn.Linear(dim, vocab_size, bias=bias)
        for layer, own_seed in ((self.encoder, seed), (self.decoder, seed + 1)):
            layer.weight.data.copy_(falling_table(vocab_size, dim, last, own_seed))
        if tied:
            self.decoder.weight = self.encoder.weight
        self.optimizer = optimizer

    def hidden(self, inputs: Tensor) -> Tensor:
        """What the softmax reads."""
        mixed = self.mix(self.encoder(inputs))
        return self.dropout(mixed[0] if isinstance(mixed, tuple) else torch.tanh(mixed))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.decoder(self.hidden(inputs))

    def loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        return nn.functional.cross_entropy(self(inputs).flatten(0, -2), targets.flatten())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        loss = self.loss(batch)
        self.log("val_loss", loss, sync_dist=True)
        return loss

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(dim=-1)

    def configure_optimizers(self) -> Any:
        return self.optimizer(self)


class HeadOnly(LanguageModel):
    """Gets features `[batch_size, DIM]`, predicts ids."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(**changes)
        del self.encoder, self.mix
        self.norm = nn.BatchNorm1d(DIM)

    def hidden(self, inputs: Tensor) -> Tensor:
        return self.norm(inputs)


class EmbeddingOnly(LanguageModel):
    """Gets ids, predicts one of four classes."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(**changes)
        del self.mix
        self.decoder = nn.Linear(DIM, 4)

    def hidden(self, inputs: Tensor) -> Tensor:
        return self.encoder(input=inputs).mean(dim=1)


class BagOnly(EmbeddingOnly):
    """Gets ids, which one bag holds, and predicts one of four classes."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(**changes)
        self.encoder = nn.EmbeddingBag.from_pretrained(self.encoder.weight.detach(), freeze=False)

    def hidden(self, inputs: Tensor) -> Tensor:
        return self.encoder(inputs)


def model_of(kind: str = "untied", **changes: Any) -> LanguageModel:
    """A model of two tables, a `tied` one, a `head`, an `embedding` or a `bag`, with dropout, at random state 0."""
    seed_everything(0, verbose=False)
    changes = {"dropout": 0.1, **changes}
    if kind in ("untied", "tied"):
        return LanguageModel(tied=kind == "tied", **changes)
    return {"head": HeadOnly, "embedding": EmbeddingOnly, "bag": BagOnly}[kind](**changes)


def dataset_of(kind: str = "untied") -> TensorDataset:
    """The data that `model_of` learns."""
    inputs, targets = dataset().tensors
    if kind == "head":
        features = torch.randn(VOCAB_SIZE, DIM, generator=torch.Generator().manual_seed(1))[inputs.flatten()]
        return TensorDataset(features, targets.flatten())
    return TensorDataset(inputs, inputs[:, 0] % 4 if kind in ("embedding", "bag") else targets)


def loaders_of(kind: str = "untied", **changes: Any) -> dict[str, Any]:
    """Arguments of `Trainer.fit` for `model_of`, in batches of 8, or of 12 for a head."""
    return loaders(dataset_of(kind), batch_size=12 if kind == "head" else 8, **changes)


class Recorder(LightningModule):
    """Keeps the batches it sees in `trained` and `evaluated`, and has one weight to train."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.trained: list[Any] = []
        self.evaluated: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.trained.append(batch)
        return self.weight.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluated.append(batch)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self)


class Windows(LightningDataModule):
    """Consecutive windows of three random texts, `[3, 5]` inputs and targets, as a stateful corpus gives them.

    Args:
        fingerprint: Of its vocabulary.
        vocab_size: Tokens of its vocabulary; the texts have 50 different ones.
        windows: How many there are for training; validation, test and prediction have the first two.
        seed: By which the texts are drawn.
    """

    def __init__(self, fingerprint: str = "abc", vocab_size: int = 50, windows: int = 6, seed: int = 0) -> None:
        super().__init__()
        text = torch.randint(50, (3, 5 * windows + 1), generator=torch.Generator().manual_seed(seed))
        self.pairs = list(zip(text[:, :-1].split(5, dim=1), text[:, 1:].split(5, dim=1), strict=True))
        self.vocabulary = UserList(range(vocab_size))
        self.vocabulary.fingerprint = fingerprint  # type: ignore[attr-defined]
        self.token_counts = torch.arange(50, 0, -1)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.pairs, batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.pairs[:2], batch_size=None)  # type: ignore[arg-type]

    test_dataloader = predict_dataloader = val_dataloader


class Losses(Callback):
    """Keeps the loss of every training step, in `values`."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(float(outputs["loss"]))


class Copies(Callback):
    """Keeps copies of the module at the start of every epoch, in `models`."""

    def __init__(self) -> None:
        self.models: list[Any] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        attached, pl_module.trainer = pl_module.trainer, None
        self.models.append(deepcopy(pl_module))
        pl_module.trainer = attached


class Notes(Callback):
    """Comes after others: notes what work within hooks could have changed, at the start of epochs and after steps."""

    def __init__(self) -> None:
        self.notes: list[Any] = []
        self.names: list[Any] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        metrics = [part for part in pl_module.modules() if isinstance(part, Metric)]
        self.notes.append(
            [
                [part.training for part in pl_module.modules()],
                [parameter.requires_grad for parameter in pl_module.parameters()],
                [None if parameter.grad is None else parameter.grad.clone() for parameter in pl_module.parameters()],
                [value.clone() for value in (*pl_module.parameters(), *pl_module.buffers())],
                [{name: torch.as_tensor(getattr(one, name)).clone() for name in one._defaults} for one in metrics],
                [one._update_count for one in metrics],
                torch.get_rng_state(),
                torch.from_numpy(np.random.get_state()[1].astype(np.int64)),  # type: ignore[index,union-attr]
                random.getstate()[1],
                (trainer.training, len(trainer.callback_metrics)),
            ]
        )
        self.names.append(([type(logger).__name__ for logger in trainer.loggers], sorted(vars(pl_module))))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.notes.append([value.clone() for value in pl_module.state_dict().values()])


class InMemory(Logger):
    """Keeps the metrics that are logged, in `rows`."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


def quiet_trainer(folder: Path, *callbacks: Any, **changes: Any) -> Trainer:
    """A Trainer for three epochs on one CPU that prints, logs and saves nothing."""
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"accelerator": "cpu", "devices": 1, "max_epochs": 3, "enable_checkpointing": False}
    quiet |= {"default_root_dir": folder, "log_every_n_steps": 1}
    return Trainer(callbacks=list(callbacks), **{**quiet, **changes})


@contextmanager
def small_files(size: int = 64) -> Iterator[None]:
    """No file can grow beyond a size in bytes, as on a full disk: what is written first is there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def outcome(trainer: Trainer, module: Any) -> SimpleNamespace:
    """What `assert_same_run` compares, and what an `InMemory` logger got as `rows`, of a run that has ended."""
    from lightning_embcompress.compression.plan import plan_of

    schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    return SimpleNamespace(
        module=module,
        trainer=trainer,
        parameters={name: value.clone() for name, value in module.state_dict().items()},
        optimizers=[optimizer.state_dict() for optimizer in trainer.optimizers],
        # But for functions, which are equal to themselves only.
        schedulers=[{key: one for key, one in state.items() if not callable(one)} for state in schedulers],
        plan=plan_of(module),
        trained=[name for name, parameter in module.named_parameters() if parameter.requires_grad],
        report=json.loads(Path(trainer.log_dir or trainer.default_root_dir, "report.json").read_text()),
        rows=getattr(trainer.logger, "rows", []),
    )


def assert_same_run(resumed: SimpleNamespace, whole: SimpleNamespace, source: object = "") -> None:
    """That a run which was resumed from a `source` ended as the uninterrupted one, to the last bit."""
    for part in ("parameters", "optimizers"):
        one, other = getattr(resumed, part), getattr(whole, part)
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=lambda said, part=part: f"{part}, {source}: {said}")
    for part in ("schedulers", "plan", "trained", "report"):
        assert getattr(resumed, part) == getattr(whole, part), (part, source)


def run_with_checkpoints(
    folder: Path, module: Any, *callbacks: Any, data: Any = None, ckpt_path: Any = None, **options: Any
) -> SimpleNamespace:
    """Fit with a checkpoint of every epoch, `epoch=*.ckpt`; the outcome."""
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = quiet_trainer(folder, *callbacks, keep, enable_checkpointing=True, **options)
    trainer.fit(module, **(data or loaders_of()), ckpt_path=ckpt_path)
    return outcome(trainer, module)


def check_resuming(folder: Path, make: Callable[[], list[Any]], epochs: Iterable[int], **options: Any) -> Any:
    """Check that resuming from the end of some epochs equals the uninterrupted run, whose outcome is given.

    Args:
        folder: Where the runs have folders of their own, `whole` and `from*`.
        make: Makes the module, and callbacks after it.
        epochs: After which runs are resumed.
        **options: Further ones of `run_with_checkpoints`.
    """
    whole = run_with_checkpoints(folder / "whole", *make(), **options)
    for epoch in epochs:
        ckpt = folder / "whole" / f"epoch={epoch}.ckpt"
        assert_same_run(run_with_checkpoints(folder / f"from{epoch}", *make(), ckpt_path=ckpt, **options), whole, ckpt)
    return whole


def gpt2_config(**changes: Any) -> Any:
    """The configuration of a GPT-2 with one layer of 32 and 300 tokens, tied unless `tie_word_embeddings=False`."""
    from transformers import GPT2Config

    sizes = {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 64, "vocab_size": 300}
    return GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, **changes})


def gpt2(seed: int = 0, **changes: Any) -> Any:
    """A random `GPT2LMHeadModel` of `gpt2_config`, without dropout."""
    from transformers import GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(gpt2_config(**changes)).eval()


def save_word_tokenizer(folder: Path, words: Iterable[str]) -> None:
    """Save a tokenizer of transformers that splits at spaces, with `<|end|>` as 0 and `<unk>` as 1."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: number for number, word in enumerate(["<|end|>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)


def save_byte_tokenizer(folder: Path, text: str, vocab_size: int = 300, eos: bool = True) -> None:
    """Train a byte-level BPE tokenizer on a text, with `<|end|>` as 0, and save it; `eos` says it ends texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([text], trainer)
    named = {"eos_token": "<|end|>"} if eos else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)


def compress_toy(model: nn.Module, method: str, ratio: float = 3.0, **given: Any) -> Any:
    """Compress by falling counts to `ratio`, or as far as the method goes if it does not reach it; gives the plan."""
    from lightning_embcompress.compression.plan import compress
    from lightning_embcompress.methods.registry import METHODS
    from lightning_embcompress.tables.finding import find_tables

    tables = find_tables(model)
    chosen = METHODS[method]
    for table in tables:
        vocab_size, dim = table.weight.shape
        smallest = chosen.factorization.smallest_bytes(vocab_size, dim, table.weight.element_size(), chosen.config())
        ratio = min(ratio, table.weight.nbytes / smallest)
    return compress(model, method, **{"ratio": ratio, "token_counts": falling_counts(vocab_size), **given})


def factors_of(method: str, vocab_size: int = VOCAB_SIZE, dim: int = DIM, dtype: torch.dtype = torch.float32) -> Any:
    """Half of a random table by a method, or as little as the method can, by shuffled counts."""
    from lightning_embcompress.methods.registry import METHODS

    chosen = METHODS[method]
    table = falling_table(vocab_size, dim, last=1.0).to(dtype)
    smallest = chosen.factorization.smallest_bytes(vocab_size, dim, table.element_size(), chosen.config())
    counts = falling_counts(vocab_size, seed=0)
    return chosen.factorization.decompose(table, max(2 * smallest, table.nbytes // 2), counts, chosen.config())


def draw_blocks(draw: Any, dtype: torch.dtype = torch.float32, most: int = 40) -> Any:
    """A `BlockLowRank` for hypothesis: blocks of any size, empty ones too, of any rank, with rows in any order.

    Args:
        draw: What a strategy or `st.data()` draws by.
        dtype: Of the factors.
        most: Rows of a block.
    """
    from hypothesis import strategies as st

    from lightning_embcompress.methods.registry import BlockLowRank

    sizes = draw(st.lists(st.integers(0, most), min_size=1, max_size=6).filter(any))
    dim = draw(st.integers(1, 12))
    ranks = [draw(st.integers(0, min(size, dim))) for size in sizes]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    factors = BlockLowRank(sum(sizes), dim, sizes, ranks, dtype)
    blocks = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    if draw(st.booleans()):
        blocks = blocks[torch.randperm(sum(sizes), generator=generator)]
    factors._index(blocks)
    for parameter in factors.parameters():
        nn.init.normal_(parameter, generator=generator)
    return factors


def compressed_head(
    method: str,
    vocab_size: int = VOCAB_SIZE,
    dim: int = DIM,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
) -> Any:
    """A compressed softmax of a random table, with a random bias."""
    from lightning_embcompress.layers.compressed import CompressedLinear

    own = torch.randn(vocab_size, generator=torch.Generator().manual_seed(1)).to(dtype)
    return CompressedLinear(factors_of(method, vocab_size, dim, dtype), nn.Parameter(own) if bias else None)
