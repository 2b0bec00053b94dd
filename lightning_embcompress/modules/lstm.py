"""LSTM language model, up to the bigLSTM of Jozefowicz et al. 2016, as a LightningModule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_embcompress.layers.compressed import CompressedEmbedding
from lightning_embcompress.layers.full_softmax import head_softmax_loss
from lightning_embcompress.layers.sampled_softmax import head_rows, sample_candidates, sampled_softmax_loss
from lightning_embcompress.modules.base import Batch, LanguageModel, Stage
from lightning_embcompress.modules.lstm_arguments import check_optimizer, check_sizes, check_training
from lightning_embcompress.utils.random_state import gather_over_processes

State: TypeAlias = tuple[Tensor, Tensor]
"""Hidden state ``[num_layers, batch_size, head_dim]`` and cell state ``[num_layers, batch_size, hidden_size]``."""


class LSTMLanguageModel(LanguageModel):
    """Word-level LSTM language model with optional projections, sampled softmax and tied tables.

    A batch is a pair of int64 tensors ``inputs`` and ``targets`` of shape ``[batch_size, seq_len]``; the target -100 is
    not predicted. Row `i` of a batch is the continuation of row `i` of the batch before: the state of the LSTM is
    carried over without its gradient (truncated back-propagation through time), separately for training, validation,
    test and prediction, so that a validation in the middle of an epoch does not disturb the training. It starts from
    zero at the start of an epoch and when the batch size changes. A checkpoint from within an epoch keeps the state of
    all rows over all processes, those of process 0 first, and resuming goes on from there, also with another number of
    processes if there are as many rows in sum; with more or fewer it starts from zero, with a warning. Of several
    processes, a checkpoint that is written on an exception has no state, for it may have hit one of them alone.

    Training minimises the full or the sampled softmax loss; validation and test always use the full softmax. Logged:
    ``train_loss``, ``val_loss``, ``test_loss`` in nats per token, ``val_perplexity`` and ``test_perplexity``, and with
    ``frequency_bands`` also ``val_perplexity/rank_1-100`` and so on.

    Initialisation: the LSTM as in the released code of the paper, every matrix uniform within ``±sqrt(3 / n)``, `n` its
    number of inputs; biases zero, the forget gate's 1. Both tables uniform within ``±table_init_range``. The paper's
    code takes ``sqrt(3 / vocab_size)`` there (0.0019 for the bigLSTM) and multiplies the embedding's gradient by the
    batch size; with Adam such small inputs leave the LSTM to its own dynamics for long, and a model that never sees a
    zero state within an epoch can then fail from one. The default is that of Zaremba et al. 2014.

    Args:
        vocab_size: Number of tokens. For ``softmax='sampled'`` their ids must be sorted by falling frequency.
        embedding_dim: Width of the embedding; 1,024 for the bigLSTM.
        hidden_size: Cells of each LSTM layer; 8,192 for the bigLSTM.
        projection_size: Width to which each layer's output is projected (``proj_size`` of :class:`torch.nn.LSTM`);
            1,024 for the bigLSTM, 0 for none.
        num_layers: LSTM layers; 2 for the bigLSTM.
        dropout: Probability of dropping a value of the embedding, between the layers and before the head; 0.25 for the
            bigLSTM, 0.1 for models of at most 4,096 cells.
        tie_weights: Whether the head reads the embedding's table; needs ``embedding_dim`` equal to the head's width.
        table_init_range: Bound of the initial values of both tables.
        softmax: Training loss, ``full`` or ``sampled`` (:mod:`lightning_embcompress.layers.sampled_softmax`).
        num_sampled: Different ids sampled for each batch with ``softmax='sampled'``; 8,192 in the paper.
        carry_state: Whether the state is carried from batch to batch; false for batches of unrelated texts.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the learning-rate scheduler from the optimizer, or None for a constant rate.
        lr_scheduler_interval: Whether the scheduler steps after each ``epoch`` or each optimizer ``step``.
        lr_scheduler_monitor: Logged value that a ``ReduceLROnPlateau`` scheduler watches.
        lstm_gradient_clip: Largest norm of the LSTM's gradients taken together, the tables' left as they are; 1.0 in
            the paper. None for no such clipping; the Trainer's ``gradient_clip_val`` works on all gradients.
        frequency_bands: Whether validation and test also measure the perplexity by frequency band of the target, from
            the data module's ``token_counts``; costs a second pass over the logits.
        sparse_gradients: Whether the gradients of the embedding, and with ``softmax='sampled'`` those of the head, are
            sparse tensors, so that a step costs what the words of a batch cost however large the vocabulary is, before
            and after compression. Needs an optimizer that takes both kinds, such as Adagrad or SGD without momentum,
            and no ``gradient_clip_val``; on one device. Fine-tuning by ``CompressedLanguageModel`` has dense ones.

    Raises:
        ValueError: If an argument is out of range, or arguments do not fit each other.

    Example:
        >>> import torch
        >>> model = LSTMLanguageModel(vocab_size=100, embedding_dim=8, hidden_size=16)
        >>> logits, state = model(torch.randint(100, (2, 5)))
        >>> logits.shape
        torch.Size([2, 5, 100])
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int = 256,
        hidden_size: int = 512,
        projection_size: int = 0,
        num_layers: int = 1,
        dropout: float = 0.1,
        tie_weights: bool = False,
        table_init_range: float = 0.1,
        softmax: Literal["full", "sampled"] = "full",
        num_sampled: int = 8192,
        carry_state: bool = True,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: Literal["epoch", "step"] = "epoch",
        lr_scheduler_monitor: str = "val_loss",
        lstm_gradient_clip: float | None = None,
        frequency_bands: bool = False,
        sparse_gradients: bool = False,
    ) -> None:
        """Build the layers ``encoder``, ``lstm`` and ``decoder``."""
        super().__init__(
            vocab_size, optimizer, lr_scheduler, lr_scheduler_interval, lr_scheduler_monitor, frequency_bands
        )
        # Plain numbers and strings only, so that checkpoints load with `weights_only=True`.
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        check_sizes(vocab_size, embedding_dim, hidden_size, projection_size, num_layers, tie_weights)
        check_training(vocab_size, dropout, table_init_range, softmax, num_sampled, lstm_gradient_clip)
        head_dim = projection_size or hidden_size
        self.softmax = softmax
        self.num_sampled = num_sampled
        self.carry_state = carry_state
        self.sparse_gradients = sparse_gradients
        self.lstm_gradient_clip = lstm_gradient_clip
        self._states: dict[Stage, State] = {}
        self._restored: State | None = None

        self.encoder: nn.Module = nn.Embedding(vocab_size, embedding_dim, sparse=sparse_gradients)
        self.lstm = nn.LSTM(
            embedding_dim,
            hidden_size,
            num_layers=num_layers,
            dropout=dropout if num_layers > 1 else 0.0,
            proj_size=projection_size,
            batch_first=True,
        )
        self.decoder: nn.Module = nn.Linear(head_dim, vocab_size)
        self.dropout = nn.Dropout(dropout)
        if tie_weights:
            self.decoder.weight = self.encoder.weight
        self._initialise(table_init_range)

    @torch.no_grad()
    def _initialise(self, table_init_range: float) -> None:
        for table in (self.encoder, self.decoder):
            nn.init.uniform_(table.get_parameter("weight"), -table_init_range, table_init_range)
        nn.init.zeros_(self.decoder.get_parameter("bias"))
        for name, parameter in self.lstm.named_parameters():
            if name.startswith("bias"):
                nn.init.zeros_(parameter)
                if name.startswith("bias_ih"):
                    # Gates come in the order input, forget, cell, output; the two biases of a gate are added.
                    nn.init.ones_(parameter.chunk(4)[1])
                continue
            # Input and recurrent weights form one matrix of the layer, so the inputs of both count.
            layer = name.rpartition("_l")[2]
            inputs = ("weight_hr",) if name.startswith("weight_hr") else ("weight_ih", "weight_hh")
            bound = math.sqrt(3 / sum(self.lstm.get_parameter(f"{part}_l{layer}").shape[1] for part in inputs))
            nn.init.uniform_(parameter, -bound, bound)

    @override
    def setup(self, stage: str) -> None:
        """Check the data module's vocabulary, and what training with sparse gradients cannot do.

        Raises:
            ValueError: If the vocabulary is larger than the tables, or gradients are sparse and there is a strategy
                for several devices, or a `gradient_clip_val`.
        """
        super().setup(stage)
        if stage != "fit" or not self.sparse_gradients:
            return
        if not isinstance(self.trainer.strategy, SingleDeviceStrategy):
            raise ValueError(
                f"sparse_gradients=True is for one device, not for {type(self.trainer.strategy).__name__}: set it to "
                "False, with an optimizer of dense gradients, or devices to 1 and strategy to auto."
            )
        if self.trainer.gradient_clip_val:
            raise ValueError(
                f"gradient_clip_val={self.trainer.gradient_clip_val} cannot clip the tables' gradients, which are "
                "sparse: leave it out, with lstm_gradient_clip for the LSTM's, or set sparse_gradients to False."
            )

    @override
    def configure_optimizers(self) -> Any:
        """Make the optimizer over all parameters, and the scheduler.

        Raises:
            ValueError: If gradients are sparse and the optimizer takes no such gradients beside dense ones.
        """
        if self.sparse_gradients:
            check_optimizer(self.optimizer)
        return super().configure_optimizers()

    @override
    def use_dense_gradients(self) -> None:
        """Train with gradients that every optimizer takes."""
        self.sparse_gradients = False
        if isinstance(self.encoder, nn.Embedding | CompressedEmbedding):
            self.encoder.sparse = False

    @override
    def forward(self, inputs: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Score every next token.

        Args:
            inputs: Token ids, int64, shape ``[batch_size, seq_len]``.
            state: State after the tokens before; zero if None.

        Returns:
            Logits, shape ``[batch_size, seq_len, vocab_size]``, and the state after the last token.
        """
        hidden, state = self.hidden_states(inputs, state)
        return self.decoder(hidden), state

    def hidden_states(self, inputs: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Return the inputs of the head.

        Args:
            inputs: Token ids, int64, shape ``[batch_size, seq_len]``.
            state: State after the tokens before; zero if None.

        Returns:
            Hidden states, shape ``[batch_size, seq_len, head_dim]``, and the state after the last token.
        """
        embedded = self.dropout(self.encoder(inputs))
        if state is not None:
            # One restored from a checkpoint lies on the CPU, perhaps in another precision.
            state = (state[0].to(embedded), state[1].to(embedded))
        if embedded.device.type == "cpu":
            # Under autocast, nn.LSTM fails on CPUs without bfloat16 instructions ("could not create a primitive").
            with torch.autocast("cpu", enabled=False):
                hidden, state = self.lstm(embedded.to(self.lstm.bias_ih_l0.dtype), state)
        else:
            hidden, state = self.lstm(embedded, state)
        return self.dropout(hidden), state

    def _continued_hidden_states(self, inputs: Tensor, stage: Stage) -> Tensor:
        state = self._states.get(stage)
        if state is not None and state[0].shape[1] != inputs.shape[0]:
            state = None
        hidden, state = self.hidden_states(inputs, state)
        if self.carry_state:
            self._states[stage] = (state[0].detach(), state[1].detach())
        return hidden

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the full or the sampled softmax loss in nats per token, logged as ``train_loss``."""
        inputs, targets = batch
        hidden = self._continued_hidden_states(inputs, "train")
        if self.softmax == "full":
            loss, _ = head_softmax_loss(self.decoder, hidden, targets)
        else:
            loss = sampled_softmax_loss(
                hidden,
                targets,
                rows=partial(head_rows, self.decoder, sparse=self.sparse_gradients),
                bias=self.decoder.bias if isinstance(self.decoder.bias, Tensor) else None,
                candidates=sample_candidates(self.vocab_size, self.num_sampled),
                vocab_size=self.vocab_size,
            )
        self.log("train_loss", loss, prog_bar=True, batch_size=inputs.shape[0])
        return loss

    @override
    def logits(self, inputs: Tensor, stage: Stage) -> Tensor:
        """Score every next token, ``[batch_size, seq_len, vocab_size]``, with the state carried within the stage."""
        logits: Tensor = self.decoder(self._continued_hidden_states(inputs, stage))
        return logits

    @override
    def head_inputs(self, batch: Batch, stage: Stage) -> tuple[nn.Module, Tensor, Tensor]:
        """The decoder, its hidden states, with the state carried within the stage, and target ids."""
        inputs, targets = batch
        return self.decoder, self._continued_hidden_states(inputs, stage), targets

    @override
    def start_text(self, stage: Stage) -> None:
        """Let the stage's next batch start from a zero state."""
        self._states.pop(stage, None)

    @override
    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Start the texts of an epoch from a zero state, and a resumed rest of an epoch from the checkpoint's."""
        restored, self._restored = self._restored, None
        # Lightning leaves `on_train_epoch_start` out when it resumes from after the last step of an epoch.
        if batch_idx == 0:
            self.start_text("train")
        elif restored is not None:
            self._take_up(restored, batch[0].shape[0])

    def _take_up(self, state: State, batch_size: int) -> None:
        """Go on from the state of all rows over all processes."""
        rows, processes = state[0].shape[1], self.trainer.world_size
        if rows != batch_size * processes:
            rank_zero_warn(
                f"The checkpoint holds the LSTM state of {rows} texts, but now there are {batch_size * processes}"
                f" (batch_size={batch_size} on each of {processes} processes): they start from zero. Resume with as"
                " many in sum to go on exactly."
            )
            return
        own = slice(self.global_rank * batch_size, (self.global_rank + 1) * batch_size)
        self._states["train"] = (state[0][:, own], state[1][:, own])

    @override
    def on_train_epoch_end(self) -> None:
        """Forget the state, so that only checkpoints from within an epoch hold it."""
        # Lightning calls this too where `max_steps` ends an epoch early, and a later run goes on with its rest.
        if self.trainer.is_last_batch:
            self.start_text("train")

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the LSTM's gradients by their common norm, then all of them as the Trainer was told."""
        if self.lstm_gradient_clip is not None:
            nn.utils.clip_grad_norm_(self.lstm.parameters(), self.lstm_gradient_clip)
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    @override
    def text_state(self) -> dict[str, Any]:
        """Within an epoch, the carried state of the rows of all processes, those of process 0 first."""
        if not self.carry_state:
            return {}
        if self.trainer.state.status == TrainerStatus.INTERRUPTED and self.trainer.world_size > 1:
            # Others may not have been hit by the exception, and whoever waited for their state would wait forever.
            rank_zero_warn(
                "The checkpoint on the exception has no LSTM state, which the other processes hold in part: training "
                "that is resumed from it starts from a zero state."
            )
            return {}
        state = self._states.get("train")
        # One process writes the file, and the others read other texts. All call this hook.
        states = gather_over_processes(None if state is None else [part.cpu() for part in state])
        known = [part for part in states if part is not None]
        if len(known) < len(states):
            return {}
        return {"lstm_state": [torch.cat(parts, dim=1) for parts in zip(*known, strict=True)]}

    @override
    def continue_text(self, checkpoint: Mapping[str, Any]) -> None:
        """Keep the carried state of a checkpoint until training starts.

        Raises:
            ValueError: If it does not fit the layers.
        """
        state = checkpoint.get("lstm_state")
        if state is not None:
            self._check_state(state)
        self._restored = None if state is None else (state[0], state[1])

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare the vocabulary with the one that the checkpoint was trained with, and keep the carried state.

        Raises:
            ValueError: If the size or the fingerprint of the vocabulary differs, or the state does not fit the layers.
        """
        self.continue_text(checkpoint)
        super().on_load_checkpoint(checkpoint)

    def _check_state(self, state: Any) -> None:
        layers = self.lstm.num_layers
        widths = (self.lstm.proj_size or self.lstm.hidden_size, self.lstm.hidden_size)
        shapes = [list(part.shape) for part in state if isinstance(part, Tensor)] if isinstance(state, list) else []
        rows = shapes[0][1] if shapes and len(shapes[0]) == 3 else None
        if shapes != [[layers, rows, width] for width in widths]:
            raise ValueError(
                f"The LSTM state of the checkpoint has the shapes {shapes}, but this model's are"
                f" {[[layers, 'batch_size', width] for width in widths]}: the checkpoint is damaged, or of another"
                " model. Resume with the model it was trained with, or from another checkpoint."
            )
