"""Packed rows: what is read from them, and products with them."""

from __future__ import annotations

import copy
import gc
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_embcompress.methods.quantizers import packed_rows, repacked_product
from lightning_embcompress.methods.quantizers.integer_quantizer import from_codes, scales_shape
from lightning_embcompress.methods.quantizers.packed_rows import (
    multiply_packed,
    pack_rows,
    read_packed_rows,
    unpack_rows,
)

# Of whole bytes, halves and quarters of one, and across bytes.
BITS = [2, 3, 4, 5, 8]
# Rows that share groups, that end within a byte, with groups that end within a byte, and with groups of unequal sizes.
SHAPES = [(0, 5, 16), (7, 0, 16), (9, 1, 64), (23, 5, 16), (31, 24, 64), (10, 63, 21), (40, 130, 17), (50, 192, 64)]


@pytest.fixture(autouse=True)
def also_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers are multiplied however small the matrix is."""
    monkeypatch.setattr(packed_rows, "_SMALL", 0)


def _matrix(
    n: int, columns: int, bits: int, group_size: int, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes and scales, and what they stand for in float64."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(2**bits, (n, columns), dtype=torch.uint8, generator=generator)
    scales = (0.1 + torch.rand(scales_shape(n, columns, group_size), generator=generator)).to(dtype)
    values = codes.double() - 2 ** (bits - 1)
    group_rows, group_columns = max(1, group_size // max(1, columns)), max(1, min(columns, group_size))
    for row in range(n):
        for column in range(0, columns, group_columns):
            values[row, column : column + group_columns] *= scales[row // group_rows, column // group_columns].double()
    return pack_rows(codes, bits), scales, values


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("columns", "tile"), [(0, 40), (1, 2**17), (8, 2**17), (13, 40), (64, 40)])
def test_rows_are_packed_lowest_bit_first_with_the_highest_of_every_byte_inverted(
    columns: int, bits: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_rows, "_TILE", tile)
    codes = torch.randint(2**bits, (5, columns), generator=torch.Generator().manual_seed(1))
    packed = pack_rows(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, (columns * bits + 7) // 8)
    for row, data in zip(codes.tolist(), packed.tolist(), strict=True):
        whole = sum(code << (bits * place) for place, code in enumerate(row))
        assert [byte ^ 128 for byte in data] == list(whole.to_bytes(len(data), "little"))
    unpacked = unpack_rows(packed, bits, columns)
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked.long(), codes)
    assert torch.equal(unpack_rows(packed, bits, columns, torch.float32), codes.float())
    assert torch.equal(unpack_rows(packed[:4].view(2, 2, -1), bits, columns).long(), codes[:4].view(2, 2, columns))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "columns", "group_size"), SHAPES)
def test_rows_are_those_of_the_matrix(n: int, columns: int, group_size: int, bits: int) -> None:
    packed, scales, values = _matrix(n, columns, bits, group_size)
    reference = from_codes(unpack_rows(packed, bits, columns), scales, bits, group_size)
    place = torch.randint(max(1, n), (2, 6) if n else (2, 0))
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        rows = read_packed_rows(packed, scales, place, bits, columns, group_size, dtype)
        assert rows.dtype == dtype
        assert torch.equal(rows, values[place].float().to(dtype))
    assert torch.equal(reference[place], values[place].float())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "columns", "group_size"), SHAPES)
@pytest.mark.parametrize("repacks", [True, False])
def test_products_against_float64(
    n: int, columns: int, group_size: int, bits: int, repacks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_rows, "_TILE", 700)
    if not repacks:
        monkeypatch.setattr(packed_rows, "can_repack", lambda: False)
        monkeypatch.setattr(packed_rows, "repacked_product", None)
    packed, scales, values = _matrix(n, columns, bits, group_size, torch.bfloat16)
    for shape in ((columns,), (1, columns), (2, 4, columns), (33, columns), (0, columns)):
        hidden = torch.randn(shape, dtype=torch.float64)
        bound = hidden.norm(dim=-1, keepdim=True) * values.norm(dim=-1)
        for dtype, part in (
            (torch.float64, 1e-12),
            (torch.float32, 1e-6),
            (torch.float16, 2e-3),
            (torch.bfloat16, 1e-2),
        ):
            product = multiply_packed(hidden.to(dtype), packed, scales, bits, columns, group_size)
            assert product.dtype == dtype
            assert product.shape == (*shape[:-1], n)
            assert bool(((product.double() - hidden @ values.T).abs() <= part * bound + 1e-30).all())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("outlier", [1, 30])
def test_logits_of_one_state_are_those_of_float32(bits: int, outlier: int) -> None:
    hidden = torch.randn(1, 192, generator=torch.Generator().manual_seed(2))
    hidden[0, 70] *= outlier
    packed, scales, values = _matrix(3000, 192, bits, 64)
    hidden *= (20 / (hidden.double() @ values.T).abs().max()).float()
    logits = multiply_packed(hidden, packed, scales, bits, 192, 64)
    assert float((logits - hidden.double() @ values.T).abs().max()) < 2e-5


def test_states_that_are_not_finite_give_logits_that_are_not() -> None:
    packed, scales, _ = _matrix(20, 24, 4, 16)
    for value in (float("nan"), float("inf")):
        hidden = torch.randn(2, 24)
        hidden[0, 3] = value
        logits = multiply_packed(hidden, packed, scales, 4, 24, 16)
        assert not logits[0].isfinite().any()
        assert logits[1].isfinite().all()


def test_a_probe_tells_products_that_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    repackable = repacked_product.can_repack.__wrapped__
    assert repackable() == repacked_product.can_repack()
    linear = repacked_product._linear
    monkeypatch.setattr(repacked_product, "_linear", lambda *inputs: linear(*inputs).clamp(-(2**15), 2**15 - 1))
    assert not repackable()


def test_the_copy_is_kept_for_as_long_as_what_it_is_of(monkeypatch: pytest.MonkeyPatch) -> None:
    if not repacked_product.can_repack():
        pytest.skip("this processor has no exact products of bytes")
    made: list[int] = []
    repack = repacked_product.repack
    monkeypatch.setattr(packed_rows, "repack", lambda *inputs: made.append(1) or repack(*inputs))
    packed, scales, values = _matrix(200, 192, 4, 64)
    hidden = torch.randn(1, 192)

    def matches(packed: Tensor, factor: float) -> bool:
        product = multiply_packed(hidden, packed, scales.view(torch.uint8).view(torch.float16), 4, 192, 64)
        return torch.allclose(product, (factor * (hidden.double() @ values.T)).float(), atol=1e-3)

    kept = len(packed_rows._repacked._found)
    assert matches(packed, 1)
    with torch.inference_mode():
        assert matches(packed, 1)
    assert len(made) == 1
    assert sum(part.numel() for part in packed_rows._repacked._found[packed][1].integers) == 200 * 192
    scales.mul_(2)
    assert matches(packed, 2)
    assert len(made) == 2
    values = torch.zeros_like(values)
    packed.copy_(pack_rows(torch.full((200, 192), 8), 4))
    assert matches(packed, 1)
    assert len(made) == 3
    assert copy.deepcopy(packed) not in packed_rows._repacked._found
    assert len(packed_rows._repacked._found) == kept + 1
    del packed
    gc.collect()
    assert len(packed_rows._repacked._found) == kept


def test_no_copy_is_kept_of_what_may_change_unseen() -> None:
    hidden = torch.randn(1, 192)
    with torch.inference_mode():
        packed, scales, values = _matrix(200, 192, 4, 64)
        product = multiply_packed(hidden, packed, scales, 4, 192, 64)
        assert packed not in packed_rows._repacked._found
        torch.testing.assert_close(product, (hidden.double() @ values.T).float(), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("states", [1, 40])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_gradients_reach_the_states(bits: int, states: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_rows, "_TILE", 256)
    packed, scales, values = _matrix(60, 20, bits, 64)
    hidden = torch.randn(states, 20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: multiply_packed(h, packed, scales, bits, 20, 64), hidden, fast_mode=True)
    weights = torch.randn(states, 60)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        narrow = hidden.detach().to(dtype).requires_grad_()
        (multiply_packed(narrow, packed, scales, bits, 20, 64) * weights).sum().backward()
        assert narrow.grad is not None
        assert narrow.grad.dtype == dtype
        reference = weights.double() @ values
        assert float((narrow.grad - reference).norm() / reference.norm()) < tolerance


def test_nothing_is_kept_for_the_gradient_but_the_packed_matrix() -> None:
    packed, scales, _ = _matrix(60, 20, 4, 64)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        multiply_packed(torch.randn(9, 20, requires_grad=True), packed, scales, 4, 20, 64)
    assert [tensor.data_ptr() for tensor in kept] == [packed.data_ptr(), scales.data_ptr()]


def test_autocast_is_as_for_linear() -> None:
    packed, scales, values = _matrix(60, 20, 4, 64)
    for states in (1, 40):
        hidden = torch.randn(states, 20, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            product = multiply_packed(hidden, packed, scales, 4, 20, 64)
            reference = nn.functional.linear(hidden, values.float())
        assert product.dtype == reference.dtype == torch.bfloat16
        torch.testing.assert_close(product, reference, rtol=0.05, atol=0.5)
        product.float().sum().backward()
        assert hidden.grad is not None
        torch.testing.assert_close(hidden.grad[0], values.sum(dim=0).float(), rtol=0.02, atol=1.0)
        hidden.grad = None


def test_on_meta_there_are_shapes() -> None:
    packed, scales, _ = _matrix(60, 20, 3, 64)
    packed, scales = packed.to("meta"), scales.to("meta")
    assert multiply_packed(torch.empty(4, 20, device="meta"), packed, scales, 3, 20, 64).shape == (4, 60)
    place = torch.empty(2, 3, dtype=torch.long, device="meta")
    assert read_packed_rows(packed, scales, place, 3, 20, 64).shape == (2, 3, 20)


class _Tied(nn.Module):
    """Rows of ids, and products of them with all rows."""

    def __init__(self, columns: int, bits: int, group_size: int) -> None:
        super().__init__()
        packed, scales, _ = _matrix(40, columns, bits, group_size)
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.layout = (bits, columns, group_size)

    def forward(self, ids: Tensor) -> Tensor:
        rows = read_packed_rows(self.packed, self.scales, ids, *self.layout)
        return multiply_packed(rows / 64, self.packed, self.scales, *self.layout)


@pytest.mark.parametrize(("columns", "bits", "group_size"), [(24, 8, 16), (20, 4, 64), (21, 6, 16)])
def test_exported_graphs_give_the_same_for_any_batch(columns: int, bits: int, group_size: int) -> None:
    model, ids = _Tied(columns, bits, group_size).eval(), torch.randint(40, (2, 5))
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (ids,), dynamic_shapes=({0: batch},))
    for count in (1, 7):
        other = torch.randint(40, (count, 5))
        torch.testing.assert_close(exported.module()(other), model(other), rtol=1e-4, atol=1e-3)


def test_onnx_runtime_gives_the_same() -> None:
    pytest.importorskip("onnxscript", reason="exporting to ONNX needs it: pip install onnx onnxscript onnxruntime")
    runtime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    model, ids = _Tied(20, 3, 64).eval(), torch.randint(40, (2, 5))
    batch = torch.export.Dim("batch", min=1, max=64)
    program: Any = torch.onnx.export(model, (ids,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    file = io.BytesIO()
    program.save(file)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    other = torch.randint(40, (3, 5))
    (found,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(other), rtol=1e-4, atol=1e-3)


def test_what_does_not_fit_is_said() -> None:
    packed, scales, _ = _matrix(60, 20, 4, 16)
    place = torch.tensor([1])
    for wrong, call in (
        ("bits", lambda: pack_rows(torch.zeros(2, 3), 9)),
        ("13 uint8.*10", lambda: unpack_rows(packed, 5, 20)),
        ("torch.int8", lambda: read_packed_rows(packed.view(torch.int8), scales, place, 4, 20, 16)),
        (r"scales.*\[60, 1\]", lambda: multiply_packed(torch.randn(1, 20), packed, scales, 4, 20, 32)),
        ("states.*19", lambda: multiply_packed(torch.randn(1, 19), packed, scales, 4, 20, 16)),
    ):
        with pytest.raises(ValueError, match=wrong):
            call()


def test_digits_are_the_states() -> None:
    states = torch.cat([torch.randn(5, 3, 7) * torch.logspace(0, 20, 5).view(-1, 1, 1), torch.zeros(1, 3, 7)])
    digits, counts = repacked_product.byte_digits(states)
    assert digits.shape == (6, 3, 3, 7)
    found = (digits.double() * counts.double().view(6, 3, 1, 1)).sum(1)
    largest = states.abs().amax((1, 2), keepdim=True).double()
    assert bool(((found - states).abs() <= 2 * largest / 256**3).all())
