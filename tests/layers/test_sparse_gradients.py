"""Embeddings whose factors get sparse gradients: the same numbers, and nothing as large as the table."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adagrad, Adam, SparseAdam
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

from lightning_embcompress.compression.plan import compress, densify
from lightning_embcompress.integrations.saved import load_compressed, save_compressed
from lightning_embcompress.layers.compressed import CompressedEmbedding, CompressedLinear
from lightning_embcompress.methods.full_table import FullTable
from lightning_embcompress.methods.group_reduce.factorization import BlockLowRank
from lightning_embcompress.methods.registry import Factorization, Quantization
from lightning_embcompress.quantization.aware import prepare_qat
from toys import factors_of

VOCAB_SIZE, DIM = 120, 12
IDS = torch.tensor([[3, 5, 3, 117], [7, 5, 3, 64]])


CASES = ["group_reduce", "group_reduce prepared", "group_reduce learned", "group_reduce frozen"]
CASES += ["transform_coding", "transform_coding prepared"]


def _factors(case: str) -> Factorization[Any]:
    """A method, in the state that follows its name."""
    method, _, state = case.partition(" ")
    factors = factors_of(method, VOCAB_SIZE, DIM)
    if not state:
        return factors
    prepared = factors.prepared(Quantization(group_size=16, ranges="learned" if state == "learned" else "minmax"))
    if state == "frozen":
        prepared.freeze_ranges()
    return prepared


def _pair(factors: Factorization[Any], **given: Any) -> tuple[CompressedEmbedding, CompressedEmbedding]:
    """Layers of equal factors, of dense gradients and of sparse ones."""
    return CompressedEmbedding(copy.deepcopy(factors), **given), CompressedEmbedding(factors, **given, sparse=True)


def _backward(layer: nn.Module, ids: Tensor) -> Tensor:
    rows = layer(ids)
    (rows * torch.linspace(-1, 2, rows.numel()).view(rows.shape)).sum().backward()
    return rows.detach()


def _check_equal(dense: nn.Module, sparse: nn.Module) -> int:
    """Compare gradients, and count them."""
    count = 0
    for (name, plain), own in zip(dense.named_parameters(), sparse.parameters(), strict=True):
        assert (plain.grad is None) == (own.grad is None), name
        if plain.grad is not None and own.grad is not None:
            assert own.grad.is_sparse, name
            torch.testing.assert_close(own.grad.to_dense(), plain.grad, msg=lambda said, name=name: f"{name}: {said}")
            count += 1
    return count


def _own_rows(factors: Factorization[Any]) -> list[nn.Parameter]:
    """Factors with a row for every token, of all tokens together."""
    found = [
        parameter
        for name, parameter in factors.named_parameters()
        if name.split(".")[0] in ("coefficients", "weight", "cores") and not name.endswith("scales")
    ]
    return found if sum(len(parameter) for parameter in found) == VOCAB_SIZE else []


def _nnz(factors: Sequence[nn.Parameter]) -> int:
    """Rows of gradients, each of which they have once."""
    assert all(parameter.grad._nnz() == parameter.grad.coalesce()._nnz() for parameter in factors)
    return sum(parameter.grad._nnz() for parameter in factors)


@pytest.mark.parametrize("case", CASES)
def test_only_rows_that_are_looked_up_are_in_the_gradient(case: str) -> None:
    _, sparse = _pair(_factors(case))
    own = _own_rows(sparse.factorization)
    # Codes of tokens are no factors.
    assert bool(own) == (case != "transform_coding")
    _backward(sparse, IDS)
    if own:
        # Words of blocks of rank 0 have no numbers of their own.
        wide = [parameter for parameter in own if parameter.shape[1]]
        words = len(IDS.unique())
        assert words / 2 <= _nnz(wide) <= words
        assert len(wide) < len(own) or _nnz(wide) == words
    scales = [parameter for name, parameter in sparse.named_parameters() if name.endswith("scales")]
    assert bool(scales) == (case.endswith("learned") or case == "transform_coding prepared")


def test_blocks_without_an_id_get_gradients_without_rows() -> None:
    # Empty blocks, of rank 0, kept as rows, and of a rank of their own.
    factors = BlockLowRank(20, 4, [6, 0, 2, 5, 7], [2, 0, 2, 0, 1])
    for parameter in factors.parameters():
        nn.init.normal_(parameter)
    dense, sparse = _pair(factors)
    optimizer = SparseAdam(sparse.parameters(), lr=0.1)
    for ids, expected in (([0, 5], 2), ([6], 1), ([8, 9], 0), ([19, 13, 19], 2)):
        dense.zero_grad()
        optimizer.zero_grad()
        assert torch.equal(_backward(dense, torch.tensor(ids)), _backward(sparse, torch.tensor(ids)))
        assert _check_equal(dense, sparse) == 6
        counts = [parameter.grad._nnz() for parameter in factors.coefficients]
        assert sorted(counts) == [0, 0, 0, 0, expected]
        optimizer.step()
        dense.load_state_dict(sparse.state_dict())


@pytest.mark.parametrize("kind", [SparseAdam, SGD, Adagrad])
def test_a_whole_table_trains_as_that_of_torch(kind: Any) -> None:
    reference = nn.Embedding(VOCAB_SIZE, DIM, padding_idx=5, sparse=True)
    layer = CompressedEmbedding(FullTable.decompose(reference.weight, 10**9), padding_idx=5, sparse=True)
    generator = torch.Generator().manual_seed(1)
    optimizers = [kind(one.parameters(), lr=0.05) for one in (reference, layer)]
    for _ in range(5):
        ids = torch.randint(0, 20, (3, 4), generator=generator)
        for one, optimizer in zip((reference, layer), optimizers, strict=True):
            optimizer.zero_grad()
            _backward(one, ids)
            optimizer.step()
        torch.testing.assert_close(layer.factorization.weight, reference.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_the_first_step_is_that_of_adam_and_later_ones_leave_other_rows_alone(case: str) -> None:
    dense, sparse = _pair(_factors(case).requires_grad_(True), padding_idx=5)
    start = copy.deepcopy(sparse.state_dict())
    adam, optimizer = Adam(dense.parameters(), lr=0.01, eps=1e-12), SparseAdam(sparse.parameters(), lr=0.01, eps=1e-12)
    _backward(dense, IDS)
    _backward(sparse, IDS)
    gradients = [parameter.grad for parameter in dense.parameters()]
    adam.step()
    optimizer.step()
    for plain, own, gradient in zip(dense.parameters(), sparse.parameters(), gradients, strict=True):
        # Of a gradient that is nothing but rounding the sign, and so the step, may be either.
        clear = torch.zeros_like(plain) if gradient is None else (gradient.abs() > 1e-6) | (gradient == 0)
        torch.testing.assert_close(own[clear.bool()], plain[clear.bool()], rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(start[name], value) for name, value in sparse.state_dict().items())
    for ids in (IDS + 1, IDS + 2):
        optimizer.zero_grad()
        _backward(sparse, ids)
        optimizer.step()
    touched = torch.cat([IDS.flatten() + shift for shift in range(3)]).unique()
    moved = 0
    for name, parameter in sparse.named_parameters():
        if any(parameter is own for own in _own_rows(sparse.factorization)):
            moved += int((parameter != start[name]).any(dim=1).sum()) if parameter.shape[1] else 0
    assert moved <= len(touched)


class _Largest(TorchDispatchMode):
    """Most numbers of a tensor that is made, of sparse ones those that are there."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_place(one) for one in tree_leaves([args, kwargs]) if isinstance(one, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _place(tensor) not in given:
                self.numbers = max(self.numbers, (tensor._values() if tensor.is_sparse else tensor).numel())
        return result


def _place(tensor: Tensor) -> int:
    return id(tensor) if tensor.is_sparse else tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("quantized", [False, True])
def test_nothing_as_large_as_the_table_is_made(quantized: bool) -> None:
    vocab_size = 40_000
    factors: Factorization[Any] = BlockLowRank(vocab_size, 16, [4_000, 16_000, 20_000], [16, 8, 2])
    for parameter in factors.parameters():
        nn.init.normal_(parameter)
    if quantized:
        factors = factors.prepared(Quantization(group_size=16, ranges="learned"))
    ids = torch.randint(0, vocab_size, (64,), generator=torch.Generator().manual_seed(0))
    largest = {}
    for is_sparse in (True, False):
        layer = CompressedEmbedding(copy.deepcopy(factors), sparse=is_sparse)
        optimizer = SparseAdam(layer.parameters()) if is_sparse else SGD(layer.parameters(), lr=0.1)
        # State is made, once, in the first step.
        for _ in range(2):
            optimizer.zero_grad()
            with _Largest() as seen:
                _backward(layer, ids)
                optimizer.step()
        largest[is_sparse] = seen.numbers
    assert largest[True] <= 64 * 16
    assert largest[False] >= 20_000


def test_a_softmax_of_the_same_table_adds_dense_gradients() -> None:
    dense, sparse = _pair(factors_of("group_reduce", VOCAB_SIZE, DIM))
    for layer in (dense, sparse):
        head = CompressedLinear(layer.factorization)
        F.cross_entropy(head(layer(IDS)).flatten(0, 1), IDS.flatten()).backward()
    for plain, own in zip(dense.parameters(), sparse.parameters(), strict=True):
        assert not own.grad.is_sparse
        torch.testing.assert_close(own.grad, plain.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    dense, sparse = _pair(factors_of("group_reduce", VOCAB_SIZE, DIM).to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(_backward(dense, IDS), _backward(sparse, IDS))
    assert _check_equal(dense, sparse) == 6


def test_results_are_the_same_in_deterministic_mode() -> None:
    factors = factors_of("group_reduce", VOCAB_SIZE, DIM).prepared(Quantization(group_size=16, ranges="learned"))
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            layer = CompressedEmbedding(copy.deepcopy(factors), sparse=True)
            optimizer = SparseAdam(layer.parameters(), lr=0.1)
            for shift in range(3):
                optimizer.zero_grad()
                _backward(layer, IDS + shift)
                optimizer.step()
            results.append(layer.state_dict())
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_the_flag_is_shown_and_may_be_changed() -> None:
    layer = CompressedEmbedding(factors_of("low_rank", VOCAB_SIZE, DIM), padding_idx=2, sparse=True)
    assert repr(layer).startswith("CompressedEmbedding(\n  120, 12, padding_idx=2, sparse=True\n")
    assert "sparse" not in repr(CompressedEmbedding(factors_of("low_rank", VOCAB_SIZE, DIM)))
    for is_sparse in (False, True):
        layer.sparse = is_sparse
        layer.zero_grad()
        _backward(layer, IDS)
        assert {parameter.grad.is_sparse for parameter in layer.parameters()} == {is_sparse}
    assert copy.deepcopy(layer).sparse


def _model(is_sparse: bool = True) -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"encoder": nn.Embedding(VOCAB_SIZE, DIM, sparse=is_sparse), "decoder": nn.Linear(DIM, VOCAB_SIZE)}
    )


def _all_sparse(layer: nn.Module) -> bool:
    """Whether all gradients of a lookup are sparse."""
    layer.zero_grad()
    _backward(layer, IDS)
    return all(parameter.grad.is_sparse for parameter in layer.parameters())


def test_models_keep_the_flag_and_files_have_none(tmp_path: Path) -> None:
    model = _model()
    compress(model, "group_reduce", ratio=1.5, token_counts=torch.arange(VOCAB_SIZE, 0, -1), groups=3)
    assert model["encoder"].sparse
    assert _all_sparse(model["encoder"])
    save_compressed(model, tmp_path / "model")
    for is_sparse in (True, False):
        fresh = _model(is_sparse)
        load_compressed(tmp_path / "model", fresh)
        assert fresh["encoder"].sparse == is_sparse
        assert torch.equal(fresh["encoder"](IDS), model["encoder"](IDS))
    prepare_qat(model, Quantization(group_size=16))
    assert model["encoder"].sparse
    assert _all_sparse(model["encoder"])
    densify(model)
    assert type(model["encoder"]) is nn.Embedding
    assert model["encoder"].sparse
    assert _all_sparse(model["encoder"])


def test_scaled_embeddings_keep_the_flag() -> None:
    model = nn.Sequential(BartScaledWordEmbedding(VOCAB_SIZE, DIM, padding_idx=1, embed_scale=2.0))
    model[0].sparse = True
    compress(model, "low_rank", ratio=1.5)
    assert model[0].sparse
    assert _all_sparse(model)
    densify(model)
    assert type(model[0]) is BartScaledWordEmbedding
    assert model[0].sparse


@pytest.mark.usefixtures("process_group")
def test_data_parallel_training_is_refused_with_a_remedy() -> None:
    layer = CompressedEmbedding(factors_of("low_rank", VOCAB_SIZE, DIM), sparse=True)
    wrapped = DistributedDataParallel(nn.Sequential(layer))
    with pytest.raises(RuntimeError, match=r"sparse=True, but DistributedDataParallel .* set `sparse = False`"):
        wrapped(IDS)
    # Without gradients it is as it was, and it can be done as it says.
    with torch.no_grad():
        assert torch.equal(wrapped(IDS), layer(IDS))
    layer.sparse = False
    wrapped(IDS).sum().backward()
    assert not layer.factorization.basis.grad.is_sparse
