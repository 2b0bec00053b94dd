"""Embeddings of transformers that scale their rows: every class that is known, and what becomes of the others."""

from __future__ import annotations

import copy
import importlib
import pickle
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from lightning_embcompress.compression.plan import compress, densify
from lightning_embcompress.layers.compressed import CompressedEmbedding
from lightning_embcompress.layers.scaled_embeddings import KNOWN, scale_of
from lightning_embcompress.methods.registry import LowRank
from lightning_embcompress.tables.replacement import replace_table

_SOURCES = Path(transformers.__file__).parent / "models"
_IDS = torch.tensor([[0, 3, 49], [7, 7, 1]])


def _classes() -> dict[str, str]:
    """Classes that derive from `nn.Embedding` and are called scaled or normed, and the modules they are in."""
    found = {}
    for file in sorted(_SOURCES.glob("*/modeling_*.py")):
        for name in re.findall(
            r"^class (\w+(?:Scaled|Normed)\w*Embedding)\(nn\.Embedding\):", file.read_text("utf-8"), re.M
        ):
            found[name] = f"transformers.models.{file.parent.name}.{file.stem}"
    return found


_CLASSES = _classes()
_IN_THIS_VERSION = sorted(KNOWN & _CLASSES.keys())


def _scaled(name: str, scale: float = 5.6568, **given: object) -> nn.Embedding:
    torch.manual_seed(0)
    layer: nn.Embedding = getattr(importlib.import_module(_CLASSES[name]), name)(50, 8, 1, embed_scale=scale, **given)
    return layer


def test_most_of_the_known_classes_are_there() -> None:
    assert len(_IN_THIS_VERSION) >= 15


@pytest.mark.parametrize("name", _IN_THIS_VERSION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_scaled_as_the_class_does(name: str, dtype: torch.dtype) -> None:
    model = nn.ModuleDict({"embed": _scaled(name).to(dtype)})
    original = copy.deepcopy(model["embed"])
    factors = LowRank(50, 8, 8, dtype=dtype)
    with torch.no_grad():
        factors.coefficients.copy_(original.weight)
        factors.basis.copy_(torch.eye(8))
    replace_table(model, ["embed"], factors)
    layer = model["embed"]
    assert isinstance(layer, CompressedEmbedding)
    assert layer.scale is not None
    assert "padding_idx=1, scale=5.65" in repr(layer)
    for one in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(one(_IDS), original(_IDS))
    # Another table does not change the scale.
    replace_table(model, ["embed"], factors)
    assert torch.equal(model["embed"](_IDS), original(_IDS))
    densify(model)
    again = model["embed"]
    assert type(again) is type(original)
    assert again.state_dict().keys() == original.state_dict().keys()
    assert _public(again) == _public(original)
    assert again.padding_idx == 1
    assert torch.equal(again(_IDS), original(_IDS))


def _public(layer: nn.Module) -> set[str]:
    return {name for name in vars(layer) if not name.startswith("_")}


@pytest.mark.parametrize("name", sorted(_CLASSES.keys() - KNOWN))
def test_classes_that_do_more_are_refused(name: str) -> None:
    layer_class = getattr(importlib.import_module(_CLASSES[name]), name)
    layer = layer_class.__new__(layer_class)
    nn.Embedding.__init__(layer, 50, 8)
    assert scale_of(layer) is None
    model = nn.ModuleDict({"embed": layer, "head": nn.Linear(8, 50)})
    with pytest.raises(ValueError, match=rf"'embed' of table 'embed' is a .*{name}"):
        compress(model, "low_rank", ratio=1.2)


def test_a_class_of_the_same_name_from_elsewhere_is_not_known() -> None:
    class BartScaledWordEmbedding(nn.Embedding):
        embed_scale = 3.0

    assert scale_of(BartScaledWordEmbedding(50, 8)) is None


@pytest.mark.parametrize("name", ["BartScaledWordEmbedding", "Gemma3TextScaledWordEmbedding"])
def test_a_scale_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        scale = scale_of(_scaled(name))
    assert scale is not None
    assert scale.value == pytest.approx(5.6568)


def test_scaled_rows_train_and_padding_does_not() -> None:
    model = nn.ModuleDict({"embed": _scaled("BartScaledWordEmbedding")})
    compress(model, "low_rank", ratio=1.5)
    model["embed"](torch.tensor([1, 1])).sum().backward()
    assert all(parameter.grad.abs().sum() == 0 for parameter in model.parameters())
    model["embed"](torch.tensor([1, 2])).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
