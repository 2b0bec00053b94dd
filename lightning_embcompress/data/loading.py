"""A loader that continues in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

Item = TypeVar("Item")


class ResumableSampler(DistributedSampler[int]):
    """An order of items that can begin in its middle.

    It is a :class:`~torch.utils.data.DistributedSampler` so that Lightning does not put its own in this place. Unlike
    that, it repeats no item where processes do not divide the items evenly, which would count text twice: what is
    missing is the item number ``num_items``, in which nothing is predicted.

    Args:
        num_items: How many items there are.
        fixed_by: What decides how many batches an epoch has, in words.
        shuffle: Whether the order is drawn, from ``seed`` and the number of the epoch.
        seed: Of the order.
        rank: Which part to give, in distributed training.
        world_size: How many processes there are; 1 if each has items of its own.
    """

    start = 0
    """How many items are left out, the next time only."""

    def __init__(
        self, num_items: int, fixed_by: str, shuffle: bool = False, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        """Keep the arguments."""
        super().__init__(range(num_items), world_size, rank, shuffle, seed)  # type: ignore[arg-type]
        self.num_items = num_items
        self.fixed_by = fixed_by

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch.

        Never an earlier one: resuming from between the last step of an epoch and its end, Lightning names the epoch
        that is over, but the loader's state knows better.
        """
        self.epoch = max(self.epoch, epoch)

    def __iter__(self) -> Iterator[int]:
        """Give the numbers of the items; only the first time do they begin at ``start``."""
        # A generator: nothing may be consumed before the first item is drawn. With worker processes, torch makes two
        # iterators and uses the second.
        start, self.start = self.start, 0
        order = torch.arange(self.num_items)
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = order[torch.randperm(self.num_items, generator=generator)]
        fillers = torch.full((len(self) * self.num_replicas - self.num_items,), self.num_items)
        yield from torch.cat([order, fillers])[self.rank :: self.num_replicas][start:].tolist()


class ResumableLoader(DataLoader[Item]):
    """A loader that continues in the middle of an epoch, in the same order, when training is resumed there.

    Lightning saves its ``state_dict`` in checkpoints. Where Lightning puts another sampler into a copy of it, as for
    ``overfit_batches``, every epoch starts at its beginning. (torchdata's ``StatefulDataLoader`` loses its place to
    the iterators that Lightning makes and does not use, repeats the end of an epoch, and refuses another number of
    worker processes.)
    """

    batches_per_epoch: Callable[[], float] | None = None
    """How many batches the trainer takes from an epoch, if that may be fewer than there are."""

    _position = 0

    def __iter__(self) -> Iterator[Item]:  # type: ignore[override]
        """Give the batches, in order."""
        # Nothing may be consumed before the first batch is drawn: Lightning makes iterators it does not use.
        sampler = self.sampler
        self._position = sampler.start // (self.batch_size or 1) if isinstance(sampler, ResumableSampler) else 0
        for batch in super().__iter__():
            self._position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Give the epoch, by whose number the order is drawn, and how many of its batches were already used."""
        limit = len(self) if self.batches_per_epoch is None else min(len(self), self.batches_per_epoch())
        is_over = self._position >= limit
        epoch = self.sampler.epoch if isinstance(self.sampler, ResumableSampler) else 0
        return {"epoch": epoch + is_over, "position": 0 if is_over else self._position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let the next epoch begin where the saved one was.

        Raises:
            ValueError: If there are not that many batches.
        """
        position = int(state_dict["position"])
        if not isinstance(self.sampler, ResumableSampler):
            if position:
                rank_zero_warn(
                    f"The checkpoint was saved after {position} batches of an epoch, but the loader's order was "
                    f"replaced by a {type(self.sampler).__name__} (as for overfit_batches): the epoch starts at its "
                    "beginning."
                )
            return
        if not 0 <= position < len(self):
            raise ValueError(
                f"The checkpoint was saved after {position} batches of an epoch, but now an epoch has {len(self)}: "
                f"resume with the same {self.sampler.fixed_by}."
            )
        self._position = position
        # Loaders whose order is the same in every epoch have not always counted them.
        self.sampler.epoch = int(state_dict.get("epoch", 0))
        self.sampler.start = position * (self.batch_size or 1)


def make_loader(
    dataset: Dataset[Item], sampler: ResumableSampler, batch_size: int | None, num_workers: int = 0
) -> ResumableLoader[Any]:
    """Make a loader.

    Args:
        dataset: What to load.
        sampler: Its order.
        batch_size: Items in a batch, per process; the last batch may have fewer. ``None`` if every item is a batch.
        num_workers: Processes that read ahead; 0 reads in the training process, which is fast enough for most models.
    """
    return ResumableLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        # An own generator: each new iterator draws a seed, which must not disturb the random numbers of training.
        generator=torch.Generator(),
    )
