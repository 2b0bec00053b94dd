"""What the weight of a compressed layer answers to functions and methods of torch."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_embcompress.layers.pooling import bag_ids, pool
from lightning_embcompress.layers.table_view import TableView
from lightning_embcompress.layers.weight_refusals import ReadRows, function_name, refused
from lightning_embcompress.methods.registry import Factorization


class WeightAnswers:
    """What stands for a table gives where it is asked by its methods, or by functions of torch."""

    view_of: TableView

    @staticmethod
    def made(view: TableView) -> Any:
        """What stands for another view of the table."""
        raise NotImplementedError

    @property
    def factorization(self) -> Factorization[Any]:
        """What the table is stored as."""
        return self.view_of.table

    def __repr__(self, **_: Any) -> str:
        """Shape, and how it is stored."""
        view = self.view_of
        return f"TableWeight({list(view.shape)}, dtype={view.read_dtype}, stored as {type(view.table).__name__})"

    def __format__(self, _: str) -> str:
        """As `repr`."""
        return repr(self)

    def size(self, dim: int | None = None) -> Any:
        """Shape of the table."""
        return torch.Size(self.view_of.shape) if dim is None else self.view_of.shape[dim]

    def dim(self) -> int:
        """Two."""
        return 2

    def numel(self) -> int:
        """How many numbers the table would have."""
        return self.view_of.shape[0] * self.view_of.shape[1]

    def __len__(self) -> int:
        """How many rows the table has."""
        return self.view_of.shape[0]

    def _seen(self, **changes: Any) -> Any:
        """The same table read in another way, see `TableView`."""
        return self.made(replace(self.view_of, **changes))

    @property
    def T(self) -> Any:
        """The transposed table."""
        return self._seen(transposed=not self.view_of.transposed)

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
        return self._seen(detached=True)

    @data.setter
    def data(self, value: Any) -> None:
        refused("data", (self,), {})

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
            return refused("to", (self,), {})
        # `cuda` is another name of the current one.
        device = None if device is None else torch.empty(0, device=device).device
        changes = {"dtype": dtype} if dtype not in (None, self.view_of.read_dtype) else {}
        if device not in (None, self.view_of.read_device):
            changes["device"] = device
        return self._seen(**changes) if changes else self

    type_as = to

    def cuda(self, device: Any = None, **_: Any) -> Any:
        """The table with results on a GPU."""
        return self.to(torch.device("cuda", device) if isinstance(device, int) else device or "cuda")

    def type(self, dtype: Any = None, non_blocking: bool = False) -> Any:
        """The table read in another dtype; without one, what torch calls it where it refuses to take it."""
        return "TableWeight of a compressed layer" if dtype is None else self.to(dtype)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Let the factors train, or not."""
        if self.view_of.is_plain:
            self.factorization.requires_grad_(requires_grad)
        elif requires_grad:
            refused("requires_grad_", (self,), {})
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
            refused("grad", (self,), {})

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
        return refused("an optimizer", (self,), {})

    def __getitem__(self, index: Any) -> Any:
        """Rows of the table."""
        found = self.view_of.item(index)
        if found is None:
            return refused("indexing", (self,), {})
        # Of a dense weight these would be views, by which rows are set to zero.
        is_view = isinstance(index, int | slice) and not found.requires_grad and not torch.compiler.is_compiling()
        if is_view:
            found = found.as_subclass(ReadRows)
            found.weight = self
        return found

    def index_select(self, dim: int, index: Tensor) -> Any:
        """Rows of the table."""
        return self[index] if dim in (0, -2) else refused("index_select", (self,), {})

    def matmul(self, other: Any) -> Any:
        """The product with the table."""
        return _matmul(self, other)

    mm = mv = __matmul__ = matmul

    def __rmatmul__(self, other: Any) -> Any:
        """The product with the table, from its left."""
        # By a function of torch, so that modes see it as they see that of a dense weight.
        return torch.matmul(other, self) if isinstance(self, Tensor) else _matmul(other, self)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer a function of torch, or say why not."""
        given, name = dict(kwargs or {}), function_name(func)
        own = WeightAnswers.__dict__.get(name) if args and isinstance(args[0], WeightAnswers) else None
        if own is not None and getattr(func, "__name__", "") == "__get__":
            return getattr(args[0], name)
        if own is not None and func == getattr(Tensor, name, None):
            return own(*args, **given)
        answer = _FUNCTIONS.get(func)
        if answer is not None:
            result = answer(*args, **given)
            return refused(name, args, given) if result is NotImplemented else result
        if func in MAKES_OTHERS:
            given["device"] = given.get("device") or args[0].view_of.read_device
            return func(_on_meta(args[0]), *args[1:], **given)
        if func in _METADATA or getattr(func, "__name__", "") == "__get__":
            # What would read numbers ends in `__torch_dispatch__`.
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **given)
        return refused(name, args, given)


def _on_meta(value: Any) -> Any:
    if not isinstance(value, WeightAnswers):
        return value
    return torch.empty(value.view_of.shape, dtype=value.view_of.read_dtype, device="meta")


def _matmul(left: Any, right: Any) -> Any:
    if not isinstance(left, WeightAnswers):
        return right.view_of.right_of(left)
    return NotImplemented if isinstance(right, WeightAnswers) else left.view_of.left_of(right)


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(input, WeightAnswers) or not isinstance(weight, WeightAnswers) or isinstance(bias, WeightAnswers):
        return NotImplemented
    product = weight.view_of.turned().right_of(input)
    return product if bias is None else product + bias.to(product.dtype)


def _addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    if isinstance(input, WeightAnswers):
        return NotImplemented
    product = _matmul(mat1, mat2)
    return product if product is NotImplemented else beta * input + alpha * product


def _einsum(equation: Any, *operands: Any) -> Any:
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    inputs, arrow, output = str(equation).replace(" ", "").partition("->")
    letters = inputs.split(",")
    if len(operands) != 2 or len(letters) != 2 or not arrow:
        return NotImplemented
    (weight, own), (other, of_other) = zip(operands, letters, strict=True)
    if not isinstance(weight, WeightAnswers):
        (weight, own), (other, of_other) = (other, of_other), (weight, own)
    if "..." in of_other:
        free = [letter for letter in string.ascii_letters if letter not in inputs]
        rest = "".join(free[: other.ndim - len(of_other) + 3])
        of_other, output = of_other.replace("...", rest), output.replace("...", rest)
    found = None if isinstance(other, WeightAnswers) else weight.view_of.einsum(own, other, of_other, output)
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
    if not isinstance(weight, WeightAnswers) or weight.view_of.transposed or max_norm is not None or scale_grad_by_freq:
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
    like = next(one for one in (*args, *given.values()) if isinstance(one, WeightAnswers))
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
    torch.detach: WeightAnswers.detach,
    torch.t: WeightAnswers.t,
    torch.permute: WeightAnswers.permute,
    torch.index_select: WeightAnswers.index_select,
    **dict.fromkeys((torch.transpose, torch.swapaxes, torch.swapdims), WeightAnswers.transpose),
    **dict.fromkeys((Tensor.to, Tensor.type_as), _like),
    **dict.fromkeys(_named("matmul mm mv __matmul__"), _matmul),
    **dict.fromkeys(_named("inner"), _linear),
    **dict.fromkeys(_named("addmm"), _addmm),
}
"""What functions of torch, and methods of other tensors, give; `NotImplemented` for what they cannot."""
MAKES_OTHERS = {
    *_named("zeros_like ones_like empty_like full_like rand_like randn_like"),
    *_named("new_zeros new_ones new_empty new_full new_tensor"),
}
"""What makes another tensor like this one."""
_METADATA = {
    *_named("stride ndimension numel nelement element_size get_device storage_offset is_contiguous"),
    *_named("is_floating_point is_complex is_signed is_inference is_same_size is_conj is_neg"),
}
"""What needs no numbers."""


def _refusing(name: str) -> Callable[..., Any]:
    return lambda *args: refused(name, args, {})


def _read_as(place: Any) -> Callable[[WeightAnswers], Any]:
    return lambda weight: weight.to(place)


# Methods of tensors that stand for `to`.
_SHORT: dict[str, Any] = {"float": torch.float32, "double": torch.float64, "half": torch.float16}
for _name, _place in {**_SHORT, "bfloat16": torch.bfloat16, "cpu": "cpu"}.items():
    setattr(WeightAnswers, _name, _read_as(_place))

# The operators of tensors take a TypeError for a sign to try the other operand's, or to compare by identity.
_OPERATORS = "eq ne lt le gt ge add radd sub rsub mul rmul truediv rtruediv pow and or xor neg abs"
for _operator in _OPERATORS.split():
    setattr(WeightAnswers, f"__{_operator}__", _refusing(_operator))
WeightAnswers.__hash__ = object.__hash__  # type: ignore[method-assign]
