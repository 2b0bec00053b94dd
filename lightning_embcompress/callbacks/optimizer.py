"""Putting new parameters into an optimizer that is running."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Optimizer

from lightning_embcompress.layers.compressed import CompressedLayer
from lightning_embcompress.methods.numerics.gram import compute_dtype
from lightning_embcompress.methods.registry import Factorization

# A part of the table at a time: its gradient by a factor with a row for every token is as large as that factor.
_PARTS = 8


def splice(optimizers: Sequence[Optimizer], model: nn.Module, replaced: Mapping[str, nn.Module]) -> list[str]:
    """Let optimizers train the layers that took the place of others.

    The new parameters stand where the old ones stood, in the same group: the number of groups stays what it is (which
    learning-rate schedulers and resuming rely on), and their order is that of the rebuilt model's parameters, so that
    a resumed run finds every state where it belongs.

    Layers that keep their parameters may get others beside them, and have them in another order: those that come follow
    the parameter that is before them in the layer, into its group.

    The momentum of `torch.optim.SGD` is a sum of gradients, and goes on as that of the factors, see `pull_back`. So
    do the sums of `torch.optim.Adagrad`, about, see `squares_pulled_back`: they only ever grow, and from its first
    value again, steps of factors that all tokens share would be as large as the factors themselves. All other state
    goes whole: the averages of Adam are its own again after some steps, and a first moment beside none would explode.

    Args:
        optimizers: All optimizers of the run.
        model: The model, with the new layers in place.
        replaced: The old layers by their paths, in the order of `model.named_modules()`; of those that were changed
            themselves, what has the parameters they had.

    Returns:
        Paths of the layers whose state was dropped.
    """
    order = {id(parameter): place for place, parameter in enumerate(model.parameters())}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = [(list(old.parameters()), list(model.get_submodule(path).parameters())) for path, old in replaced.items()]
    kept = {id(parameter) for _, after in layers for parameter in after}
    gone = {id(parameter): parameter for before, _ in layers for parameter in before if id(parameter) not in kept}
    changed = {id(p) for before, after in layers if list(map(id, before)) != list(map(id, after)) for p in before}
    tables = _one_for_one(model, replaced)
    dropped: list[str] = []
    for optimizer in optimizers:
        arrived: list[nn.Parameter] = []
        for group in optimizer.param_groups:
            # In place: some optimizers keep a reference to this list.
            parameters = group["params"]
            owned = {id(parameter) for parameter in parameters}
            if not owned & changed:
                continue
            # Of optimizers that were made of named parameters.
            given = names | dict(zip(map(id, parameters), group.get("param_names", ()), strict=False))
            places = [order.get(id(parameter), math.inf) for parameter in parameters if id(parameter) not in gone]
            end = 0
            for before, after in layers:
                here = {id(parameter) for parameter in parameters}
                known = {id(parameter) for parameter in before}
                if known & gone.keys():
                    if not owned & known & gone.keys():
                        continue
                    come = [parameter for parameter in after if id(parameter) not in known | here]
                    if not come and not here & known & gone.keys():
                        continue
                else:
                    if not owned & known & changed:
                        continue
                    come = [parameter for parameter, beside in _beside(after, known) if beside in owned]
                # A layer tied to one before it finds the table gone: its factors follow those of that one.
                first = next((i for i, parameter in enumerate(parameters) if id(parameter) in known), end)
                new = {id(parameter) for parameter in come}
                local = [parameter for parameter in after if id(parameter) in here | new]
                rest = [parameter for parameter in parameters[first:] if id(parameter) not in known]
                parameters[first:] = local + rest
                end = first + len(local)
                arrived += come
            if places == sorted(places):
                # A table that became two left one place, its factors have two.
                parameters.sort(key=lambda parameter: order.get(id(parameter), math.inf))
            if "param_names" in group:
                group["param_names"] = [given[id(parameter)] for parameter in parameters]
        going_on = _go_on_by_adagrad(optimizer, model, replaced, arrived) if isinstance(optimizer, Adagrad) else set()
        for path, old in replaced.items():
            for parameter in old.parameters():
                state = optimizer.state.pop(parameter, None) if id(parameter) in gone else None
                if not state or path in going_on:
                    continue
                momentum = state.get("momentum_buffer") if isinstance(optimizer, SGD) else None
                table = tables.get(id(parameter))
                if table is not None and isinstance(momentum, Tensor):
                    for factor, value in pull_back(table, momentum):
                        optimizer.state[factor] = {"momentum_buffer": value}
                elif any(torch.is_tensor(value) and value.numel() > 1 for value in state.values()):
                    dropped.append(path)
    return list(dict.fromkeys(dropped))


def _beside(after: Sequence[nn.Parameter], known: set[int]) -> Iterator[tuple[nn.Parameter, int]]:
    """Parameters that came to others of their layer, and the ids of those that they follow, or come before."""
    beside = next((id(parameter) for parameter in after if id(parameter) in known), 0)
    for parameter in after:
        if id(parameter) in known:
            beside = id(parameter)
        else:
            yield parameter, beside


def levels_of_adagrad(
    optimizers: Sequence[Optimizer], layers: Sequence[nn.Module]
) -> list[dict[int, Mapping[str, Any]]]:
    """What `torch.optim.Adagrad` has gathered of the tables of compressed layers, for `start_anew`.

    Args:
        optimizers: All optimizers of the run.
        layers: Those whose factors are to get other values.
    """
    levels: list[dict[int, Mapping[str, Any]]] = []
    for optimizer in optimizers:
        levels.append({})
        if not isinstance(optimizer, Adagrad):
            continue
        for factorization in _factorizations(layers):
            state = _level(optimizer, factorization)
            if state is not None:
                levels[-1][id(factorization)] = state
    return levels


def _go_on_by_adagrad(
    optimizer: Adagrad, model: nn.Module, replaced: Mapping[str, nn.Module], arrived: Sequence[nn.Parameter]
) -> set[str]:
    """Give the parameters that came their sums; gives the paths of layers whose tables had some."""
    states: dict[int, Mapping[str, Any]] = {}
    paths: set[str] = set()
    # Tied layers share their factors, and so what is known of them.
    levels = {id(table): _level(optimizer, table) for table in _factorizations(replaced.values())}
    for path, old in replaced.items():
        new = model.get_submodule(path)
        of_factors = levels.get(id(old.factorization)) if isinstance(old, CompressedLayer) else None
        state = of_factors or optimizer.state.get(cast(Tensor, getattr(old, "weight", None)), {})
        if "sum" in state and isinstance(new, CompressedLayer):
            states[id(new.factorization)] = state
            paths.add(path)
    _start_adagrad(optimizer, arrived, _factorizations(model.get_submodule(path) for path in replaced), states)
    return paths


def _level(optimizer: Adagrad, factorization: Factorization[Any]) -> Mapping[str, Any] | None:
    """One number for the sums of all entries of a table, from those of its factors: the largest that one of them says.

    Too large a number makes steps small, too small a one makes them as large as the factors.
    """
    states = [optimizer.state.get(factor, {}) for factor in factorization.parameters()]
    known = [state for state in states if "sum" in state]
    if not known:
        return None
    ratios = [0.0]
    for factor, squares in squares_pulled_back(factorization, 1.0):
        of_one = float(squares.mean()) if squares.numel() else 0.0
        if of_one > 0 and "sum" in optimizer.state.get(factor, {}):
            ratios.append(float(optimizer.state[factor]["sum"].float().mean()) / of_one)
    return {"sum": max(ratios), "step": known[0]["step"]}


def start_anew(
    optimizers: Sequence[Optimizer],
    parameters: Sequence[nn.Parameter],
    layers: Iterable[nn.Module] = (),
    levels: Sequence[Mapping[int, Mapping[str, Any]]] = (),
) -> bool:
    """Forget what optimizers have gathered of parameters whose values were replaced by others.

    Args:
        optimizers: All optimizers of the run.
        parameters: Which have other values now.
        layers: Compressed ones that they are in.
        levels: What `levels_of_adagrad` said of these before.

    Returns:
        Whether anything was forgotten that does not go on in another form.
    """
    changed = {id(parameter) for parameter in parameters}
    factorizations = _factorizations(layers)
    found = False
    for place, optimizer in enumerate(optimizers):
        own = [one for group in optimizer.param_groups for one in group["params"] if id(one) in changed]
        known = levels[place] if levels else {}
        going_on = {id(one) for table in factorizations if id(table) in known for one in table.parameters()}
        for parameter in own:
            found = bool(optimizer.state.pop(parameter, None) and id(parameter) not in going_on) or found
        if isinstance(optimizer, Adagrad):
            _start_adagrad(optimizer, own, factorizations, known)
    return found


def _factorizations(layers: Iterable[nn.Module]) -> list[Factorization[Any]]:
    """Those of compressed layers, each once."""
    found = [layer.factorization for layer in layers if isinstance(layer, CompressedLayer)]
    return list({id(factorization): factorization for factorization in found}.values())


def _start_adagrad(
    optimizer: Adagrad,
    parameters: Sequence[nn.Parameter],
    factorizations: Sequence[Factorization[Any]],
    states: Mapping[int, Mapping[str, Any]],
) -> None:
    """Give parameters the state that Adagrad makes once, with its parameters, and never later.

    Args:
        optimizer: Which has the parameters in its groups already.
        parameters: Those without a state.
        factorizations: Of which they may be factors.
        states: Of the tables in the place of which factorizations are, by the ids of these, with one sum for all
            entries or those of each; others start as a table does that has seen no gradient.
    """
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    left = {id(parameter): parameter for parameter in parameters}
    for parameter in parameters:
        start = torch.full_like(parameter, groups[id(parameter)]["initial_accumulator_value"])
        optimizer.state[parameter] = {"step": torch.tensor(0.0), "sum": start}
    for factorization in factorizations:
        own = [parameter for parameter in factorization.parameters() if id(parameter) in left]
        if not own:
            continue
        known = states.get(id(factorization))
        first = groups[id(own[0])]["initial_accumulator_value"]
        for factor, squares in squares_pulled_back(factorization, first if known is None else known["sum"]):
            if id(factor) in left:
                state = optimizer.state[factor]
                torch.maximum(state["sum"], squares.to(factor.dtype), out=state["sum"])
                if known is not None:
                    state["step"] = known["step"].clone()


def _one_for_one(model: nn.Module, replaced: Mapping[str, nn.Module]) -> dict[int, Factorization[Any]]:
    """Which factorization took the place of which weight, by the weight's id; none of one that became two."""
    found: dict[int, Factorization[Any]] = {}
    split = set()
    for path, old in replaced.items():
        weight = getattr(old, "weight", None)
        new = model.get_submodule(path)
        if not isinstance(weight, nn.Parameter) or not isinstance(new, CompressedLayer):
            continue
        if found.setdefault(id(weight), new.factorization) is not new.factorization:
            split.add(id(weight))
    return {key: table for key, table in found.items() if key not in split}


def pull_back(factorization: Factorization[Any], moment: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
    """What a sum of gradients of a table is as one of its factors, by the chain rule.

    For a table `W = U B` and its moment `M` these are `M Bᵀ` for `U` and `Uᵀ M` for `B`: the gradients of `⟨M, W⟩`.

    Args:
        factorization: Of a table `[vocab_size, dim]`.
        moment: `[vocab_size, dim]`, dense or sparse.

    Returns:
        Every trained parameter, and its moment of the same shape.
    """
    every = torch.arange(factorization.vocab_size, device=factorization.device)
    if moment.is_sparse:
        moment = moment.coalesce()
        every, moment = moment.indices()[0], moment.values()
    return _pulled_back(factorization, zip(every.tensor_split(_PARTS), moment.tensor_split(_PARTS), strict=True))


def squares_pulled_back(
    factorization: Factorization[Any], squares: Tensor | float
) -> list[tuple[nn.Parameter, Tensor]]:
    """What sums of squared gradients of a table are as those of its factors, about.

    Where gradients of a table `W = U B` are independent of each other, the squares `S` of all of them are `S (B∘B)ᵀ`
    for `U` and `(U∘U)ᵀ S` for `B`; and for any factor with the Jacobian `J`, `(J∘J)ᵀ s`. This is the expectation of
    `(Jᵀ (ε √s))²` for random signs `ε` (Hutchinson 1990). One draw tells little of an entry, but much of the sums of a
    factor's rows and columns, and their product stands for the entries, as in Adafactor (Shazeer and Stern 2018, arXiv
    1804.04235, section 3). Of a row with few entries it tells little: at rank 1 some are a hundredth of what they are.

    Args:
        factorization: Of a table `[vocab_size, dim]`.
        squares: `[vocab_size, dim]`, or one number for all.

    Returns:
        Every trained parameter, and its sums of squares of the same shape, float32 at least.
    """
    every = torch.arange(factorization.vocab_size, device=factorization.device).tensor_split(_PARTS)
    # The same in all processes.
    generator = torch.Generator(factorization.device).manual_seed(0)

    def draws() -> Iterator[tuple[Tensor, Tensor]]:
        for ids in every:
            shape = len(ids), factorization.dim
            signs = torch.randint(0, 2, shape, generator=generator, device=ids.device, dtype=torch.int8)
            sizes = squares[ids].sqrt() if isinstance(squares, Tensor) else math.sqrt(squares)
            yield ids, (2 * signs - 1) * sizes

    pulled = _pulled_back(factorization, draws())
    return [(factor, _by_rows_and_columns(drawn.to(compute_dtype(drawn.dtype)).square_())) for factor, drawn in pulled]


def _by_rows_and_columns(squares: Tensor) -> Tensor:
    """Entries from the sums of rows and columns alone."""
    if not squares.numel():
        return squares
    if squares.ndim < 2:
        return torch.full_like(squares, float(squares.mean()))
    flat = squares.view(len(squares), -1)
    rows, columns = flat.mean(dim=1, keepdim=True), flat.mean(dim=0, keepdim=True)
    return (rows * (columns / columns.mean().clamp(min=torch.finfo(columns.dtype).tiny))).view(squares.shape)


def _pulled_back(
    factorization: Factorization[Any], parts: Iterable[tuple[Tensor, Tensor]]
) -> list[tuple[nn.Parameter, Tensor]]:
    """Every trained parameter, and the gradient of the sum of `⟨moments, rows⟩` over all ids and their moments."""
    factors = [parameter for parameter in factorization.parameters() if parameter.requires_grad]
    sums = [torch.zeros_like(parameter, memory_format=torch.contiguous_format) for parameter in factors]
    for ids, moments in parts:
        with torch.enable_grad():
            rows = factorization.rows(ids)
        for total, part in zip(sums, _gradients(rows, factors, moments.to(rows)), strict=True):
            total += part
    return list(zip(factors, sums, strict=True))


def _gradients(rows: Tensor, factors: Sequence[Tensor], moment: Tensor) -> Sequence[Tensor]:
    if not factors or not len(moment):
        return [torch.zeros_like(factor) for factor in factors]
    gradients = torch.autograd.grad(rows, factors, moment, allow_unused=True)
    return [torch.zeros_like(f) if part is None else part for f, part in zip(factors, gradients, strict=True)]
