"""Metrics: perplexity over tokens, by frequency band, and compression ratio."""

from lightning_embcompress.metrics.compression import CompressionRatio
from lightning_embcompress.metrics.frequency_bands import PerplexityByFrequency
from lightning_embcompress.metrics.perplexity import Perplexity

__all__ = ["CompressionRatio", "Perplexity", "PerplexityByFrequency"]
