"""Trains in processes of their own, each of which is killed or interrupted at a moment of its own."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from lightning_embcompress import EmbeddingCompression
from lightning_embcompress.callbacks import replacing
from lightning_embcompress.compression.tasks import Task
from lightning_embcompress.methods.registry import Factorization
from lightning_embcompress.utils import files
from toys import InMemory, LanguageModel, assert_same_run, outcome, quiet_trainer

VOCAB_SIZE, DIM, STEPS = 120, 12, 6
"""Steps are those of an epoch."""


def adam(module: LanguageModel) -> Any:
    """Adam, and a rate that falls by the epoch."""
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    return [optimizer], [lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.8)]


def momentum(module: LanguageModel) -> Any:
    """Momentum, and a rate that changes by the step."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    schedule = lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=100)
    return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def model(tied: bool = False, optimizer: str = "adam") -> LanguageModel:
    chosen = {"adam": adam, "sgd": momentum}[optimizer]
    return LanguageModel(VOCAB_SIZE, DIM, tied=tied, dropout=0.2, optimizer=chosen)


class Moment(Callback):
    """Calls something once, when training comes to a moment.

    The moments are `step` (the middle of an epoch), `solving` (the first table is solved), `writing` (a residual is
    written under its temporary name) and `replacing` (one table is replaced, another is not, the optimizer knows none).
    """

    def __init__(self, name: str, epoch: int, action: Callable[[], None]) -> None:
        self.name, self.epoch, self.action = name, epoch, action
        self.now = self.done = False

    def reached(self) -> None:
        if self.now and not self.done:
            self.done = True
            self.action()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.name == "solving":
            self._before(Task, "record")
        elif self.name == "writing":
            self._before(files, "synchronize", lambda path: Path(path).parent.parent.name == "residuals")
        elif self.name == "replacing":
            self._before(replacing, "splice")
            # In place: the second table of the model, not a copy that is being solved.
            tables: list[Any] = []

            def is_second(own: Factorization[Any], *_: Any) -> bool:
                if any(own is part for part in pl_module.modules()):
                    tables.append(own)
                return bool(tables) and (len(tables) > 1 or pl_module.hparams["tied"])

            self._before(Factorization, "load_state_dict", is_second)

    def _before(self, owner: Any, name: str, wanted: Callable[..., Any] = lambda *_, **__: True) -> None:
        """For the rest of the process, which is about to end."""
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.now and wanted(*args, **kwargs):
                self.reached()
            return original(*args, **kwargs)

        setattr(owner, name, watched)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.now = trainer.current_epoch == self.epoch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.name == "step" and batch_idx == STEPS // 2:
            self.reached()


def data() -> dict[str, Any]:
    drawn = (VOCAB_SIZE ** torch.rand(8 * STEPS, 7, generator=torch.Generator().manual_seed(3))).long() - 1
    text = TensorDataset(drawn[:, :-1], drawn[:, 1:])
    return {"train_dataloaders": DataLoader(text, 8, shuffle=True), "val_dataloaders": DataLoader(text, 16)}


def callback(**changes: Any) -> EmbeddingCompression:
    """Compresses at the start of epoch 2, and refines at those of 4 and 6."""
    arguments: dict[str, Any] = {"method": "group_reduce", "ratio": 2, "groups": 3}
    return EmbeddingCompression(**{**arguments, "at_epoch": 2, "refine_at_epochs": [4, 6], **changes})


def fit(
    folder: Path,
    *callbacks: Callback,
    case: Mapping[str, Any] | None = None,
    ckpt_path: Path | None = None,
    compression: EmbeddingCompression | None = None,
    max_epochs: int = 8,
    **changes: Any,
) -> SimpleNamespace:
    """One run, with a checkpoint of every epoch."""
    seed_everything(0, verbose=False)
    module, compression = model(**(case or {})), compression or callback()
    keep = ModelCheckpoint(
        changes.pop("dirpath", folder), filename="{epoch}", save_top_k=-1, save_last=True, save_on_train_epoch_end=True
    )
    trainer = quiet_trainer(
        folder,
        *(*callbacks, compression, keep),
        **{"logger": InMemory(), "max_epochs": max_epochs, "enable_checkpointing": True, **changes},
    )
    trainer.fit(module, **data(), ckpt_path=ckpt_path)
    callback_state = {name: value for name, value in compression.state_dict().items() if name != "compressed"}
    return SimpleNamespace(**vars(outcome(trainer, module)), callback=callback_state)


def assert_equal(resumed: SimpleNamespace, whole: SimpleNamespace) -> None:
    """That two runs, as `fit` gives them, came to the same end."""
    assert_same_run(resumed, whole)
    assert resumed.callback["refined"] == whole.callback["refined"]


def _child(folder: Path, how: str, name: str, epoch: int, case: dict[str, Any]) -> int:
    number = signal.Signals[how]
    # A shell that starts processes in the background lets them ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    moment = Moment(name, epoch, lambda: os.kill(os.getpid(), number))
    try:
        fit(folder, moment, OnExceptionCheckpoint(folder, "interrupted"), case=case)
    except SystemExit as exit:
        return int(exit.code or 0)
    except BaseException:
        traceback.print_exc()
        return 70
    return 71


def _kill_after(checkpoint: Path, process: int, seconds: float) -> None:
    # A process that ended otherwise stays a zombie until it is waited for: it can be signalled in vain.
    until = time.monotonic() + 60
    while not checkpoint.exists() and time.monotonic() < until:
        time.sleep(0.002)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)


def main(folder: Path, cases: list[list[Any]]) -> None:
    """One process after the other; a fork starts at once, with everything imported."""
    torch.set_num_threads(1)
    codes = []
    for arguments in cases:
        own = folder / "-".join(map(str, arguments[:3]))
        own.mkdir(parents=True)
        process = os.fork()
        if process == 0:
            with (own / "said.txt").open("w") as said:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                code = _child(own, *arguments)
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
        if arguments[1] == "random":
            _kill_after(own / f"epoch={arguments[2] % 5}.ckpt", process, random.Random(arguments[2]).uniform(0, 0.08))
        codes.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
    print("RESULT " + json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
