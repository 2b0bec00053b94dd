"""State that is loaded a tensor at a time, as loaders of sharded files do, in any order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_embcompress.methods.registry import METHODS, Factorization, factorization_from_spec

_RARE: dict[str, Any] = {"subspaces": 4, "bits": 4, "rare_bits": 2, "rare_fraction": 0.5}
_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{method: (method, {}) for method in sorted(METHODS)},
    "rare tokens": ("product_quantization", _RARE),
}


def _decomposed(case: str) -> Factorization[Any]:
    method, given = _CASES[case]
    chosen = METHODS[method]
    options = chosen.config(**given)
    generator = torch.Generator().manual_seed(0)
    weight, counts = torch.randn(60, 8, generator=generator), torch.randperm(60, generator=generator)
    max_bytes = max(weight.nbytes // 2, chosen.factorization.smallest_bytes(60, 8, 4, options))
    return chosen.factorization.decompose(weight, max_bytes, counts, options)


@pytest.mark.parametrize("case", sorted(_CASES))
@pytest.mark.parametrize("on_meta", [False, True])
def test_tensors_can_come_one_at_a_time(case: str, on_meta: bool) -> None:
    factors = _decomposed(case)
    state = factors.state_dict()
    names = list(state)
    for order in (names, names[::-1], *(names[turn:] + names[:turn] for turn in range(1, len(names)))):
        loaded = factorization_from_spec(factors.spec(), torch.float32, torch.device("meta") if on_meta else None)
        for name in order:
            # Assigned tensors may be changed in place later, those of the other tests may not.
            missing = loaded.load_state_dict({name: state[name].clone()}, strict=False, assign=on_meta).missing_keys
            assert len(missing) == len(names) - 1
        assert all(not tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
        found = loaded.state_dict()
        assert all(torch.equal(found[name], state[name]) for name in names)
        buffers = dict(factors.named_buffers())
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in loaded.named_buffers())
        assert torch.equal(loaded.materialize(), factors.materialize())
        hidden = torch.randn(3, 8)
        assert torch.equal(loaded.logits(hidden), factors.logits(hidden))
