"""The weight that a compressed layer answers with, against the table that it stands for."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_embcompress.callbacks.passes import copied
from lightning_embcompress.compression.plan import compress
from lightning_embcompress.layers.compressed import CompressedEmbedding, CompressedLinear
from lightning_embcompress.layers.fused_loss import fused_cross_entropy
from lightning_embcompress.layers.table_weight import TableWeight
from lightning_embcompress.methods.registry import Factorization, Quantization
from lightning_embcompress.quantization.aware import convert_qat, prepare_qat
from lightning_embcompress.utils.storage import holds_views
from toys import factors_of, model_of

_SIZE, _DIM = 200, 8
_HIDDEN = torch.randn(2, 3, _DIM, generator=torch.Generator().manual_seed(0))
_SHARES = torch.rand(2, 3, _SIZE, generator=torch.Generator().manual_seed(1)).softmax(-1)
_BIAS = torch.randn(_SIZE, generator=torch.Generator().manual_seed(2))
_IDS = torch.tensor([[0, 7, -1], [199, 7, 3]])

_ANSWERED: dict[str, Callable[[Any], Tensor]] = {
    "linear": lambda w: F.linear(_HIDDEN, w),
    "linear with a bias": lambda w: F.linear(_HIDDEN, w, _BIAS),
    "scaled": lambda w: F.linear(_HIDDEN * _DIM**-0.5, weight=w),
    "matmul with T": lambda w: _HIDDEN @ w.T,
    "matmul with mT": lambda w: torch.matmul(_HIDDEN, w.mT),
    "mm with t": lambda w: _HIDDEN[0].mm(w.t()),
    "transpose": lambda w: _HIDDEN.matmul(w.transpose(-1, 0)),
    "permute": lambda w: _HIDDEN @ w.permute(1, 0),
    "transposed twice": lambda w: F.linear(_HIDDEN, w.T.T),
    "from the left": lambda w: w @ _HIDDEN[0].T,
    "batched from the left": lambda w: w.matmul(_HIDDEN.mT),
    "a vector": lambda w: w @ _HIDDEN[0, 0],
    "addmm": lambda w: torch.addmm(_BIAS, _HIDDEN[0], w.t()),
    "inner": lambda w: torch.inner(_HIDDEN, w),
    "einsum": lambda w: torch.einsum("bsd,vd->bsv", _HIDDEN, w),
    "einsum in another order": lambda w: torch.einsum("vd, sbd -> bvs", w, _HIDDEN.transpose(0, 1)),
    "einsum of any dimensions": lambda w: torch.einsum("...d,vd->v...", _HIDDEN, w),
    "mixture of rows": lambda w: _SHARES @ w,
    "mixture by einsum": lambda w: torch.einsum("bsv,vd->bsd", _SHARES, w),
    "embedding": lambda w: F.embedding(_IDS.abs(), w),
    "items": lambda w: w[_IDS],
    "an item": lambda w: w[-2],
    "a list": lambda w: w[[5, 3]],
    "a slice": lambda w: w[190:],
    "a mask": lambda w: w[torch.arange(_SIZE) > 150],
    "columns of rows": lambda w: w[_IDS, 2:5],
    "index_select": lambda w: w.index_select(0, _IDS[1]),
    "in another dtype": lambda w: F.linear(_HIDDEN.double(), w.to(torch.float64)).float(),
    "as another tensor": lambda w: F.linear(_HIDDEN.double().to(w), w),
}


def _factors(method: str = "low_rank") -> Factorization[Any]:
    return factors_of(method, _SIZE, _DIM)


def _gradients(factors: Factorization[Any], result: Tensor) -> list[Tensor]:
    factors.zero_grad()
    (result * torch.linspace(-1, 1, result.numel()).view(result.shape)).sum().backward()
    return [parameter.grad.clone() for parameter in factors.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("name", _ANSWERED)
@pytest.mark.parametrize("method", ["low_rank", "transform_coding"])
def test_answers_as_the_table_does(method: str, name: str) -> None:
    factors, call = _factors(method), _ANSWERED[name]
    result = call(CompressedLinear(factors).weight)
    assert type(result) is Tensor
    every = torch.arange(_SIZE)
    table = factors.rows(every)
    torch.testing.assert_close(result, call(table), rtol=1e-4, atol=1e-5)
    found, expected = _gradients(factors, result), _gradients(factors, call(factors.rows(every)))
    assert any(bool(gradient.any()) for gradient in expected)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_padding_row_of_a_functional_embedding_gets_no_gradient() -> None:
    factors, ids = _factors(), torch.tensor([7, 199, 7])
    weight = CompressedEmbedding(factors).weight
    found = _gradients(factors, F.embedding(ids, weight, padding_idx=-1))
    expected = _gradients(factors, F.embedding(ids, factors.rows(torch.arange(_SIZE)), padding_idx=_SIZE - 1))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_says_what_the_table_is(dtype: torch.dtype) -> None:
    weight = CompressedEmbedding(_factors().to(dtype)).weight
    assert (weight.dtype, weight.device, weight.shape) == (dtype, torch.device("cpu"), (_SIZE, _DIM))
    assert (weight.ndim, len(weight), weight.size(-1), weight.numel()) == (2, _SIZE, _DIM, _SIZE * _DIM)
    assert (weight.is_meta, weight.is_floating_point(), weight.grad) == (False, True, None)
    assert torch.zeros(2).to(weight.dtype).dtype == torch.zeros(2).type_as(weight).dtype == dtype
    for made in (torch.zeros_like(weight), weight.new_zeros(_SIZE, _DIM)):
        assert (type(made), made.dtype, made.shape) == (Tensor, dtype, (_SIZE, _DIM))
    assert not made.any()
    assert "stored as LowRank" in repr(weight)
    assert f"{weight}" == repr(weight)


_REFUSED: dict[str, Callable[[Any], object]] = {
    "sum": lambda w: w.sum(),
    "norm": lambda w: w.norm(dim=-1),
    "normalize": lambda w: F.normalize(w),
    "add": lambda w: w + 1,
    "radd": lambda w: 1.0 + w,
    "eq": lambda w: w == torch.zeros(_SIZE, _DIM),
    "cat": lambda w: torch.cat([torch.zeros(1, _DIM), w]),
    "clone": lambda w: w.detach().clone(),
    "numpy": lambda w: w.detach().numpy(),
    "untyped_storage": lambda w: w.untyped_storage(),
    "unbind": lambda w: list(w),
    "indexing": lambda w: w[:, 1],
    "__setitem__": lambda w: w.__setitem__(0, 1.0),
    "normal_": lambda w: nn.init.normal_(w),
    "uniform_": lambda w: w.data.uniform_(-0.1, 0.1),
    "zero_": lambda w: w.data.zero_(),
    "fill_": lambda w: w.data[3].fill_(0.0),
    "__setitem__ ": lambda w: w.detach()[3:5].__setitem__(0, 1.0),
    "copy_": lambda w: w.copy_(torch.zeros(_SIZE, _DIM)),
    "data": lambda w: setattr(w, "data", torch.zeros(_SIZE, _DIM)),
    "grad": lambda w: setattr(w, "grad", torch.zeros(_SIZE, _DIM)),
    "register_hook": lambda w: w.register_hook(lambda gradient: gradient * 0),
    "requires_grad_": lambda w: setattr(w.detach(), "requires_grad", True),
    "requires_grad_ ": lambda w: nn.Parameter(w),
    "an optimizer": lambda w: torch.optim.Adam([w]),
    "linear_cross_entropy": lambda w: F.linear_cross_entropy(_HIDDEN[0], w, torch.tensor([1, 2, 3])),
    "embedding": lambda w: F.embedding(torch.tensor([1]), w, max_norm=1.0),
}


@pytest.mark.parametrize("name", _REFUSED)
def test_refuses_what_needs_numbers(name: str) -> None:
    layer = CompressedLinear(_factors())
    before = layer.factorization.materialize()
    with pytest.raises(TypeError, match=rf"^{name.strip()} .* table of 200 x 8 is stored as LowRank.*materialize\(\)"):
        _REFUSED[name](layer.weight)
    assert torch.equal(layer.factorization.materialize(), before)


class _FusedLoss(torch.autograd.Function):
    """A loss of another library, which computes the gradient of the weight by itself."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return (hidden @ weight.T).sum()

    @staticmethod
    def backward(ctx: Any, *gradient: Any) -> Any:
        hidden, weight = ctx.saved_tensors
        ones = torch.ones(len(hidden), len(weight))
        return ones @ weight, ones.T @ hidden


@torch.no_grad()
def test_rows_that_were_read_are_not_the_table() -> None:
    layer = CompressedEmbedding(_factors())
    rows = layer.weight[1:]
    assert torch.equal(rows, layer.factorization.materialize()[1:])
    assert type(_HIDDEN @ rows.T) is Tensor
    with pytest.raises(TypeError, match="zero_ .* compressed layer"):
        rows.zero_()
    # Ids in a tensor give a copy of a dense weight, too.
    layer.weight[_IDS].zero_()


def test_passes_over_data_leave_the_weight_of_frozen_factors_alone() -> None:
    weight = CompressedEmbedding(_factors()).weight.requires_grad_(False)
    assert copied([weight], {})[0] is weight


def test_gradient_of_the_whole_weight_is_not_lost_silently() -> None:
    layer = CompressedLinear(_factors())
    loss = _FusedLoss.apply(_HIDDEN[0].clone().requires_grad_(), layer.weight)
    with pytest.raises(TypeError, match=r"gradient of a whole table.*head_softmax_loss"):
        loss.backward()  # type: ignore[union-attr]


def test_tied_layers_have_one_weight_and_parameters_do_not_list_it() -> None:
    factors = _factors()
    model = nn.ModuleList([CompressedEmbedding(factors), CompressedLinear(factors), CompressedLinear(_factors())])
    assert model[0].weight is model[1].weight is model[0].weight
    assert model[2].weight is not model[0].weight
    assert model[0].weight.data_ptr() == model[1].weight.data_ptr() != model[2].weight.data_ptr()
    assert not any(isinstance(one, TableWeight) for one in [*model.parameters(), *model.state_dict().values()])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other[0].weight is other[1].weight
        assert other[0].weight is not model[0].weight
    moved = model.to(torch.bfloat16)
    assert moved[0].weight is moved[1].weight
    assert moved[0].weight.dtype == torch.bfloat16


def test_assigning_the_weight_of_another_layer_ties_them() -> None:
    embedding, head = CompressedEmbedding(_factors()), CompressedLinear(_factors("transform_coding"))
    head.weight = embedding.weight
    assert head.factorization is embedding.factorization
    assert torch.equal(head(_HIDDEN), embedding.factorization.logits(_HIDDEN))
    for value in (nn.Parameter(torch.zeros(_SIZE, _DIM)), torch.zeros(_SIZE, _DIM), None, embedding.weight.T):
        with pytest.raises(ValueError, match=r"weight of a CompressedLinear.*200 x 8.*densify"):
            head.weight = value
    with pytest.raises(ValueError, match=r"CompressedLinear of 200 x 8 .* \(60, 8\)"):
        head.weight = CompressedEmbedding(factors_of("low_rank", 60, _DIM)).weight
    with pytest.raises(TypeError, match="compressed layer"):
        nn.Linear(_DIM, _SIZE).weight = embedding.weight
    assert head.factorization is embedding.factorization


def test_freezing_the_weight_freezes_the_factors() -> None:
    layer = CompressedEmbedding(_factors())
    layer.weight.requires_grad_(False)
    assert not layer.weight.requires_grad
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    layer.weight.requires_grad = True
    assert layer.weight.requires_grad
    assert all(parameter.requires_grad for parameter in layer.parameters())


def test_detached_weight_gives_no_gradient_to_the_factors() -> None:
    factors, hidden = _factors(), _HIDDEN.clone().requires_grad_()
    for weight in (CompressedLinear(factors).weight.detach(), CompressedLinear(factors).weight.data):
        assert not weight.requires_grad
        F.linear(hidden, weight).sum().backward()
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, 2 * factors.materialize().sum(0).expand_as(hidden), rtol=1e-4, atol=1e-4)
    assert all(parameter.grad is None for parameter in factors.parameters())
    assert weight.requires_grad_(False) is weight


def test_copies_of_a_weight_have_a_table_of_their_own() -> None:
    layer = CompressedEmbedding(_factors())
    for other in (copy.deepcopy(layer.weight.T), pickle.loads(pickle.dumps(layer.weight.T))):
        assert other.factorization is not layer.factorization
        torch.testing.assert_close(_HIDDEN @ other, layer.factorization.logits(_HIDDEN))
    # A copy of the factorization, which shares its parameters, has not its weight.
    assert CompressedEmbedding(copy.copy(layer.factorization)).weight is not layer.weight


def test_follows_the_table_through_quantization() -> None:
    model = model_of("tied", dropout=0.0).eval()
    compress(model, "low_rank", ratio=2)
    hidden, ids = torch.randn(3, model.encoder.embedding_dim), torch.tensor([1, 5])
    for packs in (False, True):
        convert_qat(model) if packs else prepare_qat(model, Quantization(bits=8))
        weight = model.encoder.weight
        assert weight is model.decoder.weight
        assert weight.requires_grad is not packs
        torch.testing.assert_close(F.linear(hidden, weight, model.decoder.bias), model.decoder(hidden))
        assert torch.equal(weight[ids], model.encoder(ids))
        torch.testing.assert_close(F.linear(hidden, weight.detach()), model.encoder.factorization.logits(hidden))


def test_losses_read_the_factors_of_a_layer_whose_weight_was_read() -> None:
    head, targets = CompressedLinear(_factors()), torch.tensor([1, 5, 7])
    expected = fused_cross_entropy(head, _HIDDEN[0], targets)
    assert head.weight.requires_grad
    assert torch.equal(fused_cross_entropy(head, _HIDDEN[0], targets), expected)
    assert not holds_views(head)


def test_on_the_meta_device_changes_in_place_do_nothing() -> None:
    layer = CompressedLinear(_factors()).to("meta")
    weight = layer.weight
    assert weight.is_meta
    assert nn.init.normal_(weight) is weight
    assert F.linear(_HIDDEN.to("meta"), weight).shape == (2, 3, _SIZE)
    with pytest.raises(TypeError, match="clone"):
        weight.clone()


def test_autocast_narrows_logits_as_it_does_those_of_the_layer() -> None:
    layer = CompressedLinear(_factors())
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(_HIDDEN, layer.weight).dtype == torch.bfloat16
        assert torch.equal(F.linear(_HIDDEN, layer.weight), layer(_HIDDEN))
        assert F.embedding(_IDS.abs(), layer.weight).dtype == torch.float32


class _Functional(nn.Module):
    """Ties by a function of its embedding's weight."""

    def __init__(self, head: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.embedding, self.head = CompressedEmbedding(_factors()), head

    def forward(self, ids: Tensor) -> Tensor:
        weight = self.embedding.weight
        return self.head(torch.tanh(self.embedding(ids)).to(weight.dtype) * (weight.size(0) / weight.numel()), weight)


@pytest.mark.parametrize("head", [F.linear, lambda hidden, weight: hidden @ weight.T])
def test_compiles_and_exports(head: Callable[[Tensor, Any], Tensor]) -> None:
    model, ids = _Functional(head), torch.tensor([[1, 5, 7]])
    expected = model(ids)
    gradients = _gradients(model.embedding.factorization, expected)
    torch._dynamo.reset()
    found = torch.compile(model, backend="aot_eager", fullgraph=True)(ids)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(_gradients(model.embedding.factorization, found), gradients)
    torch.testing.assert_close(torch.export.export(model, (ids,)).module()(ids), expected)
