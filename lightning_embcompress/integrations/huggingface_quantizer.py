"""Loading of compressed models by `from_pretrained`, which knows them as models of a quantization method.

Imported by `registration` as soon as transformers can take it, in the middle of transformers' own imports: whatever
imports more than that is imported when it is used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lightning_embcompress.integrations.sources import QUANT_METHOD

if TYPE_CHECKING:
    from lightning_embcompress.compression.plan import Plan, TablePlan
    from lightning_embcompress.methods.registry import Factorization


@register_quantization_config(QUANT_METHOD)
class EmbeddingCompressionConfig(QuantizationConfigMixin):
    """The record of the plan in `config.json`, as transformers carries it.

    Args:
        **record: The plan as JSON, see `Plan.to_dict`.
    """

    def __init__(self, **record: Any) -> None:
        """Keep it; it is read and checked when a model is built from it."""
        self.__dict__.update(record, quant_method=QUANT_METHOD)


@register_quantizer(QUANT_METHOD)
class EmbeddingCompressionQuantizer(HfQuantizer):
    """Gives a model the structure of its plan before its weights are loaded. Nothing is quantized.

    The loaded model is as one that was compressed in memory: it can be trained, cast and saved.
    """

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Put empty factors in the place of tables, and empty bytes in that of other weights that are quantized.

        Raises:
            ValueError: If the configuration holds no plan that can be read, or one for another model.
        """
        from lightning_embcompress.compression.backbone import apply_backbone
        from lightning_embcompress.compression.plan import Plan, check_plan
        from lightning_embcompress.integrations import huggingface
        from lightning_embcompress.tables.replacement import replace_table
        from lightning_embcompress.tables.transformers_models import pretrained_models

        plan = Plan.from_dict(self.quantization_config.to_dict())
        self.plan, self.stored = _fitted(plan, model)
        check_plan(model, self.plan)
        self.known = model._keys_to_ignore_on_load_unexpected
        model._keys_to_ignore_on_load_unexpected = {*(self.known or ()), *_entries([*plan.tables, *self.plan.tables])}
        self.on_disk = self._rows_in_files(model)
        for table in self.plan.tables:
            empty = self.on_disk.get(table.name)
            if empty is None:
                empty = _empty(table, model.get_submodule(table.name).weight.dtype).to("meta")
            replace_table(model, table.modules, empty)
            # A tensor with two names is read from the file under one of them; transformers would take the other for
            # missing, and overwrite what was read. So only the first layer lists the factors while they are loaded.
            # Of rows that stay in files nothing is to be loaded.
            for path in table.modules[table.name not in self.on_disk :]:
                layer = model.get_submodule(path)
                del layer.factorization
                layer.__dict__["factorization"] = empty
        apply_backbone(model, self.plan.backbone)
        huggingface.follow(model)
        # A bias that the files lack, as where a base model gets a head, becomes what it is in the dense class.
        for part in pretrained_models(model).values():
            part.__dict__["_init_weights"] = _initializing(part._init_weights)

    def _rows_in_files(self, model: Any) -> dict[str, Factorization[Any]]:
        """Tables whose rows are to stay in their files, see `rows_on_disk`."""
        from lightning_embcompress.integrations.row_files import rows_of_model

        dtypes = {table.name: model.get_submodule(table.name).weight.dtype for table in self.plan.tables}
        # Under which layers' names a table may be in the files, by the first one that reads it here.
        stored = {
            table.name: [path for path, name in self.stored.items() if name == table.name] for table in self.plan.tables
        }
        found = rows_of_model(model, self.plan, stored, dtypes)
        ignored = {rf"(^|\.){re.escape(path)}\.factorization\." for name in found for path in (name, *stored[name])}
        model._keys_to_ignore_on_load_unexpected |= ignored
        return found

    def get_weight_conversions(self) -> list[Any]:
        """Factors that are stored under the name of a layer that this model does not have, or has beside another."""
        from transformers.core_model_loading import WeightRenaming

        return [
            WeightRenaming(rf"^{re.escape(stored)}\.factorization\.", f"{path}.factorization.")
            for stored, path in self.stored.items()
            if stored != path and path not in self.on_disk
        ]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Give the loaded factors to all layers that share them, and look at the weights beside them.

        Raises:
            ValueError: If a factor was missing from the files, or they are damaged.
        """
        from lightning_embcompress.compression.backbone_files import finish_loading
        from lightning_embcompress.integrations import huggingface
        from lightning_embcompress.tables.transformers_models import pretrained_models

        for table in self.plan.tables:
            factorization = self.on_disk.get(table.name)
            if factorization is None:
                factorization = _loaded(table, model.get_submodule(table.name).factorization)
            for path in table.modules:
                model.get_submodule(path).factorization = factorization
        model._keys_to_ignore_on_load_unexpected = self.known
        finish_loading(model, _is_missing)
        # From here on it is a model like any other: what transformers calls quantized can neither be cast nor trained.
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        for part in pretrained_models(model).values():
            part.config.__dict__.pop("_is_quantized", None)
            del part.__dict__["_init_weights"]
        huggingface.follow(model)
        return model

    def is_serializable(self) -> bool:
        """True."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True."""
        return True


def _fitted(plan: Plan, model: Any) -> tuple[Plan, dict[str, str]]:
    """A plan for a model of another class than the one it was saved from.

    Paths are taken with or without the name of the base model, as transformers takes those of weights. What this model
    ties to a table reads it too, and layers that it does not have are left out.

    Returns:
        The plan, and the paths of the layers under which factors are loaded by those under which they may be stored.
    """
    from lightning_embcompress.tables.finding import all_modules

    base, there = f"{model.base_model_prefix}.", all_modules(model)
    headless = model.get_output_embeddings() is None
    ties = [(one.removesuffix(".weight"), other.removesuffix(".weight")) for one, other in _ties(model).items()]
    placed = []
    for table in plan.tables:
        names = [(path, base + path, path.removeprefix(base)) for path in table.modules]
        found = [name for candidates in names if (name := next((one for one in candidates if one in there), None))]
        # The softmax of another model, or a table that `check_plan` then misses.
        placed.append(found or ([] if headless else list(table.modules)))
    if not headless and any(set(paths) & there.keys() for paths in placed):
        # A softmax that is not tied is left out where a model has its own.
        placed = [paths if set(paths) & there.keys() else [] for paths in placed]
    taken = {path for paths in placed for path in paths}
    for paths in placed:
        # Every tie has the same source: from any of a group the source is one step away, and the rest another one.
        for _ in range(2):
            tied = [one if other in paths else other for one, other in ties if one in paths or other in paths]
            paths += [path for path in dict.fromkeys(tied) if path not in taken]
            taken.update(paths)
    pairs = [(table, paths) for table, paths in zip(plan.tables, placed, strict=True) if paths]
    stored = {path: paths[0] for table, paths in pairs for path in table.modules}
    fitted = replace(plan, tables=tuple(replace(table, modules=tuple(paths)) for table, paths in pairs))
    if plan.backbone is None:
        return fitted, stored
    known = dict(model.named_parameters(remove_duplicate=False))
    weights = {}
    for name, shape in plan.backbone.weights.items():
        own = next((one for one in (name, base + name, name.removeprefix(base)) if one in known), None)
        # One outside of the base model belongs to a head that this model may not have.
        if own is not None or name.startswith(base):
            weights[own or name] = shape
    return replace(fitted, backbone=replace(plan.backbone, weights=weights) if weights else None), stored


def _initializing(init_weights: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    """`_init_weights` of a model as its classes know it: a compressed softmax is a linear layer to it.

    Its table has been loaded. What a layer has beside it, a bias, is initialised as that of a dense one. Weights in
    few bits have been loaded too: they would be unpacked, and the random numbers for them thrown away.
    """
    from lightning_embcompress.layers.compressed import CompressedLayer, CompressedLinear

    def initialize(module: nn.Module) -> None:
        if not isinstance(module, CompressedLayer):
            if not is_parametrized(module) or any(map(_is_missing, module.parameters(recurse=False))):
                init_weights(module)
        elif isinstance(module, CompressedLinear) and module.bias is not None:
            dense = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            dense.weight._is_hf_initialized = True  # type: ignore[attr-defined]
            dense.bias = module.bias
            init_weights(dense)
            module.bias = dense.bias

    return initialize


def _entries(tables: Sequence[TablePlan]) -> set[str]:
    """Patterns of the entries of tables in files, see `layers.state_entry`: on the meta device a layer has none."""
    return {rf"(^|\.){re.escape(path)}\.weight$" for table in tables for path in table.modules}


def _is_missing(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or not getattr(tensor, "_is_hf_initialized", False)


def _ties(model: Any) -> dict[str, str]:
    return {one: other for one, other in model.all_tied_weights_keys.items() if one.endswith(".weight")}


def _empty(table: TablePlan, dtype: torch.dtype) -> Factorization[Any]:
    from lightning_embcompress.methods.registry import factorization_from_spec

    # On a real device, whatever the context: what follows from the structure alone is computed here.
    with torch.device("cpu"):
        return factorization_from_spec(table.spec, dtype)


def _loaded(table: TablePlan, read: Factorization[Any]) -> Factorization[Any]:
    """A factorization with tensors that transformers has put into place one by one, which tells it nothing."""
    for name, tensor in read.state_dict(keep_vars=True).items():
        if _is_missing(tensor):
            raise ValueError(
                f"'{table.name}.factorization.{name}' was not loaded: it is missing from the model's files, or was to "
                "stay on disk, where factors cannot be read from. Take all files of one save_pretrained, and load them "
                "to memory"
            )
    factorization = _empty(table, read.dtype)
    try:
        factorization.load_state_dict(read.state_dict(), assign=True)
    except RuntimeError as error:
        raise ValueError(f"the compressed table {table.name!r} is damaged: {error}") from error
    # Buffers that are not stored, and follow from the structure, are where that was built.
    factorization.to(read.device)
    factorization.provenance = table.provenance
    return factorization
