"""Data modules: text as streams of token ids."""

from lightning_embcompress.data.huggingface import HuggingFaceText
from lightning_embcompress.data.one_billion_word import OneBillionWord
from lightning_embcompress.data.python_docs import PythonDocs
from lightning_embcompress.data.text_files import TextFiles
from lightning_embcompress.data.token_stream import TokenStreamDataModule
from lightning_embcompress.data.vocabulary import Vocabulary
from lightning_embcompress.data.windows import TokenWindows

__all__ = [
    "HuggingFaceText",
    "OneBillionWord",
    "PythonDocs",
    "TextFiles",
    "TokenStreamDataModule",
    "TokenWindows",
    "Vocabulary",
]
