"""Models of transformers within a module, and which of their layers have a row per token.

transformers is never imported here: a model of it can only be there if somebody else has imported it.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from lightning_embcompress.layers.compressed import CompressedEmbedding, CompressedLinear


def pretrained_models(root: nn.Module) -> dict[str, Any]:
    """Models of transformers within a module by their paths, outer ones first; the module itself has the path `""`."""
    # A model of transformers can only be there if somebody has imported it.
    library = sys.modules.get("transformers.modeling_utils")
    kind = getattr(library, "PreTrainedModel", ())
    return {path: module for path, module in root.named_modules() if isinstance(module, kind)}


def only_model(root: nn.Module) -> Any:
    """The model of transformers that a module is or holds, if it is one; what that holds in turn does not count."""
    outer: list[str] = []
    models = pretrained_models(root)
    for path in models:
        if not any(path.startswith(f"{other}." if other else "") for other in outer):
            outer.append(path)
    return models[outer[0]] if len(outer) == 1 else None


def vocabulary_layers(root: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Token embeddings and softmax projections of a module, as far as a model of transformers in it says.

    Returns:
        Its embeddings, of which an encoder and a decoder may have one each, and its projection; where it has none,
        projections that are outside of it. Nothing if there is no such model, or it does not say.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> model = GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=50, n_positions=50))
        >>> vocabulary_layers(nn.Sequential(model, nn.Linear(8, 50)))
        ([Embedding(50, 8)], [Linear(in_features=8, out_features=50, bias=True)])
    """
    model = only_model(root)
    if model is None:
        return [], []
    parts = [model, model.get_encoder(), model.get_decoder()] if _has_encoder_and_decoder(model) else [model]
    try:
        layers, projection = [part.get_input_embeddings() for part in parts], model.get_output_embeddings()
    except NotImplementedError:
        return [], []
    embeddings = {id(layer): layer for layer in layers if isinstance(layer, nn.Embedding | CompressedEmbedding)}
    if not embeddings:
        return [], []
    own = set(model.modules())
    candidates = [layer for layer in root.modules() if layer not in own] if projection is None else [projection]
    projections: list[nn.Module] = [layer for layer in candidates if isinstance(layer, nn.Linear | CompressedLinear)]
    return list(embeddings.values()), projections


def _has_encoder_and_decoder(model: Any) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False)) and hasattr(model, "get_encoder")
