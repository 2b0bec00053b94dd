"""The callback that lets factors and weights train as they will be once they are stored in few bits."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from lightning_embcompress.callbacks.checks import check_copies, check_optimizers, is_fast_dev_run
from lightning_embcompress.callbacks.compression import compressing
from lightning_embcompress.callbacks.monitors import restart_comparisons, warn_of_early_end
from lightning_embcompress.callbacks.replacing import changing_in_training, rewrap, uninterrupted
from lightning_embcompress.callbacks.reporting import log, show_and_log, show_perplexities, unmeasured
from lightning_embcompress.callbacks.scheduled import ScheduledCallback
from lightning_embcompress.compression.backbone import backbone_of, freeze_backbone_ranges
from lightning_embcompress.layers.sizes import compressed_tables
from lightning_embcompress.methods.quantizers.quantization import storage_of
from lightning_embcompress.methods.registry import Quantization
from lightning_embcompress.quantization.aware import conversion_report, plan_qat
from lightning_embcompress.tables.finding import Table, find_tables
from lightning_embcompress.utils.division import failing_together


class QuantizationAware(ScheduledCallback):
    """Train tables, and on request other weights, as they will be once they are stored in few bits.

    From its epoch on factors are read as the integers they will become, and the optimizer goes on with the numbers
    behind them; of an embedding only the rows that a step reads are rounded. Codes of `transform_coding`, which keep
    widths of their own, are trained too. Checkpoints of the training are of the numbers, work with `ckpt_path`
    everywhere and resume exactly; `save_compressed`, `save_pretrained` and `lightning_embcompress.convert_qat` store
    the integers. Perplexity on the validation data is measured before and after, and written to `report.json` with the
    bytes after conversion.

    In a run that also compresses, this comes last: at the epoch of the last compression or refinement, after it, or
    later. Dense tables that are named in `tables` are quantized as they are.

    Epochs count from 0; what is due at an epoch happens before its first step.

    Args:
        bits: Of a value of a factor: `int8`, `int6`, `int4`, `int3`, ... or the number.
        at_epoch: Epoch at whose start quantization begins; 0 is before the first step.
        group_size: Neighbouring values of a row that share a scale, 16 to 256.
        scale_dtype: Of the scales, `float16` or `bfloat16`.
        ranges: A group's range is that of its values (`minmax`), or its scale is trained too (`learned`).
        tables: `auto` for all compressed tables, or names of modules; `[]` for none, with `backbone`.
        backbone: Dtype of all other linear and recurrent weights, `int8`, `int4`, ... in groups of the same size, or
            `float16`, `bfloat16`; None to leave them as they are.
        freeze_observers_at: Epoch from whose start on ranges stay what they are; None to let them follow the values.
        monitor: Name of a loss that validation logs, in nats per token, to measure the perplexity by; by default the
            only one with "loss" in its name.

    Raises:
        ValueError: If an argument is out of its range; when training starts, if a compression or refinement is due
            later, there is nothing to quantize, or it is quantized already. Nothing is changed then.

    Example:
        >>> callback = QuantizationAware("int4", at_epoch=3, backbone="int8")
        >>> QuantizationAware("int9")
        Traceback (most recent call last):
        ...
        ValueError: bits must be from 2 to 8, as in 'int4', it is 'int9'
    """

    comes_last: ClassVar[bool] = True

    def __init__(
        self,
        bits: str | int = "int4",
        at_epoch: int = 0,
        group_size: int = 64,
        scale_dtype: Literal["float16", "bfloat16"] = "float16",
        ranges: Literal["minmax", "learned"] = "minmax",
        tables: str | list[str] = "auto",
        backbone: str | None = None,
        freeze_observers_at: int | None = None,
        monitor: str | None = None,
    ) -> None:
        """Check what can be checked without a model."""
        super().__init__(at_epoch, monitor)
        self.quantization = Quantization(_width(bits), group_size, scale_dtype, ranges)
        if backbone is not None:
            storage_of(backbone, self.quantization)
        elif not tables:
            raise ValueError("there is nothing to quantize: tables is empty, and backbone is None")
        if freeze_observers_at is not None and freeze_observers_at < at_epoch:
            raise ValueError(
                f"freeze_observers_at={freeze_observers_at} comes before at_epoch={at_epoch}: there are no ranges to "
                "freeze before quantization begins"
            )
        self.tables = tables
        self.backbone = backbone
        self.freeze_observers_at = freeze_observers_at
        self._start_anew()

    def _start_anew(self) -> None:
        # Of an interruption between the change and its measurement `measured` tells.
        self._state: dict[str, Any] = {"prepared": None, "frozen": False, "measured": True, "settings": None}
        self._state["perplexity"] = {"epoch": None, "before": None, "after": None}

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked for."""
        return {**vars(self.quantization), "tables": self.tables, "backbone": self.backbone}

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(at_epoch=self.at_epoch, tables=self.tables, backbone=self.backbone)

    @override
    def state_dict(self) -> dict[str, Any]:
        return deepcopy(self._state)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = deepcopy(state_dict)
        if "body" in (settings := self._state["settings"] or {}):
            settings["backbone"] = settings.pop("body")

    @override
    def former_keys(self) -> list[str]:
        # Of when `backbone` was called `body`.
        return [self._generate_state_key(at_epoch=self.at_epoch, tables=self.tables, body=self.backbone)]

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work with this Trainer."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            freeze = self.freeze_observers_at
            limit = trainer.max_epochs
            if freeze is not None and limit not in (None, -1) and freeze >= limit and not is_fast_dev_run(trainer):
                raise ValueError(
                    f"freeze_observers_at={freeze} is beyond max_epochs={limit} (epochs count from 0): train for at "
                    f"least {freeze + 1} epochs, or choose an earlier one"
                )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check before the first step what will be quantized, and go on with what was begun."""
        check_optimizers(trainer, type(self).__name__)
        _check_order(trainer, self)
        if self._state["prepared"] is not None and not self._is_there(pl_module):
            # The callback was used for another model before.
            self._start_anew()
        if self._state["prepared"] is None:
            with failing_together():
                self._check_request(trainer, pl_module)
        else:
            if (begun := self._state["settings"]) != self.settings:
                rank_zero_warn(
                    f"quantization began with {begun}, and stays as it is: {self.settings} comes too late. Resume from "
                    "a checkpoint of before it"
                )
            if self._state["frozen"]:
                # Which parameters train is not kept in checkpoints.
                self._freeze(trainer, pl_module)
        super().on_fit_start(trainer, pl_module)

    def _is_there(self, module: LightningModule) -> bool:
        """Whether what was prepared is what the model has; converted it cannot go on training."""
        tables = {path: factors for paths, factors in compressed_tables(module) for path in paths}
        own = [name for name in self._state["prepared"] if name in tables]
        packed = [name for name in own if not tables[name].is_prepared]
        backbone = None if self.backbone is None else backbone_of(module)
        if backbone is not None and not backbone.is_prepared:
            packed.append(next(iter(backbone.weights)))
        if packed:
            raise ValueError(
                f"{', '.join(map(repr, packed))} was converted, and has no numbers left to train: resume from a "
                "checkpoint of the training, which is not converted"
            )
        return own == self._state["prepared"] and (self.backbone is None or backbone is not None)

    def _check_request(self, trainer: Trainer, module: LightningModule) -> None:
        if all(callback._done.compressed for callback in compressing(trainer)):
            self._check_plan(trainer, module, self.tables)
            return
        # Tables that are compressed first are dense now; what is there already can be checked.
        compressed = {path for paths, _ in compressed_tables(module) for path in paths}
        names = self._names - {"auto"}
        if (names & compressed) or self.backbone is not None:
            self._check_plan(trainer, module, sorted(names & compressed))
        if names - compressed:
            find_tables(module, sorted(names - compressed))

    def _check_plan(self, trainer: Trainer, module: LightningModule, tables: str | list[str]) -> None:
        plan = plan_qat(module, self.quantization, tables, self.backbone)
        check_copies(trainer, type(self).__name__, {path: module.get_submodule(path) for path in plan.layers})

    @override
    def tables_to_come(self, module: LightningModule) -> list[Table]:
        names = sorted(self._names - {"auto"})
        there = self._state["prepared"] is not None or compressed_tables(module)
        return [] if there or not names else find_tables(module, names)

    @property
    def _names(self) -> set[str]:
        return {self.tables} if isinstance(self.tables, str) else set(self.tables)

    @override
    def _is_due(self, trainer: Trainer) -> bool:
        epoch = trainer.current_epoch
        if self._state["prepared"] is None:
            return is_fast_dev_run(trainer) or epoch >= self.at_epoch
        return not self._state["measured"] or self._freezes(trainer)

    def _freezes(self, trainer: Trainer) -> bool:
        freeze = self.freeze_observers_at
        if self._state["frozen"] or freeze is None:
            return False
        return is_fast_dev_run(trainer) or trainer.current_epoch >= freeze

    @override
    def _do_due(self, trainer: Trainer, module: LightningModule) -> None:
        # Drawn numbers would change what follows, and a resumed run does not draw them again.
        with isolate_rng():
            if self._state["prepared"] is None:
                self._prepare(trainer, module)
            if not self._state["measured"]:
                self._measure_change(trainer, module)
            if self._freezes(trainer):
                with uninterrupted():
                    self._freeze(trainer, module)
                rank_zero_info(f"Ranges are frozen from epoch {trainer.current_epoch} on.")

    def _prepare(self, trainer: Trainer, module: LightningModule) -> None:
        plan = plan_qat(module, self.quantization, self.tables, self.backbone)
        before = self._measure(trainer, module, "before quantization")
        layers = plan.layers
        paths = [path for path, _ in module.named_modules(remove_duplicate=False) if path in layers]
        with uninterrupted():
            with changing_in_training(trainer, module, paths):
                plan.carry_out(module)
            self._state |= {"prepared": plan.tables, "measured": False, "settings": self.settings}
            self._state["perplexity"] = {"epoch": trainer.current_epoch, "before": before, "after": None}
            restart_comparisons(trainer, "Quantized")

    def _freeze(self, trainer: Trainer, module: LightningModule) -> None:
        for paths, factors in compressed_tables(module):
            if set(self._state["prepared"]) & set(paths):
                factors.freeze_ranges()
        if self.backbone is not None:
            freeze_backbone_ranges(module)
        self._state["frozen"] = True
        # DDP waits for gradients of what trained when it was made, and knows the buffers of then.
        rewrap(trainer)

    def _measure_change(self, trainer: Trainer, module: LightningModule) -> None:
        self._state["perplexity"]["after"] = self._measure(trainer, module, "quantized")
        self._state["measured"] = True
        show_and_log(trainer, module, f"Quantized at epoch {trainer.current_epoch}")
        report = conversion_report(module)
        for entry in report["tables"]:
            _say(f"Table {entry['name']!r} trains for {entry['dtype']}", entry)
        if backbone := report["backbone"]:
            _say(f"The backbone ({backbone['weights']} weights) trains for {backbone['dtype']}", backbone)
        before, after = (self._state["perplexity"][name] for name in ("before", "after"))
        known = before is not None and after is not None
        whole = report["model"]
        _say("The whole model", whole, f"; validation perplexity {before:.2f} before, {after:.2f} now" if known else "")
        log(trainer, {"converted_bytes": whole["stored_bytes"], "converted_ratio": whole["ratio"]})
        self._write_report(trainer, module, self._perplexities(trainer))

    def _perplexities(self, trainer: Trainer, final: float | None = None) -> dict[str, Any]:
        """The perplexities of a run for `report.json`, of those that compress too."""
        done = [callback for callback in compressing(trainer) if callback._done.compressed]
        if done:
            return done[-1]._merged(trainer)
        return {**unmeasured(), "final": final}

    @override
    def report_entries(self, module: LightningModule) -> dict[str, Any]:
        """Bits and bytes of what was quantized, as they will be once it is converted, and the perplexities."""
        if self._state["prepared"] is None:
            return {}
        return {"quantization": {**conversion_report(module), "perplexity": dict(self._state["perplexity"])}}

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the final model and write the report, unless a callback that compresses does."""
        if self._state["prepared"] is None:
            warn_of_early_end(trainer, f"at_epoch={self.at_epoch}: nothing was quantized")
        elif not any(callback._done.compressed for callback in compressing(trainer)):
            final = self._measure(trainer, pl_module, "final")
            values = self._perplexities(trainer, final)
            self._write_report(trainer, pl_module, values)
            show_perplexities(values)


def _width(bits: str | int) -> int:
    known = {name: width for width in range(2, 9) for name in (width, str(width), f"int{width}")}
    if isinstance(bits, bool) or bits not in known:
        raise ValueError(f"bits must be from 2 to 8, as in 'int4', it is {bits!r}")
    return known[bits]


def _say(what: str, entry: dict[str, Any], more: str = "") -> None:
    size, ratio = entry["stored_bytes"] / 1e6, entry["ratio"]
    bits = f", {entry['bits_per_weight']:.2f} bits per weight" if "bits_per_weight" in entry else ""
    rank_zero_info(f"{what}: {size:.3f} MB once converted, {ratio:.2f}x less than dense{bits}{more}")


def _check_order(trainer: Trainer, own: QuantizationAware) -> None:
    for callback in compressing(trainer):
        last = max([callback.at_epoch, *callback.refine_at_epochs])
        if last > own.at_epoch:
            what = "refines" if last > callback.at_epoch else "compresses"
            raise ValueError(
                f"{type(callback).__name__} {what} tables at epoch {last}, and {type(own).__name__} quantizes them at "
                f"epoch {own.at_epoch} already: solving again would lose what was trained since. Let quantization "
                f"begin with at_epoch={last} or later"
            )
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if other is own or not isinstance(other, QuantizationAware):
            continue
        shared, both = own._names & other._names, own._names | other._names
        if "auto" in both and own._names and other._names:
            shared = both
        if shared or (own.backbone is not None and other.backbone is not None):
            what = f"the tables {sorted(shared)}" if shared else "the backbone"
            raise ValueError(f"two callbacks quantize {what}: give them different tables, and backbone to one of them")
