"""Finding tables, refusing what cannot be replaced, and replacing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from lightning_embcompress.compression.plan import compress, densify
from lightning_embcompress.layers.compressed import CompressedEmbedding, CompressedLinear
from lightning_embcompress.methods.registry import LowRank
from lightning_embcompress.tables.finding import Table, check_finite, find_tables
from lightning_embcompress.tables.replacement import replace_table, restore_dense
from small_models import build


def _pair(vocab_size: int = 100, dim: int = 8) -> nn.ModuleDict:
    return nn.ModuleDict({"encoder": nn.Embedding(vocab_size, dim), "decoder": nn.Linear(dim, vocab_size)})


def _tied(vocab_size: int = 100, dim: int = 8) -> nn.ModuleDict:
    model = _pair(vocab_size, dim)
    model["decoder"].weight = model["encoder"].weight
    return model


@pytest.mark.parametrize(
    ("model", "tables", "expected"),
    [
        (_tied(), "auto", [("encoder", "decoder")]),
        # A named module brings what is tied to it, and tables come in the order of the model.
        (_tied(), ["decoder"], [("encoder", "decoder")]),
        (_tied(), ["decoder", "encoder"], [("encoder", "decoder")]),
        (_pair(), ["decoder", "encoder"], [("encoder",), ("decoder",)]),
        (_pair(), "decoder", [("decoder",)]),
        (
            nn.ModuleDict({**_pair(), "lstm": nn.LSTM(8, 8), "hidden": nn.Linear(8, 8), "norm": nn.LayerNorm(8)}),
            "auto",
            [("encoder",), ("decoder",)],
        ),
        # An embedding or a projection alone.
        (nn.Sequential(nn.Embedding(100, 8), nn.LSTM(8, 8)), "auto", [("0",)]),
        (nn.Sequential(nn.LSTM(8, 8), nn.Linear(8, 100)), "auto", [("1",)]),
        # Positions, and of two sizes the one that is named.
        (nn.ModuleDict({"position": nn.Embedding(32, 8), **_pair()}), "auto", [("encoder",), ("decoder",)]),
        (nn.ModuleDict({"word": nn.Embedding(100, 8), "tag": nn.Embedding(30, 8)}), ["word"], [("word",)]),
    ],
)
def test_tables_that_are_found(model: nn.Module, tables: str | list[str], expected: list[tuple[str, ...]]) -> None:
    found = find_tables(model, tables)
    assert [table.modules for table in found] == expected
    for table in found:
        assert table.weight is model.get_submodule(table.name).weight
        assert table.shape == tuple(table.weight.shape)


def test_a_module_that_is_registered_twice_is_one_table_with_two_paths() -> None:
    model = nn.Module()
    model.encoder = nn.Embedding(100, 8)
    model.inner = nn.Module()
    model.inner.embed = model.encoder
    model.decoder = nn.Linear(8, 100)
    assert [table.modules for table in find_tables(model)] == [("encoder", "inner.embed"), ("decoder",)]
    compress(model, "low_rank", ratio=1.2)
    # Otherwise one path would go on reading the dense table.
    assert isinstance(model.inner.embed, CompressedEmbedding)
    assert model.inner.embed.factorization is model.encoder.factorization


class _Scaled(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(input)


class _Functional(nn.Module):
    """Reads the weight of another module, by its own name for it."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.kernel = weight


def _changed(change: Callable[[nn.ModuleDict], Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = _pair()
        change(model)
        return model

    return make


def _parametrize(model: nn.ModuleDict) -> None:
    nn.utils.parametrizations.orthogonal(model["encoder"])


def _tie_elsewhere(model: nn.ModuleDict) -> None:
    model["head"] = _Functional(model["encoder"].weight)


def _keep_at_the_root(model: nn.ModuleDict) -> None:
    model.kept = model["encoder"].weight


def _limit_norms(model: nn.ModuleDict) -> None:
    model["encoder"].max_norm = 2.0
    model["decoder"].weight = model["encoder"].weight


def _compressed() -> nn.Module:
    model = nn.ModuleDict({**_pair(), "hidden": nn.Linear(8, 8)})
    compress(model, "low_rank", ratio=1.2)
    return model


def _wrapped() -> nn.Module:
    model = _tied()
    model["encoder"] = torch.compile(model["encoder"], backend="eager")
    return model


def _hold_integers(model: nn.ModuleDict) -> None:
    model["encoder"].weight = nn.Parameter(torch.zeros(100, 8, dtype=torch.int8), requires_grad=False)


def _beside(**layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.ModuleDict({**_pair(), **layers})


_WRAPPED = r"'encoder'.*OptimizedModule.*module\.encoder\.compile"
_REFUSED: list[tuple[Callable[[], nn.Module], str | list[str], str]] = [
    (lambda: nn.LSTM(8, 8), "auto", "configure_model"),
    (_beside(other=nn.Linear(8, 100)), "auto", r"'decoder' \(100, 8\); 'other' \(100, 8\)"),
    (lambda: nn.Sequential(nn.Linear(9, 4), nn.Linear(4, 8)), "auto", r"'0' \(4, 9\); '1' \(8, 4\)"),
    (_pair, ["encodr"], "'encodr' .*'encoder'"),
    (_pair, [], "tables is an empty list"),
    (_beside(lstm=nn.LSTM(8, 8)), ["lstm"], "'lstm' is a LSTM"),
    (_beside(encoder=_Scaled(100, 8)), "auto", "'encoder' .*_Scaled"),
    (_beside(encoder=nn.Embedding(100, 8, scale_grad_by_freq=True)), "auto", "'encoder' has scale_grad_by_freq"),
    (_beside(encoder=nn.Embedding(100, 8, device="meta")), "auto", "'encoder' is on the meta device"),
    (_changed(_hold_integers), ["encoder"], r"'encoder' holds torch.int8"),
    (_changed(lambda model: nn.utils.weight_norm(model["decoder"])), "auto", "'decoder' .*'weight_g'"),
    (_changed(_parametrize), "auto", "'encoder' .*ParametrizedEmbedding"),
    (_changed(_tie_elsewhere), "auto", r"'head\.kernel' of the _Functional is table 'encoder'"),
    (_changed(_keep_at_the_root), "auto", r"'kept' of the ModuleDict is table 'encoder'"),
    (_changed(_limit_norms), "auto", r"'encoder' of table 'encoder' has max_norm=2.0, .*'decoder'"),
    (lambda: nn.Embedding(100, 8), "auto", "an Embedding"),
    # The small projection beside compressed tables must not be taken for a table.
    (_compressed, "auto", "'encoder', 'decoder' .*densify"),
    (_compressed, ["decoder"], "'decoder' .*densify"),
    # Wrapped by torch.compile, named or tied to what is named.
    *((_wrapped, tables, _WRAPPED) for tables in ("auto", ["encoder"], ["encoder._orig_mod"], ["decoder"])),
]


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(("make", "tables", "message"), _REFUSED)
def test_refusals_name_the_layer_and_the_remedy_and_change_nothing(
    make: Callable[[], nn.Module], tables: str | list[str], message: str
) -> None:
    model = make()
    modules = list(model.named_modules())
    values = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
    state = {name: tensor.clone() for name, tensor in values.items()}
    with pytest.raises(ValueError, match=message):
        compress(model, "low_rank", ratio=1.2, tables=tables)
    assert all(one[1] is other[1] for one, other in zip(modules, model.named_modules(), strict=True))
    assert all(torch.equal(state[name], tensor) for name, tensor in values.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_named(value: float) -> None:
    table = Table(("encoder",), torch.zeros(20, 4))
    check_finite(table)
    table.weight[[3, 17], 2] = value
    with pytest.raises(ValueError, match=r"'encoder' has NaN or infinite values in 2 of its 20 rows \(rows 3, 17"):
        check_finite(table)
    table.weight[:8] = value
    with pytest.raises(ValueError, match=r"in 9 of its 20 rows \(rows 0, 1, 2, 3, 4, \.\.\.\)"):
        check_finite(table)


def test_replacing_keeps_what_the_layers_had_beside_their_weight() -> None:
    model = nn.ModuleDict(
        {"encoder": nn.Embedding(100, 8, padding_idx=2, max_norm=3.0, norm_type=1.0), "decoder": nn.Linear(8, 100)}
    ).eval()
    bias, factors = model["decoder"].bias, LowRank(100, 8, 2)
    replace_table(model, ["encoder", "decoder"], factors)
    encoder, decoder = model["encoder"], model["decoder"]
    assert isinstance(encoder, CompressedEmbedding)
    assert isinstance(decoder, CompressedLinear)
    assert (encoder.padding_idx, encoder.max_norm, encoder.norm_type) == (2, 3.0, 1.0)
    assert decoder.bias is bias
    assert encoder.factorization is decoder.factorization is factors
    assert not encoder.training
    restore_dense(model)
    assert type(model["encoder"]) is nn.Embedding
    assert type(model["decoder"]) is nn.Linear
    assert (model["encoder"].padding_idx, model["encoder"].max_norm, model["encoder"].norm_type) == (2, 3.0, 1.0)
    assert model["decoder"].bias is bias
    assert model["encoder"].weight is model["decoder"].weight
    assert not model["encoder"].training


@pytest.fixture
def compiled() -> Iterator[nn.ModuleDict]:
    """A model with a compiled embedding."""
    model = _pair()
    # Runs the same operations.
    model["encoder"].compile(backend="eager")
    yield model
    torch.compiler.reset()


def test_layers_that_are_not_compiled_any_more_are_named(
    compiled: nn.ModuleDict, caplog: pytest.LogCaptureFixture
) -> None:
    ids, said = torch.tensor([3, 99]), "Not compiled any more: 'encoder', replaced by new layers"
    with caplog.at_level("INFO"):
        compress(compiled, "low_rank", ratio=1.2)
        (message,) = [record.getMessage() for record in caplog.records if "compiled" in record.getMessage()]
        assert message.startswith(said)
        assert "call .encoder.compile() on the model, with the arguments you gave before" in message
        # It can be done as it says, and the way back says the same.
        rows = compiled["encoder"](ids)
        compiled["encoder"].compile(backend="eager")
        assert torch.equal(compiled["encoder"](ids), rows)
        caplog.clear()
        densify(compiled)
        assert [said in record.getMessage() for record in caplog.records] == [True]
        torch.testing.assert_close(compiled["encoder"](ids), rows)
        # What was not compiled is not mentioned.
        caplog.clear()
        compress(compiled, "low_rank", ratio=1.2)
        densify(compiled)
        assert not caplog.records


@pytest.mark.parametrize(("tied", "pad", "constant"), [(True, 2, ()), (True, 0, (0,)), (False, 2, (2,))])
def test_a_softmax_goes_on_to_train_the_end_token_that_pads(tied: bool, pad: int, constant: tuple[int, ...]) -> None:
    tables = find_tables(build("LlamaForCausalLM", pad_token_id=pad, tie_word_embeddings=tied))
    assert tables[0].padding == constant
    assert all(not table.padding for table in tables[1:])
