"""Random small models: `from random_models import RandomModel`.

A model reads one to three vocabularies by embeddings, bags, heads and plain products with a weight, tied or not, in
random containers, beside buffers, normalization and recurrent layers. The same seed gives the same structure; the
values come of another one, so that a model can be built anew and loaded into.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NAMES = """
    encoder decoder wte lm_head weight_ table factorization_ a-b a%20b Ünï 0 7 _x __y shared model body
    embed_tokens out embeddings lookup projection layer head emb type training_ hooks keys2 Weight dim bias_
    plan
"""


class _Scaled(nn.Embedding):
    """An embedding of a class that nobody knows."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Double:
    """A forward hook that changes what a layer gives."""

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return 2 * output


class Count:
    """A hook of any kind that only counts how often it is called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *_: Any) -> None:
        self.calls += 1


class Doubled:
    """A forward in the place of a module's own."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * type(self.module).forward(self.module, *args, **kwargs)


class RandomModel(nn.Module):
    """A model that reads random vocabularies in random ways.

    Args:
        seed: Of the structure.
        values: Of the weights.
    """

    def __init__(self, seed: int, values: int = 0) -> None:
        super().__init__()
        self.random = random.Random(seed)
        torch.manual_seed(1000 * seed + values)
        self.dtype = self.random.choice(DTYPES)
        self.ids = self.random.choice((torch.int64, torch.int64, torch.int32))
        self.readers: list[tuple[str, int, str, dict[str, Any]]] = []
        self.vocabularies: list[tuple[int, int]] = []
        self.said: list[str] = []
        for number in range(self.random.choice((1, 1, 1, 1, 2, 2, 3))):
            self._add_vocabulary(number)
        self._add_others()
        self.to(self.dtype)
        for name, _, kind, _ in self.readers:
            self._decorate(name, kind)
        # Its state would be copied with every copy of the model.
        del self.random

    def _chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def _place(self, module: nn.Module) -> str:
        """Register a module somewhere, and give its path."""
        parent: nn.Module = self
        path: list[str] = []
        for _ in range(self.random.choice((0, 0, 1, 1, 2, 3))):
            containers = [
                (name, child)
                for name, child in parent._modules.items()
                if type(child) in (nn.Module, nn.ModuleDict, nn.ModuleList, nn.Sequential)
            ]
            if containers and self._chance(0.5):
                name, child = self.random.choice(containers)
            else:
                child = self.random.choice((nn.Module, nn.ModuleDict, nn.ModuleList, nn.Sequential))()
                name = self._register(parent, child)
            parent, path = child, [*path, name]
        return ".".join([*path, self._register(parent, module)])

    def _register(self, parent: nn.Module, child: nn.Module) -> str:
        if isinstance(parent, nn.ModuleList | nn.Sequential):
            parent.append(child)
            return str(len(parent) - 1)
        taken = parent._modules
        free = [name for name in _NAMES.split() if name not in taken and not hasattr(parent, name)]
        name = self.random.choice(free)
        parent.add_module(name, child)
        return name

    def _add_vocabulary(self, number: int) -> None:
        size, dim = self.random.randint(40, 160), self.random.choice((6, 8, 12, 16, 16, 24))
        self.vocabularies.append((size, dim))
        kinds = self.random.choice(
            (
                ["embedding"],
                ["embedding", "head"],
                ["embedding", "head"],
                ["embedding", "head"],
                ["bag"],
                ["bag", "head"],
                ["head"],
                ["embedding", "embedding", "head"],
                ["embedding", "embedding", "head", "head"],
                ["embedding", "product"],
                ["embedding", "head", "product"],
                ["bag", "embedding"],
                ["embedding", "bag", "head"],
            )
        )
        tied = self._chance(0.5)
        shared: nn.Parameter | None = None
        for kind in kinds:
            if kind == "product":
                source = next(name for name, of, other, _ in self.readers if of == number and other == "embedding")
                options = {"form": self.random.choice(("linear", "matmul", "embedding"))}
                self.readers.append((source, number, "product", options))
                continue
            module, options = self._layer(kind, size, dim, norm="product" not in kinds)
            if tied and shared is not None:
                module.weight = shared  # type: ignore[assignment]
            if shared is None:
                shared = module.weight  # type: ignore[assignment]
            name = self._place(module)
            self.readers.append((name, number, kind, options))
            if self._chance(0.04):
                self._place(module)
        assert shared is not None
        if self._chance(0.15):
            shared.requires_grad_(False)
        self._fill(shared.data)
        if self._chance(0.02):
            # A parameter beside the layers that read it.
            self.register_parameter(f"weight{number}", shared)

    def _fill(self, table: Tensor) -> None:
        """Give some tables values that are no noise."""
        what = self.random.choice(
            ("normal",) * 12 + ("zeros", "rank one", "one row", "nan", "small", "large", "zero row")
        )
        if what == "zeros":
            table.zero_()
        elif what in ("rank one", "one row"):
            rows = torch.randn(len(table), 1) if what == "rank one" else torch.ones(len(table), 1)
            table.copy_(rows @ torch.randn(1, table.shape[1]))
        elif what == "nan":
            table[self.random.randrange(len(table))] = self.random.choice((float("nan"), float("inf")))
        elif what == "small" or (what == "large" and self.dtype in (torch.float32, torch.float64)):
            table.mul_(0.1 if what == "small" else 5)
        elif what == "zero row":
            table[self.random.randrange(len(table))] = 0

    def _layer(self, kind: str, size: int, dim: int, norm: bool) -> tuple[nn.Module, dict[str, Any]]:
        if kind == "head":
            return nn.Linear(dim, size, bias=self._chance(0.5)), {}
        padding = self.random.choice((None, None, None, 0, size - 1, self.random.randrange(size)))
        common: dict[str, Any] = {"padding_idx": padding, "sparse": self._chance(0.15)}
        if self.dtype not in (torch.float32, torch.float64):
            # torch adds up no sparse gradients of these.
            common["sparse"] = False
        if self._chance(0.1) and norm:
            common |= {"max_norm": self.random.choice((0.5, 2.0, 100.0)), "norm_type": self.random.choice((1.0, 2.0))}
        if kind == "bag":
            mode = self.random.choice(("sum", "mean", "max"))
            if mode == "max":
                common["sparse"] = False
            offsets = self._chance(0.5)
            last = offsets and self._chance(0.3)
            bag = nn.EmbeddingBag(size, dim, mode=mode, include_last_offset=last, **common)
            return bag, {"offsets": offsets, "weights": mode == "sum" and self._chance(0.5)}
        if self._chance(0.02):
            return nn.Embedding(size, dim, scale_grad_by_freq=True, **{**common, "sparse": False}), {}
        return (_Scaled if self._chance(0.02) else nn.Embedding)(size, dim, **common), {}

    def _add_others(self) -> None:
        """Layers and buffers that no compression is to touch."""
        for number, (_, dim) in enumerate(self.vocabularies):
            kind = self.random.choice(("linear", "norm", "gru", "none"))
            if kind == "linear":
                self.add_module(f"mix{number}", nn.Linear(dim, dim))
            elif kind == "norm":
                self.add_module(f"mix{number}", nn.BatchNorm1d(dim) if self._chance(0.5) else nn.LayerNorm(dim))
            elif kind == "gru":
                self.add_module(f"mix{number}", nn.GRU(dim, dim, batch_first=True))
        if self._chance(0.3):
            self.register_buffer("steps", torch.zeros(3, dtype=torch.long), persistent=self._chance(0.7))
        if self._chance(0.2):
            self.register_buffer("table_like", torch.randn(self.vocabularies[0]), persistent=self._chance(0.7))
        if self._chance(0.2):
            self.scale = nn.Parameter(torch.ones(()))
        if self._chance(0.1):
            self.alias = self._modules[next(iter(self._modules))]

    def _decorate(self, name: str, kind: str) -> None:
        module = self.get_submodule(name)
        if kind == "product" or not self._chance(0.15):
            return
        kinds = (
            "double",
            "pre",
            "backward",
            "state",
            "state pre",
            "attribute",
            "eval",
            "load",
            "loaded",
            "full",
            "method",
        )
        what = self.random.choice((*kinds, "parametrization", "weight norm"))
        if what == "double":
            module.register_forward_hook(Double())
        elif what == "pre":
            module.register_forward_pre_hook(Count())
        elif what == "backward":
            if not isinstance(module, nn.Linear):
                return
            module.register_full_backward_pre_hook(Count())
        elif what == "full":
            module.register_full_backward_hook(Count())
        elif what == "state":
            module.register_state_dict_post_hook(Count())
        elif what == "state pre":
            module.register_state_dict_pre_hook(Count())
        elif what == "load":
            module.register_load_state_dict_pre_hook(Count())
        elif what == "loaded":
            module.register_load_state_dict_post_hook(Count())
        elif what == "method":
            # A forward of the instance alone, as a tracer or an adapter puts there.
            module.forward = Doubled(module)  # type: ignore[method-assign]
        elif what == "parametrization" and self._chance(0.3):
            nn.utils.parametrize.register_parametrization(module, "weight", nn.Identity())
        elif what == "weight norm" and self._chance(0.3) and not getattr(module, "sparse", False):
            nn.utils.parametrizations.weight_norm(module)
        elif what == "attribute":
            module.note = "kept"  # type: ignore[assignment]
        else:
            module.eval()

    def inputs(self) -> dict[int, dict[str, Any]]:
        """Ids of every vocabulary, the same for the same structure."""
        generator = torch.Generator().manual_seed(5)
        found = {}
        for number, (size, dim) in enumerate(self.vocabularies):
            found[number] = {
                "ids": torch.randint(size, (3, 5), generator=generator).to(self.ids),
                "states": torch.randn(3, 5, dim, generator=generator, dtype=torch.float64).to(self.dtype),
                "weights": torch.rand(3, 5, generator=generator, dtype=torch.float64).to(self.dtype),
            }
        return found

    def forward(self, inputs: dict[int, dict[str, Any]]) -> list[Tensor]:
        outputs = []
        states = {number: given["states"] for number, given in inputs.items()}
        for name, number, kind, options in self.readers:
            module: Any = self.get_submodule(name)
            ids, weights = inputs[number]["ids"], inputs[number]["weights"]
            if kind == "embedding":
                rows = module(ids)
                outputs += [rows, module(ids[:0])]
                if not module.sparse:
                    # Of one id torch makes no sparse gradient.
                    outputs.append(module(ids[0, 0]))
                states[number] = self._mixed(number, states[number] + rows)
            elif kind == "bag":
                extra = {"per_sample_weights": weights} if options["weights"] else {}
                if options["offsets"]:
                    ends = [0, 5, 5, 11] + ([15] if module.include_last_offset else [])
                    extra = {key: value.flatten() for key, value in extra.items()}
                    bags = module(ids.flatten(), torch.tensor(ends, dtype=ids.dtype), **extra)
                else:
                    bags = module(ids, **extra)
                outputs.append(bags)
                states[number] = self._mixed(number, states[number] + bags[:3].unsqueeze(1))
            elif kind == "head":
                outputs += [module(states[number]), module(states[number][0, 0])]
            else:
                outputs.append(_PRODUCTS[options["form"]](states[number], module.weight, ids))
        scale = getattr(self, "scale", None)
        return outputs if scale is None else [output * scale for output in outputs]

    def _mixed(self, number: int, states: Tensor) -> Tensor:
        mix = self._modules.get(f"mix{number}")
        if mix is None:
            return states
        if isinstance(mix, nn.BatchNorm1d):
            return mix(states.flatten(0, 1)).view_as(states)
        mixed = mix(states)
        return mixed[0] if isinstance(mixed, tuple) else mixed


_PRODUCTS: dict[str, Callable[[Tensor, Any, Tensor], Tensor]] = {
    "linear": lambda states, weight, ids: nn.functional.linear(states, weight),
    "matmul": lambda states, weight, ids: states @ weight.T,
    "embedding": lambda states, weight, ids: nn.functional.embedding(ids, weight),
}
