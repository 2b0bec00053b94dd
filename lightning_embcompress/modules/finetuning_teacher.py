"""The dense original of a model that is fine-tuned: its scores, and its tables."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from typing_extensions import Self

from lightning_embcompress.callbacks.passes import step_arguments
from lightning_embcompress.integrations.checkpoint import write_record
from lightning_embcompress.layers.distillation import TeacherScores, joined_scores, teacher_scores
from lightning_embcompress.layers.head_loss import token_chunks
from lightning_embcompress.modules.base import LanguageModel
from lightning_embcompress.modules.finetuning_parts import Parts, Watch
from lightning_embcompress.tables.replacement import put_back

# Of a model that was stored in float16, a parameter of the backbone differs by less from what it was.
_SAME_BODY = 1e-2
# What modules keep in a checkpoint of where they are in a text.
_CARRIED = ("lstm_state",)


class Teacher:
    """A model that is never trained, in evaluation mode.

    It is no module: what holds it has none of it among its parameters, and copies of that share it.

    Args:
        model: The model; from now on frozen and in evaluation mode.
        parts: Where its tables are.
    """

    def __init__(self, model: LightningModule, parts: Parts) -> None:
        """Freeze it."""
        self.model = model.requires_grad_(False).eval()
        self.parts = parts

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Not copied."""
        return self

    @torch.no_grad()
    def scores(self, batch: Any, batch_idx: int, top_k: int | None, temperature: float) -> TeacherScores:
        """Score a batch of the training text, which goes on where the batch before ended.

        Args:
            batch: As the student gets it.
            batch_idx: Its index in the epoch.
            top_k: See `teacher_scores`.
            temperature: See `teacher_scores`.
        """
        if isinstance(self.model, LanguageModel):
            known = self.model.known_head(batch, "train")
            if known is None:
                return teacher_scores(self.model.scores(batch, "train")[0], top_k, temperature)
            head, hidden = known[0], known[1].flatten(0, -2)
        else:
            with silenced(self.model), Watch(self.model, self.parts, head=True) as watch:
                self.model.training_step(*step_arguments(self.model.training_step, batch, batch_idx))
            found = self.parts.head(self.model)
            assert found is not None
            head, hidden = found, watch.hidden_states()
        # Logits of all positions need not be there at once.
        parts = token_chunks(head, hidden)
        return joined_scores([teacher_scores(head(hidden[part]), top_k, temperature) for part in parts])

    def layers(self) -> dict[str, nn.Module]:
        """The layers that read its tables, by their paths."""
        return {path: self.model.get_submodule(path) for path in self.parts.paths}

    def to(self, device: torch.device) -> None:
        """Move it."""
        self.model.to(device)

    def carried(self) -> dict[str, Any]:
        """What a checkpoint must keep so that the teacher goes on with the text; all processes have to call it."""
        if not isinstance(self.model, LanguageModel):
            return {}
        # With the key by which a module knows that training will go on from it.
        checkpoint: dict[str, Any] = {"optimizer_states": []}
        self.model.on_save_checkpoint(checkpoint)
        return {name: value for name, value in checkpoint.items() if name in _CARRIED}

    def take_up(self, carried: dict[str, Any]) -> None:
        """Go on with the text from where a checkpoint was written.

        Args:
            carried: What `carried` returned; empty for the beginning.
        """
        if isinstance(self.model, LanguageModel):
            checkpoint = {"state_dict": {}, **carried}
            write_record(self.model, checkpoint)
            self.model.on_load_checkpoint(checkpoint)


def over_shared_backbone(student: LightningModule, original: LightningModule, parts: Parts) -> LightningModule:
    """The student with the tables of its original, over the very same backbone: no parameter of that is copied.

    Args:
        student: Its backbone must stay as it is.
        original: The dense model; afterwards only its tables are needed.
        parts: Where the tables are, in both.

    Returns:
        Modules of their own around the student's parameters and buffers, apart from the tables.

    Raises:
        ValueError: If the original has another backbone, over which its tables mean something else.
    """
    theirs = dict(original.named_parameters())
    inside = tuple(f"{path}." for path in parts.paths)
    for name, parameter in student.named_parameters():
        if name.startswith(inside):
            continue
        other = theirs.get(name)
        # Meant to be equal: but one of them may have been stored in fewer bits.
        same = other is not None and other.shape == parameter.shape
        if same and other is not None:
            own = parameter.detach().float()
            same = bool((own - other.to(own)).norm() <= _SAME_BODY * own.norm())
        if not same:
            raise ValueError(
                f"teacher_shares_backbone=True, but {name!r} of the teacher is not that of the model: its tables "
                "belong to"
                " another backbone. Set teacher_shares_backbone=False, so that the teacher is a whole model."
            )
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*student.parameters(), *student.buffers())}
    for owner in (student._trainer, student.__dict__.get("log")):
        shared[id(owner)] = owner
    view = copy.deepcopy(student, shared)
    tables = {path: original.get_submodule(path) for path in parts.paths}
    dtypes = {one.dtype for one in parts.split(student)[0] if one.is_floating_point()}
    if len(dtypes) == 1 and any(one.dtype not in dtypes for table in tables.values() for one in table.parameters()):
        # A backbone in another precision. Not in place: the original may be somebody's, or its tables be compared with.
        tables = {path: table.to(dtype=next(iter(dtypes))) for path, table in copy.deepcopy(tables).items()}
    put_back(view, tables)
    return view


@contextmanager
def silenced(model: LightningModule) -> Iterator[None]:
    """Let what a model logs go nowhere."""
    before: dict[str, Any] = {name: model.__dict__[name] for name in ("log", "log_dict") if name in model.__dict__}
    model.log = model.log_dict = _nothing  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.log, model.log_dict
        model.__dict__.update(before)


def _nothing(*_: Any, **__: Any) -> None:
    pass


def shares_parameters(model: nn.Module, teacher: nn.Module) -> bool:
    """Whether two models have a parameter in common."""
    own: set[Tensor] = set(model.parameters())
    return any(parameter in own for parameter in teacher.parameters())
