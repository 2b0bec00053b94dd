"""Collect, solve and measure on a device that computes as the CPU does, and refuses to mix tensors with it as GPUs do.

A process of its own: the device is registered with torch for good.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree
from torch.utils import backend_registration

from lightning_embcompress import compress
from lightning_embcompress.calibration.statistics import collect_statistics
from lightning_embcompress.cli.text import TokenizedText
from lightning_embcompress.integrations.placement import Placement
from lightning_embcompress.metrics.frequency_bands import PerplexityByFrequency
from lightning_embcompress.tables import finding
from toys import gpt2


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class Far(torch.Tensor):
    """A tensor on the device: one on the CPU within it."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Far:
        places = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.size(), dtype=inner.dtype, device="far:0", **places)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, _: Any, arguments: Any = (), keywords: Any = None) -> Any:
        return run(function, *arguments, **(keywords or {}))

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(torch.tensor(index, dtype=torch.long).to("far") if type(index) is list else index)

    def tolist(self) -> Any:
        return self.inner.tolist()


def run(function: Any, *arguments: Any, **keywords: Any) -> Any:
    """Any operation: of one device, but for copies and for indices that are on the CPU."""
    name, device = str(function), keywords.get("device")
    tensors = [one for one in pytree.tree_leaves((arguments, keywords)) if isinstance(one, torch.Tensor)]
    far = [one for one in tensors if isinstance(one, Far)]
    is_copy = any(part in name for part in ("_to_copy", "copy_"))
    is_index = ("index.Tensor" in name or "index_put" in name) and isinstance(arguments[0], Far)
    others = [tuple(one.shape) for one in tensors if not isinstance(one, Far) and one.dim()]
    if far and others and not is_copy and not is_index:
        raise RuntimeError(f"{name}: expected all tensors on one device, {others} are on the CPU")
    plain, options = pytree.tree_map(lambda x: x.inner if isinstance(x, Far) else x, (arguments, keywords))
    stays = bool(far) if device is None else torch.device(device).type == "far"
    if "copy_" in name and "_to_copy" not in name:
        stays = isinstance(arguments[0], Far)
    found = function(*plain, **(options if device is None else {**options, "device": "cpu"}))

    def placed(value: Any) -> Any:
        if not stays or not isinstance(value, torch.Tensor):
            return value
        # In place, the tensor is what it was.
        same = [one for one in far if one.inner is value]
        return same[0] if same else Far(value)

    return pytree.tree_map(placed, found)


def _made_on_the_cpu(name: str) -> None:
    """Let a function of torch make tensors on the device, which a fallback in Python cannot do for some."""
    plain = getattr(torch, name)

    def make(*arguments: Any, device: Any = None, **keywords: Any) -> Any:
        if device is None or torch.device(device).type != "far":
            return plain(*arguments, **keywords, **({} if device is None else {"device": device}))
        return plain(*arguments, **keywords).to("far")

    setattr(torch, name, make)


def main() -> None:
    """Compare with the CPU."""
    backend_registration._setup_privateuseone_for_python_backend("far", backend_module=_Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(run, "PrivateUse1")
    for name in ("arange", "tensor", "as_tensor"):
        _made_on_the_cpu(name)
    # In Python there are no inference tensors.
    TokenizedText.perplexity = torch.no_grad()(TokenizedText.perplexity.__wrapped__)  # type: ignore[attr-defined]
    # Parameters of a class of their own cannot take the values of others.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    finding.Tensor = Far  # type: ignore[attr-defined]

    batches = [
        {"input_ids": torch.randint(300, (4, 24), generator=torch.Generator().manual_seed(seed))} for seed in (0, 1)
    ]
    near: Any = gpt2()
    away = copy.deepcopy(near)
    expected = collect_statistics(near, batches)
    ids = np.arange(200) * 7 % 300
    text = TokenizedText(ids, ids)
    placed = text.placed(torch.device("far"), None)
    for method, size in (("transform_coding", {"bits_per_weight": 4}), ("shared_basis", {"bits_per_weight": 12})):
        one, other = copy.deepcopy(near), copy.deepcopy(away)
        placement = Placement(other, torch.device("far"))
        placement.is_larger = False
        with placement.running():
            other.tie_weights()
            assert next(other.parameters()).device.type == "far"
            found = collect_statistics(other, batches)
            assert abs(placed.perplexity(other, 32, "Far") - text.perplexity(one, 32, "Near")) < 1e-3
        assert found.hidden["lm_head"].device.type == "cpu"
        torch.testing.assert_close(found.hidden["lm_head"], expected.hidden["lm_head"], rtol=1e-4, atol=1e-5)
        with placement.solving(["transformer.wte", "lm_head"]):
            other.tie_weights()
            assert other.lm_head.weight.device.type == "far"
            plan = compress(other, method, statistics=expected, **size)
            assert other.lm_head.factorization.device.type == "far"
        assert plan == compress(one, method, statistics=expected, **size)
        assert all(tensor.device.type == "cpu" for tensor in other.state_dict().values())
        assert torch.equal(
            other(input_ids=batches[0]["input_ids"]).logits, one(input_ids=batches[0]["input_ids"]).logits
        )
        with placement.running():
            metric = PerplexityByFrequency(expected.token_counts, [10])
            value = placed.perplexity(other, 32, "Far", metric)
            assert abs(value - text.perplexity(one, 32, "Near")) < 1e-3
            assert all(float(band) > 1 for band in metric.compute().values())
    print("done")


if __name__ == "__main__":
    main()
