"""What the data says of a model's tables: token counts, and second moments of what goes through them.

To second order, a change `δ_i` of the rows of a table changes the mean loss by `½ Σ_i q_i δ_iᵀ M δ_i`, where `q_i` is
how often token `i` occurs and `M = E[g gᵀ]` for an embedding (`g` the gradient of the summed loss at the embedding's
output: the empirical Fisher information), `M = E[h hᵀ]` for a softmax head (`h` the hidden state that it reads). These
moments take `O(d²)` of memory a table, whatever the data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.seed import isolate_rng
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_embcompress.calibration.collector import Collector
from lightning_embcompress.calibration.reading_modules import find_layers
from lightning_embcompress.calibration.rows import as_batch
from lightning_embcompress.calibration.settling import Settling
from lightning_embcompress.calibration.sums import summed
from lightning_embcompress.calibration.words import padding_ids
from lightning_embcompress.metrics.perplexity import IGNORE_INDEX
from lightning_embcompress.tables.finding import Table
from lightning_embcompress.utils.division import failing_together
from lightning_embcompress.utils.files import explaining_failure, replacing
from lightning_embcompress.utils.progress import progress_bar

LossFunction: TypeAlias = Callable[[Any, Any], Any]
"""Called with the model and a batch; gives the mean loss over targets, or `(mean loss, number of targets)`."""

_FORMAT = "lightning-embcompress statistics"
_VERSION = 1
_MOMENTS = ("hidden", "hidden_mean", "probabilities", "squared_probabilities", "gradients", "gradient_energies")
_KINDS = (*_MOMENTS, "table_counts")
# `[vocab_size]`, and not square.
_OF_TOKENS = ("probabilities", "squared_probabilities", "gradient_energies")


@dataclass(frozen=True, eq=False)
class Statistics:
    """Token counts, and moments of the hidden states and gradients at a model's tables; everything on the CPU.

    Means are over targets: positions where the model predicts and the loss counts. Several modules may read one table;
    each has moments of its own, and modules that were never called have none.

    Attributes:
        token_counts: `[vocab_size]` int64, how often every token occurs; float64 if counts were given that are not
            whole numbers.
        hidden: Path of a head to `E[h hᵀ]`, `[d, d]` float64, `h` the hidden state that the head reads at a target.
            Where a causal language model of transformers scales what the head gives, times the square of that factor.
        hidden_mean: Path of a head to `E[h]`, `[d]` float64.
        probabilities: Path of a head to the mean predicted probability of every token, `[vocab_size]` float64. Missing
            for heads whose logits were never computed, as in training with a sampled softmax.
        gradients: Path of an embedding to `E[g gᵀ]`, `[d, d]` float64: the sum of `g gᵀ` over all positions, divided by
            the number of targets. `g` is the gradient of the summed loss with respect to the row that was read at a
            position: at the embedding's output, times the scale of embeddings that have one.
        num_targets: Over how many targets the means are.
        skipped_batches: Batches that were left out because of a NaN or infinite loss, gradient or hidden state.
        gradient_energies: Path of an embedding to `[vocab_size]` float64: the part of the trace of `E[g gᵀ]` that comes
            from the positions of each token.
        squared_probabilities: Path of a head to the mean square of the predicted probability of every token,
            `[vocab_size]` float64; missing as `probabilities` is.
        table_counts: Path of a module to the token counts of its table, where that has another vocabulary than the
            first table has; empty for a model of one vocabulary.
    """

    token_counts: Tensor
    hidden: dict[str, Tensor] = field(default_factory=dict)
    hidden_mean: dict[str, Tensor] = field(default_factory=dict)
    probabilities: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    num_targets: int = 0
    skipped_batches: int = 0
    gradient_energies: dict[str, Tensor] = field(default_factory=dict)
    squared_probabilities: dict[str, Tensor] = field(default_factory=dict)
    table_counts: dict[str, Tensor] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the first vocabulary."""
        return len(self.token_counts)

    def counts_of(self, modules: Sequence[str]) -> Tensor:
        """Token counts of the table that modules read, by their paths."""
        return next((self.table_counts[path] for path in modules if path in self.table_counts), self.token_counts)

    def check(self, tables: Sequence[Table]) -> None:
        """Refuse tables of another model or vocabulary than the one that was looked at.

        Args:
            tables: What the statistics are to be used for.

        Raises:
            ValueError: Naming the table, the shapes and what to do.

        Example:
            >>> model = nn.Sequential(nn.Embedding(10, 4))
            >>> statistics = Statistics(torch.ones(10), gradients={"0": torch.eye(4, dtype=torch.float64)})
            >>> from lightning_embcompress.tables.finding import find_tables
            >>> statistics.check(find_tables(model))
        """
        remedy = "they are of another model or vocabulary: collect them from this model with collect_statistics"
        for table in tables:
            vocab_size, dim = table.shape
            counted = len(self.counts_of(table.modules))
            if vocab_size != counted:
                raise ValueError(
                    f"the statistics count {counted} tokens, but table {table.name!r} {table.shape} has "
                    f"{vocab_size} rows: {remedy}"
                )
            moments = [
                (kind, path, moment)
                for kind in ("hidden", "gradients")
                for path, moment in getattr(self, kind).items()
                if path in table.modules
            ]
            if not moments:
                known = ", ".join(map(repr, dict.fromkeys([*self.gradients, *self.hidden]))) or "none"
                raise ValueError(
                    f"the statistics have no moments of table {table.name!r} {table.shape}, only of {known}: {remedy}, "
                    f"or name the module, as in tables=[{table.name!r}]"
                )
            for kind, path, moment in moments:
                if moment.shape != (dim, dim):
                    raise ValueError(
                        f"the statistics of table {table.name!r} {table.shape} must be {dim} x {dim} moments, "
                        f"but {kind}[{path!r}] has the shape {tuple(moment.shape)}: {remedy}"
                    )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save to one safetensors file, in one step: a file that was there stays whole until the new one is.

        Args:
            path: The file; its folder must exist.

        Raises:
            OSError: If it cannot be written.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     Statistics(torch.tensor([3, 0])).save(f"{folder}/statistics.safetensors")
            ...     Statistics.load(f"{folder}/statistics.safetensors").token_counts
            tensor([3, 0])
        """
        tensors = {"token_counts": self.token_counts}
        for kind in _KINDS:
            tensors |= {f"{kind}/{name}": tensor for name, tensor in getattr(self, kind).items()}
        wide = {
            name: tensor.double() if tensor.is_floating_point() else tensor.long() for name, tensor in tensors.items()
        }
        # Copies: the format knows no memory that is shared.
        tensors = {name: tensor.cpu().clone().contiguous() for name, tensor in wide.items()}
        record = {"version": _VERSION, "num_targets": self.num_targets, "skipped_batches": self.skipped_batches}
        with explaining_failure(path), replacing(path) as temporary:
            save_file(tensors, temporary, {_FORMAT: json.dumps(record)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Load what `save` wrote.

        Args:
            path: The file.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is damaged, or holds something else.
        """
        name = str(path)
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {name!r} with statistics: collect them with collect_statistics")
        try:
            with safe_open(name, framework="pt") as opened:
                metadata = opened.metadata() or {}
                if _FORMAT not in metadata:
                    raise ValueError("it holds something else")
                record = json.loads(metadata[_FORMAT])
                if record["version"] != _VERSION:
                    raise ValueError(
                        f"its version is {record['version']!r}, this version of the package reads {_VERSION}"
                    )
                # Of their own, not mapped: the file may be written anew.
                tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118
            return _from_tensors(tensors, record)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
            raise ValueError(
                f"{name!r} cannot be read as statistics: {what}. Collect them again with collect_statistics, and save "
                "them with Statistics.save"
            ) from error


@torch.inference_mode(False)
def collect_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction | None = None,
    *,
    token_counts: Any = None,
    tables: str | Sequence[str] = "auto",
    limit: int | None = None,
    tolerance: float | None = None,
    description: str = "Collecting statistics",
) -> Statistics:
    """Collect the statistics of a model's tables by one forward and backward pass over some batches of data.

    Token counts are better those of all the training data; moments need fewer tokens, 30 to 100 times the dimension of
    the tables: by `tolerance` the pass ends once it has seen enough. The logits of causal language models of
    transformers are computed a few positions at a time, if there is no loss_fn. The model is in evaluation mode
    meanwhile, and as it was before afterwards: no parameter and no gradient of one is touched, nor is the global random
    state. Compressed tables are looked at by their modules, as dense ones are.

    Where `torch.distributed` is in use all processes have to call this, each with its own part of the data; all get the
    statistics of everything.

    Args:
        model: Any module that calls its tables as modules.
        batches: Batches of the data, such as a DataLoader, or without loss_fn the rows of a `datasets.Dataset` of token
            ids. They are moved to the model's device.
        loss_fn: Called with the model and a batch, gives the mean loss over the batch's targets, or
            `(mean loss, number of targets)`. Without a number, positions of the heads are targets where the gradient at
            the logits is not zero. None for a model of transformers, called as `model(**batch)`; the labels are the
            `input_ids`, without padding, if the batch has none.
        token_counts: `[vocab_size]` how often every token occurs, of several vocabularies by the paths of tables; None
            to count the ids that embeddings get, without padding, see `WordMasks`.
        tables: `auto`, or the paths of one or more modules, see `find_tables`.
        limit: Number of batches at most; None for all.
        tolerance: End before the last batch once the moments have settled: once a table that is compressed by them is
            expected to lose only this part more than by those of endless text, such as 0.1, as halves of the text
            differ (see `expected_excess`). Batches must come in no order then. How far it is from that is logged. None
            for all batches.
        description: What the progress bar says.

    Raises:
        ValueError: If limit or tolerance is not positive; if there is no batch, or none with finite values; if the
            tables cannot be found, or one of them is
            never called; if the token counts do not fit them.

    Example:
        >>> model = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 100))
        >>> def loss_fn(model, batch):
        ...     return nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        >>> statistics = collect_statistics(model, torch.randint(100, (3, 4, 6)), loss_fn)
        >>> statistics.num_targets, statistics.hidden["1"].shape, statistics.gradients["0"].shape
        (60, torch.Size([8, 8]), torch.Size([8, 8]))
    """
    with failing_together():
        if isinstance(model, DistributedDataParallel):
            raise ValueError(
                "the model is wrapped in DistributedDataParallel, which would wait for gradients that nobody computes: "
                "pass model.module; the statistics are summed over all processes all the same"
            )
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1 batch, it is {limit}")
        if tolerance is not None and not tolerance > 0:
            raise ValueError(f"tolerance must be positive, a part of the loss such as 0.1, it is {tolerance}")
        collector = Collector(model, find_layers(model, tables), token_counts, in_halves=tolerance is not None)
        settling = None if tolerance is None else Settling(collector, tolerance)
        sizes = [size for size in (limit, len(batches) if isinstance(batches, Sized) else None) if size is not None]
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        with (
            isolate_rng(),
            collector,
            progress_bar(description, total=min(sizes, default=None), unit="batches") as advance,
        ):
            for batch in islice(batches, limit):
                batch = move_data_to_device(batch if loss_fn else as_batch(batch, model.forward), device)
                collector.begin(batch)
                if loss_fn is not None:
                    result = loss_fn(model, batch)
                    loss, num_targets = result if isinstance(result, tuple | list) else (result, None)
                    collector.add(loss, None if num_targets is None else int(num_targets))
                elif collector.add_causal(arguments := _with_labels(model, batch)) is None:
                    collector.add(_loss_of_output(model, arguments))
                advance(1)
                if settling is not None and settling.is_settled():
                    break
    if settling is not None:
        settling.say()
    return Statistics(**summed(collector))


_REMEDY = "give loss_fn, which is called as loss_fn(model, batch) and gives the mean loss over the targets"


def _with_labels(model: nn.Module, batch: Any) -> dict[str, Any]:
    """Arguments of a model of transformers, by which it computes a loss."""
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"without loss_fn the model is called as model(**batch), but a batch is a {type(batch).__name__} and no "
            f"mapping: {_REMEDY}"
        )
    arguments = dict(batch)
    if "labels" not in arguments and "input_ids" in arguments:
        labels = arguments["input_ids"]
        mask = arguments.get("attention_mask")
        if mask is None or mask.shape != labels.shape:
            mask = torch.ones_like(labels)
            for token in padding_ids(getattr(model, "config", None)):
                mask = mask.where(labels != token, 0)
        arguments["labels"] = labels.where(mask != 0, IGNORE_INDEX)
    return arguments


def _loss_of_output(model: nn.Module, arguments: Mapping[str, Any]) -> Any:
    """The loss that a model of transformers computes by itself."""
    output = model(**arguments)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ValueError(f"{type(model).__name__} gives a {type(output).__name__} without a loss: {_REMEDY}")
    return loss


def _are_counts(tensor: Tensor) -> bool:
    return tensor.dim() == 1 and tensor.dtype in (torch.int64, torch.float64) and bool((tensor >= 0).all())


def _from_tensors(tensors: dict[str, Tensor], record: dict[str, Any]) -> Statistics:
    counts = tensors.pop("token_counts")
    if not _are_counts(counts):
        raise ValueError("token_counts are no counts")
    found: dict[str, dict[str, Tensor]] = {kind: {} for kind in _KINDS}
    for key, tensor in tensors.items():
        kind, slash, path = key.partition("/")
        if not slash or kind not in found:
            raise ValueError(f"{key!r} is unknown")
        if kind == "table_counts":
            fits = _are_counts(tensor)
        elif kind in _OF_TOKENS:
            fits = tensor.shape == tensors.get(f"table_counts/{path}", counts).shape
        elif kind == "hidden_mean":
            fits = tensor.shape == tensors[f"hidden/{path}"].shape[:1]
        else:
            fits = tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1]
        if not fits or (tensor.dtype != torch.float64 and kind in _MOMENTS) or not torch.isfinite(tensor).all():
            raise ValueError(f"{key!r} is damaged")
        found[kind][path] = tensor
    for name in ("num_targets", "skipped_batches"):
        if type(record[name]) is not int or record[name] < 0:
            raise ValueError(f"{name} is {record[name]!r}")
    return Statistics(counts, **found, num_targets=record["num_targets"], skipped_batches=record["skipped_batches"])
