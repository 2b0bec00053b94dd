"""Which of the ids that embeddings read are words of the text, and which fill batches up."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_embcompress.metrics.perplexity import IGNORE_INDEX
from lightning_embcompress.tables.finding import all_modules
from lightning_embcompress.tables.transformers_models import ids_in_config, is_within, pretrained_models

_OTHER_SIDE = ("encoder_", "cross_")
_PADDING_MASKS = ("padding_mask", "pad_mask")
# What is a mask of words only if all that it leaves out is one and the same id.
_AMBIGUOUS = ("mask", "input_mask", "text_mask")


class WordMasks:
    """Follows the arguments of a model, and tells words from padding wherever an embedding is called.

    A position is padding where a mask says so: an `attention_mask` or `..._padding_mask` of the shape of the ids,
    among the arguments of a module that holds the embedding, the innermost first, or in the batch; or a
    `..._key_padding_mask` that attention elsewhere in the model is given (`settled`). Where there is no mask, it is
    padding if it holds the `padding_idx` of the embedding or the `pad_token_id` of the model of transformers around
    it, unless that model uses the same id for something else, such as the end of a text.

    Args:
        model: The module.
        embeddings: Paths of its embeddings to the layers.
    """

    def __init__(self, model: nn.Module, embeddings: Mapping[str, nn.Module]) -> None:
        """Find out around which embedding which modules are."""
        self._model = model
        layers = {id(layer) for layer in embeddings.values()}
        named = all_modules(model)
        paths = [path for path, layer in named.items() if id(layer) in layers]
        around = {path[:place] for path in paths for place, letter in enumerate(path) if letter == "."} | {""}
        self._around = [named[path] for path in around if path in named and id(named[path]) not in layers]
        configs = {path: _config(model, path) for path in embeddings}
        self._padding = {path: _padding_ids(configs[path], layer) for path, layer in embeddings.items()}
        self._starts = {path for path, config in configs.items() if _starts_with_padding(config)}
        self._two_sided = {path for path, config in configs.items() if getattr(config, "is_encoder_decoder", False)}
        self._frames: list[dict[str, Any]] = []
        self._elsewhere: list[Tensor] = []
        self._batch: dict[str, Any] = {}
        self._ignoring: list[Tensor] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow the arguments of modules in the block."""
        with ExitStack() as stack:
            for module in dict.fromkeys(self._around):
                stack.callback(module.register_forward_pre_hook(self._enter(module), with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(self._leave).remove)
            for module in self._model.modules():
                if module not in self._around and any(map(_of_attention, _signature(module).parameters)):
                    stack.callback(module.register_forward_pre_hook(self._note(module), with_kwargs=True).remove)
            yield

    def begin(self, batch: Any) -> None:
        """Forget what was before this batch, and look for masks in it."""
        self._frames, self._elsewhere = [], []
        self._batch = _masks_of(batch) if isinstance(batch, Mapping) else {}
        self._ignoring = _tensors_with(batch, IGNORE_INDEX)

    def _enter(self, module: nn.Module) -> Callable[..., None]:
        signature = _signature(module)

        def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            self._frames.append(_masks_of(_bound(signature, arguments, keywords)))

        return hook

    def _note(self, module: nn.Module) -> Callable[..., None]:
        signature = _signature(module)

        def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            given = _bound(signature, arguments, keywords)
            self._elsewhere += [one for name, one in given.items() if _of_attention(name) and isinstance(one, Tensor)]

        return hook

    def _leave(self, *_: Any) -> None:
        if self._frames:
            self._frames.pop()

    def words(self, path: str, ids: Tensor) -> Tensor:
        """Where words are, `[*]` bool, for `[*]` ids that the embedding of a path is reading now."""
        for frame in (*reversed(self._frames), self._batch):
            for name, mask in frame.items():
                if name.startswith(_OTHER_SIDE):
                    continue
                if mask is None and path in self._two_sided:
                    # The mask of the other side may have the same shape.
                    return self._by_id(path, ids)
                if (
                    mask is not None
                    and mask.shape == ids.shape
                    and (found := _words(name, mask.to(ids.device), ids)) is not None
                ):
                    return found
        return self._by_id(path, ids)

    def _by_id(self, path: str, ids: Tensor) -> Tensor:
        words = torch.ones_like(ids, dtype=torch.bool)
        for token in self._padding[path]:
            words &= ids != token
        if path in self._starts and ids.dim() > 1:
            # A decoder begins with it.
            words[..., 0] = True
        return words

    def settled(self, ids: Tensor, words: Tensor) -> Tensor:
        """What `words` gave for ids, when the model was called to its end: attention may have been told more since."""
        for mask in self._elsewhere:
            # Ids may come with the position or the text first.
            mask = mask.to(ids.device)
            mask = mask.T if mask.dim() == 2 and mask.shape != ids.shape else mask
            # That of another text would leave out several ids.
            if mask.shape == ids.shape and len(torch.unique(ids[mask != 0])) == 1:
                words = words & (mask == 0)
        return words

    def predicting(self, path: str, shape: Sequence[int]) -> Tensor | None:
        """Where no padding is, `[*]` bool, among `[*]` positions that the head of a path is reading now.

        None where nothing says so. What predicts a target is no padding, whatever the loss makes of it.
        """
        wanted = "attention_mask"
        if getattr(_config(self._model, path), "is_encoder_decoder", False):
            wanted = "decoder_attention_mask"
        for frame in (*reversed(self._frames), self._batch):
            mask = frame.get(wanted)
            if mask is not None and mask.shape == tuple(shape):
                return _words(wanted, mask, mask)
        return None

    def targets(self, shape: Sequence[int]) -> Tensor | None:
        """Where targets are, `[*]` bool, for `[*]` positions whose loss is not seen; None if all may be."""
        for tensor in self._ignoring:
            if tensor.shape == tuple(shape) or (len(shape) == 1 and tensor.numel() == shape[0]):
                return tensor.reshape(shape) != IGNORE_INDEX
        return None


def _signature(module: nn.Module) -> inspect.Signature:
    try:
        return inspect.signature(module.forward)
    except (TypeError, ValueError):
        return inspect.Signature()


def _bound(signature: inspect.Signature, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    """Arguments by their names, as far as they fit."""
    try:
        bound = signature.bind_partial(*arguments, **keywords)
    except TypeError:
        return keywords
    bound.apply_defaults()
    return {**bound.arguments, **keywords}


def _of_attention(name: str) -> bool:
    return name.endswith("key_padding_mask")


def _masks_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in arguments.items():
        is_mask = isinstance(name, str) and (name.endswith(("attention_mask", *_PADDING_MASKS)) or name in _AMBIGUOUS)
        if is_mask and (value is None or isinstance(value, Tensor)):
            found[name] = value
    return found


def _words(name: str, mask: Tensor, ids: Tensor) -> Tensor | None:
    """Where a mask says that words are; None if it may be about something else."""
    if mask.is_floating_point() and bool((mask < 0).any()):
        # To be added to scores.
        return mask == 0
    if name.endswith(_PADDING_MASKS):
        return mask == 0
    words = mask != 0
    if name in _AMBIGUOUS:
        words = next((one for one in (words, ~words) if len(torch.unique(ids[~one])) == 1), torch.ones_like(words))
    return words


def _tensors_with(batch: Any, value: int) -> list[Tensor]:
    """Tensors of integers in a batch that hold a value."""
    if isinstance(batch, Tensor):
        return [batch] if not batch.is_floating_point() and bool((batch == value).any()) else []
    parts: Sequence[Any] = ()
    if isinstance(batch, Mapping):
        parts = list(batch.values())
    elif isinstance(batch, tuple | list):
        parts = batch
    return [tensor for part in parts for tensor in _tensors_with(part, value)]


def _padding_ids(config: Any, layer: nn.Module) -> set[int]:
    own = getattr(layer, "padding_idx", None)
    return padding_ids(config) if own is None else padding_ids(config, own)


def padding_ids(config: Any, *own: int) -> set[int]:
    """Ids that are padding by a configuration of transformers, and others, unless it uses them for what texts hold."""
    padding = {*own, getattr(config, "pad_token_id", None)}
    used = ids_in_config(config, "bos", "eos", "unk", "sep", "cls", "mask")
    return {token for token in padding if isinstance(token, int)} - used


def _starts_with_padding(config: Any) -> bool:
    start = getattr(config, "decoder_start_token_id", None)
    return start is not None and start == getattr(config, "pad_token_id", None)


def _config(model: nn.Module, path: str) -> Any:
    """The configuration of the innermost model of transformers around a module; None if there is none."""
    around = [(len(outer), part) for outer, part in pretrained_models(model).items() if is_within(path, outer)]
    return max(around, key=lambda one: one[0])[1].config.get_text_config() if around else None
