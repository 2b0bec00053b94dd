"""Fine-tuning of compressed language models: distillation, reconstruction, and two learning rates."""

from lightning_embcompress.modules.finetuning.module import CompressedLanguageModel

__all__ = ["CompressedLanguageModel"]
