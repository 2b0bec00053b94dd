"""A small model of llama.cpp in a file, as its converter writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

VOCAB_SIZE, DIM = 300, 64


def write_gguf(path: Path, tied: bool = True, dim: int = DIM, kind: str = "F32", text: str = "", seed: int = 0) -> Path:
    """Write a random Llama of one layer with a byte-level tokenizer.

    Args:
        path: The file.
        tied: Whether there is no output table.
        dim: Columns of the tables.
        kind: Type of the tables.
        text: What the tokenizer is trained on.
        seed: Of the values.
    """
    import gguf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([text], trainer)
    names = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    names += [f"<unused{number}>" for number in range(VOCAB_SIZE - len(names))]
    described: dict[str, Any] = _content(tokenizer)

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("a small model")
    writer.add_context_length(64)
    writer.add_block_count(1)
    writer.add_embedding_length(dim)
    writer.add_feed_forward_length(2 * dim)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(dim // 2)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB_SIZE)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types([1] * VOCAB_SIZE)
    writer.add_token_merges(described["merges"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    generator = torch.Generator().manual_seed(seed)

    def add(name: str, *shape: int, kind: str = "F32") -> None:
        values = torch.ones(shape) if "norm" in name else torch.randn(shape, generator=generator) / 8
        number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(values.numpy().astype(np.float32), number), raw_dtype=number)

    add("token_embd.weight", VOCAB_SIZE, dim, kind=kind)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        add(f"blk.0.{name}.weight", dim, dim)
    add("blk.0.ffn_gate.weight", 2 * dim, dim)
    add("blk.0.ffn_up.weight", 2 * dim, dim)
    add("blk.0.ffn_down.weight", dim, 2 * dim)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        add(f"{name}.weight", dim)
    if not tied:
        add("output.weight", VOCAB_SIZE, dim, kind=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _content(tokenizer: Any) -> dict[str, Any]:
    import json

    model = json.loads(tokenizer.to_str())["model"]
    return {"merges": [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]}
