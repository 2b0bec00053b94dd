"""Fine-tuning of a language model with compressed tables, whatever class it is of."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.integrations.saved import save_compressed
from lightning_embcompress.layers.distillation import (
    TeacherScores,
    check_distillation,
    distilled_head_loss,
    distilled_loss,
)
from lightning_embcompress.metrics.frequency_bands import PerplexityByFrequency
from lightning_embcompress.metrics.perplexity import Perplexity
from lightning_embcompress.modules.base import LanguageModel, Stage
from lightning_embcompress.modules.finetuning_arguments import check_arguments, check_effect, plain_path
from lightning_embcompress.modules.finetuning_foreign import (
    NestedCheckpoint,
    evaluate_foreign,
    forward_hooks,
    loss_of,
    step_output,
    warn_of_unknown_targets,
)
from lightning_embcompress.modules.finetuning_original import Original
from lightning_embcompress.modules.finetuning_parts import Freeze, Parts, Watch, unfreeze, warn_of_frozen
from lightning_embcompress.modules.finetuning_sources import (
    architecture_of,
    build,
    open_model,
    register_checkpoint_class,
)
from lightning_embcompress.modules.huggingface import HuggingFaceCausalLM


class CompressedLanguageModel(LanguageModel):
    """Fine-tunes a language model, compressed or about to be: any class, given as a module or by its path.

    The loss is a weighted sum of three terms, in nats per token:

    * cross-entropy: what the model's own ``training_step`` computes;
    * distillation: the divergence from the ``teacher``, the dense original, over its ``teacher_top_k`` likeliest tokens
      and all others together (:mod:`lightning_embcompress.layers.distillation`). The full softmax is computed for it,
      also where the model trains by a sampled one;
    * reconstruction: how far the factors are from the teacher's tables, in the metric of the loss where there are
      ``statistics`` (:mod:`lightning_embcompress.modules.finetuning_reconstruction`). Without weights it keeps factors
      from drifting; alone it is a decomposition by gradient descent.

    Nothing of the teacher is trained, or kept in checkpoints but its path: a run that is resumed finds it there again,
    or is given it as a module again. With ``teacher_shares_backbone`` only its tables are kept, and they are read over
    the model's own backbone, of which there is no copy; that backbone must not be trained, for then it would no longer
    be that of the original and the teacher would move with its student.

    The model keeps its own ways: an LSTM's state is carried over from batch to batch (also the teacher's, and over a
    resumed epoch), batches are what the model takes, the hooks of a module of another class are called. Its optimizer
    is replaced by the one given here. In evaluation mode, in which callbacks collect statistics, ``training_step`` is
    that of the model alone. Logged are ``train_loss``, and where that is not the cross-entropy as it is
    ``train_cross_entropy``, ``train_distillation`` and ``train_reconstruction``, each without its weight; ``val_loss``,
    ``val_perplexity``, with ``frequency_bands`` also ``val_perplexity/rank_1-100`` and so on, and the same for test. Of
    a module of another class these are measured from the cross-entropy over the vocabulary that its
    ``validation_step`` computes; what it logs under these names itself is then ``val_loss/model`` and so on.

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
        freeze: ``backbone`` to train the tables alone (with the biases of their layers), ``factors`` to train all but
            them, None for both. What an earlier fine-tuning has frozen is trained again; other parameters of a module
            that are frozen stay so.
        factor_learning_rate: Of the tables; None for the optimizer's.
        backbone_learning_rate: Of everything else; None for the optimizer's. Schedulers scale each from its own start.
        tables: ``auto``, or names of the modules that are the tables, see
            :func:`~lightning_embcompress.tables.replacement.find_tables`.
        optimizer: Makes the optimizer from two groups of parameters, the backbone and the tables, in this order.
        lr_scheduler: Makes the learning-rate scheduler from the optimizer, or None for a constant rate.
        lr_scheduler_interval: Whether the scheduler steps after each ``epoch`` or each optimizer ``step``.
        lr_scheduler_monitor: Logged value that a ``ReduceLROnPlateau`` scheduler watches.
        frequency_bands: Whether validation and test also measure the perplexity by frequency band of the target, from
            the data module's ``token_counts``; costs a second pass over the logits.
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
        model, weights, teacher, statistics = (plain_path(one) for one in (model, weights, teacher, statistics))
        check_distillation(teacher_top_k, temperature)
        weighted = {"cross_entropy": cross_entropy_weight, "distillation": distillation_weight}
        weighted["reconstruction"] = reconstruction_weight
        rates = {"factor_learning_rate": factor_learning_rate, "backbone_learning_rate": backbone_learning_rate}
        check_arguments(weighted, rates, freeze, reconstruction_rows, teacher_shares_backbone)
        if architecture is None:
            # Of a checkpoint, a teacher that was given as a module is missing, and weights may have been set to 0.
            check_effect(weighted, teacher, teacher_shares_backbone, reconstruction_rows, statistics)
        opened = build(architecture) if model is None and architecture is not None else open_model(model, weights)
        if not opened.automatic_optimization:
            raise ValueError(
                f"{type(opened).__name__} optimizes by hand (automatic_optimization=False), so that no term can be"
                " added to its loss: give a model whose training_step returns its loss."
            )
        parts = Parts(opened, tables)
        super().__init__(
            parts.vocab_size, optimizer, lr_scheduler, lr_scheduler_interval, lr_scheduler_monitor, frequency_bands
        )
        ignored = ["model", "weights", "teacher", "statistics", "optimizer", "lr_scheduler", "architecture"]
        self.save_hyperparameters(ignore=ignored)
        # Plain values, so that checkpoints load with `weights_only=True`; of modules nothing.
        self.hparams.update(
            model=None,
            weights=None,
            teacher=teacher if isinstance(teacher, str) else None,
            statistics=statistics if isinstance(statistics, str) else None,
            architecture=architecture_of(opened),
        )
        self.parts = parts
        self.weights_of_terms = weighted
        # Whether the loss is what the model's own step gives.
        self._alone = weighted == {"cross_entropy": 1, "distillation": 0, "reconstruction": 0}
        self.teacher_top_k, self.temperature = teacher_top_k, temperature
        self.reconstruction_rows = reconstruction_rows
        self.freeze_part = freeze
        self.learning_rates = (backbone_learning_rate, factor_learning_rate)
        self.model = opened
        self._warned_of_targets = False
        self._is_ours = isinstance(opened, LanguageModel)
        if isinstance(opened, LanguageModel):
            # The optimizer is another one than that which the model was made for.
            opened.use_dense_gradients()
        self._original = Original(opened, parts, teacher, teacher_shares_backbone, statistics)
        forward_hooks(self, opened)
        unfreeze(opened)
        warn_of_frozen(opened, parts, freeze)
        parts.freeze(opened, freeze)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives when it is called."""
        return self.model(*args, **kwargs)

    @override
    def logits(self, inputs: Tensor, stage: Stage) -> Tensor:
        """Scores of every next token, where the model is a language model of this package."""
        return self._ours().logits(inputs, stage)

    @override
    def scores(self, batch: Any, stage: Stage) -> tuple[Tensor, Tensor]:
        """Logits and targets of a batch, where the model is a language model of this package."""
        return self._ours().scores(batch, stage)

    @override
    def head_inputs(self, batch: Any, stage: Stage) -> tuple[nn.Module, Tensor, Tensor] | None:
        """What the model computes its logits from, where it is a language model of this package."""
        return self._ours().known_head(batch, stage)

    @override
    def start_text(self, stage: Stage) -> None:
        """Forget the stage's text, where the model has a memory."""
        if self._is_ours:
            self._ours().start_text(stage)

    def _ours(self) -> LanguageModel:
        if not isinstance(self.model, LanguageModel):
            raise TypeError(
                f"{type(self.model).__name__} is no LanguageModel of this package, so its logits are known within its"
                " own steps only: call the model itself."
            )
        return self.model

    @override
    def setup(self, stage: str) -> None:
        """Set the model up, read the data module's token counts and, for training, the teacher.

        Raises:
            ValueError: If the data, the teacher or the statistics do not fit the model.
        """
        # By itself it does not know what Lightning is doing. Found at every call: callbacks divert what is logged.
        self.model.log = self._log_of_model  # type: ignore[method-assign]
        self._check_fingerprint()
        self.model.setup(stage)
        super().setup(stage)
        if stage == "fit":
            self.parts.freeze(self.model, self.freeze_part)
            self._original.open(self.model, self.weights_of_terms, self.trainer)

    def _check_fingerprint(self) -> None:
        vocabulary = getattr(self._datamodule(), "vocabulary", None)
        found, known = getattr(vocabulary, "fingerprint", None), getattr(self.model, "_vocabulary_fingerprint", None)
        if None not in (found, known) and found != known:
            raise ValueError(
                f"The model was trained with a vocabulary of the fingerprint {known}, that of the data has {found}: its"
                " ids stand for other tokens. Use the data, or the vocabulary file, that it was trained with."
            )

    @override
    def teardown(self, stage: str) -> None:
        """Let the model log by itself again."""
        self.model.__dict__.pop("log", None)
        self.model.teardown(stage)

    def _log_of_model(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if self.training and name == "train_loss" and not self._alone:
            name = "train_cross_entropy"
        elif not self._is_ours and self._is_measured(name):
            name += "/model"
        self.log(name, value, *args, **kwargs)

    def _is_measured(self, name: str) -> bool:
        """Whether a value of evaluation is logged here."""
        stage, _, what = name.partition("_")
        perplexity = {"val": self.val_perplexity, "test": self.test_perplexity}.get(stage)
        own = what in ("loss", "perplexity") or what.startswith("perplexity/")
        return own and not self.training and perplexity is not None and perplexity.update_called

    @override
    def on_fit_start(self) -> None:
        """Bring the teacher to the device, once the model has the weights that it starts from."""
        self.model.on_fit_start()
        self._original.start(self.model, self.device)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Return the weighted sum of the terms, logged as ``train_loss``."""
        weights = self.weights_of_terms
        if self._alone or not self.training:
            return step_output(self.model.training_step, batch, batch_idx)
        output: Any = None
        said = None
        if weights["distillation"]:
            # First: what it takes is gone again before the model's own graph is there.
            said = self._original.scores(batch, batch_idx, self.teacher_top_k, self.temperature)
        with Watch(self.model, self.parts, head=said is not None and not self._is_ours) as watch:
            loss = self._from_logits(batch, said) if said is not None and self._is_ours else None
            if loss is None:
                output = step_output(self.model.training_step, batch, batch_idx)
                own = loss_of(output)
                if own is None:
                    return output
                loss = weights["cross_entropy"] * own
        if said is not None and not self._is_ours:
            loss = loss + self._from_hidden_states(watch, said)
        if weights["reconstruction"]:
            # The same rows when a run is resumed, and others in every process.
            seed = (self.global_step * 2**20 + batch_idx) * 2**12 + self.global_rank
            term = self._original.reconstruction(self.model, watch.ids, self.reconstruction_rows, seed % 2**63)
            self.log("train_reconstruction", term.detach(), batch_size=1)
            loss = loss + weights["reconstruction"] * term
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=1)
        return {**output, "loss": loss} if isinstance(output, Mapping) else loss

    def _from_logits(self, batch: Any, said: TeacherScores) -> Tensor:
        """Cross-entropy and distillation, where the model is a language model of this package."""
        weights = (self.weights_of_terms["cross_entropy"], self.weights_of_terms["distillation"])
        known = self._ours().known_head(batch, "train")
        if known is None:
            logits, targets = self._ours().scores(batch, "train")
            found = distilled_loss(logits, targets, said, self.temperature, *weights, overwrite=True)
        else:
            head, hidden, targets = known
            found = distilled_head_loss(head, hidden, targets, said, self.temperature, *weights)
        self.log("train_cross_entropy", found.cross_entropy, batch_size=1)
        self.log("train_distillation", found.distillation, batch_size=1)
        return found.loss

    def _from_hidden_states(self, watch: Watch, said: TeacherScores) -> Tensor:
        """Distillation alone, of the logits that the head gives once more: a module may have changed its own."""
        hidden, head = watch.hidden_states(), self.parts.head(self.model)
        assert head is not None
        targets = watch.targets
        if targets is None:
            if not self._warned_of_targets:
                warn_of_unknown_targets(self.model)
                self._warned_of_targets = True
            targets = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
        weight = self.weights_of_terms["distillation"]
        found = distilled_head_loss(head, hidden, targets, said, self.temperature, 0.0, weight)
        self.log("train_distillation", found.distillation, batch_size=1)
        return found.loss

    @override
    def parameter_groups(self) -> list[dict[str, Any]]:
        """The backbone, then the tables, each with its learning rate if it has one of its own."""
        return self.parts.groups(self.model, *self.learning_rates)

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients as the model does."""
        self.model.configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        """Let the model and its teacher go on with the text, or start it anew."""
        for teacher in self._original.texts():
            teacher.on_train_batch_start(batch, batch_idx)
        return self.model.on_train_batch_start(batch, batch_idx)

    @override
    def on_train_epoch_end(self) -> None:
        """Let the model and its teacher end the text."""
        for teacher in self._original.texts():
            teacher.on_train_epoch_end()
        self.model.on_train_epoch_end()

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        """Score a batch by the full softmax, or as a module of another class does."""
        if self._is_ours:
            return super().validation_step(batch, batch_idx)
        measured = (self.val_perplexity, self.val_bands)
        return evaluate_foreign(self.model, self.parts, self.model.validation_step, batch, batch_idx, *measured)

    @override
    def test_step(self, batch: Any, batch_idx: int) -> Any:
        """Score a batch by the full softmax, or as a module of another class does."""
        if self._is_ours:
            return super().test_step(batch, batch_idx)
        measured = (self.test_perplexity, self.test_bands)
        return evaluate_foreign(self.model, self.parts, self.model.test_step, batch, batch_idx, *measured)

    @override
    def on_predict_epoch_start(self) -> None:
        """Let the model begin."""
        self.model.on_predict_epoch_start()

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """What the model predicts."""
        return step_output(self.model.predict_step, batch, batch_idx)

    @override
    def _start_evaluation(self, stage: Stage, perplexity: Perplexity, bands: PerplexityByFrequency | None) -> None:
        super()._start_evaluation(stage, perplexity, bands)
        if not self._is_ours:
            getattr(self.model, "on_validation_epoch_start" if stage == "val" else "on_test_epoch_start")()

    @override
    def _log_evaluation(self, stage: Stage, perplexity: Perplexity, bands: PerplexityByFrequency | None) -> None:
        if not self._is_ours:
            getattr(self.model, "on_validation_epoch_end" if stage == "val" else "on_test_epoch_end")()
            if not perplexity.update_called:
                return
        super()._log_evaluation(stage, perplexity, bands)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what the model does, the structure of its tables, and where the teacher is in the text."""
        self.model.on_save_checkpoint(checkpoint)
        super().on_save_checkpoint(checkpoint)
        # Training cannot go on from a checkpoint of the weights alone, which has no optimizer.
        carried = self._original.carried() if "optimizer_states" in checkpoint else {}
        if carried:
            checkpoint["embcompress_teacher"] = carried

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give the model the structure that the checkpoint was written with, and what else it has stored.

        Raises:
            ValueError: If the checkpoint does not fit the model or the vocabulary of the data.
        """
        NestedCheckpoint(checkpoint).load_into(self.model)
        super().on_load_checkpoint(checkpoint)
        self._original.carry(checkpoint.get("embcompress_teacher", {}))

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


register_checkpoint_class(CompressedLanguageModel, {"architecture", "teacher_top_k"})
