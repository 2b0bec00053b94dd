"""Statistics of a model's tables, against the definition computed position by position."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_embcompress.calibration.statistics import Statistics, collect_statistics
from lightning_embcompress.compression.plan import compress, densify
from lightning_embcompress.layers.full_softmax import full_softmax_loss
from lightning_embcompress.tables.finding import find_tables
from toys import gpt2

VOCAB_SIZE, EMBEDDING_DIM, HEAD_DIM, IGNORED = 90, 5, 6, -100
_BOTH = ["encoder", "decoder"]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module] = nn.LSTM) -> None:
        super().__init__()
        self.encoder = nn.Embedding(VOCAB_SIZE, EMBEDDING_DIM)
        self.dropout = nn.Dropout(0.5)
        self.rnn = kind(EMBEDDING_DIM, HEAD_DIM, num_layers=2, dropout=0.5, batch_first=True)
        self.decoder = nn.Linear(HEAD_DIM, VOCAB_SIZE)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.decoder(self.dropout(self.rnn(self.dropout(self.encoder(inputs)))[0]))


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten(), ignore_index=IGNORED)


def batches(count: int = 3, seed: int = 0, ignored: float = 0.2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for size in range(2, 2 + count):
        text = torch.randint(VOCAB_SIZE, (size, 6), generator=generator)
        dropped = torch.rand(size, 5, generator=generator) < ignored
        made.append((text[:, :-1], text[:, 1:].masked_fill(dropped, IGNORED)))
    return made


@pytest.fixture
def model() -> Recurrent:
    torch.manual_seed(0)
    return Recurrent().double()


def by_hand(model: Any, data: list[tuple[Tensor, Tensor]]) -> Statistics:
    """One backward pass for the loss of every target alone; the model's parts called by themselves."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    sums: dict[str, Any] = {"H": 0, "h": 0, "p": 0, "G": 0}
    number = 0
    for inputs, targets in data:
        rows = model.encoder(inputs).detach().requires_grad_()
        hidden = model.rnn(rows)[0]
        log_probabilities = model.decoder(hidden).log_softmax(-1)
        gradient = torch.zeros_like(rows)
        for position in (targets != IGNORED).nonzero().tolist():
            row, step = position
            negative = -log_probabilities[row, step, targets[row, step]]
            gradient += torch.autograd.grad(negative, rows, retain_graph=True)[0]
            state = hidden[row, step].detach()
            sums["H"] += torch.outer(state, state)
            sums["h"] += state
            sums["p"] += log_probabilities[row, step].detach().exp()
            number += 1
        for g in gradient.flatten(0, -2):
            sums["G"] += torch.outer(g, g)
    return Statistics(
        torch.bincount(torch.cat([inputs.flatten() for inputs, _ in data]), minlength=VOCAB_SIZE),
        {"decoder": sums["H"] / number},
        {"decoder": sums["h"] / number},
        {"decoder": sums["p"] / number},
        {"encoder": sums["G"] / number},
        number,
    )


def assert_same(found: Statistics, expected: Statistics, **tolerances: float) -> None:
    assert torch.equal(found.token_counts, expected.token_counts)
    assert (found.num_targets, found.skipped_batches) == (expected.num_targets, expected.skipped_batches)
    for kind in ("hidden", "hidden_mean", "probabilities", "gradients"):
        one, other = getattr(found, kind), getattr(expected, kind)
        assert list(one) == list(other), kind
        for path, tensor in one.items():
            assert tensor.dtype == torch.float64
            scale = other[path].double().abs().max()
            torch.testing.assert_close(
                tensor / scale, other[path].double() / scale, **{"rtol": 0, "atol": 1e-12, **tolerances}, msg=kind
            )


@pytest.mark.parametrize("ignored", [0.0, 0.2, 0.9])
def test_the_definition(model: Recurrent, ignored: float) -> None:
    data = batches(ignored=ignored)
    found = collect_statistics(model, data, loss_fn)
    assert_same(found, by_hand(model, data))
    assert found.probabilities["decoder"].sum() == pytest.approx(1)
    assert torch.equal(found.hidden["decoder"], found.hidden["decoder"].T)


def test_given_numbers_of_targets(model: Recurrent) -> None:
    def counted(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return loss_fn(model, batch), (batch[1] != IGNORED).sum()

    data = batches()
    assert_same(collect_statistics(model, iter(data), counted), by_hand(model, data))

    # The mean over a part of the targets that the caller alone knows of: `g` is of the sum it stands for.
    double = collect_statistics(model, data, lambda *arguments: (loss_fn(*arguments), 2 * int(counted(*arguments)[1])))
    expected = by_hand(model, data)
    torch.testing.assert_close(double.gradients["encoder"], 2 * expected.gradients["encoder"])
    torch.testing.assert_close(double.hidden, expected.hidden)


def test_limit_and_given_counts(model: Recurrent) -> None:
    data, counts = batches(4), torch.arange(VOCAB_SIZE)

    def endless() -> Iterator[Any]:
        while True:
            yield from data

    found = collect_statistics(model, endless(), loss_fn, limit=2, token_counts=counts.tolist())
    expected = by_hand(model, data[:2])
    assert torch.equal(found.token_counts, counts)
    torch.testing.assert_close(found.gradients, expected.gradients)
    assert found.num_targets == expected.num_targets
    halves = collect_statistics(model, data, loss_fn, limit=1, token_counts=counts / 2)
    assert halves.token_counts.dtype == torch.float64
    assert collect_statistics(model, data, loss_fn, limit=1, token_counts=counts * 2.0).token_counts.dtype == torch.long


@pytest.mark.parametrize(
    "change", ["frozen", "compiled", "overwritten", "in place", "no grad around", "inference mode"]
)
def test_however_the_model_is_run(model: Recurrent, change: str) -> None:
    data, expected = batches(), None
    expected = by_hand(model, data)
    loss: Callable[..., Any] = loss_fn
    if change == "frozen":
        model.requires_grad_(False)
    if change == "compiled":
        model.compile(backend="eager", fullgraph=True)
        model.decoder.compile(backend="eager")
    if change == "overwritten":
        loss = lambda model, batch: full_softmax_loss(model(batch[0]), batch[1], overwrite=True)  # noqa: E731
    if change == "in place":

        class InPlace(Recurrent):
            def forward(self, inputs: Tensor) -> Tensor:
                rows = self.encoder(inputs).mul_(2).div_(2)
                return self.decoder(input=self.rnn(rows)[0]).mul_(2).div_(2)

        model.__class__ = InPlace
    context = {"no grad around": torch.no_grad, "inference mode": torch.inference_mode}.get(change, torch.enable_grad)
    with context():
        found = collect_statistics(model, data, loss)
    assert_same(found, expected)


def test_nothing_is_changed(model: Recurrent) -> None:
    def random_loss(model: nn.Module, batch: Any) -> Tensor:
        assert not any(part.training for part in model.modules())
        return loss_fn(model, batch) + 0 * (torch.rand(()) + random.random() + np.random.rand())

    model.dropout.eval()
    model.encoder.weight.requires_grad_(False)
    model.decoder.weight.grad = torch.ones_like(model.decoder.weight)
    before = copy.deepcopy(model)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    collect_statistics(model, batches(), random_loss)
    with pytest.raises(ZeroDivisionError):
        collect_statistics(model, batches(), lambda *_: 1 / 0)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert [part.training for part in model.modules()] == [part.training for part in before.modules()]
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    for one, other in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.requires_grad == other.requires_grad
        assert (one.grad is None) == (one is not model.decoder.weight)
    assert torch.equal(model.decoder.weight.grad, torch.ones_like(model.decoder.weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(model: Recurrent, dtype: torch.dtype) -> None:
    # Many targets: a mean over them would vanish in float16.
    data = batches(1) + [(x.repeat(400, 1), y.repeat(400, 1)) for x, y in batches(1)]

    def narrow(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype):
            return loss_fn(model, batch)

    # An LSTM under autocast needs instructions that not every CPU has.
    model.rnn = nn.RNN(EMBEDDING_DIM, HEAD_DIM, batch_first=True).double()
    expected = collect_statistics(model, data, loss_fn)
    found = collect_statistics(model.float(), data, narrow)
    assert_same(found, expected, atol=0.02 if dtype == torch.bfloat16 else 0.003)


def test_models_of_half_precision() -> None:
    torch.manual_seed(0)
    exact = nn.Sequential(nn.Embedding(VOCAB_SIZE, 8), nn.LayerNorm(8), nn.Linear(8, VOCAB_SIZE)).double()
    data = [(x.repeat(2000, 1), y.repeat(2000, 1)) for x, y in batches(1)]
    found = collect_statistics(copy.deepcopy(exact).half(), data, loss_fn)
    assert_same(found, collect_statistics(exact, data, loss_fn), atol=0.005)


def test_padding_may_be_anything(model: Recurrent) -> None:
    """Rows of the batch that nothing reads: attention over no position at all gives NaN there."""

    class Broken(Recurrent):
        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.rnn(self.encoder(inputs))[0]
            padding = torch.zeros_like(hidden)
            padding[-1] = torch.nan
            return self.decoder(hidden + padding)

    def loss_of_others(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0])[:-1].flatten(0, 1), batch[1][:-1].flatten(), ignore_index=IGNORED)

    data = batches()
    for _, targets in data:
        targets[-1] = IGNORED
    expected = by_hand(model, data)
    model.__class__ = Broken
    found = collect_statistics(model, data, loss_of_others)
    assert_same(found, expected)


def test_batches_that_are_not_finite(model: Recurrent, recwarn: pytest.WarningsRecorder) -> None:
    good, bad = batches(2), batches(5, seed=1)

    def poisoned(model: nn.Module, batch: Any) -> Tensor:
        kind = next((k for k, other in enumerate(bad) if other is batch or torch.equal(other[0], batch[0])), None)
        loss = loss_fn(model, batch)
        if kind == 0:
            return loss * torch.nan
        if kind == 1:
            return loss / 0
        if kind == 2:
            # Finite, with an infinite gradient.
            return loss + model(batch[0]).sub(model(batch[0])).sqrt().sum()
        return loss

    bad[3][1].fill_(IGNORED)
    data = [bad[0], good[0], bad[1], bad[2], good[1], bad[3]]
    found = collect_statistics(model, data, poisoned)
    expected = collect_statistics(model, good, loss_fn)
    assert found.skipped_batches == 4
    assert torch.equal(found.token_counts, expected.token_counts)
    for kind in ("hidden", "hidden_mean", "probabilities", "gradients"):
        torch.testing.assert_close(getattr(found, kind), getattr(expected, kind), rtol=0, atol=0)
    assert "4 of 6 batches were left out of the statistics" in str(recwarn[0].message)

    with pytest.raises(ValueError, match="each of the 2 batches has a NaN or infinite loss"):
        collect_statistics(model, bad[:2], poisoned)
    with pytest.raises(ValueError, match="the dataloader yields nothing"):
        collect_statistics(model, iter([]), loss_fn)


def test_tied_gpt2() -> None:
    model = gpt2(vocab_size=VOCAB_SIZE, n_positions=8, n_embd=8).double()
    ids = torch.stack([x for x, _ in batches(1)][0:1]).flatten(0, 1)[:2].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    found = collect_statistics(model, [{"input_ids": ids, "attention_mask": mask}])

    model.eval()
    rows = model.transformer.wte(ids).detach().requires_grad_()
    output = model(inputs_embeds=rows, attention_mask=mask, output_hidden_states=True)
    targets = ids[:, 1:].where(mask[:, 1:] == 1, IGNORED)
    total = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum")
    (gradient,) = torch.autograd.grad(total, rows)
    kept = targets != IGNORED
    number, g = int(kept.sum()), gradient.flatten(0, 1)
    hidden = output.hidden_states[-1][:, :-1][kept].detach()
    probabilities = output.logits[:, :-1][kept].detach().softmax(-1).mean(0)
    expected = Statistics(
        torch.bincount(ids[mask == 1], minlength=VOCAB_SIZE),
        {"lm_head": hidden.T @ hidden / number},
        {"lm_head": hidden.mean(0)},
        {"lm_head": probabilities},
        {"transformer.wte": g.T @ g / number},
        number,
    )
    # transformers computes the loss in float32.
    assert_same(found, expected, atol=1e-6)
    found.check(find_tables(model))
    # The last position predicts nothing, and padding is not predicted.
    assert number == 3 * 4 + 2


def test_tables_that_are_called_several_times() -> None:
    """An encoder and a decoder that share one table, as T5 does, and a head that is called by turns."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB_SIZE, decoder_start_token_id=0, **sizes)).double()
    ids, labels = batches(1, ignored=0.0)[0]
    found = collect_statistics(model, [{"input_ids": ids, "labels": labels}])

    model.eval()
    shifted = torch.cat([torch.zeros(len(labels), 1, dtype=torch.long), labels[:, :-1]], dim=1)
    rows = [model.shared(tokens).detach().requires_grad_() for tokens in (ids, shifted)]
    loss = model(inputs_embeds=rows[0], decoder_inputs_embeds=rows[1], labels=labels).loss * labels.numel()
    gradients = [g.flatten(0, 1) for g in torch.autograd.grad(loss, rows)]
    expected = sum(g.T @ g for g in gradients) / labels.numel()
    torch.testing.assert_close(sum(found.gradients.values()), expected)
    assert torch.equal(found.token_counts, torch.bincount(torch.cat([ids, shifted]).flatten(), minlength=VOCAB_SIZE))
    assert list(found.hidden) == ["lm_head"]
    assert found.num_targets == labels.numel()


def test_scaled_embeddings_are_of_the_table() -> None:
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Embedding(VOCAB_SIZE, 8), nn.Tanh(), nn.Linear(8, VOCAB_SIZE)).double()
    scaled = copy.deepcopy(plain)
    scaled[0] = BartScaledWordEmbedding(VOCAB_SIZE, 8, padding_idx=None, embed_scale=4.0).double()
    with torch.no_grad():
        scaled[0].weight.copy_(plain[0].weight / 4)
    found, expected = (collect_statistics(model, batches(), loss_fn) for model in (scaled, plain))
    # A change of the row is four times that of the output.
    torch.testing.assert_close(found.gradients["0"], 16 * expected.gradients["0"])


@pytest.mark.parametrize("tables", ["auto", ["decoder", "encoder"]])
def test_compressed_tables(model: Recurrent, tables: Any) -> None:
    compress(model, "low_rank", ratio=1.3)
    assert type(model.decoder).__name__ == "CompressedLinear"
    found = collect_statistics(model, batches(ignored=0.5), loss_fn, tables=tables)
    one = collect_statistics(model, batches(ignored=0.5), loss_fn, tables="decoder", token_counts=[1] * VOCAB_SIZE)
    dense = copy.deepcopy(model)
    densify(dense)
    expected = collect_statistics(dense, batches(ignored=0.5), loss_fn)
    assert_same(found, expected, atol=1e-10)
    assert list(one.hidden) == ["decoder"]
    assert not one.gradients
    assert torch.equal(one.hidden["decoder"], found.hidden["decoder"])
    # One compressed table and its dense partner.
    compress(dense, "low_rank", ratio=1.3, tables=["encoder"])
    assert type(dense.decoder) is nn.Linear
    found = collect_statistics(dense, batches(), loss_fn, tables=tables)
    assert (list(found.gradients), list(found.hidden)) == (["encoder"], ["decoder"])


def test_heads_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, VOCAB_SIZE)).double().requires_grad_(False)
    data = [(torch.randn(12, 4, dtype=torch.float64), torch.randint(VOCAB_SIZE, (12,)))]
    with pytest.raises(ValueError, match="table '2' is read by no embedding.*give token_counts"):
        collect_statistics(model, data, loss_fn, tables="2")
    found = collect_statistics(model, data, loss_fn, tables="2", token_counts=torch.ones(VOCAB_SIZE))
    hidden = model[:2](data[0][0])
    torch.testing.assert_close(found.hidden["2"], hidden.T @ hidden / 12)
    assert found.num_targets == 12


def test_embeddings_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCAB_SIZE, 8), nn.Flatten(), nn.Linear(40, 3)).double()
    data = [(batch[0], batch[0][:, 0] % 3) for batch in batches()]
    with pytest.raises(ValueError, match=r"none of the tables is a head: let loss_fn give \(mean loss, number"):
        collect_statistics(model, data, loss_fn)
    found = collect_statistics(model, data, lambda *arguments: (loss_fn(*arguments), len(arguments[1][1])))
    assert found.num_targets == sum(len(batch[0]) for batch in data)
    assert list(found.gradients) == ["0"]


def test_heads_that_are_not_called(model: Recurrent) -> None:
    def sampled(model: Any, batch: Any) -> Tensor:
        hidden = model.rnn(model.encoder(batch[0]))[0]
        return (hidden * model.decoder.weight[batch[1].clamp(min=0)]).sum(-1).mean()

    for loss in (sampled, lambda *arguments: (sampled(*arguments), 10)):
        with pytest.raises(ValueError, match="head 'decoder' was never called with gradients enabled at a target"):
            collect_statistics(model, batches(), loss)
    found = collect_statistics(model, batches(), lambda *a: (sampled(*a), 10), tables="encoder")
    assert found.num_targets == 30

    def without_embedding(model: Any, batch: Any) -> Tensor:
        with torch.no_grad():
            rows = model.encoder(batch[0])
        return F.cross_entropy(model.decoder(model.rnn(rows)[0]).flatten(0, 1), batch[1].flatten())

    with pytest.raises(ValueError, match="embedding 'encoder' was never called with gradients enabled, so"):
        collect_statistics(model, batches(), without_embedding)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"loss_fn": lambda *_: 1.0}, "loss .*float"),
        ({"loss_fn": lambda model, batch: model(batch[0])}, r"loss .*\(2, 5, 90\)"),
        ({"loss_fn": lambda model, batch: model(batch[0]).sum().detach()}, "does not depend on the tables 'encoder'"),
        ({"loss_fn": None}, r"model is called as model\(\*\*batch\), but a batch is a tuple"),
        ({"limit": 0}, "limit .*0"),
        ({"token_counts": torch.ones(89)}, "one entry for each of the 90 rows of table 'encoder'"),
        ({"token_counts": [-1.0, *[1] * 89]}, "entry 0 is -1.0"),
        ({"token_counts": [1] * 89 + [float("nan")]}, "entry 89 is nan"),
        ({"tables": ["nothing"]}, "no module 'nothing'"),
        ({"tables": []}, "empty list"),
        ({"tables": ["encoder", "other"]}, "table 'other' is read by no embedding"),
        ({"batches": [{"inputs": batches()[0][0]}], "loss_fn": None}, "Recurrent gives a Tensor .*give loss_fn"),
    ],
)
def test_mistakes(model: Recurrent, arguments: dict[str, Any], said: str) -> None:
    model.other = nn.Linear(HEAD_DIM, 30)
    with pytest.raises(ValueError, match=said):
        collect_statistics(model, **{"batches": batches(), "loss_fn": loss_fn, "tables": _BOTH, **arguments})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_on_cuda(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = Recurrent(kind).double()
    expected = collect_statistics(model, batches(), loss_fn)
    model.cuda()
    assert_same(collect_statistics(model, batches(), loss_fn), expected, atol=1e-8)
    assert (model.rnn.training, model.rnn.dropout) == (True, 0.5)
