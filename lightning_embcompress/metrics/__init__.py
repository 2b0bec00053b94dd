"""Metrics: perplexity over tokens, of all and by frequency band."""

from lightning_embcompress.metrics.frequency_bands import PerplexityByFrequency
from lightning_embcompress.metrics.perplexity import Perplexity

__all__ = ["Perplexity", "PerplexityByFrequency"]
