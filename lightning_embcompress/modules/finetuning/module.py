"""Fine-tuning of a language model with compressed tables, whatever class it is of."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.hooks import DataHooks, ModelHooks
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from typing_extensions import override

from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.integrations.checkpoint import (
    RECORD_KEY,
    restore_structure,
    restores_structure,
    write_record,
)
from lightning_embcompress.integrations.saved import save_compressed
from lightning_embcompress.modules.base import LanguageModel, VocabularyModule
from lightning_embcompress.modules.finetuning.architecture import OPENED, architecture_of, build, open_model
from lightning_embcompress.modules.finetuning.parts import Freeze, Parts, own_step, unfreeze, warn_of_frozen
from lightning_embcompress.modules.finetuning.teacher import Teacher
from lightning_embcompress.modules.finetuning.terms import Terms
from lightning_embcompress.modules.huggingface import HuggingFaceCausalLM

# Hooks of Lightning's besides those of its two classes of hooks. Layers that are built late are there already.
_HOOKS = {
    *("validation_step", "test_step", "predict_step", "backward", "configure_callbacks", "configure_gradient_clipping"),
    *("lr_scheduler_step", "optimizer_step", "optimizer_zero_grad"),
    *(name for name in (*vars(ModelHooks), *vars(DataHooks)) if not name.startswith(("_", "configure_"))),
}
_PREFIX = "model."


class CompressedLanguageModel(VocabularyModule):
    """Fine-tunes a language model, compressed or about to be: any class, given as a module or by its path.

    The loss is a weighted sum of three terms, in nats per token:

    * cross-entropy: what the model's own ``training_step`` computes;
    * distillation: the divergence from the ``teacher``, the dense original, over its ``teacher_top_k`` likeliest tokens
      and all others together (:mod:`lightning_embcompress.layers.distillation`). The full softmax is computed for it,
      also where the model trains by a sampled one;
    * reconstruction: how far the factors are from the teacher's tables, in the metric of the loss where there are
      ``statistics`` (:mod:`lightning_embcompress.modules.finetuning.reconstruction`). Without weights it keeps factors
      from drifting; alone it is a decomposition by gradient descent.

    Nothing of the teacher is trained, or kept in checkpoints but its path: a run that is resumed finds it there again,
    or is given it as a module again. With ``teacher_shares_backbone`` only its tables are kept, and they are read over
    the model's own backbone, of which there is no copy; that backbone must not be trained, for then it would no longer
    be that of the original and the teacher would move with its student.

    Everything else is the model's own: every hook of Lightning's that it overrides is called, also those of
    evaluation; an LSTM's state is carried over from batch to batch (also the teacher's, and over a resumed epoch);
    batches are what the model takes. Only its optimizer is replaced by the one given here. In evaluation mode, in which
    callbacks collect statistics, ``training_step`` is that of the model alone. A module of another class is distilled
    at those positions of its head that its own loss reads.

    Logged is what the model logs. Where the loss is not its own, what it calls ``train_loss`` is
    ``train_cross_entropy``, and there are also ``train_loss``, ``train_distillation`` and ``train_reconstruction``, the
    terms without their weights.

    Checkpoints have the model's structure and arguments: ``CompressedLanguageModel.load_from_checkpoint(path)`` needs
    none of the files that it came from; one of another class than this package's is given as ``model`` once more.

    Args:
        model: The path of a checkpoint of an :class:`LSTMLanguageModel`, of a :class:`HuggingFaceCausalLM` or of
            another fine-tuning, compressed or not; a directory of ``save_pretrained``, or a name on the Hugging Face
            hub; or a module: any LightningModule, or a model of transformers.
        weights: Where ``model`` is a module, what is loaded into it: a checkpoint of its class, or a directory that
            ``save_compressed`` or ``save_pretrained`` has written, compressed or not.
        teacher: The dense original, a path or a module as ``model``. Needed for distillation and reconstruction.
        teacher_shares_backbone: Whether only the teacher's tables are kept, over this model's own backbone; needs
            ``freeze='backbone'``.
        teacher_top_k: How many of the teacher's likeliest tokens are told apart at every position; None for all.
        temperature: What logits of teacher and model are divided by to be compared.
        cross_entropy_weight: Of the cross-entropy; 0 for none.
        distillation_weight: Of the distillation; 0 for none.
        reconstruction_weight: Of the reconstruction; 0 for none.
        reconstruction_rows: Rows of each table that are drawn at every step for the reconstruction; None for those of
            the tokens in the batch.
        statistics: Of the model, or the file that ``Statistics.save`` has written; None for the plain relative error.
        freeze: ``backbone`` to train the tables alone (with the biases of their layers), ``rows`` to train nothing of
            them but what all rows share (bases, means and scales), so that codes stay what they are and little text is
            enough, ``factors`` to train all but them, None for both. What an earlier fine-tuning has frozen is trained
            again; other parameters of a module that are frozen stay so.
        factor_learning_rate: Of the tables; None for the optimizer's.
        backbone_learning_rate: Of everything else; None for the optimizer's. Schedulers scale each from its own start.
        tables: ``auto``, or names of the modules that are the tables, see
            :func:`~lightning_embcompress.tables.finding.find_tables`.
        optimizer: Makes the optimizer from two groups of parameters, the backbone and the tables, in this order.
        lr_scheduler: Makes the learning-rate scheduler from the optimizer, or None for a constant rate.
        lr_scheduler_interval: Whether the scheduler steps after each ``epoch`` or each optimizer ``step``.
        lr_scheduler_monitor: Logged value that a ``ReduceLROnPlateau`` scheduler watches.
        frequency_bands: Whether a language model of this package also measures the perplexity by frequency band of the
            target, from the data module's ``token_counts``; costs a second pass over the logits.
        architecture: What checkpoints have in the place of ``model``; nothing to give by hand.

    Attributes:
        model: The model that is fine-tuned.

    Raises:
        FileNotFoundError: If there is nothing at a path.
        TypeError: If ``model`` or ``teacher`` is of a type that cannot be used.
        ValueError: If an argument is out of range, or arguments do not fit each other; when training starts, also if
            the teacher has another vocabulary, other tables or, with ``teacher_shares_backbone``, another backbone.

    Example:
        >>> from lightning_embcompress import compress
        >>> from lightning_embcompress.modules import LSTMLanguageModel
        >>> dense = LSTMLanguageModel(vocab_size=500, embedding_dim=32, hidden_size=32)
        >>> small = LSTMLanguageModel(vocab_size=500, embedding_dim=32, hidden_size=32)
        >>> _ = small.load_state_dict(dense.state_dict())
        >>> plan = compress(small, "low_rank", ratio=4)
        >>> tuned = CompressedLanguageModel(small, teacher=dense, distillation_weight=1.0, factor_learning_rate=0.01)
        >>> [len(group["params"]) for group in tuned.parameter_groups()]
        [4, 5]
    """

    def __init__(
        self,
        model: str | nn.Module | None = None,
        weights: str | None = None,
        teacher: str | nn.Module | None = None,
        teacher_shares_backbone: bool = False,
        teacher_top_k: int | None = 128,
        temperature: float = 1.0,
        cross_entropy_weight: float = 1.0,
        distillation_weight: float = 0.0,
        reconstruction_weight: float = 0.0,
        reconstruction_rows: int | None = None,
        statistics: Statistics | str | None = None,
        freeze: Freeze | None = None,
        factor_learning_rate: float | None = None,
        backbone_learning_rate: float | None = None,
        tables: str | list[str] = "auto",
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: Literal["epoch", "step"] = "epoch",
        lr_scheduler_monitor: str = "val_loss",
        frequency_bands: bool = True,
        architecture: dict[str, Any] | None = None,
    ) -> None:
        """Open the model, and check what can be checked without the teacher's files."""
        model, weights, teacher, statistics = map(_plain_path, (model, weights, teacher, statistics))
        # As checkpoints of older versions call it.
        freeze = "backbone" if str(freeze) == "body" else freeze
        terms = Terms(
            cross_entropy_weight,
            distillation_weight,
            reconstruction_weight,
            teacher_top_k,
            temperature,
            reconstruction_rows,
        )
        rates = (backbone_learning_rate, factor_learning_rate)
        _check_parts(freeze, rates, terms, teacher_shares_backbone)
        if architecture is None:
            # Of a checkpoint, a teacher that was given as a module is missing, and weights may have been set to 0.
            _check_effect(terms, teacher, teacher_shares_backbone, statistics)
        opened = build(architecture) if model is None and architecture is not None else open_model(model, weights)
        if not opened.automatic_optimization:
            raise ValueError(
                f"{type(opened).__name__} uses manual optimization (automatic_optimization=False), so that no term can"
                " be added to its loss: give a model whose training_step returns its loss."
            )
        parts = Parts(opened, tables)
        super().__init__(parts.vocab_size, optimizer, lr_scheduler, lr_scheduler_interval, lr_scheduler_monitor)
        ignored = ["model", "weights", "teacher", "statistics", "optimizer", "lr_scheduler", "architecture"]
        self.save_hyperparameters(ignore=ignored)
        # Plain values, so that checkpoints load with `weights_only=True`; of modules nothing.
        self.hparams.update(
            model=None,
            weights=None,
            teacher=teacher if isinstance(teacher, str) else None,
            statistics=statistics if isinstance(statistics, str) else None,
            freeze=freeze,
            architecture=architecture_of(opened),
        )
        self.parts = parts
        self.terms = terms
        self.freeze_part = freeze
        self.learning_rates = rates
        self.model = opened
        self.teacher = Teacher(opened, parts, teacher, teacher_shares_backbone, statistics)
        if isinstance(opened, LanguageModel):
            # The optimizer is another one than that which the model was made for.
            opened.use_dense_gradients()
            opened.frequency_bands = frequency_bands
        own = {name for kind in type(self).__mro__ if issubclass(kind, VocabularyModule) for name in vars(kind)}
        for name in _HOOKS - own:
            if is_overridden(name, opened):
                # On the instance, for Lightning asks which hooks a module has.
                setattr(self, name, getattr(opened, name))
        unfreeze(opened)
        warn_of_frozen(opened, parts, freeze)
        parts.freeze(opened, freeze)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        return self.model(*args, **kwargs)

    @override
    def setup(self, stage: str) -> None:
        """Set the model up and, for training, open the teacher.

        Raises:
            ValueError: If the data, the teacher or the statistics do not fit the model.
        """
        # By itself it does not know which hook is running. `self.log` is looked up at every call: callbacks divert it.
        self.model.log = self._log_of_model  # type: ignore[method-assign]
        self.model.setup(stage)
        super().setup(stage)
        if stage == "fit":
            self.parts.freeze(self.model, self.freeze_part)
            self.teacher.open(self.model, self.terms.distillation, self.terms.reconstruction, self.trainer)

    @override
    def teardown(self, stage: str) -> None:
        """Let the model log by itself again."""
        self.model.__dict__.pop("log", None)
        self.model.teardown(stage)

    @property
    def monitored_loss(self) -> str | None:
        """The logged loss by which callbacks measure the perplexity, if the model names one."""
        return getattr(self.model, "monitored_loss", None)

    def _log_of_model(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if name == "train_loss" and not self.terms.are_the_models_own:
            name = "train_cross_entropy"
        self.log(name, value, *args, **kwargs)

    @override
    def on_fit_start(self) -> None:
        """Bring the teacher to the device, once the model has the weights that it starts from."""
        self.model.on_fit_start()
        self.teacher.start(self.model, self.device)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Return the weighted sum of the terms, logged as ``train_loss``."""
        if self.terms.are_the_models_own or not self.model.training:
            return own_step(self.model, batch, batch_idx)
        # The same rows when a run is resumed, and others in every process.
        seed = ((self.global_step * 2**20 + batch_idx) * 2**12 + self.global_rank) % 2**63
        return self.terms.training_step(self.model, self.teacher, batch, batch_idx, seed, self.log)

    @override
    def parameter_groups(self) -> list[dict[str, Any]]:
        """The backbone, then the tables, each with its learning rate if it has one of its own."""
        return self.parts.groups(self.model, *self.learning_rates)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        """Let the model and its teacher go on with the text, or start it anew."""
        for text in self.teacher.texts():
            text.on_train_batch_start(batch, batch_idx)
        return self.model.on_train_batch_start(batch, batch_idx)

    @override
    def on_train_epoch_end(self) -> None:
        """Let the model and its teacher end the text."""
        for text in self.teacher.texts():
            text.on_train_epoch_end()
        self.model.on_train_epoch_end()

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what the model does, the structure of its tables, and where the teacher is in the text."""
        self.model.on_save_checkpoint(checkpoint)
        super().on_save_checkpoint(checkpoint)
        # Training cannot go on from a checkpoint of the weights alone, which has no optimizer.
        state = self.teacher.text_state() if "optimizer_states" in checkpoint else {}
        if state:
            checkpoint["embcompress_teacher"] = state

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give the model the structure that the checkpoint was written with, and what else it has stored.

        Raises:
            ValueError: If the checkpoint does not fit the model or the vocabulary of the data.
        """
        self._read_old_names(checkpoint.get("hyper_parameters", {}))
        self._check_vocabulary(checkpoint)
        own_hook = is_overridden("on_load_checkpoint", self.model) and not restores_structure(self.model)
        restore_structure(self, checkpoint, complete=not own_hook)
        # As a checkpoint of the model alone, whose own hook may change what is loaded.
        inner = {key: value for key, value in checkpoint.items() if key != RECORD_KEY}
        write_record(self.model, inner)
        state = checkpoint.get("state_dict")
        if isinstance(state, Mapping):
            inner["state_dict"] = {name.removeprefix(_PREFIX): value for name, value in state.items()}
        self.model.on_load_checkpoint(inner)
        if isinstance(state, Mapping):
            checkpoint["state_dict"] = {_PREFIX + name: value for name, value in inner["state_dict"].items()}
        self.teacher.continue_text(checkpoint.get("embcompress_teacher", {}))

    def _read_old_names(self, hyper_parameters: Mapping[str, Any]) -> None:
        """Take arguments of checkpoints from when the backbone was called body, unless others are given."""
        rate = hyper_parameters.get("body_learning_rate")
        if rate is not None and self.learning_rates[0] is None:
            self.learning_rates = (rate, self.learning_rates[1])
            self.hparams.update(backbone_learning_rate=rate)
        if hyper_parameters.get("teacher_shares_body") and self.freeze_part == "backbone":
            self.teacher.shares_backbone = True
            self.hparams.update(teacher_shares_backbone=True)

    def save_compressed(self, path: str | os.PathLike[str]) -> None:
        """Save the model without what fine-tuned it, for `load_compressed` into a module of its class.

        Args:
            path: A directory, see :func:`lightning_embcompress.save_compressed`.
        """
        save_compressed(self.model, path)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Save a model of transformers as transformers does.

        Args:
            path: A directory, see :meth:`HuggingFaceCausalLM.save_pretrained`.

        Raises:
            TypeError: If it is none.
        """
        if not isinstance(self.model, HuggingFaceCausalLM):
            raise TypeError(
                f"{type(self.model).__name__} is no HuggingFaceCausalLM, so transformers could not read it: use"
                " save_compressed(path)."
            )
        self.model.save_pretrained(str(path))


# A part that was frozen there is trained again, unless it is to be frozen here too.
OPENED[CompressedLanguageModel] = (
    {"architecture", "teacher_top_k"},
    {"freeze": None, "teacher_shares_backbone": False},
)


def _plain_path(given: Any) -> Any:
    """A path as a string, which checkpoints can keep; anything else as it is."""
    return os.fspath(given) if isinstance(given, os.PathLike) else given


def _check_parts(freeze: str | None, rates: tuple[float | None, float | None], terms: Terms, shares: bool) -> None:
    """Refuse a part that cannot be frozen, or not for these terms.

    Args:
        freeze: The part that is not trained.
        rates: Learning rates of backbone and tables; None for that of the optimizer.
        terms: Of the loss.
        shares: Whether the teacher's tables are read over the model's own backbone.

    Raises:
        ValueError: Naming the argument, its value and the remedy.
    """
    for name, rate in zip(("backbone_learning_rate", "factor_learning_rate"), rates, strict=True):
        if rate is not None and not 0 <= rate < math.inf:
            raise ValueError(f"{name}={rate} must be 0 or more; leave it out for that of the optimizer.")
    if freeze not in (None, "backbone", "factors", "rows"):
        raise ValueError(f"freeze={freeze!r} must be 'backbone', 'factors', 'rows' or None.")
    if terms.reconstruction and freeze == "factors":
        raise ValueError(
            "reconstruction_weight trains factors, but freeze='factors' leaves them as they are: set one of them to"
            " 0 or None."
        )
    if shares and freeze not in ("backbone", "rows"):
        raise ValueError(
            f"teacher_shares_backbone=True with freeze={freeze!r}: the teacher is the dense tables over the model's own"
            " backbone, and if that is trained the teacher moves with its student, to where both agree and neither is"
            " right. Set freeze='backbone', or teacher_shares_backbone=False to keep the whole teacher."
        )


def _check_effect(terms: Terms, teacher: Any, shares: bool, statistics: Any) -> None:
    """Refuse arguments that change nothing.

    Raises:
        ValueError: Naming the argument, its value and the remedy.
    """
    taught, compared = bool(terms.distillation or terms.reconstruction), bool(terms.reconstruction)
    for name, given, works, remedy in (
        ("teacher", teacher, taught, "distillation_weight=0 and reconstruction_weight=0: set one of them"),
        ("teacher_shares_backbone", shares or None, teacher is not None, "teacher=None: give the dense original"),
        ("reconstruction_rows", terms.rows, compared, "reconstruction_weight=0: set reconstruction_weight=1"),
        ("statistics", statistics, compared, "reconstruction_weight=0: set reconstruction_weight=1"),
    ):
        if given is not None and not works:
            value = repr(given) if isinstance(given, str | int) else type(given).__name__
            raise ValueError(f"{name}={value} has no effect with {remedy}, or leave {name} out.")
