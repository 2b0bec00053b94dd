"""Perplexity of a pretrained model against stored bits, beside the formats that others use: `docs/figures.md`.

Every table is stored, read back, and put into the dense model, which is measured: what a way to store it loses is told
apart from how it is computed with. Points are kept as soon as they are known; the same command goes on with them.

    python tests/benchmarks/pretrained_figures.py measure MODEL FOLDER STATISTICS
    python tests/benchmarks/pretrained_figures.py table FOLDER
    python tests/benchmarks/pretrained_figures.py plot MODEL FOLDER STATISTICS PICTURE
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bound import gaussian_bound
from carvq import CARVQ
from formats import FORMATS, GRIDS, in_metric, store_as
from jsonargparse import CLI
from torch import Tensor, nn

from lightning_embcompress.calibration.loss_metric import metric_of
from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.cli.sweep import Measured, checksum, sweep
from lightning_embcompress.cli.sweep_record import SWEEP_FILE, Point
from lightning_embcompress.layers.sizes import compressed_tables
from lightning_embcompress.methods.registry import SharedBasisBlocks, TransformCodingConfig
from lightning_embcompress.metrics.perplexity import token_negative_log_likelihood
from lightning_embcompress.tables.finding import find_tables

_DATA = Path(__file__).parents[3] / "shared" / "data"
_BLOCK = 512
# Name of a text, its file, characters of it, and tokens: the first text is of the kind that statistics are of.
_TEXTS = (
    ("WikiText-2", "wikitext-2/valid.txt", 200_000, 16_384),
    ("lm1b", "lm1b/heldout-monolingual.tokenized.shuffled/news.en.heldout-dev", 100_000, 8_192),
)
# What has lost so many nats on the first quarter of a text, or on as many blocks, is not measured on the rest.
_LOST, _FEWEST = 0.7, 4
# Above so many nats only the order of magnitude is told.
_RUINED = 1.0

# Methods and sizes, in the order in which they are measured.
_STAGES: tuple[tuple[Sequence[str], Sequence[float]], ...] = (
    (("transform_coding",), (4.5, 3, 2, 3.5, 2.5, 1.5, 1)),
    (("transform_coding:codes=trellis,effort=12",), (2, 3, 1.5, 1)),
    (("transform_coding:codes=trellis,effort=10", "transform_coding:codes=trellis,effort=8"), (2, 3, 1.5, 1)),
    (("shared_basis", "shared_basis:groups=1,refine_rounds=0"), (4.5, 3, 2, 1)),
    (("tensor_train:max_rank=4", "tensor_train:max_rank=1"), (4.5,)),
    (("product_quantization",), (4.5, 3, 2, 1)),
    (("weighted_low_rank", "low_rank"), (4.5, 3, 2, 1)),
    (
        (
            "group_reduce:groups=20,refine_rounds=0",
            "group_reduce:groups=5,refine_rounds=0",
            "group_reduce:groups=20,refine_rounds=5",
        ),
        (4.5, 3, 2, 1),
    ),
    (("tensor_train_matrix", "tensor_train_matrix:num_cores=2"), (4.5, 3, 2, 1)),
)

# Methods of the plot, their names and colors.
_DRAWN = (
    ("transform_coding", "single codes (lloyd)", "tab:blue"),
    ("transform_coding:codes=trellis,effort=12", "trellis, effort 12", "tab:orange"),
)


@dataclass
class _Text:
    """Blocks of a text, `[blocks, 512]` ids, and the losses of the dense model once they are known."""

    name: str
    blocks: Tensor
    dense: list[float]


def measure(
    model: str,
    folder: Path,
    statistics: Path,
    data: Path = _DATA,
    share: float = 1.0,
    threads: int = 2,
    stages: list[int] | None = None,
    others: bool = True,
) -> None:
    """Measure the dense model, the formats of other programs, and all methods.

    Args:
        model: A directory of a causal language model of transformers with its tokenizer.
        folder: Where the points are kept.
        statistics: What errors cost, of other text of the first kind.
        data: Folder of the texts.
        share: How much of the texts is measured, their first blocks.
        threads: Of torch.
        stages: Which methods to measure, by their numbers in `_STAGES`; all where none are given.
        others: Whether the formats of other programs are measured.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = []
    for name, file, characters, tokens in _TEXTS:
        text = (data / file).read_text(encoding="utf-8")[:characters].replace(" <unk>", " unk")
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0][:tokens]
        assert ids.numel() == tokens, f"{file}: {characters} characters are only {ids.numel()} tokens"
        blocks = ids.view(-1, _BLOCK)
        texts.append(_Text(name, blocks[: max(1, round(share * len(blocks)))], []))
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = Statistics.load(statistics)
    if (folder / SWEEP_FILE).is_file():
        losses = _points(folder)[0].losses
        texts = [_Text(text.name, text.blocks, losses[text.name]) for text in texts]

    def evaluate(smaller: nn.Module) -> Measured:
        (own,) = find_tables(dense)
        with torch.no_grad():
            before = own.weight.clone()
            own.weight.copy_(_table_of(smaller))
        try:
            losses = {text.name: _losses(dense, text) for text in texts}
        finally:
            with torch.no_grad():
                own.weight.copy_(before)
        for text in texts:
            text.dense = text.dense or losses[text.name]
        values = [math.exp(_mean_change(losses[text.name], text.dense) + _mean(text.dense)) for text in texts]
        return Measured(values[0], {text.name: value for text, value in zip(texts, values, strict=True)}, losses)

    def say(point: Point) -> None:
        print(f"{point.method} {point.bits_per_weight} {point.bands} {point.seconds} {point.note}", flush=True)

    common: dict[str, Any] = {
        "ratios": (),
        "token_counts": found.token_counts,
        "data": {text.name: checksum(text.blocks) for text in texts},
        "statistics": lambda: found,
        "on_point": say,
    }
    if others:
        (own,) = find_tables(dense)
        matrix = metric_of(dense, own, found, found.token_counts).matrix
        ours = {f"{kind}, in the metric of the loss": in_metric(kind, matrix) for kind in GRIDS}
        stores = {name: store_as(form) for name, form in {**FORMATS, **ours, **CARVQ}.items()}
        sweep(dense, evaluate, folder, (), bits=(), stores=stores, **common)
    for stage in range(len(_STAGES)) if stages is None else stages:
        methods, sizes = _STAGES[stage]
        sweep(dense, evaluate, folder, methods, bits_per_weight=sizes, bits=(), **common)


def table(folder: Path) -> None:
    """Print all points as a table of Markdown, against the dense model by blocks.

    Args:
        folder: Where the points are.
    """
    points = [point for point in _points(folder) if point.losses]
    dense = points[0]
    print("| stored as | bits per weight | " + " | ".join(dense.losses) + " | nats | predicted |")
    print("|---" * (len(dense.losses) + 4) + "|")
    for point in sorted(points, key=lambda one: (-(one.bits_per_weight or 0), one.perplexity or math.inf)):
        changes = {name: point.change(dense, name) for name in dense.losses}
        cells = [point.method, f"{point.bits_per_weight:.2f}"]
        cells += [_shown(point, dense, name, *change) for name, change in changes.items()]
        change, error = next(iter(changes.values()))
        cells.append("" if point is dense else f"{change:+.4f} ± {error:.4f}" if change < _RUINED else f"{change:+.1f}")
        cells.append("" if point is dense or point.predicted_loss is None else f"{point.predicted_loss:.4f}")
        print(f"| {' | '.join(cells)} |")


def plot(model: str, folder: Path, statistics: Path, picture: Path) -> None:
    """Draw what single codes and a trellis lose, as measured and as predicted, and the least that any code could.

    Args:
        model: The directory that was measured.
        folder: Where the points are.
        statistics: Those of the points.
        picture: File to be written.
    """
    import matplotlib
    from transformers import AutoModelForCausalLM

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = Statistics.load(statistics)
    (own,) = find_tables(dense)
    weight, metric = own.weight.detach(), metric_of(dense, own, found, found.token_counts)
    points = _points(folder)
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    text = _TEXTS[0][0]
    for method, name, color in _DRAWN:
        drawn = sorted((one for one in points if one.method == method), key=lambda one: one.bits_per_weight or 0)
        axes.plot(
            [one.bits_per_weight for one in drawn], [one.predicted_loss for one in drawn], color=color, label=name
        )
        changes = [(one.bits_per_weight, *one.change(points[0], text)) for one in drawn]
        # What is not clearly above zero has no place on a logarithmic axis.
        x, y, error = zip(*(change for change in changes if change[1] > 2 * change[2]), strict=True)
        axes.errorbar(x, y, error, fmt="o", color=color, markersize=4, capsize=3)
    config = TransformCodingConfig()
    solved = SharedBasisBlocks.decompose(weight, int(weight.numel() * 2 / 8), found.token_counts, config, metric=metric)
    sizes = sorted(one.bits_per_weight or 0 for one in points if one.method == _DRAWN[0][0])
    bound = gaussian_bound(weight, metric, solved, sizes)
    for size, nats in zip(sizes, bound, strict=True):
        print(f"{size:.2f} {nats:.4f}")
    axes.plot(sizes, bound, "k--", label="rate-distortion bound")
    axes.set(yscale="log", xlabel="bits per weight, all that is stored", ylabel="loss above dense, nats per token")
    axes.set_title(f"Predicted (lines), measured on {text} (points)", fontsize=10)
    axes.grid(which="both", alpha=0.2)
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=120)


def _shown(point: Point, dense: Point, text: str, change: float, error: float) -> str:
    """Perplexity on a text, and how much that is above the dense one; a star where only its beginning was measured."""
    few = "" if len(point.losses[text]) == len(dense.losses[text]) else "*"
    value = math.exp(_mean(dense.losses[text]) + change)
    if point is dense:
        return f"{value:,.2f}"
    if change > _RUINED:
        return f"{float(f'{value:.2g}'):,.0f}{few}"
    sure = "" if math.isnan(error) else f" ± {100 * error:.1f}"
    return f"{value:,.2f}{few} ({100 * math.expm1(change):+,.1f}{sure} %)"


def _points(folder: Path) -> list[Point]:
    """All points, the dense one first."""
    entries = json.loads((folder / SWEEP_FILE).read_text(encoding="utf-8"))["points"]
    return sorted((Point(**entry) for entry in entries.values()), key=lambda point: point.order)


def _table_of(model: nn.Module) -> Tensor:
    """The table of a model as it is stored, dense."""
    for _, factors in compressed_tables(model):
        return factors.materialize()
    (found,) = find_tables(model)
    return found.weight.detach()


@torch.inference_mode()
def _losses(model: Any, text: _Text) -> list[float]:
    """Mean loss of the blocks of a text; of the first quarter alone where it is far above the dense one."""
    found: list[float] = []
    for block in text.blocks:
        quarter = max(_FEWEST, len(text.blocks) // 4)
        if len(found) == quarter and text.dense and _mean_change(found, text.dense) > _LOST:
            break
        logits = model(input_ids=block[None], use_cache=False).logits[0, :-1]
        found.append(float(token_negative_log_likelihood(logits, block[1:]).double().mean()))
    return found


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _mean_change(losses: Sequence[float], dense: Sequence[float]) -> float:
    """Mean difference over the blocks that were measured."""
    return _mean([mine - base for mine, base in zip(losses, dense, strict=False)])


if __name__ == "__main__":
    CLI([measure, table, plot])
