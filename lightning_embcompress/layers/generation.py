"""`generate()` of transformers with a compressed softmax that computes the best tokens alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightning_embcompress.layers.compressed import CompressedLinear

# What these make of the scores of the best tokens does not depend on others.
_TOP_K, _TOP_P = "TopKLogitsWarper", "TopPLogitsWarper"
_KNOWN = ("TemperatureLogitsWarper", _TOP_K, _TOP_P)
# What they are called in transformers.
_MODES = ("greedy_search", "sample")


def generate_from_best(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **model_kwargs: Any,
) -> Any:
    """Decode greedily, or by sampling from the `top_k` best, from those alone: for `generate(custom_generate=...)`.

    What comes out is what `generate` gives without it, for a head that has to find the best tokens only, see
    `CompressedLinear.topk`; where several tokens have the same logit, it may be another one of them. Of all other
    tokens the head's logits are minus infinity, and so are the scores of most models, in `output_scores` too.

    Args:
        model: A causal language model of transformers with a compressed head.
        input_ids: From `generate`, as everything below.
        logits_processor: Only temperature, top k and top p; where tokens are sampled top k, and no top p before it.
        stopping_criteria: Any.
        generation_config: Any of greedy search or sampling.
        **model_kwargs: Go to the model.

    Raises:
        ValueError: If the head is not compressed, it is another search, or scores of other tokens could matter.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from lightning_embcompress import compress
        >>> sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=500, **sizes)).eval()
        >>> plan = compress(model, "low_rank", ratio=2)
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> model.generate(ids, custom_generate=generate_from_best, max_new_tokens=4, do_sample=False).shape
        torch.Size([1, 7])
    """
    head = model.get_output_embeddings()
    if not isinstance(head, CompressedLinear):
        raise ValueError(
            f"the head of {type(model).__name__} is a {type(head).__name__}, which is not compressed: compress its "
            "table, or leave custom_generate out"
        )
    mode = generation_config.get_generation_mode(model_kwargs.get("assistant_model"))
    if mode not in _MODES:
        raise ValueError(
            f"{str(mode.value).replace('_', ' ')} needs more than the best tokens: leave custom_generate out"
        )
    names = [type(one).__name__ for one in logits_processor]
    others = [name for name in names if name not in _KNOWN]
    if others:
        raise ValueError(f"{', '.join(others)} may need the scores of all tokens: leave custom_generate out")
    count = 1
    if generation_config.do_sample:
        if _TOP_K not in names:
            raise ValueError("samples are drawn from all tokens: set top_k, or leave custom_generate out")
        first = names.index(_TOP_K)
        if _TOP_P in names[:first]:
            raise ValueError(
                "top p comes before top k, and adds up the probabilities of all tokens: set top_p and top_k in place "
                "of logits processors of your own, or leave custom_generate out"
            )
        count = logits_processor[first].top_k
    with only_best(head, min(count, head.out_features)):
        return model._sample(
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            **model_kwargs,
        )


@contextmanager
def only_best(head: CompressedLinear, k: int) -> Iterator[None]:
    """Let a head give minus infinity for all tokens but the `k` best of every state, where no gradient is wanted.

    Example:
        >>> from lightning_embcompress.methods.registry import LowRank
        >>> head = CompressedLinear(LowRank.decompose(torch.randn(100, 16), 4000))
        >>> with torch.no_grad(), only_best(head, 3):
        ...     int(head(torch.randn(2, 16)).isfinite().sum())
        6
    """
    before = head.best
    head.best = k
    try:
        yield
    finally:
        head.best = before
