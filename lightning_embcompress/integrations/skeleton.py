"""Modules built from a state dict alone: of a model whose class is not known, as far as its tables are concerned.

Compressing a table needs its weight and the place where it belongs, not the code that reads it. So every tensor is put
where its name says, and whatever looks like an embedding or a projection becomes one; the result cannot be called.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from itertools import accumulate

import torch
from torch import Tensor, nn

from lightning_embcompress.compression.backbone_files import backbone_shapes, check_backbone_tensors
from lightning_embcompress.compression.plan import Plan, apply_plan
from lightning_embcompress.compression.records import check_factors, dtype_of
from lightning_embcompress.tables.automatic import vocabulary_size
from lightning_embcompress.tables.finding import all_modules
from lightning_embcompress.utils.storage import identity_of


def build_skeleton(state: Mapping[str, Tensor], plan: Plan, where: str, dtype: torch.dtype | None = None) -> nn.Module:
    """Build modules that have a state dict.

    Args:
        state: Tensors by their names. Those of several names that share their memory, or are one, are tied.
        plan: What is compressed in it.
        where: What messages call it.
        dtype: What floating-point tensors are cast to; None for nothing.

    Returns:
        `nn.Embedding` or `nn.Linear` (with a bias, or as the last of several that share a table without any) wherever
        there is a matrix and nothing beside it but a bias for each row, compressed layers where the plan says so, and
        plain buffers for all other tensors.

    Raises:
        ValueError: If the plan does not fit the tensors, or factors hold values that are not finite. No memory has
            been allocated for it then.
    """
    # What layers share may be stored under any of their names.
    check_factors(plan.tables, state, where, complete=False)
    check_backbone_tensors(plan.backbone, state, where)
    state = _cast(state, dtype)
    skeleton = nn.Module()
    compressed = {path for table in plan.tables for path in table.modules}
    beside = set(backbone_shapes(nn.Module(), plan.backbone, {}))
    beside |= {f"{path}.weight" for path in compressed} & state.keys()
    tensors = {name: tensor for name, tensor in state.items() if not _owner(name, compressed) and name not in beside}
    weights: dict[str, Tensor] = {}
    # First, and in the order of the plan, so that tables keep their names: a file may have its tensors in any order.
    for table in plan.tables:
        if not any(_owner(name, dict.fromkeys(table.modules, table)) for name in state):
            raise ValueError(
                f"{where} is damaged: it has no factors of table {table.name!r}, which its plan compresses"
            )
        # Only its shape and dtype are read: one number stands for all, because a few factors can make a table of 10¹²
        # rows.
        placeholder = torch.empty((), dtype=dtype_of(table.dtype))
        weights |= dict.fromkeys(table.modules, placeholder.expand(table.spec["vocab_size"], table.spec["dim"]))
    weights |= {path: tensors[f"{path}.weight"] for path in _layer_paths(tensors) if path not in compressed}
    sharing: dict[tuple[object, ...], list[str]] = {}
    for path, weight in weights.items():
        sharing.setdefault(identity_of(weight), []).append(path)
    parameters = {identity: nn.Parameter(weights[paths[0]]) for identity, paths in sharing.items()}
    biases = {path: tensors.pop(f"{path}.bias") for path in weights if f"{path}.bias" in tensors}
    for path, weight in weights.items():
        tensors.pop(f"{path}.weight", None)
        shared = sharing[identity_of(weight)]
        is_last = len(shared) > 1 and shared[-1] == path and not biases.keys() & set(shared)
        put_at(skeleton, path, _layer(parameters[identity_of(weight)], biases.get(path), is_last))
    for name, tensor in tensors.items():
        put_at(skeleton, name, tensor)
    if plan.backbone is not None:
        number = next((tensor for tensor in state.values() if tensor.is_floating_point()), torch.empty(()))
        for name, shape in plan.backbone.weights.items():
            put_at(skeleton, name, nn.Parameter(torch.empty(shape, dtype=number.dtype)))
    apply_plan(skeleton, plan)
    # Assigned: what was cast since the plan was made keeps its dtype, and nothing is copied.
    beside |= {name for name in state if _owner(name, compressed)}
    skeleton.load_state_dict({name: state[name] for name in beside}, strict=False, assign=True)
    return skeleton


def choose_tables(skeleton: nn.Module) -> list[str]:
    """Choose the tables to compress in a skeleton: the layers with the most rows.

    Those that hold the same values are tied: whoever gathers a model from many processes writes tied ones twice.

    Returns:
        Their paths.

    Raises:
        ValueError: If there are none, or more than an embedding and a softmax.
    """
    layers = {
        path: module for path, module in all_modules(skeleton).items() if isinstance(module, nn.Embedding | nn.Linear)
    }
    if not layers:
        raise ValueError("found no table: the model has no matrix that an embedding or a projection could have")
    rows = max(len(module.weight) for module in layers.values())
    largest = {path: module for path, module in layers.items() if len(module.weight) == rows}
    distinct = {id(module.weight): module for module in largest.values()}
    # An embedding has no bias, so of two tables one has none.
    projections = [module for module in distinct.values() if isinstance(module, nn.Linear)]
    if len(distinct) > 2 or len(projections) > 1:
        shown = [f"{path!r} {tuple(module.weight.shape)}" for path, module in largest.items()]
        listed = "; ".join(shown[:6]) + ("; ..." if len(shown) > 6 else "")
        raise ValueError(
            f"the tables cannot be told from the {len(largest)} layers with the most rows ({listed}); name the modules "
            "to compress, as in tables=['encoder']"
        )
    if len(distinct) == 1:
        # The other role may have a few rows less, as where one of them is padded.
        near = {
            path: module
            for path, module in layers.items()
            if path not in largest
            and vocabulary_size(len(module.weight), [rows])
            and all(module.weight.shape[1] == one.weight.shape[1] for one in distinct.values())
        }
        if len({id(module.weight) for module in near.values()}) == 1:
            return list(largest | near)
    first, *others = largest.values()
    for module in others:
        if module.weight is not first.weight and torch.equal(module.weight, first.weight):
            module.weight = first.weight
    return list(largest)


def put_at(skeleton: nn.Module, name: str, value: Tensor | nn.Module) -> None:
    """Put something where its name says, which was checked when the model was built that it is a part of."""
    node = skeleton
    path, _, leaf = name.rpartition(".")
    for part in filter(None, path.split(".")):
        child = node._modules.setdefault(part, nn.Module())
        assert child is not None
        node = child
    if isinstance(value, nn.Module):
        node._modules[leaf] = value
    elif isinstance(value, nn.Parameter):
        node._parameters[leaf] = value
    else:
        node._buffers[leaf] = value


def _owner(name: str, compressed: Collection[str]) -> str:
    """The compressed layer that a tensor is a factor of."""
    path, found, _ = name.rpartition(".factorization.")
    return path if found and path in compressed else ""


def _layer_paths(tensors: Mapping[str, Tensor]) -> list[str]:
    """The modules of which nothing is known but a matrix, and perhaps a bias for each of its rows."""
    inside: Counter[str] = Counter()
    for name in tensors:
        inside.update(accumulate(name.split(".")[:-1], "{}.{}".format))
    found = []
    for path, count in inside.items():
        weight, bias = tensors.get(f"{path}.weight"), tensors.get(f"{path}.bias")
        if weight is None or weight.dim() != 2 or not weight.is_floating_point():
            continue
        if count == 1 + (bias is not None) and (bias is None or bias.shape == weight.shape[:1]):
            found.append(path)
    return found


def _layer(weight: nn.Parameter, bias: Tensor | None, is_softmax: bool) -> nn.Embedding | nn.Linear:
    if bias is None and not is_softmax:
        layer = nn.Embedding(weight.shape[0], weight.shape[1], _weight=weight)
        layer.weight = weight
        # Only a row that never got a gradient is nothing but zeros.
        zeros = () if 0 in weight.stride() else (~weight.detach().any(dim=1)).nonzero().flatten().tolist()
        layer.padding_idx = zeros[0] if len(zeros) == 1 else None
        return layer
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight
    linear.register_parameter("bias", None if bias is None else nn.Parameter(bias))
    return linear


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> Mapping[str, Tensor]:
    """Cast tensors, those with several names once."""
    if dtype is None:
        return tensors
    done: dict[tuple[object, ...], Tensor] = {}
    for tensor in tensors.values():
        if identity_of(tensor) not in done:
            done[identity_of(tensor)] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return {name: done[identity_of(tensor)] for name, tensor in tensors.items()}
