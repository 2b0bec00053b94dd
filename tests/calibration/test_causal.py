"""Statistics of causal language models whose head reads a few positions at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_embcompress.calibration import causal
from lightning_embcompress.calibration.recomputing import calling, kept_bytes, stacked_layers
from lightning_embcompress.calibration.statistics import Statistics, collect_statistics
from toys import gpt2

VOCAB_SIZE, POSITIONS = 90, 7
_SMALL = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LAYERS = {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}


def _gpt2(**changes: Any) -> Any:
    return gpt2(vocab_size=VOCAB_SIZE, n_positions=16, n_embd=8, **changes)


def _opt() -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "word_embed_proj_dim": 6, "ffn_dim": 8, "num_attention_heads": 2}
    return OPTForCausalLM(OPTConfig(**sizes, **_SMALL))


def _gemma2() -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    heads = {"num_key_value_heads": 1, "head_dim": 4}
    return Gemma2ForCausalLM(Gemma2Config(**_LAYERS, **heads, **_SMALL, final_logit_softcapping=0.2))


def _bert() -> Any:
    from transformers import BertConfig, BertLMHeadModel

    return BertLMHeadModel(BertConfig(**_LAYERS, **_SMALL, is_decoder=True))


def _bart() -> Any:
    from transformers import BartConfig, BartForCausalLM

    sizes = {"d_model": 8, "decoder_layers": 1, "decoder_ffn_dim": 8, "decoder_attention_heads": 2}
    return BartForCausalLM(BartConfig(**sizes, **_SMALL, is_decoder=True, is_encoder_decoder=False))


def _model(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make().double()


def _data() -> list[dict[str, Tensor]]:
    ids = torch.randint(5, VOCAB_SIZE, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    nothing = torch.full_like(ids, -100)
    return [
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": ids.flip(1)},
        {"input_ids": ids, "labels": nothing},
    ]


def _at_once(model: Any, data: Any) -> Statistics:
    """All logits of a batch together, and the loss that the model computes."""
    given = []
    for batch in data:
        labels = batch.get("labels", batch["input_ids"])
        given.append({**batch, "labels": labels.where(batch.get("attention_mask", torch.ones_like(labels)) == 1, -100)})
    return collect_statistics(model, given, lambda model, batch: model(**batch).loss)


def _assert_same(found: Statistics, expected: Statistics, *, but: tuple[str, ...] = (), **tolerances: float) -> None:
    assert torch.equal(found.token_counts, expected.token_counts)
    assert found.num_targets == expected.num_targets
    for kind in ("hidden", "hidden_mean", "probabilities", "squared_probabilities", "gradients", "gradient_energies"):
        if kind not in but:
            one, other = getattr(found, kind), getattr(expected, kind)
            assert list(one) == list(other)
            for path, tensor in one.items():
                scale = other[path].abs().max()
                torch.testing.assert_close(
                    tensor / scale, other[path] / scale, **{"rtol": 0, "atol": 1e-6, **tolerances}, msg=kind
                )


@contextmanager
def _rows_of_logits(model: Any) -> Iterator[list[int]]:
    """How many positions the head reads at each call with gradients."""
    rows: list[int] = []

    def note(_: Any, __: Any, logits: Tensor) -> None:
        if torch.is_grad_enabled():
            rows.append(logits[..., 0].numel())

    handle = model.get_output_embeddings().register_forward_hook(note)
    yield rows
    handle.remove()


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal, "_positions", lambda vocab_size, device: POSITIONS)


@pytest.mark.parametrize("make", [_gpt2, _opt, _bert])
def test_pieces_give_what_all_logits_give(make: Callable[[], Any]) -> None:
    model = _model(make)
    data = _data()[:2]
    expected = _at_once(model, data)
    with _rows_of_logits(model) as rows:
        found = collect_statistics(model, data)
    # Positions without a target are not read at all.
    assert max(rows) == POSITIONS
    assert sum(rows) == found.num_targets == 3 * 10 + 2 * 10 + 6
    # transformers computes the loss in float32.
    _assert_same(found, expected)


def test_batches_without_a_target_are_counted() -> None:
    model = _model(_gpt2)
    found, without = collect_statistics(model, _data()), collect_statistics(model, _data()[:2])
    assert found.num_targets == without.num_targets
    assert found.skipped_batches == 0
    assert found.token_counts.sum() == without.token_counts.sum() + 33
    torch.testing.assert_close(found.hidden, without.hidden)
    torch.testing.assert_close(found.gradients, without.gradients)


def test_what_the_model_does_with_logits_is_in_their_probabilities() -> None:
    model = _model(_gemma2).eval()
    data = _data()[1:2]
    found = collect_statistics(model, data)
    _assert_same(found, _at_once(model, data), but=("hidden", "probabilities", "squared_probabilities"))
    with torch.no_grad():
        probabilities = model(**data[0]).logits[:, :-1].softmax(-1)
    torch.testing.assert_close(found.probabilities["lm_head"], probabilities.mean((0, 1)))
    torch.testing.assert_close(found.squared_probabilities["lm_head"], probabilities.square().mean((0, 1)))


def test_a_factor_of_the_logits_counts_as_one_of_the_hidden_states() -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    sizes = {**_LAYERS, **_SMALL, "num_key_value_heads": 1, "tie_word_embeddings": False}
    scaled = _model(lambda: GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=4.0)))
    plain = _model(lambda: GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=1.0)))
    plain.load_state_dict(scaled.state_dict())
    with torch.no_grad():
        plain.lm_head.weight /= 4
    found, expected = (collect_statistics(model, _data()) for model in (scaled, plain))
    found.hidden["lm_head"] *= 16
    _assert_same(found, expected)


def _with_another_loss() -> Any:
    model = _gpt2()
    of_words = model.forward

    def forward(*arguments: Any, **keywords: Any) -> Any:
        output = of_words(*arguments, **keywords)
        if output.loss is not None:
            output.loss = output.loss + output.logits.square().mean()
        return output

    model.forward = forward
    return model


def _with_neighbours() -> Any:
    model = _gpt2()
    model.lm_head.register_forward_pre_hook(lambda _, arguments: (arguments[0].cumsum(1),))
    return model


@pytest.mark.parametrize("make", [_bart, _with_another_loss, _with_neighbours])
def test_other_models_get_all_positions_at_once(make: Callable[[], Any]) -> None:
    model = _model(make)
    data = _data()[1:2]
    with _rows_of_logits(model) as rows:
        found = collect_statistics(model, data)
    assert rows == [33]
    data[0]["labels"] = data[0]["input_ids"]
    _assert_same(found, collect_statistics(model, data, lambda model, batch: model(**batch).loss))


def test_a_batch_that_is_not_finite_is_left_out_whole() -> None:
    model = _model(_gpt2)
    data = _data()[:2]
    expected = collect_statistics(model, data[1:])

    def spoil(_: Any, arguments: tuple[Tensor, ...], logits: Tensor) -> Tensor | None:
        spoilt["left"] -= torch.is_grad_enabled()
        return logits * torch.nan if spoilt["left"] == 0 and torch.is_grad_enabled() else None

    # The second piece of the first batch.
    spoilt = {"left": 2}
    model.lm_head.register_forward_hook(spoil)
    with pytest.warns(UserWarning, match="1 of 2 batches"):
        found = collect_statistics(model, data)
    assert found.skipped_batches == 1
    torch.testing.assert_close(found.hidden, expected.hidden)
    torch.testing.assert_close(found.gradients, expected.gradients)


def test_the_model_is_as_before() -> None:
    model = _model(_gpt2)
    expected = collect_statistics(model, _data())
    assert not {"forward"} & vars(model.transformer).keys()
    # As accelerate wraps modules.
    wrapped = copy.deepcopy(model)
    own = wrapped.transformer.forward
    wrapped.transformer.forward = lambda *arguments, **keywords: own(*arguments, **keywords)
    kept = wrapped.transformer.forward
    _assert_same(collect_statistics(wrapped, _data()), expected, atol=1e-12)
    assert wrapped.transformer.forward is kept

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError

    model.lm_head.register_forward_pre_hook(broken)
    with pytest.raises(ZeroDivisionError):
        collect_statistics(model, _data())
    assert not {"forward"} & vars(model.transformer).keys()


@pytest.mark.parametrize("make", [_gpt2, _opt, _gemma2])
def test_layers_are_computed_twice_where_memory_is_short(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = _model(make)
    expected = collect_statistics(model, _data())
    small, large = _data()[1], {"input_ids": torch.randint(3, VOCAB_SIZE, (400, 11))}
    calls: list[int] = []

    def count(forward: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        return forward(*arguments, **keywords)

    layer = stacked_layers(model)[-1]
    with calling(layer, count), caplog.at_level("INFO", "lightning.pytorch"):
        for free, batches, times in ((10**9, [small, large], 2), (10**4, [large, small], 4)):
            monkeypatch.setattr(causal, "free_memory", lambda device, free=free: free)
            calls.clear()
            collect_statistics(model, batches)
            # Three times on a few tokens before.
            assert len(calls) == 3 + times
    assert [record.message for record in caplog.records if "4,400 tokens" in record.message]
    monkeypatch.setattr(causal, "free_memory", lambda device: 10_000)
    _assert_same(collect_statistics(model, _data()), expected, atol=1e-12)
    assert "forward" not in vars(layer)


def test_what_is_kept_for_the_way_back_is_counted() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.ModuleList([nn.Linear(16, 16)])[0])
    states = torch.randn(32, 8, requires_grad=True)
    # What the first layer is given, and what the activation gives; weights are there anyway.
    assert kept_bytes(model, lambda: model(states)) == 4 * 32 * (8 + 16)


def test_half_precision_and_autocast() -> None:
    model = _model(_gpt2)
    expected = collect_statistics(model, _data())
    found = collect_statistics(copy.deepcopy(model).bfloat16(), _data())
    _assert_same(found, expected, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        found = collect_statistics(copy.deepcopy(model).float(), _data())
    _assert_same(found, expected, atol=0.1)


def test_parameters_take_no_gradients() -> None:
    model = _model(_gpt2)
    seen = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        seen.append(any(parameter.requires_grad for parameter in model.parameters()))
        logits = model(**batch).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())

    collect_statistics(model, _data()[1:2], loss_fn)
    assert seen == [False]
    assert all(parameter.requires_grad for parameter in model.parameters())
