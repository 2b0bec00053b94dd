"""Models of transformers within a module, and which of their layers have a row per token.

transformers is never imported here: a model of it can only be there if somebody else has imported it.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from lightning_embcompress.layers.compressed import CompressedLayer

# Of transformers: joins the numbers of its `decoder` with those of another weight before it multiplies.
_READ_AS_NUMBERS = ("MobileBertLMPredictionHead",)
# Of transformers: embeddings that are looked up beside those of the words, one a layer (Gemma 3n, Gemma 4) or of
# entities (LUKE). Nothing else of a model says what they are.
_SECOND_TABLES = ("embed_tokens_per_layer", "entity_embeddings")


def is_second_table(path: str) -> bool:
    """Whether an embedding within a model of transformers is a table beside that of its words, by its name.

    Example:
        >>> is_second_table("model.embed_tokens_per_layer"), is_second_table("model.embed_tokens")
        (True, False)
    """
    return path.rpartition(".")[2] in _SECOND_TABLES


def reads_numbers(module: nn.Module) -> bool:
    """Whether a module of transformers needs the numbers of its layers' weights, which a compressed layer has not."""
    kind = type(module)
    return kind.__module__.startswith("transformers.") and kind.__name__ in _READ_AS_NUMBERS


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
        if not any(is_within(path, other) for other in outer):
            outer.append(path)
    return models[outer[0]] if len(outer) == 1 else None


def vocabulary_layers(root: nn.Module) -> dict[str, tuple[list[nn.Module], list[nn.Module]]]:
    """Token embeddings and softmax projections that models of transformers within a module name.

    They are what `get_input_embeddings` and `get_output_embeddings` give, of a model and of all models within it: an
    encoder and a decoder may have one each, and a model of images the text model inside.

    Returns:
        Embeddings and projections by the paths of the outermost models; without models that name no embedding, such as
        those of images alone.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=50, n_positions=50))
        >>> vocabulary_layers(nn.Sequential(model))
        {'0': ([Embedding(50, 8)], [Linear(in_features=8, out_features=50, bias=False)])}
    """
    found: dict[str, tuple[list[nn.Module], list[nn.Module]]] = {}
    outer = ""
    for path, model in pretrained_models(root).items():
        # A model comes before those within it.
        if not found or not is_within(path, outer):
            outer = path
            found[outer] = ([], [])
        embeddings, projections = found[outer]
        # The input of a model of images is a projection of patches.
        embeddings += [
            layer for layer in _named(model.get_input_embeddings, embeddings) if not isinstance(layer, nn.Linear)
        ]
        projections += _named(model.get_output_embeddings, projections)
    return {path: layers for path, layers in found.items() if layers[0]}


def _named(give: Any, known: list[nn.Module]) -> list[nn.Module]:
    """The layer that a model gives, or those of the list that it gives, if they are matrices and not known already."""
    try:
        layer = give()
    except (NotImplementedError, AttributeError):
        # It has none, or is a part that was not made to be asked.
        return []
    layers = list(layer) if isinstance(layer, nn.ModuleList) else [layer]
    return [one for one in layers if _is_matrix(one) and one not in known]


def _is_matrix(layer: Any) -> bool:
    """Whether a layer has a row per token, rather than patches of an image or nothing."""
    weight = getattr(layer, "weight", None)
    return isinstance(layer, CompressedLayer) or (isinstance(weight, Tensor) and weight.dim() == 2)


def ends_of_texts(root: nn.Module) -> set[int]:
    """Ids that models of transformers within a module begin or end a text with."""
    found: set[int] = set()
    for model in pretrained_models(root).values():
        for config in (model.config.get_text_config(), getattr(model, "generation_config", None)):
            found |= ids_in_config(config, "bos", "eos")
    return found


def ids_in_config(config: Any, *names: str) -> set[int]:
    """Ids of special tokens, such as `eos`, in a configuration of transformers, which may have several for a name.

    Example:
        >>> from transformers import GPT2Config
        >>> ids_in_config(GPT2Config(bos_token_id=3, eos_token_id=[3, 5]), "bos", "eos", "sep")
        {3, 5}
    """
    values = [getattr(config, f"{name}_token_id", None) for name in names]
    flat = [one for value in values for one in (value if isinstance(value, list | tuple) else [value])]
    return {one for one in flat if isinstance(one, int)}


def is_within(path: str, outer: str) -> bool:
    """Whether a module is, by its path, in another one, of which the whole model has the path `""`."""
    return not outer or path.startswith(f"{outer}.")
