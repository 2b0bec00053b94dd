"""What every way of storing a table must do, for all methods there are: a new one is tested by its registration."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from lightning_embcompress.layers.compressed import CompressedEmbedding, CompressedLinear
from lightning_embcompress.methods.numerics.gram import row_weights
from lightning_embcompress.methods.registry import (
    METHODS,
    BlockLowRank,
    Factorization,
    factorization_from_spec,
)
from toys import draw_blocks, falling_counts, loss_metric, normal

_METHODS = sorted(METHODS)
# Of one entry, relative to the norms of the vectors whose product it is.
_ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def _table(vocab_size: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return normal(vocab_size, dim, seed=seed, dtype=dtype)


def _budget(method: str, table: Tensor, ratio: float) -> int:
    """Bytes at a ratio, or the fewest that a method needs for a table: some cannot make small ones much smaller."""
    chosen = METHODS[method]
    smallest = chosen.factorization.smallest_bytes(*table.shape, table.element_size(), chosen.config())
    return max(smallest, int(table.nbytes / ratio))


def _decomposed(
    method: str, vocab_size: int, dim: int, ratio: float = 3, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Factorization[Any]:
    """Some structure of a method, its parameters shaken so that nothing holds only for fresh solutions."""
    table, counts = _table(vocab_size, dim, dtype, seed), falling_counts(vocab_size, seed)
    chosen = METHODS[method]
    factors = chosen.factorization.decompose(table, _budget(method, table, ratio), counts, chosen.config())
    _shake(factors, seed)
    return factors


def _shake(factors: Factorization[Any], seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in factors.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((0.3 * noise).to(parameter.dtype))


def _check_reads(factors: Factorization[Any], seed: int = 0) -> None:
    """`rows` and `logits` against products with the dense table."""
    generator = torch.Generator().manual_seed(seed)
    dtype, rounding = factors.dtype, _ROUNDING[factors.dtype]
    dense = factors.materialize()
    assert dense.shape == (factors.vocab_size, factors.dim)
    assert dense.dtype == dtype
    ids = torch.randint(factors.vocab_size, (3, 7), generator=generator)
    for some in (ids, ids[0, 0], ids[:, :0], ids.repeat(2, 1), ids.int(), torch.arange(factors.vocab_size)):
        rows = factors.rows(some)
        assert rows.dtype == dtype
        assert rows.shape == (*some.shape, factors.dim)
        assert torch.all((rows - dense[some.long()]).abs() <= rounding * dense.norm())
        with torch.no_grad():
            assert torch.equal(factors.rows(some), rows)
    hidden = torch.randn(2, 3, factors.dim, generator=generator, dtype=torch.float64).to(dtype)
    for some in (hidden, hidden[0, 0], hidden[:, :0], hidden.transpose(0, 1)):
        logits = factors.logits(some)
        assert logits.dtype == dtype
        assert logits.shape == (*some.shape[:-1], factors.vocab_size)
        expected = some.double() @ dense.double().T
        scale = some.double().norm() * dense.double().norm(dim=1).max() if some.numel() else 0
        assert torch.all((logits.double() - expected).abs() <= rounding * scale)


@pytest.mark.parametrize("method", _METHODS)
@given(
    vocab_size=st.integers(1, 70),
    dim=st.integers(1, 20),
    ratio=st.floats(1, 12),
    dtype=st.sampled_from(list(_ROUNDING)),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=30)
def test_rows_and_logits_are_those_of_the_dense_table(
    method: str, vocab_size: int, dim: int, ratio: float, dtype: torch.dtype, seed: int
) -> None:
    _check_reads(_decomposed(method, vocab_size, dim, ratio, dtype, seed), seed)


def _reconstructed(factors: BlockLowRank) -> Tensor:
    """`W` in one piece, from the definition: row `i` of block `b` is `u_i B_b`, rows of a block in vocabulary order."""
    table = factors.basis.new_zeros(factors.vocab_size, factors.dim)
    for block, (coefficients, basis) in enumerate(zip(factors.coefficients, factors.bases(), strict=True)):
        rows = (factors.block_of_row == block).nonzero().flatten()
        values = coefficients if factors.dense_blocks[block] else coefficients @ basis
        table = table.index_put((rows,), values)
    return table


@given(st.data(), st.sampled_from(list(_ROUNDING)))
@settings(deadline=None, max_examples=80)
def test_any_block_structure(data: st.DataObject, dtype: torch.dtype) -> None:
    factors = draw_blocks(data.draw, dtype, most=15)
    _check_reads(factors)
    expected = _reconstructed(factors)
    assert (factors.materialize() - expected).abs().max() <= _ROUNDING[dtype] * (expected.norm() + 1)


@pytest.mark.parametrize("method", _METHODS)
@pytest.mark.parametrize("role", [CompressedEmbedding, CompressedLinear])
def test_gradients_are_those_of_finite_differences(method: str, role: type[nn.Module]) -> None:
    layer = role(_decomposed(method, 14, 4, 1.5, torch.float64))
    names = [name for name, _ in layer.named_parameters()]
    given_input = torch.tensor([[3, 3, 0], [13, 5, 3]]) if role is CompressedEmbedding else torch.randn(2, 4).double()

    def read(values: Tensor, *parameters: Tensor) -> Any:
        return functional_call(layer, dict(zip(names, parameters, strict=True)), values)

    if role is CompressedLinear:
        given_input.requires_grad_()
    assert torch.autograd.gradcheck(read, (given_input, *layer.parameters()))


@pytest.mark.parametrize("method", _METHODS)
def test_every_parameter_gets_a_gradient_from_any_batch(method: str) -> None:
    """Like the weight of an `nn.Embedding`, and as DistributedDataParallel asks for."""
    factors = _decomposed(method, 60, 8)
    for ids in (torch.tensor([5]), torch.empty(0, 3, dtype=torch.long)):
        factors.zero_grad()
        factors.rows(ids).sum().backward()
        assert all(parameter.grad is not None for parameter in factors.parameters())


@pytest.mark.parametrize("method", _METHODS)
@pytest.mark.parametrize("bad", [-1, 60, 10**6])
def test_ids_out_of_range_are_refused(method: str, bad: int) -> None:
    with pytest.raises(IndexError):
        _decomposed(method, 60, 8).rows(torch.tensor([3, bad]))


def _check_same(one: Factorization[Any], other: Factorization[Any]) -> None:
    hidden = torch.randn(3, other.dim, dtype=other.dtype)
    assert torch.equal(one.materialize(), other.materialize())
    assert torch.equal(one.logits(hidden), other.logits(hidden))


_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{method: (method, {}) for method in _METHODS},
    "trellis": ("transform_coding", {"codes": "trellis", "effort": 6, "bits": 2}),
    "rare tokens": ("product_quantization", {"subspaces": 4, "bits": 4, "rare_bits": 2, "rare_fraction": 0.5}),
}


@pytest.mark.parametrize("case", sorted(_CASES))
@pytest.mark.parametrize("on_meta", [False, True])
def test_tensors_can_be_loaded_one_at_a_time(case: str, on_meta: bool) -> None:
    """In any order, as loaders of sharded files do, into what the structure says as JSON."""
    method, given_options = _CASES[case]
    chosen, table = METHODS[method], _table(60, 8)
    config = chosen.config(**given_options)
    max_bytes = max(table.nbytes // 2, chosen.factorization.smallest_bytes(60, 8, 4, config))
    factors = chosen.factorization.decompose(table, max_bytes, falling_counts(60, 0), config)
    spec, state, names = json.loads(json.dumps(factors.spec())), factors.state_dict(), list(factors.state_dict())
    assert spec == factors.spec()
    for order in (names, names[::-1], *(names[turn:] + names[:turn] for turn in range(1, len(names)))):
        loaded = factorization_from_spec(spec, torch.float32, torch.device("meta") if on_meta else None)
        assert type(loaded) is type(factors)
        assert loaded.stored_bytes() == factors.stored_bytes()
        for name in order:
            # Assigned tensors may be changed in place later, those of the other tests may not.
            missing = loaded.load_state_dict({name: state[name].clone()}, strict=False, assign=on_meta).missing_keys
            assert len(missing) == len(names) - 1
        assert all(not tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
        found, buffers = loaded.state_dict(), dict(factors.named_buffers())
        assert all(torch.equal(found[name], state[name]) for name in names)
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in loaded.named_buffers())
        assert loaded.spec() == spec
        _check_same(loaded, factors)


@pytest.mark.parametrize("method", _METHODS)
def test_copies_and_conversions(method: str) -> None:
    factors = _decomposed(method, 60, 8)
    factors.provenance = {"method": method}
    _check_same(copy.deepcopy(factors), factors)
    restored = pickle.loads(pickle.dumps(factors))
    _check_same(restored, factors)
    assert restored.provenance == factors.provenance
    half = copy.deepcopy(factors).to(torch.bfloat16)
    assert half.dtype == torch.bfloat16
    _check_reads(half)
    assert copy.deepcopy(factors).to("meta").device.type == "meta"
    double = copy.deepcopy(factors).double()
    torch.testing.assert_close(double.materialize().float(), factors.materialize())


_STRUCTURES: list[dict[str, Any]] = [
    {"kind": "block_low_rank", "sizes": [6, 4], "ranks": [2, 1]},
    {"kind": "cp", "vocab_shape": [2, 5], "dim_shape": [4], "rank": 3},
    {"kind": "low_rank", "rank": 2},
    {"kind": "product_quantization", "subspaces": 4, "centroids": 4, "rare_tokens": 3, "rare_centroids": 2},
    {"kind": "shared_basis_blocks", "sizes": [6, 4], "rank": 4, "segments": [[[4, 4]], [[2, 1]]], "is_coded": True},
    {
        "kind": "shared_basis_blocks",
        "sizes": [6, 4],
        "rank": 4,
        "segments": [[[4, 1], [-2, 3]], [[-3, 2]]],
        "is_coded": True,
        "window": 6,
        "basis_bits": 6,
    },
    {"kind": "latent_codes", "sizes": [6, 4], "rank": 4, "segments": [[[-2, 4]], [[2, 1]]], "window": 8},
    {"kind": "tensor_train", "shape": [2, 2], "ranks": [1, 1, 1]},
    {"kind": "tensor_train_matrix", "vocab_shape": [2, 5], "dim_shape": [2, 2], "ranks": [1, 2, 1]},
    {"kind": "tucker", "vocab_shape": [2, 5], "dim_shape": [4], "ranks": [2, 2, 2]},
]
# For a table of 10 x 4: what each entry must not be.
_IMPOSSIBLE: dict[str, list[Any]] = {
    "vocab_size": [None, 0, -3, 2.5, "60", True],
    "dim": [None, 0, True],
    "sizes": [[6, 5], [6], [12, -2], []],
    "rank": [-1, 9, None, "2", 1.5],
    "ranks": [[2], [1, 20, 1], [-1, 1, 2], [1, 2, 3, 1], [], "1, 2, 1", [2, 2.0, 1], None],
    "vocab_shape": [[3, 3], [], "2, 5", [10, 0]],
    "dim_shape": [[3], [2, 0], None, [1, 1, 1]],
    "shape": [[3], [], None],
    "subspaces": [5, None],
    "centroids": [0, 11],
    "rare_tokens": [11, "2", None],
    "rare_centroids": [5, "2", None],
    "segments": [
        *("all", [[[4, 4]]], [[[9, 4]], [[2, 1]]], [[[4, 5]], [[2, 1]]], [[[4, 4, 1]], [[2, 1]]]),
        *([[[-6, 4]], [[2, 1]]], [[[-2, 3], [2, 1]], [[2, 1]]], [[[-2, 4]], [[-2, 1]]], [[[4, 4]], [[-2, 1]]]),
        *([[[4, 4]], [["-2", 1]]], [[[4, 4]], [[-2.0, 1]]], [[[4, 4]], [[-2, -1]]], [[4], [2]]),
    ],
    "window": [0, 3, 17, -6, 6.0, "6", None, True],
    "basis_bits": [0, 1, 9, -6, 6.0, "6", None, True],
    "is_coded": [1, False],
}


@pytest.mark.parametrize("structure", _STRUCTURES, ids=lambda one: f"{one['kind']}{one.get('window', '')}")
def test_structures_that_are_not_possible_are_refused(structure: dict[str, Any]) -> None:
    spec = {**structure, "vocab_size": 10, "dim": 4}
    assert factorization_from_spec(spec, torch.float32).spec() == spec
    for name in spec.keys() - {"kind"}:
        for bad in _IMPOSSIBLE[name]:
            with pytest.raises(ValueError, match=f"{name}|rank|bits|segments|window"):
                factorization_from_spec({**spec, name: bad}, torch.float32)


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'nosuch'; known are cp, block_low_rank, "):
        factorization_from_spec({"kind": "nosuch"}, torch.float32)


@pytest.mark.parametrize("method", _METHODS)
def test_solving_twice_gives_the_same_and_changes_nothing_global(method: str) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    state, drawn = torch.get_rng_state(), np.random.RandomState(1).random_sample(2)
    first, again = (_decomposed(method, 90, 12) for _ in range(2))
    assert torch.equal(first.materialize(), again.materialize())
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.random_sample(2), drawn)
    assert tensorly.get_backend() == "numpy"


@pytest.mark.parametrize("method", _METHODS)
@pytest.mark.parametrize("scale", [1.0, 1e-30])
def test_rows_of_zeros_and_duplicates(method: str, scale: float) -> None:
    table, counts = _table(60, 8), falling_counts(60, 0)
    chosen = METHODS[method]
    zeros = chosen.factorization.decompose(torch.zeros(60, 8), _budget(method, table, 2), counts, chosen.config())
    assert zeros.materialize().abs().max() == 0
    table = scale * table
    table[10:20] = table[3]
    table[30:] = 0
    # Half of the tokens never occur.
    counts[30:] = 0
    factors = chosen.factorization.decompose(table, _budget(method, table, 1), counts, chosen.config())
    assert factors.materialize().isfinite().all()
    assert factors.weighted_error(table, row_weights(counts, 60)) < 1
    refined = factors.refined(torch.zeros(60, 8), _budget(method, table, 1), counts, chosen.config())
    assert all(parameter.isfinite().all() for parameter in refined.parameters())


@pytest.mark.parametrize("method", _METHODS)
@pytest.mark.parametrize(("shape", "dtype"), [((3000, 64), torch.float32), ((20_000, 16), torch.bfloat16)])
def test_stored_bytes_are_those_of_a_file(
    method: str, shape: tuple[int, int], dtype: torch.dtype, tmp_path: Path
) -> None:
    factors = _decomposed(method, *shape, ratio=4, dtype=dtype)
    file = tmp_path / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in factors.state_dict().items()}, file)
    size = file.stat().st_size + len(json.dumps(factors.spec()))
    assert factors.stored_bytes() > 70_000
    assert factors.stored_bytes() == pytest.approx(size, rel=0.02)
    assert factors.stored_bytes() >= sum(tensor.nbytes for tensor in factors.state_dict().values())


@pytest.mark.parametrize("method", _METHODS)
@given(
    vocab_size=st.integers(1, 400),
    dim=st.integers(1, 24),
    part=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=30)
def test_budget_is_never_exceeded(
    method: str, vocab_size: int, dim: int, part: float, dtype: torch.dtype, seed: int
) -> None:
    table, counts = _table(vocab_size, dim, dtype, seed), falling_counts(vocab_size, seed)
    chosen = METHODS[method]
    smallest = chosen.factorization.smallest_bytes(vocab_size, dim, dtype.itemsize, chosen.config())
    # From the very smallest on: what is called possible must be.
    max_bytes = smallest + int(part * max(0, table.nbytes - smallest))
    before = table.clone()
    shares: list[float] = []
    factors = chosen.factorization.decompose(table, max_bytes, counts, chosen.config(), shares.append)
    assert factors.stored_bytes() <= max_bytes
    assert factors.dtype == dtype
    assert torch.equal(table, before)
    assert sum(shares) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"^-?\d+ (bytes|elements) do not (hold|cover) "):
        chosen.factorization.decompose(table, smallest - dtype.itemsize, counts, chosen.config())
    # One byte less than this result takes is another budget.
    if (less := factors.stored_bytes() - 1) >= smallest:
        assert chosen.factorization.decompose(table, less, counts, chosen.config()).stored_bytes() <= less


@pytest.mark.parametrize("method", _METHODS)
def test_the_weight_of_a_layer_can_be_given_as_it_is(method: str) -> None:
    table, counts = _table(100, 8), falling_counts(100, 0)
    chosen = METHODS[method]
    budget = _budget(method, table, 2)
    factors = chosen.factorization.decompose(nn.Parameter(table), budget, counts, chosen.config())
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in factors.parameters())
    refined = factors.refined(nn.Parameter(2 * table), budget, counts, chosen.config())
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in refined.parameters())


@pytest.mark.parametrize("method", _METHODS)
def test_more_bytes_lower_the_error(method: str) -> None:
    # Columns enough that the ranks of all methods are different ones at these ratios.
    table, counts = _table(600, 128), falling_counts(600, 0)
    chosen = METHODS[method]
    weights = row_weights(counts if chosen.config.needs_counts else None, 600)
    errors = []
    for ratio in (8, 2.6, 1.4):
        factors = chosen.factorization.decompose(table, int(table.nbytes / ratio), counts, chosen.config())
        assert factors.stored_bytes() <= table.nbytes / ratio
        errors.append(factors.weighted_error(table, weights))
        dense = factors.materialize()
        lost = (table - dense).double().square().sum(1) @ weights / (table.double().square().sum(1) @ weights)
        assert errors[-1] == pytest.approx(float(lost), rel=1e-4)
    # With all components at the largest width, more bytes are of no use.
    assert errors[0] > errors[1] >= errors[2] > 0
    assert errors[1] > errors[2] or errors[1] < 1e-4


@pytest.mark.parametrize("method", [name for name in _METHODS if METHODS[name].config.needs_counts])
def test_weighting_by_counts_helps_the_frequent_rows(method: str) -> None:
    table, counts = _table(600, 24), falling_counts(600, 0)
    chosen, plain = METHODS[method], METHODS["low_rank"]
    budget = table.nbytes // 4
    weighted = chosen.factorization.decompose(table, budget, counts, chosen.config())
    unweighted = plain.factorization.decompose(table, budget, counts, plain.config())
    weights = row_weights(counts, 600)
    assert weighted.weighted_error(table, weights) < unweighted.weighted_error(table, weights)


@pytest.mark.parametrize("method", _METHODS)
def test_is_usable_under_autocast(method: str) -> None:
    factors = _decomposed(method, 60, 8)
    embedding, linear = CompressedEmbedding(factors), CompressedLinear(factors, nn.Parameter(torch.randn(60)))
    dense, hidden = factors.materialize(), torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        rows, logits = embedding(torch.arange(60)), linear(hidden)
        reference = nn.functional.linear(hidden, dense, linear.bias)
    # As torch's own layers: an embedding keeps its dtype, a projection takes that of autocast.
    assert rows.dtype == torch.float32
    assert logits.dtype == reference.dtype == torch.bfloat16
    torch.testing.assert_close(rows, dense, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits, reference, rtol=0, atol=0.05 * reference.abs().max().item())
    logits.float().logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in factors.parameters())
    assert all(p.grad.abs().sum() > 0 for p in factors.parameters() if p.numel())


@pytest.mark.parametrize("method", _METHODS)
def test_the_dense_table_is_never_built(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    factors = _decomposed(method, 3000, 32, ratio=8)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    largest = max(largest, tensor.numel())
            return out

    with Watch():
        hidden = torch.randn(4, 32, requires_grad=True)
        (factors.rows(torch.arange(20)).sum() + factors.logits(hidden).sum()).backward()
    assert largest <= 3000 * 32 // 2


def test_damaged_block_index_is_refused() -> None:
    factors = BlockLowRank(20, 4, [12, 8], [2, 1])
    state = factors.state_dict()
    state["packed_block_index"] = ~state["packed_block_index"]
    with pytest.raises(RuntimeError, match=r"the block index packed_block_index is damaged"):
        BlockLowRank(20, 4, [12, 8], [2, 1]).load_state_dict(state)


_IN_THE_METRIC = [name for name in _METHODS if METHODS[name].config.uses_metric]


@pytest.mark.parametrize("method", _IN_THE_METRIC)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_metric_lowers_the_loss(method: str, dtype: torch.dtype) -> None:
    table, counts, metric = _table(400, 16, dtype), falling_counts(400), loss_metric(400, 16)
    chosen, budget = METHODS[method], _budget(method, table, 4)
    plain, factors = (
        chosen.factorization.decompose(table, budget, counts, chosen.config(), metric=known) for known in (None, metric)
    )
    assert factors.dtype == dtype
    assert factors.stored_bytes() <= budget
    assert metric.loss(table, factors.materialize()) < 0.8 * metric.loss(table, plain.materialize())
    # A table that has changed a little is solved again in place, about as well as afresh.
    target = table + 0.01 * normal(400, 16, seed=1, dtype=dtype)
    before = dict(factors.named_parameters())
    refined = factors.refined(target, budget, counts, chosen.config(), metric=metric)
    assert refined is factors
    assert all(parameter is before[name] for name, parameter in refined.named_parameters())
    fresh = chosen.factorization.decompose(target, budget, counts, chosen.config(), metric=metric)
    assert metric.loss(target, refined.materialize()) < 1.1 * metric.loss(target, fresh.materialize())
