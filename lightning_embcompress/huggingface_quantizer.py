"""Loading of compressed models by `from_pretrained`, which knows them as models of a quantization method.

Imported by `registration` as soon as transformers can take it, in the middle of transformers' own imports: whatever
imports more than that is imported when it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    from lightning_embcompress.factorizations import Factorization
    from lightning_embcompress.plan import Plan, TablePlan

# The literal of `huggingface.QUANT_METHOD`: see above.
_QUANT_METHOD = "embcompress"


@register_quantization_config(_QUANT_METHOD)
class EmbeddingCompressionConfig(QuantizationConfigMixin):
    """The record of the plan in `config.json`, as transformers carries it.

    Args:
        **record: The plan as JSON, see `Plan.to_dict`.
    """

    def __init__(self, **record: Any) -> None:
        """Keep it; it is read and checked when a model is built from it."""
        self.__dict__.update(record, quant_method=_QUANT_METHOD)


@register_quantizer(_QUANT_METHOD)
class EmbeddingCompressionQuantizer(HfQuantizer):
    """Gives a model the structure of its plan before its weights are loaded. Nothing is quantized.

    The loaded model is as one that was compressed in memory: it can be trained, cast and saved.
    """

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Put empty factors in the place of tables.

        Raises:
            ValueError: If the configuration holds no plan that can be read, or one for another model.
        """
        from lightning_embcompress import huggingface
        from lightning_embcompress.plan import Plan, check_plan
        from lightning_embcompress.tables import replace_table

        self.plan = _fitted(Plan.from_dict(self.quantization_config.to_dict()), model)
        check_plan(model, self.plan)
        for table in self.plan.tables:
            factorization = _empty(table, model.get_submodule(table.name).weight.dtype)
            replace_table(model, table.modules, factorization.to("meta"))
        # A tensor with two names is read from the file under one of them; transformers would take the other for
        # missing, and overwrite what was read. So only the first layer has the factors while they are loaded.
        for path in huggingface.aliases(model):
            del model.get_submodule(path).factorization
        huggingface.follow(model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Give the loaded factors to all layers that share them.

        Raises:
            ValueError: If a factor was missing from the files, or they are damaged.
        """
        from lightning_embcompress import huggingface

        for table in self.plan.tables:
            factorization = _loaded(table, model.get_submodule(table.name).factorization)
            for path in table.modules:
                model.get_submodule(path).factorization = factorization
        # From here on it is a model like any other: what transformers calls quantized can neither be cast nor trained.
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        for module in model.modules():
            getattr(module, "config", self).__dict__.pop("_is_quantized", None)
        huggingface.follow(model)
        return model

    def is_serializable(self) -> bool:
        """True."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True."""
        return True


def _fitted(plan: Plan, model: Any) -> Plan:
    """A plan with its paths as they are in a model of another head: with or without the name of the base model."""
    return plan


def _empty(table: TablePlan, dtype: torch.dtype) -> Factorization[Any]:
    from lightning_embcompress.factorizations import factorization_from_spec

    # On a real device, whatever the context: what follows from the structure alone is computed here.
    with torch.device("cpu"):
        return factorization_from_spec(table.spec, dtype)


def _loaded(table: TablePlan, read: Factorization[Any]) -> Factorization[Any]:
    """A factorization with tensors that transformers has put into place one by one, which tells it nothing."""
    factorization = _empty(table, read.dtype)
    factorization.load_state_dict(read.state_dict(), assign=True)
    factorization.provenance = {
        "method": table.method,
        "options": dict(table.options),
        "weighted_error": table.weighted_error,
        "untied": table.untied,
    }
    return factorization
