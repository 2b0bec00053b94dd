"""Embeddings that multiply their rows by a constant: which are known, and how they do it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Of these classes of `transformers.models`, `forward` is known to be that of `nn.Embedding` times `embed_scale`, and
# nothing more (T5Gemma2's, for one, has a row of its own besides). What is not named here is refused.
_FAMILIES = (
    "Bart BigBirdPegasus BioGpt Blenderbot DiffusionGemmaText EmbeddingGemma2Text Gemma2Text Gemma3Text Gemma3nText "
    "Gemma4Text Gemma4UnifiedText GemmaText M2M100 MBart MiniCPM3 NllbMoe PLBart PPFormulaNet PegasusX SeamlessM4T "
    "SeamlessM4Tv2 TrOCR VaultGemmaText XGLM"
)
KNOWN = frozenset(f"{family}ScaledWordEmbedding" for family in _FAMILIES.split())
"""Names of the classes."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Scale:
    """The constant of a scaled embedding, and the class that had it.

    Args:
        value: The constant.
        rounded: Whether the class rounds it to the dtype of the table before it multiplies, as Gemma's do.
        layer: The class.
    """

    def __init__(self, value: float, rounded: bool, layer: type[nn.Embedding]) -> None:
        """Round it once for every dtype."""
        self.value = value
        self.rounded = rounded
        self.layer = layer
        self._by_dtype = {
            dtype: float(torch.tensor(value, dtype=dtype, device="cpu")) if rounded else value for dtype in _DTYPES
        }

    def __call__(self, rows: Tensor) -> Tensor:
        """Multiply rows, in their dtype."""
        return rows * self._by_dtype[rows.dtype]

    def dense(self, weight: nn.Parameter, padding_idx: int | None) -> nn.Embedding:
        """An embedding of the class, with a weight of the table."""
        # Made on the meta device: its own weight is thrown away at once.
        with torch.device("meta"):
            layer = self.layer(*weight.shape, padding_idx, embed_scale=self.value)  # type: ignore[call-arg]
        if self.rounded:
            layer.embed_scale = torch.tensor(self.value, dtype=weight.dtype, device=weight.device)
        layer.weight = weight
        return layer


def scale_of(embedding: nn.Module) -> Scale | None:
    """The scale of an embedding of a class that is known to have one, otherwise None.

    Example:
        >>> from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
        >>> scale_of(BartScaledWordEmbedding(10, 4, padding_idx=0, embed_scale=2.0)).value
        2.0
    """
    known: Any = embedding
    layer = type(known)
    if not layer.__module__.startswith("transformers.models.") or layer.__name__ not in KNOWN:
        return None
    scale = known.embed_scale
    if not isinstance(scale, Tensor):
        return Scale(float(scale), False, layer)
    # On the meta device, where a model is before it is loaded, the buffer has no value.
    return Scale(float(known.scalar_embed_scale if scale.is_meta else scale), True, layer)
