"""The dense original of a model that is fine-tuned: its scores, its tables, and its place in the text."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from typing_extensions import Self

from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.callbacks.passes import Logged
from lightning_embcompress.callbacks.quantization_aware import QuantizationAware
from lightning_embcompress.compression.backbone import backbone_of
from lightning_embcompress.layers.chunked_loss import token_chunks
from lightning_embcompress.layers.compressed import CompressedLayer
from lightning_embcompress.layers.distillation import TeacherScores, joined_scores, teacher_scores
from lightning_embcompress.modules.base import LanguageModel
from lightning_embcompress.modules.finetuning.architecture import open_model
from lightning_embcompress.modules.finetuning.parts import Parts, own_step, watch
from lightning_embcompress.modules.finetuning.reconstruction import Reconstruction
from lightning_embcompress.tables.listeners import layers_replaced

# Of a model that was stored in float16, a parameter of the backbone differs by less from what it was.
_SAME_BACKBONE = 1e-2
_NOT_STARTED = (
    "The teacher is opened when a Trainer starts to fit, and training_step needs it: train with Trainer.fit(model)."
)


class Teacher:
    """The dense original: opened when a Trainer starts to fit, in evaluation mode, never trained.

    It is no module, so that nothing of it is among the parameters of its student, or in checkpoints; copies of the
    student share it.

    Args:
        student: The model that is fine-tuned.
        parts: Where the student's tables are.
        given: The dense model, a module or a path; None for none.
        shares_backbone: Whether only its tables are kept, over the backbone of the student.
        statistics: Of the student, or their file; None for none.

    Attributes:
        model: The teacher itself once training has started, if anything is distilled; else None.
        own_parts: Where its tables are.

    Raises:
        ValueError: If a teacher that is given as a module does not fit the student.
    """

    def __init__(
        self,
        student: LightningModule,
        parts: Parts,
        given: nn.Module | str | None,
        shares_backbone: bool,
        statistics: Statistics | str | None,
    ) -> None:
        """Check a teacher that is there already; files are read when training starts."""
        self.parts = self.own_parts = parts
        self.given = given
        self.shares_backbone = shares_backbone
        self.statistics = statistics
        self.model: LightningModule | None = None
        self._opened: LightningModule | None = None
        self._distils = False
        self._tables: list[Reconstruction] = []
        self._text: Mapping[str, Any] = {}
        if given is not None and not isinstance(given, str):
            self._open(student)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Not copied."""
        return self

    def open(self, student: LightningModule, distillation: float, reconstruction: float, trainer: Trainer) -> None:
        """Read and check the files, before anything is changed.

        Args:
            student: The model that is fine-tuned.
            distillation: Weight of that term of its loss; 0 if it is not needed.
            reconstruction: Weight of that term of its loss; 0 if it is not needed.
            trainer: That is about to fit it.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If the teacher or the statistics do not fit the student.
        """
        self._distils = distillation > 0
        if not distillation and not reconstruction:
            return
        weight = "distillation_weight" if distillation else "reconstruction_weight"
        if self.given is None:
            raise ValueError(
                f"{weight}={distillation or reconstruction:g} needs the dense original, but there is no teacher: give"
                f" its path or a module as teacher, or set {weight}=0. One that was given as a module is not kept in"
                " checkpoints: pass it again, as in load_from_checkpoint(path, teacher=model)."
            )
        if self.shares_backbone and self._distils:
            _check_backbone(student, trainer)
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            raise ValueError(
                f"{weight} works on one device and under DDP, not under {type(trainer.strategy).__name__}, which"
                " shards the tables that are to be compared: use strategy='ddp'."
            )
        if (self.model is not None or not self._distils) and (self._tables or not reconstruction):
            # Of an earlier fit.
            return
        opened = self._open(student) if self._opened is None else self._opened
        _check_fingerprints(opened, student, trainer)
        if reconstruction:
            statistics = self.statistics
            if isinstance(statistics, str):
                statistics = Statistics.load(statistics)
            self._tables = [
                Reconstruction(student, paths, _layer(opened, paths[0]), statistics) for paths in self.parts.tables
            ]

    def _open(self, student: LightningModule) -> LightningModule:
        assert self.given is not None
        opened = open_model(self.given, None, "teacher")
        paths, layers = self.parts.paths, dict(opened.named_modules(remove_duplicate=False))
        same = all(isinstance(layers.get(path), nn.Embedding | nn.Linear | CompressedLayer) for path in paths)
        # The tables are where the student's are, if its modules are called the same.
        alike = self.shares_backbone or (same and self.parts.head(opened) is not None)
        self.own_parts = Parts(opened, paths if alike else "auto")
        if self.own_parts.vocab_size != self.parts.vocab_size:
            raise ValueError(
                f"The teacher has another vocabulary, of {self.own_parts.vocab_size} tokens, than the model, of"
                f" {self.parts.vocab_size}: give the dense model that was compressed, or one of the same vocabulary."
            )
        own = set(student.parameters())
        if any(parameter in own for parameter in opened.parameters()):
            raise ValueError(
                "The teacher has parameters that are the model's own, and would be trained with them: give another"
                " module, as copy.deepcopy(model) before it is compressed, or a path."
            )
        self._opened = opened
        return opened

    def start(self, student: LightningModule, device: torch.device) -> None:
        """Make the teacher ready, once the student has the weights that training starts from.

        Args:
            student: The model that is fine-tuned.
            device: Where it is.

        Raises:
            ValueError: If the teacher's backbone is not that of the student, where it is to be shared.
        """
        if self.shares_backbone and self._distils:
            # Once more: a checkpoint may have brought it.
            _check_backbone(student, student.trainer)
        opened, self._opened = self._opened, None
        if opened is not None and self._distils:
            if self.shares_backbone:
                opened = over_shared_backbone(student, opened, self.own_parts)
            self.model = opened.requires_grad_(False).eval()
        for table in self._tables:
            table.to(device)
        if self.model is not None:
            self.model.to(device)
            self.model.trainer = student.trainer
        for text in self.texts():
            text.continue_text(self._text)
        self._text = {}

    def texts(self) -> list[LanguageModel]:
        """The teacher, if it follows the text as language models of this package do."""
        return [self.model] if isinstance(self.model, LanguageModel) else []

    def text_state(self) -> dict[str, Any]:
        """Entries of a checkpoint by which the teacher continues the text; all processes have to call it."""
        return {name: value for text in self.texts() for name, value in text.text_state().items()}

    def continue_text(self, state: Mapping[str, Any]) -> None:
        """Let the teacher continue the text from where a checkpoint was written, when training starts."""
        self._text = state

    @torch.no_grad()
    def scores(self, batch: Any, batch_idx: int, top_k: int | None, temperature: float) -> TeacherScores:
        """Score a batch of the training text, which goes on where the batch before ended.

        Args:
            batch: As the student gets it.
            batch_idx: Its index in the epoch.
            top_k: See `teacher_scores`.
            temperature: See `teacher_scores`.

        Raises:
            RuntimeError: If no Trainer has started to fit.
        """
        model = self.model
        if model is None:
            raise RuntimeError(_NOT_STARTED)
        if isinstance(model, LanguageModel):
            known = model.known_head(batch, "train")
            if known is None:
                return teacher_scores(model.scores(batch, "train")[0], top_k, temperature)
            head, hidden = known[0], known[1].flatten(0, -2)
        else:
            with _silenced(model), watch(model, self.own_parts, head=True) as seen:
                own_step(model, batch, batch_idx)
            found = self.own_parts.head(model)
            hidden = seen.hidden_states(model)
            assert found is not None
            head = found
        # Logits of all positions need not be there at once.
        chunks = token_chunks(head, hidden)
        return joined_scores([teacher_scores(head(hidden[chunk]), top_k, temperature) for chunk in chunks])

    def reconstruction(self, student: nn.Module, ids: Sequence[Tensor], rows: int | None, seed: int) -> Tensor:
        """How far all tables are from the original's, in sum.

        Args:
            student: The model that is fine-tuned.
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
            parts = [table.of_sample(student, rows, generator) for table in self._tables]
        elif ids:
            tokens = torch.cat([part.flatten() for part in ids])
            parts = [table.of_tokens(student, tokens) for table in self._tables]
        else:
            raise ValueError(
                f"The step of {type(student).__name__} calls no embedding among {self.parts.paths}, so that the tokens"
                " of the batch are not known: set reconstruction_rows, as in reconstruction_rows=1024."
            )
        return torch.stack(parts).sum()


def over_shared_backbone(student: LightningModule, original: LightningModule, parts: Parts) -> LightningModule:
    """The student with the tables of its original, over the very same backbone: no parameter of that is copied.

    Args:
        student: Its backbone must stay as it is.
        original: The dense model; afterwards only its tables are needed.
        parts: Where the tables are, in both.

    Returns:
        Modules of their own around the student's parameters and buffers, apart from the tables.

    Raises:
        ValueError: If the original has another backbone, over which its tables mean something else.
    """
    theirs = dict(original.named_parameters())
    inside = tuple(f"{path}." for path in parts.paths)
    for name, parameter in student.named_parameters():
        if name.startswith(inside):
            continue
        other = theirs.get(name)
        # Meant to be equal: but one of them may have been stored in fewer bits.
        same = other is not None and other.shape == parameter.shape
        if same and other is not None:
            own = parameter.detach().float()
            same = bool((own - other.to(own)).norm() <= _SAME_BACKBONE * own.norm())
        if not same:
            raise ValueError(
                f"teacher_shares_backbone=True, but {name!r} of the teacher is not that of the model: its tables"
                " belong to another backbone. Set teacher_shares_backbone=False, so that the teacher is a whole model."
            )
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*student.parameters(), *student.buffers())}
    for owner in (student._trainer, student.__dict__.get("log")):
        shared[id(owner)] = owner
    view = copy.deepcopy(student, shared)
    tables = {path: original.get_submodule(path) for path in parts.paths}
    dtypes = {one.dtype for one in parts.split(student)[0] if one.is_floating_point()}
    if len(dtypes) == 1 and any(one.dtype not in dtypes for table in tables.values() for one in table.parameters()):
        # A backbone in another precision. Not in place: the original may be somebody's, or its tables be compared with.
        tables = {path: table.to(dtype=next(iter(dtypes))) for path, table in copy.deepcopy(tables).items()}
    # Not by `put_back`: what is attached to the student's layers is nothing to those of the original.
    for path, table in tables.items():
        view.set_submodule(path, table)
    layers_replaced(view)
    return view


@contextmanager
def _silenced(model: LightningModule) -> Iterator[None]:
    """Let what a model logs go nowhere."""
    before: dict[str, Any] = {name: model.__dict__[name] for name in ("log", "log_dict") if name in model.__dict__}
    dropped = Logged("")
    model.log, model.log_dict = dropped.log, dropped.log_dict  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.log, model.log_dict
        model.__dict__.update(before)


def _layer(original: LightningModule, path: str) -> nn.Module:
    try:
        return original.get_submodule(path)
    except AttributeError:
        raise ValueError(
            f"The teacher, a {type(original).__name__}, has no layer {path!r} whose table could be reconstructed: give"
            " the dense model that was compressed, or set reconstruction_weight=0."
        ) from None


def _check_backbone(student: LightningModule, trainer: Trainer) -> None:
    """Refuse a backbone that is, or will be, another one than that which a teacher could share."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    given = [one.backbone for one in callbacks if isinstance(one, QuantizationAware) and one.backbone is not None]
    if given or backbone_of(student) is not None:
        what = f"backbone={given[0]!r}) quantizes" if given else "backbone=...) has quantized"
        raise ValueError(
            f"teacher_shares_backbone=True, but QuantizationAware({what} the very backbone that the teacher is read"
            " over: its scores would no longer be those of the original, and the run could not be resumed. Set"
            " teacher_shares_backbone=False, so that the teacher is a whole model, or leave backbone out of the"
            " quantization."
        )


def _check_fingerprints(teacher: LightningModule, student: LightningModule, trainer: Trainer) -> None:
    """Compare the vocabularies that models were trained with, as far as checkpoints and the data say."""
    vocabulary = getattr(getattr(trainer, "datamodule", None), "vocabulary", None)
    known = getattr(student, "vocabulary_fingerprint", None) or getattr(vocabulary, "fingerprint", None)
    found = getattr(teacher, "vocabulary_fingerprint", None)
    if None not in (known, found) and known != found:
        raise ValueError(
            f"The teacher has another vocabulary: it was trained with one of the fingerprint {found}, the model's has"
            f" {known}, so that the same ids stand for other tokens. Give the dense model that was compressed."
        )
