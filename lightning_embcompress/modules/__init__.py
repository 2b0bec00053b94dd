"""LightningModules of language models."""

from lightning_embcompress.modules.finetuning import CompressedLanguageModel
from lightning_embcompress.modules.huggingface import HuggingFaceCausalLM
from lightning_embcompress.modules.lstm import LSTMLanguageModel

__all__ = ["CompressedLanguageModel", "HuggingFaceCausalLM", "LSTMLanguageModel"]
