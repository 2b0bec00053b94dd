"""Training with an optimizer of sparse gradients, while tables are replaced by factors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, Optimizer, SparseAdam

from lightning_embcompress.callbacks import GroupReduce
from lightning_embcompress.callbacks.optimizer import pull_back, splice
from lightning_embcompress.compression.plan import compress
from lightning_embcompress.layers.compressed import CompressedEmbedding
from toys import DIM, VOCAB_SIZE, LanguageModel, check_resuming, loaders, quiet_trainer

IDS = torch.tensor([[3, 5, 3, 117], [7, 5, 3, 64]])
COUNTS = torch.arange(VOCAB_SIZE, 0, -1)


def _step(layer: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    layer(IDS).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: SparseAdam(parameters, lr=0.05),
        lambda parameters: SGD(parameters, lr=0.05),
        lambda parameters: SGD(parameters, lr=0.05, momentum=0.5),
        lambda parameters: Adagrad(parameters, lr=0.05, initial_accumulator_value=0.5),
    ],
)
def test_optimizers_of_sparse_gradients_go_on_with_the_factors(make: Callable[[Any], Optimizer]) -> None:
    model = LanguageModel(sparse=True)
    optimizer = make(list(model.encoder.parameters()))
    for _ in range(2):
        _step(model.encoder, optimizer)
    old = {"encoder": model.encoder}
    compress(model, "group_reduce", ratio=1.5, tables="encoder", token_counts=COUNTS, groups=3)
    splice([optimizer], model, old)
    before = copy.deepcopy(model.encoder.state_dict())
    for _ in range(2):
        _step(model.encoder, optimizer)
    names = [name for name, _ in model.encoder.named_parameters()]
    assert any(not torch.equal(before[name], model.encoder.state_dict()[name]) for name in names)
    for group in optimizer.param_groups:
        assert list(map(id, group["params"])) == list(map(id, model.encoder.parameters()))


def test_sparse_momentum_is_that_of_the_factors() -> None:
    model = LanguageModel(sparse=True)
    compress(model, "group_reduce", ratio=1.5, tables="encoder", token_counts=COUNTS, groups=3)
    moment = torch.zeros(VOCAB_SIZE, DIM).index_add_(0, IDS.flatten(), torch.randn(8, DIM))
    factors = model.encoder.factorization
    for some in (moment, torch.zeros_like(moment)):
        expected = pull_back(factors, some)
        for (one, value), (other, dense) in zip(pull_back(factors, some.to_sparse(1)), expected, strict=True):
            assert one is other
            torch.testing.assert_close(value, dense)


def _two_optimizers(module: Any) -> list[Optimizer]:
    rest = [*module.mix.parameters(), *module.decoder.parameters()]
    return [SparseAdam(list(module.encoder.parameters()), lr=0.02), Adam(rest, lr=0.02)]


class _TwoOptimizers(LanguageModel):
    """A language model whose embedding has an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__(sparse=True, optimizer=_two_optimizers)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        assert all(parameter.grad.is_sparse for parameter in self.encoder.parameters())
        for optimizer in self.optimizers():
            optimizer.step()
        return loss


def _callback() -> GroupReduce:
    return GroupReduce(ratio=1.5, at_epoch=1, refine_at_epochs=[3], groups=3)


def test_training_with_two_optimizers_is_compressed_on_the_way_and_resumed(tmp_path: Path) -> None:
    def make() -> list[Any]:
        seed_everything(0, verbose=False)
        return [_TwoOptimizers(), _callback()]

    whole = check_resuming(tmp_path, make, (0, 1), data=loaders(), max_epochs=4)
    model, sparse = whole.module, whole.trainer.optimizers[0]
    assert isinstance(model.encoder, CompressedEmbedding)
    assert model.encoder.sparse
    assert list(map(id, sparse.param_groups[0]["params"])) == list(map(id, model.encoder.parameters()))
    assert set(sparse.state) == set(model.encoder.parameters())


@pytest.mark.usefixtures("process_group")
def test_callbacks_refuse_data_parallel_training_before_the_first_step(tmp_path: Path) -> None:
    model = _TwoOptimizers()
    before = copy.deepcopy(model.state_dict())
    message = r"module 'encoder' of table 'encoder' has sparse=True, .* that GroupReduce puts .* set `sparse = False`"
    with pytest.raises(ValueError, match=message):
        quiet_trainer(tmp_path, _callback(), strategy="ddp", devices=1, max_epochs=4).fit(model, **loaders())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
