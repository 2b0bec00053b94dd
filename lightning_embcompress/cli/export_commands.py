"""`embcompress export FORMAT`: tables for other engines. Imports nothing heavy."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from lightning_embcompress.cli.parsing import Command
from lightning_embcompress.cli.targets import check_target
from lightning_embcompress.cli.usage import UsageError
from lightning_embcompress.integrations.sources import find_source


@dataclass(frozen=True)
class GGUF(Command):
    """Write a GGUF file of llama.cpp with its token table and output table in few bits, in the metric of the loss.

    Scales and codes are those that lose least of what the model says, in the types that llama.cpp reads already. All
    other tensors and all metadata stay as they are, byte for byte. What errors cost follows from a text, which the
    model reads by transformers, or from a file of statistics; without either all columns count the same.

    Attributes:
        source: The GGUF file.
        target: The file to write; must not exist.
        type: Type of the tables: 4.5 bits per weight for IQ4_NL and Q4_0, 5 for Q4_1, 5.5 for Q5_0, 6 for Q5_1, 8.5 for
            Q8_0; auto for the smallest that is predicted to stay within max_perplexity_increase.
        max_perplexity_increase: For auto, such as 1%.
        text: Plain text in UTF-8, files or glob patterns: its first nine tenths say what errors cost, its last tenth is
            for the perplexity before and after.
        statistics: What errors in the tables cost, as Statistics.save has written it; if there is no such file, it is
            written from text.
        model: The Hugging Face directory of the same model, for tables that are better than those of the file, and for
            architectures that transformers does not read from GGUF.
        device: Where the model is called; auto takes a GPU where there is one.
        batch_tokens: Tokens that the model gets at once; by default what the memory has room for.
        max_tokens: Tokens that the perplexity is measured on; by default 16,384 on a CPU and 262,144 on a GPU.
        overwrite: Whether target is replaced if it is there; it stays as it is until the new one is complete.
    """

    examples: ClassVar[str] = """\
embcompress export gguf model-Q8_0.gguf model-small.gguf --type Q4_0 --text novels/*.txt
embcompress export gguf model-Q4_0.gguf model-small.gguf --type IQ4_NL --model my_model --text novels/*.txt
embcompress export gguf model-Q8_0.gguf model-small.gguf --max_perplexity_increase 1% --text novels/*.txt
"""
    source: str
    target: str
    type: Literal["auto", "IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"] = "auto"
    max_perplexity_increase: str | None = None
    text: list[str] | None = None
    statistics: str | None = None
    model: str | None = None
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    batch_tokens: int | None = None
    max_tokens: int | None = None
    overwrite: bool = False

    def run(self) -> None:
        """Export."""
        source, target = Path(self.source).expanduser(), Path(self.target).expanduser()
        if not source.is_file():
            raise UsageError(f"there is no file {self.source!r}")
        check_file(target, source, self.overwrite)
        if self.type == "auto" and self.max_perplexity_increase is None:
            raise UsageError("--type says which type, or --max_perplexity_increase how much may be lost: give one")
        if self.type == "auto" and self.text is None and self.statistics is None:
            raise UsageError("--max_perplexity_increase is predicted from --text or --statistics: give one")
        from lightning_embcompress.cli.exporting import run_gguf

        run_gguf(self, source, target)


@dataclass(frozen=True)
class CompressedTensors(Command):
    """Write a Hugging Face directory with embedding and head in packed integers, in the metric of the loss.

    Of the format pack-quantized of compressed-tensors, which AutoModelForCausalLM.from_pretrained loads where that
    package is there, and vLLM serves.

    Attributes:
        source: A directory that save_pretrained has written, or the name of a model on the Hugging Face hub.
        target: The directory to make; must not exist, or be empty.
        bits: Of an integer, 4 or 8.
        group_size: Columns that share a scale.
        tie: Whether a table that embedding and head share is stored once; untie for vLLM, which reads two.
        text: Plain text in UTF-8, files or glob patterns: its first nine tenths say what errors cost, its last tenth is
            for the perplexity before and after.
        statistics: What errors in the tables cost, as Statistics.save has written it; if there is no such file, it is
            written from text.
        tokenizer: Directory or hub name; by default the files in source.
        dtype: Of all other weights; by default that of source.
        device: Where the model is called; auto takes a GPU where there is one.
        batch_tokens: Tokens that the model gets at once; by default what the memory has room for.
        max_tokens: Tokens that the perplexity is measured on; by default 16,384 on a CPU and 262,144 on a GPU.
        overwrite: Whether target is replaced if it is a model already; it stays as it is until the new one is complete.
    """

    examples: ClassVar[str] = """\
embcompress export compressed-tensors my_model my_model-int4 --text novels/*.txt
embcompress export compressed-tensors my_model my_model-int4 --tie untie --statistics my.statistics
"""
    source: str
    target: str
    bits: int = 4
    group_size: int = 32
    tie: Literal["keep", "untie"] = "keep"
    text: list[str] | None = None
    statistics: str | None = None
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    batch_tokens: int | None = None
    max_tokens: int | None = None
    overwrite: bool = False

    def run(self) -> None:
        """Export."""
        if self.bits not in (4, 8):
            raise UsageError(f"--bits {self.bits}: must be 4 or 8")
        source, target = find_source(self.source), Path(self.target).expanduser()
        if source.kind != "pretrained":
            raise UsageError(f"SOURCE {self.source!r} must be a directory that save_pretrained has written")
        if problem := check_target(target, source, self.overwrite):
            raise UsageError(problem)
        from lightning_embcompress.cli.exporting import run_compressed_tensors

        run_compressed_tensors(self, source, target)


@dataclass(frozen=True)
class ONNX(Command):
    """Write a causal language model, compressed or not, as a graph of ids to logits for ONNX Runtime.

    Tables stay about as small in the graph as on disk: what embcompress compress has made of them is read by operators
    of ONNX Runtime, and not unfolded.

    Attributes:
        source: A directory that save_pretrained or embcompress compress has written.
        target: The file to write; must not exist. Weights above 2 GB are in TARGET.data beside it.
        overwrite: Whether target is replaced if it is there.
    """

    examples: ClassVar[str] = """\
embcompress compress my_model my_model-3bit --bits_per_weight 3 --text novels/*.txt
embcompress export onnx my_model-3bit my_model.onnx
"""
    source: str
    target: str
    overwrite: bool = False

    def run(self) -> None:
        """Export."""
        source, target = find_source(self.source), Path(self.target).expanduser()
        if source.kind != "pretrained":
            raise UsageError(f"SOURCE {self.source!r} must be a directory that save_pretrained has written")
        check_file(target, source.path, self.overwrite)
        from lightning_embcompress.cli.exporting import run_onnx

        run_onnx(source, target)


EXPORTS: dict[str, type[Command]] = {"gguf": GGUF, "compressed-tensors": CompressedTensors, "onnx": ONNX}
"""By the name of the format."""


def check_file(target: Path, source: Path, overwrite: bool) -> None:
    """Check that a file can be made.

    Raises:
        UsageError: If it is there already, or there is no folder for it.
    """
    if target.is_dir():
        raise UsageError(f"TARGET {str(target)!r} is a directory: name the file to write")
    if not target.absolute().parent.is_dir():
        raise UsageError(f"TARGET {str(target)!r}: there is no folder {str(target.absolute().parent)!r}")
    if not os.access(target.absolute().parent, os.W_OK | os.X_OK):
        raise UsageError(f"TARGET {str(target)!r}: no permission to write in {str(target.absolute().parent)!r}")
    if target.exists() and target.resolve() == source.resolve():
        raise UsageError(f"TARGET {str(target)!r} is SOURCE: choose another")
    if target.exists() and not overwrite:
        raise UsageError(f"TARGET {str(target)!r} exists: choose another, or replace it with --overwrite")
