"""Finding the tables of a model, and checking that they may be replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from lightning_embcompress.layers.bags import AnyEmbedding
from lightning_embcompress.layers.compressed import CompressedLayer
from lightning_embcompress.layers.scaled_embeddings import scale_of
from lightning_embcompress.methods.numerics.gram import row_chunks
from lightning_embcompress.methods.registry import nearest
from lightning_embcompress.tables.attachments import check_attachments, kept_tensors
from lightning_embcompress.tables.automatic import choose_tables, large_beside
from lightning_embcompress.tables.transformers_models import ends_of_texts, reads_numbers
from lightning_embcompress.utils.tensor_files import Rows


@dataclass(frozen=True)
class Table:
    """One weight matrix with a row per token, and every module that reads it.

    Attributes:
        modules: Paths of the modules in the order of `model.named_modules()`; several if they are tied.
        weight: What they share, `[vocab_size, dim]`.
        padding: Ids that one of them has as `padding_idx`.
    """

    modules: tuple[str, ...]
    weight: Tensor
    padding: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Path of the first module: how the table is called in plans, reports and messages."""
        return self.modules[0]

    @property
    def shape(self) -> tuple[int, int]:
        """`(vocab_size, dim)`."""
        return self.weight.shape[0], self.weight.shape[1]

    @cached_property
    def padding_rows(self) -> Tensor | None:
        """`[n, dim]` rows of the padding; None where they are zero, as most are."""
        rows = self.weight.detach()[list(self.padding)]
        return rows if not rows.is_meta and bool(rows.any()) else None


def find_tables(model: nn.Module, tables: str | Sequence[str] = "auto") -> list[Table]:
    """Find the tables of a model.

    `auto` takes the tables of tokens, and the rules are few:

    1. Of a model of transformers it takes what `get_input_embeddings` and `get_output_embeddings` name, of the model
       and of all models within it (where that is no softmax, the projection of as many rows), and other embeddings
       that share their weight with a projection; and second tables that are known, `embed_tokens_per_layer` (Gemma 3n
       and 4) and `entity_embeddings` (LUKE). Nothing else: not positions, a pooler or an MLP.
    2. Of other modules it takes embeddings (`nn.Embedding`, `nn.EmbeddingBag`) together with the projection that is
       tied to them or has as many rows, up to a tenth of padding. What another layer reads is hidden, no softmax.
    3. It takes an embedding without such a softmax if it has more rows than all that have one, and its name does not
       say that it holds positions.
    4. A vocabulary with less than a tenth of the weights of the largest table is small, and left.
    5. Without a softmax by these rules it takes the projection that has more rows and weights than all other layers;
       without embeddings either, only if all other projections are small beside it.

    Where two softmaxes of one vocabulary, two models side by side or several projections leave no answer, none is made
    up: name the modules.

    Args:
        model: Any module.
        tables: `"auto"`, or the path of one or more modules (`["encoder", "decoder"]`); modules tied to a named one
            come with it.

    Returns:
        The tables in the order of `model.named_modules()`.

    Raises:
        ValueError: If nothing is found, if it is not clear which candidates are meant, or if a module cannot be
            replaced.

    Example:
        >>> model = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 8), nn.Linear(8, 100))
        >>> [table.name for table in find_tables(model)]
        ['0', '2']
    """
    named = all_modules(model)
    if tables == "auto":
        found = [_table_of(named, path, weight) for path, weight in choose_tables(named)]
    else:
        found = _named(named, [tables] if isinstance(tables, str) else tables)
    for table in found:
        _check_table(table, named)
    return [replace(table, padding=_padding(table, named, model)) for table in found]


def large_and_dense(model: nn.Module, tables: Sequence[Table]) -> str:
    """Say what is large beside the tables that are compressed, and stays dense.

    Args:
        model: The model, before anything is replaced.
        tables: What is compressed.

    Returns:
        One line that says how it is named; nothing if nothing is large.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9000, 8), nn.Embedding(2000, 8), nn.Linear(8, 9000))
        >>> large_and_dense(model, find_tables(model))
        "Stays dense: '1' (2000, 8). To compress it too, name it: tables=['0', '2', '1']"
    """
    left = large_beside(all_modules(model), [table.weight for table in tables])
    if not left:
        return ""
    listed = ", ".join(f"{path!r} {shape}" for path, shape in left.items())
    it = "it" if len(left) == 1 else "them"
    names = [*(table.name for table in tables), *left]
    return f"Stays dense: {listed}. To compress {it} too, name {it}: tables={names}"


def all_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by its path; one that is registered twice has two paths, and must be replaced in both."""
    return dict(model.named_modules(remove_duplicate=False))


def check_finite(table: Table) -> None:
    """Refuse a table that holds NaN or infinite values, or none at all.

    Raises:
        ValueError: Naming the first such rows.
    """
    if table.weight.is_meta:
        raise ValueError(
            f"table {table.name!r} is on the meta device and has no values to compress: build it, or load its weights, "
            "on a real device before"
        )
    check_rows_finite(table.name, table.weight.detach())


def check_rows_finite(name: str, weight: Rows) -> None:
    """Refuse a table that holds NaN or infinite values.

    Raises:
        ValueError: Naming the first such rows.
    """
    rows: list[int] = []
    for chunk in row_chunks(*weight.shape):
        is_finite = torch.isfinite(weight[chunk]).all(dim=1)
        if not bool(is_finite.all()):
            rows += (chunk.start + (~is_finite).nonzero().squeeze(1)).tolist()
    if rows:
        shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        raise ValueError(
            f"table {name!r} has NaN or infinite values in {len(rows)} of its {weight.shape[0]} rows "
            f"(rows {shown}); the training diverged or the checkpoint is damaged: nothing was compressed"
        )


def _table_of(named: dict[str, nn.Module], path: str, weight: Tensor) -> Table:
    # A parametrized weight is another tensor at every access, and found nowhere: it is refused later by its module.
    paths = tuple(path for path, module in named.items() if getattr(module, "weight", None) is weight)
    return Table(paths or (path,), weight)


def _padding(table: Table, named: Mapping[str, nn.Module], model: nn.Module) -> tuple[int, ...]:
    found = (getattr(named[path], "padding_idx", None) for path in table.modules)
    ids = {one for one in found if one is not None}
    if any(isinstance(named[path], nn.Linear) for path in table.modules):
        # A model that pads with its end token predicts it too: then the softmax trains the row.
        ids -= ends_of_texts(model)
    return tuple(sorted(ids))


def _named(named: dict[str, nn.Module], paths: Sequence[str]) -> list[Table]:
    weights: dict[int, tuple[str, Tensor]] = {}
    for path in paths:
        if path not in named:
            candidates = [p for p, module in named.items() if isinstance(module, AnyEmbedding | nn.Linear)]
            raise ValueError(
                f"the model has no module {path!r}{nearest(path, named)}; candidates are "
                f"{', '.join(map(repr, candidates)) or 'none'}"
            )
        module = named[path]
        if isinstance(module, CompressedLayer):
            raise ValueError(f"module {path!r} is compressed already; restore it with densify(model) first")
        if not isinstance(module, AnyEmbedding | nn.Linear):
            remedy = "only nn.Embedding, nn.EmbeddingBag and nn.Linear can be compressed"
            if "_orig_mod" in module._modules:
                remedy = _remedy_of_wrapped(path)
            raise ValueError(f"module {path!r} is a {type(module).__name__}: {remedy}")
        weight = module.weight
        weights[id(weight)] = (path, weight)
    tables = [_table_of(named, path, weight) for path, weight in weights.values()]
    if not tables:
        raise ValueError("tables is an empty list: name at least one module, or use 'auto'")
    order = list(named)
    return sorted(tables, key=lambda table: order.index(table.name))


def _remedy_of_wrapped(path: str) -> str:
    """What to do about `model.layer = torch.compile(model.layer)`, which calls the layer whatever takes its place."""
    return (
        "only the layer that torch.compile has wrapped can be replaced; pass the model without the wrapper, and call "
        f"module.{path}.compile() after compression"
    )


def _check_table(table: Table, named: dict[str, nn.Module]) -> None:
    if type(table.weight) not in (Tensor, nn.Parameter):
        raise ValueError(
            f"table {table.name!r} is stored as a {type(table.weight).__module__}.{type(table.weight).__qualname__}: "
            "only plain tensors can be solved; compress the model first, and let the other library quantize or shard "
            "the layers beside the tables afterwards"
        )
    # Float8 has neither products nor sums.
    if not table.weight.is_floating_point() or table.weight.dtype.itemsize < 2:
        raise ValueError(
            f"table {table.name!r} holds {table.weight.dtype}: only floating-point numbers of 16 bits or more can be "
            f"solved; cast it before, as in model.get_submodule({table.name!r}).to(torch.bfloat16)"
        )
    for path, module in named.items():
        kept = (*module._parameters.items(), *kept_tensors(module))
        own = [name for name, tensor in kept if tensor is table.weight]
        if own and (path not in table.modules or not (path or isinstance(module, AnyEmbedding | nn.Linear))):
            raise ValueError(
                f"parameter {f'{path}.{own[0]}'.lstrip('.')!r} of the {type(module).__name__} is table {table.name!r} "
                f"by another name, and would stay as it is: remove it, and let what reads it read {table.name!r}"
            )
        if path not in table.modules:
            continue
        where = f"module {path!r} of table {table.name!r}"
        if not path:
            raise ValueError(
                f"the model is itself an {type(module).__name__}, which cannot be replaced in place: put it into a "
                "module, as in nn.Sequential(layer)"
            )
        # A subclass may do more with its weight than its base class does (scale it, for one): replacing it blindly
        # would drop that.
        scaled = isinstance(module, nn.Embedding) and scale_of(module) is not None
        if type(module) not in (nn.Embedding, nn.EmbeddingBag, nn.Linear) and not scaled:
            remedy = (
                "only plain nn.Embedding, nn.EmbeddingBag and nn.Linear, and scaled embeddings of transformers that "
                "are known, can be replaced; name other modules in tables=[...]"
            )
            if "_orig_mod" in module._modules:
                remedy = _remedy_of_wrapped(path)
            raise ValueError(f"{where} is a {type(module).__module__}.{type(module).__qualname__}: {remedy}")
        if isinstance(module, AnyEmbedding) and module.scale_grad_by_freq:
            raise ValueError(
                f"{where} has scale_grad_by_freq=True: gradients of rows are divided by how often a batch has them, "
                "and factors that many rows share have no such gradient; set it to False before compressing"
            )
        parent = named[path.rpartition(".")[0]]
        if reads_numbers(parent):
            raise ValueError(
                f"{where} is read by a {type(parent).__name__}, which joins the numbers of its weight with others: a "
                "compressed table has none, so this one has to stay dense; name other modules in tables=[...]"
            )
        check_attachments(where, module)
        if "weight" not in module._parameters:
            raise ValueError(f"{where} has a weight that is no parameter: make it one (nn.Parameter) before")
    _check_norms(table, named)


def _check_norms(table: Table, named: Mapping[str, nn.Module]) -> None:
    """Refuse a limit of norms, by which looking rows up changes them, where others read them too."""
    limits = {path: (getattr(named[path], "max_norm", None), named[path]) for path in table.modules}
    norms = {path: None if limit is None else (limit, module.norm_type) for path, (limit, module) in limits.items()}
    if len(set(norms.values())) > 1:
        limited = next(path for path, norm in norms.items() if norm is not None)
        other = next(path for path, norm in norms.items() if norm != norms[limited])
        raise ValueError(
            f"module {limited!r} of table {table.name!r} has max_norm={named[limited].max_norm}, by which it changes "
            f"the rows that {other!r} reads too; factors cannot be changed by reading them: set max_norm to None, or "
            "give them tables of their own"
        )
