"""Statistics of a model's tables from the training data of a running fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_embcompress.calibration.collector import Collector
from lightning_embcompress.calibration.reading_modules import find_layers
from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.calibration.sums import summed
from lightning_embcompress.callbacks.passes import step_arguments, training_pass, validating
from lightning_embcompress.utils.division import failing_together


def collect_in_training(
    trainer: Trainer,
    module: LightningModule,
    tables: str | Sequence[str],
    token_counts: Any,
    batches: int,
) -> Statistics:
    """Collect statistics by one pass over the first batches of the training data, see `collect_statistics`.

    The loss is that of `training_step`, in evaluation mode and in the precision of the Trainer. Nothing steps and
    nothing is logged; the module, gradients, metrics, random state and generators of the data are afterwards what they
    were. The first batches of the epoch that follows may be the same ones. Data that can be read only once is used up
    by that much: give statistics that were collected before.

    Where `training_step` does not call the head, as with a sampled softmax, the hidden states are those that
    `validation_step` computes for the same batch: it is left at the moment it calls the head. Positions there count as
    targets unless the batch says otherwise, by targets of -100 or a mask; the mean probabilities are missing. A module
    whose tables are all embeddings has as many targets as its batches have samples.

    Of several processes each reads its own part of the data, and all get the statistics of everything.

    Args:
        trainer: The Trainer that is fitting.
        module: Its module, with automatic optimization and the tables in place, dense or compressed.
        tables: `auto`, or the paths of modules, see `find_tables`.
        token_counts: `[vocab_size]` how often every token occurs; None to count the ids that embeddings get in these
            batches.
        batches: Number of batches at most, in each process; one or more.

    Raises:
        ValueError: If there is no batch with finite values, if a table cannot be found or is never called, or if the
            token counts do not fit.
    """
    with failing_together():
        collector = _collect(trainer, module, tables, token_counts, batches)
    return Statistics(**summed(collector))


def _collect(
    trainer: Trainer, module: LightningModule, tables: str | Sequence[str], token_counts: Any, batches: int
) -> Collector:
    validates = is_overridden("validation_step", module)
    collector = Collector(module, find_layers(module, tables), token_counts)
    limit = min(batches, trainer.num_training_batches)
    with collector, training_pass(trainer, module, limit, "Collecting statistics") as read:
        started = False
        for batch, index, _ in read:
            collector.begin(batch)
            with trainer.precision_plugin.train_step_context():
                output = module.training_step(*step_arguments(module.training_step, batch, index))
            loss = output.get("loss") if isinstance(output, Mapping) else output
            if loss is not None and validates and not collector.reached_head:
                with validating(trainer), collector.stopping_at_head(), trainer.precision_plugin.val_step_context():
                    if not started:
                        # A text of its own, where the module carries a state.
                        module.on_validation_start()
                        module.on_validation_epoch_start()
                        started = True
                    module.validation_step(*step_arguments(module.validation_step, batch, index))
            collector.add(loss, None if collector.knows_targets else extract_batch_size(batch))
    return collector
