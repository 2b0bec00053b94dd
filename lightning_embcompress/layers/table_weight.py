"""The weight of a compressed layer: a tensor without numbers, which answers as the table does where it can.

Code that was written for dense layers reads `head.weight.dtype`, ties by `F.linear(hidden, embedding.weight)` and
multiplies with `embedding.weight.T`. A `TableWeight` has the shape, dtype and device of the table, and hands what only
reads rows or multiplies with all of them to the factorization, whose factors get the gradients. Whatever else needs
the numbers of the table is refused by a `TypeError`.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from lightning_embcompress.layers.pooling import bag_ids, pool
from lightning_embcompress.layers.table_view import TableView
from lightning_embcompress.methods.registry import Factorization


class _Answers:
    """What stands for a table gives where it is asked by its methods, or by functions of torch."""

    view_of: TableView

    @property
    def factorization(self) -> Factorization[Any]:
        """What the table is stored as."""
        return self.view_of.table

    def __repr__(self, **_: Any) -> str:
        """Shape, and how it is stored."""
        view = self.view_of
        return f"TableWeight({list(view.shape)}, dtype={view.read_dtype}, stored as {type(view.table).__name__})"

    def __format__(self, _: str) -> str:
        return repr(self)

    @property
    def T(self) -> Any:
        """The transposed table."""
        return _seen(self, transposed=not self.view_of.transposed)

    mT = T

    def t(self) -> Any:
        """The transposed table."""
        return self.T

    def transpose(self, dim0: int, dim1: int) -> Any:
        """The table, or the transposed one."""
        return self.T if (dim0 - dim1) % 2 == 1 else self

    swapaxes = swapdims = transpose

    def permute(self, *dims: Any) -> Any:
        """The table, or the transposed one."""
        return self.transpose(0, (dims if len(dims) == 2 else dims[0])[0])

    def contiguous(self, **_: Any) -> Any:
        """The same: there is no memory that it could be laid out in."""
        return self

    @property
    def data(self) -> Any:
        """The table without a gradient to its factors."""
        return _seen(self, detached=True)

    @data.setter
    def data(self, value: Any) -> None:
        _refused("data", (self,), {})

    def detach(self) -> Any:
        """The table without a gradient to its factors."""
        return self.data

    def to(self, *args: Any, copy: bool = False, **given: Any) -> Any:
        """The table read in another dtype, or with results on another device."""
        (like,) = [one for one in (*args, given.get("other")) if isinstance(one, Tensor)] or (None,)
        device: Any
        dtype: Any
        if like is not None:
            device, dtype = like.device, like.dtype
        else:
            device, dtype, _, _ = torch._C._nn._parse_to(*args, **given)
        # A copy has numbers of its own; integers are no table.
        if copy or (dtype is not None and not dtype.is_floating_point):
            return _refused("to", (self,), {})
        # `cuda` is another name of the current one.
        device = None if device is None else torch.empty(0, device=device).device
        changes = {"dtype": dtype} if dtype not in (None, self.view_of.read_dtype) else {}
        if device not in (None, self.view_of.read_device):
            changes["device"] = device
        return _seen(self, **changes) if changes else self

    type_as = to

    def float(self) -> Any:
        """The table read in float32."""
        return self.to(torch.float32)

    def double(self) -> Any:
        """The table read in float64."""
        return self.to(torch.float64)

    def half(self) -> Any:
        """The table read in float16."""
        return self.to(torch.float16)

    def bfloat16(self) -> Any:
        """The table read in bfloat16."""
        return self.to(torch.bfloat16)

    def cpu(self) -> Any:
        """The table with results on the CPU."""
        return self.to("cpu")

    def type(self, dtype: Any = None, non_blocking: bool = False) -> Any:
        """The table read in another dtype; without one, what torch calls it where it refuses to take it."""
        return "TableWeight of a compressed layer" if dtype is None else self.to(dtype)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Let the factors train, or not."""
        if self.view_of.is_plain:
            self.factorization.requires_grad_(requires_grad)
        elif requires_grad:
            _refused("requires_grad_", (self,), {})
        return self

    @property
    def requires_grad(self) -> bool:
        """Whether factors train."""
        return self.view_of.trains

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    @property
    def grad(self) -> None:
        """None: gradients are those of the factors."""
        return None

    @grad.setter
    def grad(self, value: Any) -> None:
        if value is not None:
            _refused("grad", (self,), {})

    def data_ptr(self) -> int:
        """A number that weights of tied layers have in common, as others find ties; no address of numbers."""
        return id(self.factorization)

    @property
    def grad_fn(self) -> None:
        """None."""
        return None

    @property
    def is_leaf(self) -> bool:
        """False: it is computed from the factors, and optimizers refuse what is no leaf."""
        return False

    @property
    def retains_grad(self) -> Any:
        """What optimizers ask for then."""
        return _refused("an optimizer", (self,), {})

    def __getitem__(self, index: Any) -> Any:
        found = self.view_of.item(index)
        return _refused("indexing", (self,), {}) if found is None else found

    def index_select(self, dim: int, index: Tensor) -> Any:
        """Rows of the table."""
        return self[index] if dim in (0, -2) else _refused("index_select", (self,), {})

    def matmul(self, other: Any) -> Any:
        """The product with the table."""
        return _matmul(self, other)

    mm = mv = __matmul__ = matmul

    def __rmatmul__(self, other: Any) -> Any:
        # By a function of torch, so that modes see it as they see that of a dense weight.
        return torch.matmul(other, self) if isinstance(self, Tensor) else _matmul(other, self)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer a function of torch, or say why not."""
        given = dict(kwargs or {})
        answer = _FUNCTIONS.get(func)
        if answer is not None:
            result = answer(*args, **given)
            return _refused(_name(func), args, given) if result is NotImplemented else result
        if func in _LIKE:
            given["device"] = given.get("device") or args[0].view_of.read_device
            return func(_on_meta(args[0]), *args[1:], **given)
        if func in _METADATA or getattr(func, "__name__", "") == "__get__":
            # What would read numbers ends in `__torch_dispatch__`.
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **given)
        return _refused(_name(func), args, given)


class TableWeight(_Answers, Tensor):  # type: ignore[misc,override]
    """What stands for the table of a compressed layer where others read its `weight`.

    Its numbers are nowhere, so that it is in no `parameters()`, state dict or optimizer. It gives

    - its shape, dtype, device and whether it trains, which `requires_grad_` decides for the factors;
    - logits for `F.linear(hidden, weight, bias)`, `hidden @ weight.T`, `torch.einsum("bsd,vd->bsv", hidden, weight)`;
    - rows for `F.embedding(ids, weight)`, `weight[ids]`, `weight.index_select(0, ids)`, and bags of them for
      `F.embedding_bag(ids, weight)`;
    - mixtures of all rows for `probabilities @ weight`;
    - itself read otherwise for `.T`, `.detach()`, `.data`, `.to(dtype or device)`;
    - dense tensors like it for `torch.zeros_like(weight)` and `weight.new_zeros(...)`.

    Everything else raises a `TypeError`. Of a table on the meta device, changes in place do nothing, as there.

    Args:
        view: How the table is read.

    Example:
        >>> from lightning_embcompress.layers.compressed import CompressedEmbedding
        >>> from lightning_embcompress.methods.registry import LowRank
        >>> embedding = CompressedEmbedding(LowRank.decompose(torch.randn(100, 16), 4000))
        >>> hidden = embedding(torch.tensor([1, 2]))
        >>> F.linear(hidden, embedding.weight).shape, (hidden @ embedding.weight.T).shape
        (torch.Size([2, 100]), torch.Size([2, 100]))
        >>> embedding.weight.sum()  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        TypeError: sum cannot read or change the weight of a compressed layer...
    """

    # What transformers asks before it initializes a weight.
    _is_hf_initialized = True
    made_for: tuple[torch.dtype, torch.device]
    """What it says its dtype and device are."""

    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __new__(cls, view: TableView) -> Self:
        """Make one, without storage."""
        # One that was made in inference mode could not be saved for a backward pass later.
        with torch.inference_mode(False), torch._C.DisableTorchFunctionSubclass():
            made: Any = torch.Tensor._make_wrapper_subclass(
                cls, view.shape, dtype=view.read_dtype, device=view.read_device, requires_grad=not view.detached
            )
            if not view.detached:
                # Whoever computes gradients by himself, as fused losses do, would return that of a whole table.
                # `register_hook` asks whether factors train, which may change.
                made._backward_hooks = OrderedDict({0: _refuse_gradient})
        made.view_of, made.made_for = view, (view.read_dtype, view.read_device)
        return cast(Self, made)

    def __deepcopy__(self, memo: dict[int, Any]) -> TableWeight:
        """The weight of a copy of the factorization."""
        copied: TableWeight = TableWeight(copy.deepcopy(self.view_of, memo))
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """How the table is read."""
        return TableWeight, (self.view_of,)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Refuse what goes around `__torch_function__`."""
        return _refused(_name(func), args, kwargs or {})


class _TracedWeight(_Answers):
    """The same while `torch.compile` traces a function, which cannot make tensors without storage."""

    def __init__(self, view: TableView) -> None:
        self.view_of = view
        self.dtype, self.device, self.shape = view.read_dtype, view.read_device, torch.Size(view.shape)


def table_weight(table: Factorization[Any]) -> TableWeight:
    """The weight of a factorization: one object for all layers that share it, for as long as it is not cast or moved.

    Its factorization has it as an attribute, which copies and files of it leave out.
    """
    known: TableWeight | None = table.weight_of_layers
    if known is None or known.made_for != (table.dtype, table.device):
        known = table.weight_of_layers = TableWeight(TableView(table))
    return known


def _seen(weight: _Answers, **changes: Any) -> Any:
    """The same table read in another way, see `TableView`."""
    view = replace(weight.view_of, **changes)
    return _TracedWeight(view) if torch.compiler.is_dynamo_compiling() else TableWeight(view)


def _name(func: Any) -> str:
    """The name of a function, or of the property that it sets."""
    name = str(getattr(func, "__name__", func))
    return str(func.__self__.__name__) if name == "__set__" else name


def _refused(name: str, args: Any, given: Mapping[str, Any]) -> Any:
    """Raise for what needs numbers; what is changed in place on the meta device stays as it is."""
    values = [*args, *given.values()]
    weight = next((one for one in _flat(values) if isinstance(one, _Answers)), None)
    stored = "its table is stored as factors"
    if weight is not None:
        table = weight.factorization
        if name.endswith("_") and not name.endswith("__") and values[0] is weight and table.device.type == "meta":
            return weight
        stored = f"its table of {table.vocab_size} x {table.dim} is stored as {type(table).__name__}"
    raise TypeError(
        f"{name} cannot read or change the weight of a compressed layer: {stored}, and has no numbers of its own. It "
        "can be multiplied with (F.linear, @) and read by rows (F.embedding, weight[ids]); optimizers and hooks take "
        "layer.parameters(), and layer.factorization.materialize() builds a copy of the table, which does not train. "
        "For anything else keep the layer dense"
    )


def _flat(values: Any) -> Any:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


def _refuse_gradient(gradient: Tensor) -> None:
    raise TypeError(
        f"a gradient of a whole table, {tuple(gradient.shape)}, was computed for the weight of a compressed layer, as "
        "fused losses do, and has no way to its factors: call the layer, and compute the loss from its logits, or use "
        "lightning_embcompress.layers.full_softmax.head_softmax_loss(head, hidden, targets)"
    )


def _on_meta(value: Any) -> Any:
    if not isinstance(value, _Answers):
        return value
    return torch.empty(value.view_of.shape, dtype=value.view_of.read_dtype, device="meta")


def _matmul(left: Any, right: Any) -> Any:
    if not isinstance(left, _Answers):
        return right.view_of.right_of(left)
    return NotImplemented if isinstance(right, _Answers) else left.view_of.left_of(right)


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(input, _Answers) or not isinstance(weight, _Answers) or isinstance(bias, _Answers):
        return NotImplemented
    product = weight.view_of.turned().right_of(input)
    return product if bias is None else product + bias.to(product.dtype)


def _addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    if isinstance(input, _Answers):
        return NotImplemented
    product = _matmul(mat1, mat2)
    return product if product is NotImplemented else beta * input + alpha * product


def _einsum(equation: Any, *operands: Any) -> Any:
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    inputs, arrow, output = str(equation).replace(" ", "").partition("->")
    letters = inputs.split(",")
    if len(operands) != 2 or len(letters) != 2 or not arrow or "." in inputs:
        return NotImplemented
    (weight, own), (other, of_other) = zip(operands, letters, strict=True)
    if not isinstance(weight, _Answers):
        (weight, own), (other, of_other) = (other, of_other), (weight, own)
    found = None if isinstance(other, _Answers) else weight.view_of.einsum(own, other, of_other, output)
    return NotImplemented if found is None else found


def _embedding(
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if not isinstance(weight, _Answers) or weight.view_of.transposed or max_norm is not None or scale_grad_by_freq:
        return NotImplemented
    # Sparse gradients need an optimizer that is made for them: those of factors are dense unless the layer is asked.
    rows = weight.view_of.rows(input)
    if padding_idx is None:
        return rows
    padding = input == (padding_idx if padding_idx >= 0 else padding_idx + weight.view_of.table.vocab_size)
    return torch.where(padding.unsqueeze(-1), rows.detach(), rows)


def _embedding_bag(
    input: Any,
    weight: Any,
    offsets: Any = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    rows = _embedding(bag_ids(input), weight, None, max_norm, norm_type, scale_grad_by_freq)
    if rows is NotImplemented:
        return rows
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.view_of.table.vocab_size
    how: Any = {"mode": mode, "include_last_offset": include_last_offset, "padding_idx": padding_idx}
    return pool(rows, input, offsets, per_sample_weights, **how)


def _like(tensor: Any, *args: Any, **given: Any) -> Any:
    """A tensor is to be of the dtype and on the device of a table."""
    like = next(one for one in (*args, *given.values()) if isinstance(one, _Answers))
    rest = [one for one in args if one is not like]
    given = {name: one for name, one in given.items() if one is not like}
    return tensor.to(like.view_of.read_device, like.view_of.read_dtype, *rest, **given)


def _named(names: str) -> list[Any]:
    """Functions and methods of these names."""
    return [getattr(home, name) for name in names.split() for home in (torch, Tensor) if hasattr(home, name)]


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
    torch.embedding: lambda weight, indices, padding_idx=None, *_, **__: _embedding(indices, weight, padding_idx),
    torch.einsum: _einsum,
    torch.result_type: lambda *operands: torch.result_type(*map(_on_meta, operands)),
    torch.detach: _Answers.detach,
    torch.t: _Answers.t,
    torch.permute: _Answers.permute,
    torch.index_select: _Answers.index_select,
    **dict.fromkeys((torch.transpose, torch.swapaxes, torch.swapdims), _Answers.transpose),
    **dict.fromkeys((Tensor.to, Tensor.type_as), _like),
    **dict.fromkeys(_named("matmul mm mv __matmul__"), _matmul),
    **dict.fromkeys(_named("inner"), _linear),
    **dict.fromkeys(_named("addmm"), _addmm),
}
"""What functions of torch, and methods of other tensors, give; `NotImplemented` for what they cannot."""
_LIKE = {
    *_named("zeros_like ones_like empty_like full_like rand_like randn_like"),
    *_named("new_zeros new_ones new_empty new_full new_tensor"),
}
"""What makes another tensor like this one."""
_METADATA = {
    *_named("size stride dim ndimension numel nelement element_size __len__ get_device storage_offset is_contiguous"),
    *_named("is_floating_point is_complex is_signed is_inference is_same_size is_conj is_neg"),
}
"""What needs no numbers."""


def _refusing(name: str) -> Callable[..., Any]:
    return lambda *args: _refused(name, args, {})


# The operators of tensors take a TypeError for a sign to try the other operand's, or to compare by identity.
_OPERATORS = "eq ne lt le gt ge add radd sub rsub mul rmul truediv rtruediv pow and or xor neg abs"
for _operator in _OPERATORS.split():
    setattr(_Answers, f"__{_operator}__", _refusing(_operator))
_Answers.__hash__ = object.__hash__  # type: ignore[method-assign]
