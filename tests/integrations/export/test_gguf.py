"""GGUF files against what gguf reads in them, and against the tables that other programs would write."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gguf_models import DIM, VOCAB_SIZE, write_gguf
from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.integrations.export import gguf as exporting
from lightning_embcompress.integrations.export.gguf import GRIDS, OUTPUT_TABLE, TOKEN_TABLE, export_gguf
from lightning_embcompress.integrations.export.gguf_file import GgufFile

gguf = pytest.importorskip("gguf", reason="pip install gguf")
BITS = {"IQ4_NL": 4.5, "Q4_0": 4.5, "Q4_1": 5.0, "Q5_0": 5.5, "Q5_1": 6.0, "Q8_0": 8.5}


def _statistics(vocab_size: int = VOCAB_SIZE, dim: int = DIM, roles: str = "both") -> Statistics:
    generator = torch.Generator().manual_seed(7)

    def moment() -> Tensor:
        states = torch.randn(4 * dim, dim, generator=generator) * torch.logspace(0, -1.5, dim)
        states = (states @ torch.randn(dim, dim, generator=generator)).double()
        return states.T @ states / len(states)

    counts = (1000 / torch.arange(1, vocab_size + 1)).round()
    hidden = {} if roles == "inputs" else {"lm_head": moment()}
    means = {path: torch.zeros(dim, dtype=torch.float64) for path in hidden}
    gradients = {} if roles == "heads" else {"model.embed_tokens": moment()}
    return Statistics(counts, hidden=hidden, hidden_mean=means, gradients=gradients, num_targets=1000)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "small.gguf")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", GRIDS)
def test_gguf_reads_what_was_found(kind: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = write_gguf(tmp_path / "in.gguf", tied), tmp_path / "out.gguf"
    found = []
    fit = exporting.fit_table

    def remembered(*arguments: Any) -> Any:
        one, codes = fit(*arguments)
        found.append(codes)
        return one, codes

    monkeypatch.setattr(exporting, "fit_table", remembered)
    written = export_gguf(source, target, kind, _statistics())
    names = [TOKEN_TABLE] if tied else [TOKEN_TABLE, OUTPUT_TABLE]
    assert [one.name for one in written] == names
    read = GgufFile.open(target)
    for number, (name, one) in enumerate(zip(names, written, strict=True)):
        assert (one.type, one.before, one.bits_per_weight, one.shape) == (kind, "F32", BITS[kind], (VOCAB_SIZE, DIM))
        assert read.type_of(name) == kind
        np.testing.assert_array_equal(read.values(name), found[number].materialize().numpy())


@pytest.mark.parametrize("tied", [True, False])
def test_everything_else_stays_byte_for_byte(tied: bool, tmp_path: Path) -> None:
    source, target = write_gguf(tmp_path / "in.gguf", tied), tmp_path / "out.gguf"
    export_gguf(source, target, "Q4_1", _statistics())
    before, after = gguf.GGUFReader(source), gguf.GGUFReader(target)
    start, end = (min(tensor.field.offset for tensor in one.tensors) for one in (before, after))
    assert bytes(before.data[:start]) == bytes(after.data[:end])
    assert [tensor.name for tensor in before.tensors] == [tensor.name for tensor in after.tensors]
    for one, other in zip(before.tensors, after.tensors, strict=True):
        assert one.shape.tolist() == other.shape.tolist()
        if one.name not in (TOKEN_TABLE, OUTPUT_TABLE):
            assert one.tensor_type == other.tensor_type
            assert one.data.tobytes() == other.data.tobytes()
    # A table that is in the type already stays as it is.
    again = tmp_path / "again.gguf"
    assert [one.predicted_loss for one in export_gguf(target, again, "Q4_1")] == [None] * (1 if tied else 2)
    assert again.read_bytes() == target.read_bytes()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_less_than_half_is_lost_of_what_plain_tables_lose(kind: str, small: Path, tmp_path: Path) -> None:
    statistics = _statistics()
    (one,) = export_gguf(small, tmp_path / "out.gguf", kind, statistics)
    values = torch.from_numpy(GgufFile.open(small).values(TOKEN_TABLE))
    number = gguf.GGMLQuantizationType[kind]
    plain = gguf.quants.dequantize(gguf.quants.quantize(values.numpy(), number), number)
    metric = exporting._Table.read(GgufFile.open(small), TOKEN_TABLE, True, statistics, None, None).metric
    assert metric is not None
    assert one.predicted_loss is not None
    assert one.predicted_loss < metric.loss(values, torch.from_numpy(plain)) / 2
    read = torch.from_numpy(GgufFile.open(tmp_path / "out.gguf").values(TOKEN_TABLE))
    assert one.predicted_loss == pytest.approx(metric.loss(values, read), rel=1e-4)


def test_a_table_of_each_role_has_its_own_metric(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "in.gguf", tied=False)
    statistics = _statistics()
    inputs, head = (
        exporting._Table.read(GgufFile.open(source), name, False, statistics, None, None).metric
        for name in (TOKEN_TABLE, OUTPUT_TABLE)
    )
    assert inputs is not None
    assert head is not None
    for metric, moment in ((inputs, statistics.gradients["model.embed_tokens"]), (head, statistics.hidden["lm_head"])):
        torch.testing.assert_close(metric.matrix / metric.matrix.trace(), moment / moment.trace())


def test_the_smallest_type_within_a_limit(small: Path, tmp_path: Path) -> None:
    statistics = _statistics()
    losses = {}
    for kind in GRIDS:
        (one,) = export_gguf(small, tmp_path / "out.gguf", kind, statistics)
        losses[kind] = np.expm1(one.predicted_loss)
    assert losses["Q4_1"] > losses["Q5_0"] > losses["Q5_1"]
    limit = (losses["Q4_1"] + losses["Q5_0"]) / 2
    (one,) = export_gguf(small, tmp_path / "auto.gguf", statistics=statistics, max_perplexity_increase=limit)
    assert one.type == "Q5_0"
    with pytest.raises(ValueError, match="max_perplexity_increase"):
        export_gguf(small, tmp_path / "no.gguf", statistics=statistics, max_perplexity_increase=losses["Q8_0"] / 2)
    assert not (tmp_path / "no.gguf").exists()


def test_values_from_a_better_source(tmp_path: Path) -> None:
    exact, coarse = write_gguf(tmp_path / "f32.gguf"), write_gguf(tmp_path / "q4.gguf", kind="Q4_0")
    values = torch.from_numpy(GgufFile.open(exact).values(TOKEN_TABLE))
    export_gguf(coarse, tmp_path / "out.gguf", "Q8_0", tables={TOKEN_TABLE: values})
    read = torch.from_numpy(GgufFile.open(tmp_path / "out.gguf").values(TOKEN_TABLE))
    assert float((read - values).square().mean().sqrt()) < 2e-3
    other = write_gguf(tmp_path / "other.gguf", seed=5)
    with pytest.raises(ValueError, match=r"tables\['token_embd.weight'\] differs"):
        export_gguf(other, tmp_path / "no.gguf", "Q8_0", tables={TOKEN_TABLE: values})
    with pytest.raises(ValueError, match=r"tables\['token_embd.weight'\] has the shape"):
        export_gguf(exact, tmp_path / "no.gguf", "Q8_0", tables={TOKEN_TABLE: values[1:]})


def test_what_cannot_be_is_refused(small: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    with pytest.raises(ValueError, match="type must be one of IQ4_NL"):
        export_gguf(small, target, "Q4_K")
    with pytest.raises(ValueError, match="max_perplexity_increase is missing"):
        export_gguf(small, target)
    with pytest.raises(ValueError, match="statistics are needed"):
        export_gguf(small, target, max_perplexity_increase=0.01)
    with pytest.raises(ValueError, match="max_perplexity_increase is for type 'auto'"):
        export_gguf(small, target, "Q4_0", max_perplexity_increase=0.01)
    with pytest.raises(ValueError, match="'token_embd.weight' have 48: .* F16"):
        export_gguf(write_gguf(tmp_path / "odd.gguf", dim=48), target, "Q4_0")
    with pytest.raises(ValueError, match="statistics: none of their embeddings has the 300 tokens"):
        export_gguf(small, target, "Q4_0", _statistics(vocab_size=200))
    untied = write_gguf(tmp_path / "untied.gguf", tied=False)
    with pytest.raises(ValueError, match="statistics: none of their heads"):
        export_gguf(untied, target, "Q4_0", _statistics(roles="inputs"))
    with pytest.raises(ValueError, match="there is no file"):
        export_gguf(tmp_path / "absent.gguf", target, "Q4_0")
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(ValueError, match="text.gguf' is no GGUF file"):
        export_gguf(tmp_path / "text.gguf", target, "Q4_0")
    writer = gguf.GGUFWriter(tmp_path / "mamba.gguf", "strange")
    writer.add_tensor("other.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="has no tensor 'token_embd.weight': the architecture 'strange'"):
        export_gguf(tmp_path / "mamba.gguf", target, "Q4_0")
    assert not target.exists()


def test_a_type_that_gguf_does_not_read(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any) -> Any:
        raise NotImplementedError("no such type")

    values = torch.from_numpy(GgufFile.open(small).values(TOKEN_TABLE))
    monkeypatch.setattr(gguf.quants, "dequantize", unknown)
    with pytest.raises(ValueError, match="'token_embd.weight' is in F32, which the package gguf does not read"):
        export_gguf(small, tmp_path / "out.gguf", "Q4_0")
    assert export_gguf(small, tmp_path / "out.gguf", "Q4_0", tables={TOKEN_TABLE: values})[0].type == "Q4_0"


def test_without_the_package(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match=r"lightning-embcompress\[export\]"):
        export_gguf(small, tmp_path / "out.gguf", "Q4_0")


def test_a_full_disk_leaves_what_was_there(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out.gguf"
    target.write_text("mine")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lightning_embcompress.integrations.export.gguf_file._copy", full)
    with pytest.raises(OSError, match="could not be written, and what was there before is as it was"):
        export_gguf(small, target, "Q4_0")
    assert target.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"small.gguf", "out.gguf"}


@given(cut=st.floats(0, 0.999), place=st.floats(0, 0.3), byte=st.integers(0, 255), is_cut=st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_damage_is_told_or_does_no_harm(
    cut: float, place: float, byte: int, is_cut: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    content = bytearray(write_gguf(folder / "in.gguf").read_bytes())
    if is_cut:
        content = content[: int(cut * len(content))]
    else:
        content[int(place * len(content))] = byte
    (folder / "damaged.gguf").write_bytes(content)
    try:
        export_gguf(folder / "damaged.gguf", folder / "out.gguf", "Q4_0")
    except ValueError as error:
        assert "damaged.gguf" in str(error) or TOKEN_TABLE in str(error) or "not finite" in str(error)  # noqa: PT017
        assert not (folder / "out.gguf").exists()
    else:
        assert not is_cut
