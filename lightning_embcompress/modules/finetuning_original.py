"""What a fine-tuning holds of the dense original: opened when training starts, and left alone by everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from typing_extensions import Self

from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.callbacks.quantization_aware import QuantizationAware
from lightning_embcompress.compression.backbone import backbone_of
from lightning_embcompress.layers.compressed import CompressedLayer
from lightning_embcompress.layers.distillation import TeacherScores
from lightning_embcompress.modules.base import LanguageModel
from lightning_embcompress.modules.finetuning_parts import Parts
from lightning_embcompress.modules.finetuning_reconstruction import Reconstruction, of_the_model
from lightning_embcompress.modules.finetuning_sources import open_model
from lightning_embcompress.modules.finetuning_teacher import Teacher, over_shared_backbone, shares_parameters

_NOT_STARTED = (
    "The teacher is opened when a Trainer starts to fit, and training_step needs it: train with Trainer.fit(model)."
)


class Original:
    """The teacher of a fine-tuning, and the tables that its factors stand for.

    It is no module, so that nothing of it is trained, moved or kept in checkpoints; copies of what holds it share it.

    Args:
        model: The model that is fine-tuned.
        parts: Where its tables are.
        teacher: The dense model, a module or a path; None for none.
        shares_backbone: Whether only its tables are kept, over the backbone of the model.
        statistics: Of the model, or their file; None for none.

    Raises:
        ValueError: If a teacher that is given as a module does not fit the model.
    """

    def __init__(
        self,
        model: LightningModule,
        parts: Parts,
        teacher: nn.Module | str | None,
        shares_backbone: bool,
        statistics: Statistics | str | None,
    ) -> None:
        """Check a teacher that is there already; files are read when training starts."""
        self.parts = parts
        self.given = teacher
        self.shares_backbone = shares_backbone
        self.statistics = statistics
        self.teacher: Teacher | None = None
        self._opened: LightningModule | None = None
        self._tables: list[Reconstruction] = []
        self._distils = self._reconstructs = False
        self._carried: dict[str, Any] = {}
        if teacher is not None and not isinstance(teacher, str):
            self._opened = self._checked(model, open_model(teacher, None, "teacher"))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Not copied."""
        return self

    def open(self, model: LightningModule, weights: Mapping[str, float], trainer: Trainer) -> None:
        """Read and check what is needed, before anything is changed.

        Args:
            model: The model that is fine-tuned.
            weights: Of the terms of its loss.
            trainer: That is about to fit it.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If the teacher or the statistics do not fit the model.
        """
        self._distils, self._reconstructs = bool(weights["distillation"]), bool(weights["reconstruction"])
        terms = [name for name in ("distillation", "reconstruction") if weights[name]]
        if not terms:
            return
        if self.given is None:
            raise ValueError(
                f"{terms[0]}_weight={weights[terms[0]]:g} needs the dense original, but there is no teacher: give its"
                f" path or a module as teacher, or set {terms[0]}_weight=0. One that was given as a module is not kept"
                " in checkpoints: pass it again, as in load_from_checkpoint(path, teacher=model)."
            )
        if self.shares_backbone and self._distils:
            _check_backbone(model, trainer)
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            raise ValueError(
                f"{terms[0]} works on one device and under DDP, not under {type(trainer.strategy).__name__}, which"
                " shards the tables that are to be compared: use strategy='ddp'."
            )
        if (self.teacher is not None or not self._distils) and (self._tables or not self._reconstructs):
            # Of an earlier fit.
            return
        if self._opened is None:
            self._opened = self._checked(model, open_model(self.given, None, "teacher"))
        _check_fingerprints(self._opened, model, trainer)
        if self._reconstructs:
            statistics = self.statistics
            if isinstance(statistics, str):
                statistics = Statistics.load(statistics)
            if statistics is not None:
                statistics = of_the_model(statistics, "model.", self.parts.paths)
            self._tables = [
                Reconstruction(model, paths, self._table(self._opened, paths), statistics)
                for paths in self.parts.tables
            ]

    def _checked(self, model: LightningModule, opened: LightningModule) -> LightningModule:
        theirs = self._parts_of(opened)
        if theirs.vocab_size != self.parts.vocab_size:
            raise ValueError(
                f"The teacher has another vocabulary, of {theirs.vocab_size} tokens, than the model, of"
                f" {self.parts.vocab_size}: give the dense model that was compressed, or one of the same vocabulary."
            )
        if opened is model or shares_parameters(model, opened):
            raise ValueError(
                "The teacher has parameters that are the model's own, and would be trained with them: give another"
                " module, as copy.deepcopy(model) before it is compressed, or a path."
            )
        return opened

    def _parts_of(self, opened: LightningModule) -> Parts:
        """Where the teacher's tables are: where the model's are, if its modules are called the same."""
        paths, layers = self.parts.paths, dict(opened.named_modules(remove_duplicate=False))
        same = all(isinstance(layers.get(path), nn.Embedding | nn.Linear | CompressedLayer) for path in paths)
        if self.shares_backbone or (same and self.parts.head(opened) is not None):
            return Parts(opened, paths)
        return Parts(opened)

    def _table(self, original: LightningModule, paths: Sequence[str]) -> nn.Module:
        try:
            return original.get_submodule(paths[0])
        except AttributeError:
            raise ValueError(
                f"The teacher, a {type(original).__name__}, has no layer {paths[0]!r} whose table could be"
                " reconstructed: give the dense model that was compressed, or set reconstruction_weight=0."
            ) from None

    def start(self, model: LightningModule, device: torch.device) -> None:
        """Make the teacher ready, once the model has the weights that training starts from.

        Args:
            model: The model that is fine-tuned.
            device: Where it is.

        Raises:
            ValueError: If the teacher's backbone is not that of the model, where it is to be shared.
        """
        if self.shares_backbone and self._distils:
            # Once more: a checkpoint may have brought it.
            _check_backbone(model, model.trainer)
        opened, self._opened = self._opened, None
        if opened is not None and self._distils:
            parts = self._parts_of(opened)
            if self.shares_backbone:
                opened = over_shared_backbone(model, opened, parts)
            self.teacher = Teacher(opened, parts)
        for table in self._tables:
            table.to(device)
        if self.teacher is not None:
            self.teacher.to(device)
            self.teacher.model.trainer = model.trainer
            self.teacher.take_up(self._carried)
        self._carried = {}

    def carried(self) -> dict[str, Any]:
        """What a checkpoint must keep for the teacher to go on with the text; all processes have to call it."""
        return {} if self.teacher is None else self.teacher.carried()

    def carry(self, carried: dict[str, Any]) -> None:
        """Let the teacher go on with the text from where a checkpoint was written, when training starts."""
        self._carried = carried

    def scores(self, batch: Any, batch_idx: int, top_k: int | None, temperature: float) -> TeacherScores:
        """What the teacher says of a batch, see `Teacher.scores`.

        Raises:
            RuntimeError: If no Trainer has started to fit.
        """
        if self.teacher is None:
            raise RuntimeError(_NOT_STARTED)
        return self.teacher.scores(batch, batch_idx, top_k, temperature)

    def reconstruction(self, model: nn.Module, ids: Sequence[Tensor], rows: int | None, seed: int) -> Tensor:
        """How far all tables are from the original's, in sum.

        Args:
            model: The model that is fine-tuned.
            ids: `[*]` tokens that embeddings were called with in this step.
            rows: Rows to draw of each table instead; None to take the tokens.
            seed: By which they are drawn.

        Raises:
            RuntimeError: If no Trainer has started to fit.
            ValueError: If no embedding was called and no rows are drawn.
        """
        if not self._tables:
            raise RuntimeError(_NOT_STARTED)
        if rows is not None:
            generator = torch.Generator().manual_seed(seed)
            parts = [table.of_sample(model, rows, generator) for table in self._tables]
        elif ids:
            tokens = torch.cat([part.flatten() for part in ids])
            parts = [table.of_tokens(model, tokens) for table in self._tables]
        else:
            raise ValueError(
                f"The step of {type(model).__name__} calls no embedding among {self.parts.paths}, so that the tokens"
                " of the batch are not known: set reconstruction_rows, as in reconstruction_rows=1024."
            )
        return torch.stack(parts).sum()

    def texts(self) -> list[LanguageModel]:
        """The teacher, if it follows the text as language models of this package do."""
        model = None if self.teacher is None else self.teacher.model
        return [model] if isinstance(model, LanguageModel) else []


def _check_backbone(model: LightningModule, trainer: Trainer) -> None:
    """Refuse a backbone that is, or will be, another one than that which a teacher could share."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    given = [one.backbone for one in callbacks if isinstance(one, QuantizationAware) and one.backbone is not None]
    if given or backbone_of(model) is not None:
        what = f"backbone={given[0]!r}) quantizes" if given else "backbone=...) has quantized"
        raise ValueError(
            f"teacher_shares_backbone=True, but QuantizationAware({what} the very backbone that the teacher is read "
            "over: its"
            " scores would no longer be those of the original, and the run could not be resumed. Set"
            " teacher_shares_backbone=False, so that the teacher is a whole model, or leave backbone out of the "
            "quantization."
        )


def _check_fingerprints(teacher: LightningModule, model: LightningModule, trainer: Trainer) -> None:
    """Compare the vocabularies that models were trained with, as far as checkpoints and the data say."""
    vocabulary = getattr(getattr(trainer, "datamodule", None), "vocabulary", None)
    known = getattr(model, "_vocabulary_fingerprint", None) or getattr(vocabulary, "fingerprint", None)
    found = getattr(teacher, "_vocabulary_fingerprint", None)
    if None not in (known, found) and known != found:
        raise ValueError(
            f"The teacher has another vocabulary: it was trained with one of the fingerprint {found}, the model's has"
            f" {known}, so that the same ids stand for other tokens. Give the dense model that was compressed."
        )
