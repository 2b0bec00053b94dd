"""vLLM: directories of compressed models load with `LLM(DIR)`, and rows and logits are computed from the codes.

vLLM finds `register` by the entry point `vllm.general_plugins` wherever both packages are installed. It gives vLLM a
quantization method of the name that `config.json` has, which puts the factors of a table in the place of embedding and
head. Everything else of a model is vLLM's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from lightning_embcompress.compression.plan import Plan, TablePlan
from lightning_embcompress.integrations.sources import QUANT_METHOD
from lightning_embcompress.methods.registry import Factorization, factorization_from_spec


def register() -> None:
    """Called by vLLM in all its processes; importing this module has registered the method."""


# Tables of this process by their names: what vLLM compiles calls them as one operation, into which nobody looks.
_tables: WeakValueDictionary[str, LoadedFactors] = WeakValueDictionary()


@torch.library.custom_op("lightning_embcompress::vllm_rows", mutates_args=())
def _rows(ids: Tensor, name: str) -> Tensor:
    rows: Tensor = _tables[name].table.read(ids)
    return rows


@_rows.register_fake
def _(ids: Tensor, name: str) -> Tensor:
    table = _tables[name].table
    return ids.new_empty(*ids.shape, table.dim, dtype=table.dtype)


class LoadedFactors(nn.Module):
    """Factors of a table whose tensors vLLM reads from files, some at a time.

    Args:
        table: Of the plan.
        dtype: Of the rows.
        device: Where they are computed.
    """

    def __init__(self, table: TablePlan, dtype: torch.dtype, device: torch.device) -> None:
        """Make it empty."""
        super().__init__()
        self.name, self._device = table.name, device
        # A second model of a process, such as a draft, may have a table of the same name.
        self.key = next(key for count in itertools.count() if (key := f"{table.name}#{count}") not in _tables)
        _tables[self.key] = self
        # What follows from the structure alone is computed on a real device, whatever the context.
        with torch.device("cpu"):
            self.table: Factorization[Any] = factorization_from_spec(table.spec, dtype)
        self._read: dict[str, Tensor] = {}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Keep tensors until all of them are there."""
        found = {name: tensor.detach().cpu() for name, tensor in weights}
        self._read |= found
        return set(found)

    def finish(self) -> None:
        """Put what was read into place, and lay it out for inference.

        Raises:
            ValueError: If a tensor is missing or damaged, which vLLM does not look at.
        """
        if not self._read:
            return
        try:
            self.table.load_state_dict(self._read)
        except RuntimeError as error:
            raise ValueError(f"the compressed table {self.name!r} is not whole: {error}") from error
        self._read = {}
        self.table.requires_grad_(False).to(self._device)
        self.table.lay_out()


class TableMethod(QuantizeMethodBase):  # type: ignore[misc]
    """Embedding and head of a compressed table.

    Args:
        table: Of the plan.
    """

    def __init__(self, table: TablePlan) -> None:
        """Keep it."""
        self.table = table

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Put empty factors into a layer.

        Raises:
            ValueError: If the layer is a part of the table, as with tensor parallelism, or of another shape.
        """
        spec = self.table.spec
        if sum(output_partition_sizes) != output_size or input_size_per_partition != input_size:
            raise ValueError(
                f"tensor_parallel_size must be 1: the compressed table {self.table.name!r} is not divided over devices"
            )
        if input_size != spec["dim"] or output_size < spec["vocab_size"]:
            raise ValueError(
                f"the compressed table {self.table.name!r} is {spec['vocab_size']} x {spec['dim']}, and the model has "
                f"{output_size} x {input_size}"
            )
        # The device that vLLM has set for what it makes.
        layer.factorization = LoadedFactors(self.table, params_dtype, torch.empty(0).device)
        # An entry of nothing stands for the table in files.
        layer.register_parameter("weight", nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Read what was loaded."""
        factors: Any = layer.factorization
        factors.finish()

    def embedding(self, layer: nn.Module, input_: Tensor) -> Tensor:
        """Rows, `[*] -> [*, dim]`."""
        factors: Any = layer.factorization
        rows: Tensor = _rows(input_, factors.key)
        return rows

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits, `[*, dim] -> [*, vocab_size]`."""
        factors: Any = layer.factorization
        logits: Tensor = factors.table.logits(x)
        return logits if bias is None else logits + bias[: logits.shape[-1]]

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """A head that reads the table of the embedding is the embedding."""
        return embed_tokens


@register_quantization_config(QUANT_METHOD)
class VLLMConfig(QuantizationConfig):  # type: ignore[misc]
    """The record of the plan in `config.json`, as vLLM carries it.

    Args:
        plan: What is in the files.

    Raises:
        ValueError: If weights outside of the tables are quantized by this package too, which vLLM does not read.
    """

    def __init__(self, plan: Plan) -> None:
        """Check it."""
        super().__init__()
        if plan.backbone is not None:
            raise ValueError(
                "quantization_config: weights beside the tables are in few bits of this package, which vLLM does not "
                "read: quantize the backbone by a method that vLLM has, or leave it dense"
            )
        self.plan = plan

    def get_name(self) -> str:
        """As `config.json` has it."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """All that models are in."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any device."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None beside `config.json`."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VLLMConfig:
        """From the record.

        Raises:
            ValueError: If it is damaged.
        """
        return cls(Plan.from_dict(config))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The method of a layer: ours for embeddings and heads of the plan, none for others."""
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod()
        if not isinstance(layer, VocabParallelEmbedding):
            return None
        is_head = isinstance(layer, ParallelLMHead)
        own = [
            table
            for table in self.plan.tables
            if any((path.rpartition(".")[2] == "lm_head") == is_head for path in table.modules)
        ]
        named = [table for table in own if prefix and any(path.endswith(prefix) for path in table.modules)]
        found = (named or own)[:1]
        return TableMethod(found[0]) if found else None
