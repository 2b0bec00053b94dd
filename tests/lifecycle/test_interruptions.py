"""Runs that are killed or interrupted go on from their last checkpoint as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lifecycle.workers import interrupted as worker
from lightning_embcompress.callbacks.replacing import uninterrupted
from lightning_embcompress.integrations.checkpoint_io import check_whole_file
from lightning_embcompress.layers.compressed import CompressedLayer

SCRIPT = Path(__file__).with_name("workers") / "interrupted.py"

# How, at which moment, in which epoch (tables are compressed at the start of 2 and refined at those of 4 and 6), and
# the last epoch of which there is a checkpoint then.
KILLED = [
    ("step", 1, 0),
    ("solving", 2, 1),
    ("writing", 2, 1),
    ("replacing", 2, 1),
    ("step", 3, 2),
    ("writing", 4, 3),
    ("replacing", 4, 3),
    ("step", 5, 4),
    ("step", 7, 6),
]
# With the exit status, and whether the tables are compressed in the checkpoint that the interruption leaves.
INTERRUPTED = [
    ("SIGINT", "solving", 2, 1, False),
    ("SIGINT", "replacing", 2, 1, True),
    ("SIGINT", "step", 3, 1, True),
    ("SIGINT", "replacing", 4, 1, True),
    # Lightning ends the step first, and with it what is due before it.
    ("SIGTERM", "step", 1, 0, False),
    ("SIGTERM", "replacing", 2, 0, True),
    ("SIGTERM", "solving", 4, 0, True),
]
RANDOM = 14


class Note(Callback):
    """Notes parameters and optimizer state before every step, after what is due there."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, Any]] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        state = {"parameters": pl_module.state_dict(), "optimizer": trainer.optimizers[0].state_dict()}
        self.states[trainer.global_step] = deepcopy(state)


def _interrupt(folder: Path, cases: list[list[Any]]) -> dict[str, int]:
    """The exit status of every case; its files are in a folder of its name."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), json.dumps(cases)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    codes = json.loads(done.stdout.split("RESULT ")[1])
    return {"-".join(map(str, case[:3])): code for case, code in zip(cases, codes, strict=True)}


def _outcomes(folder: Path, case: dict[str, Any], killed: list[Any], interrupted: list[Any]) -> SimpleNamespace:
    cases: list[list[Any]] = [["SIGKILL", name, epoch, case] for name, epoch, _ in killed]
    cases += [[*one[:3], case] for one in interrupted]
    note = Note()
    whole = worker.fit(folder / "whole", note, case=case)
    codes = _interrupt(folder / "cases", cases)
    return SimpleNamespace(folder=folder, case=case, whole=whole, states=note.states, codes=codes)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """All cases with two tables and Adam, and the run that nothing happened to."""
    return _outcomes(tmp_path_factory.mktemp("untied"), {}, KILLED, INTERRUPTED)


def _assert_goes_on_as(whole: SimpleNamespace, folder: Path, checkpoint: Path, **arguments: Any) -> None:
    """That the run resumed in its folder ends as the whole one did, with all that is logged on the way."""
    step = torch.load(checkpoint, weights_only=True)["global_step"]
    resumed = worker.fit(folder, ckpt_path=checkpoint, **arguments)
    worker.assert_equal(resumed, whole)
    assert resumed.rows == [row for row in whole.rows if row[0] >= step]
    assert resumed.callback["perplexity"] == whole.callback["perplexity"]
    # Nothing half is left, of the killed process neither.
    assert not list(folder.rglob("*.tmp"))


def _assert_survives_a_kill(outcomes: SimpleNamespace, name: str, epoch: int, last: int) -> None:
    case = f"SIGKILL-{name}-{epoch}"
    folder = outcomes.folder / "cases" / case
    assert outcomes.codes[case] == -signal.SIGKILL
    assert len(list(folder.rglob("*.tmp"))) == (name == "writing")
    checkpoint = folder / "last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["epoch"] == last
    _assert_goes_on_as(outcomes.whole, folder, checkpoint, case=outcomes.case)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "epoch", "last"), KILLED)
def test_a_killed_process(untied: SimpleNamespace, name: str, epoch: int, last: int) -> None:
    _assert_survives_a_kill(untied, name, epoch, last)


@pytest.mark.full
def test_a_process_that_is_killed_at_any_moment(untied: SimpleNamespace, tmp_path: Path) -> None:
    codes = _interrupt(tmp_path / "cases", [["SIGKILL", "random", seed, {}] for seed in range(RANDOM)])
    assert list(codes.values()) == [-signal.SIGKILL] * RANDOM
    for case in codes:
        folder = tmp_path / "cases" / case
        # Killed between two checkpoints of an epoch, the last one may be of the epoch before, or not there.
        last = folder / "last.ckpt"
        _assert_goes_on_as(untied.whole, folder, last if last.exists() else folder / "epoch=0.ckpt")


def _assert_survives_an_interruption(
    outcomes: SimpleNamespace, how: str, name: str, epoch: int, code: int, compressed: bool
) -> None:
    case = f"{how}-{name}-{epoch}"
    folder = outcomes.folder / "cases" / case
    said = (folder / "said.txt").read_text()
    assert outcomes.codes[case] == code
    assert "Traceback" not in said
    assert ("KeyboardInterrupt" in said) == (how == "SIGINT")
    # Structure, factors and optimizer are those of one moment: before the change, or after it.
    interrupted, last = folder / "interrupted.ckpt", folder / f"epoch={epoch - 1}.ckpt"
    check_whole_file(interrupted)
    saved, before = torch.load(interrupted, weights_only=True), torch.load(last, weights_only=True)
    assert ("embcompress" in saved) == compressed
    if how == "SIGINT" and name in ("solving", "writing"):
        expected = {"parameters": before["state_dict"], "optimizer": before["optimizer_states"][0]}
        assert saved.get("embcompress") == before.get("embcompress")
    else:
        expected = outcomes.states[saved["global_step"]]
    torch.testing.assert_close(saved["state_dict"], dict(expected["parameters"]), rtol=0, atol=0)
    torch.testing.assert_close(saved["optimizer_states"][0], expected["optimizer"], rtol=0, atol=0)
    # It goes on to the end, with other random numbers as from within every epoch of a plain loader.
    resumed = worker.fit(folder / "interrupted", ckpt_path=interrupted, case=outcomes.case)
    assert resumed.trainer.current_epoch == 8
    assert all(isinstance(layer, CompressedLayer) for layer in (resumed.module.encoder, resumed.module.decoder))
    assert [table.modules for table in resumed.plan.tables] == [table.modules for table in outcomes.whole.plan.tables]
    assert resumed.callback["refined"] == [4, 6]
    perplexity = resumed.report["perplexity"]
    assert perplexity["final"] < 0.7 * perplexity["dense"]
    # From the last checkpoint of the end of an epoch nothing is lost.
    _assert_goes_on_as(outcomes.whole, folder, last, case=outcomes.case)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "name", "epoch", "code", "compressed"), INTERRUPTED)
def test_an_interrupted_process(
    untied: SimpleNamespace, how: str, name: str, epoch: int, code: int, compressed: bool
) -> None:
    _assert_survives_an_interruption(untied, how, name, epoch, code, compressed)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "epoch"), [("solving", 2), ("replacing", 2), ("replacing", 4)])
def test_ctrl_c_before_the_first_step_of_an_epoch(
    untied: SimpleNamespace, tmp_path: Path, name: str, epoch: int
) -> None:
    # Nothing of the epoch was drawn yet, so that nothing differs.
    case = untied.folder / "cases" / f"SIGINT-{name}-{epoch}"
    resumed = worker.fit(tmp_path, ckpt_path=case / "interrupted.ckpt")
    assert resumed.trainer.global_step == untied.whole.trainer.global_step == 8 * worker.STEPS
    worker.assert_equal(resumed, untied.whole)


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """The signals that the handler of this test was called with; afterwards it must be there again."""
    calls: list[int] = []

    def handler(number: int, frame: Any) -> None:
        calls.append(number)

    before = signal.signal(signal.SIGINT, handler)
    yield calls
    assert signal.signal(signal.SIGINT, before) is handler


def _press(handled: list[int], error: Exception | None = None) -> None:
    with uninterrupted():
        # Within another one it waits for the outer end.
        with uninterrupted():
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGINT)
        assert not handled
        if error is not None:
            raise error


def test_ctrl_c_waits_for_the_end_of_the_outer_block(handled: list[int]) -> None:
    with uninterrupted():
        pass
    # Without it nothing is called.
    assert not handled
    _press(handled)
    # Whoever presses it again wants no more than once.
    assert handled == [signal.SIGINT]
    handled.clear()
    with pytest.raises(ValueError, match="what is wrong"):
        _press(handled, ValueError("what is wrong"))
    assert handled == [signal.SIGINT]


def test_the_default_handler_raises_after_the_end() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        # The error of the block is not lost.
        with pytest.raises(KeyboardInterrupt) as raised:
            _press([], ValueError("what is wrong"))
        assert isinstance(raised.value.__context__, ValueError)
    finally:
        assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_handlers_of_other_signals_wait_too(handled: list[int]) -> None:
    # Such as the one that saves a checkpoint when a cluster wants its machine back.
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert not seen
        assert seen == [signal.SIGUSR1]
        assert not handled
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_in_another_thread_it_does_nothing(handled: list[int]) -> None:
    # Python calls handlers in the main thread only, which is not within the block.
    handler = signal.getsignal(signal.SIGINT)
    seen: list[Any] = []

    def run() -> None:
        with uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [handler]
    assert not handled


@pytest.mark.parametrize("ignored", [True, False])
def test_a_signal_that_python_does_not_handle(ignored: bool) -> None:
    # `trap "" INT` in a shell makes its processes ignore it; a program may also let it end the process at once.
    process = os.fork()
    if process == 0:
        os.closerange(1, 3)
        signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.SIG_DFL)
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code == (0 if ignored else -signal.SIGINT)


def test_a_handler_that_was_not_set_by_python(monkeypatch: pytest.MonkeyPatch) -> None:
    # A program that embeds Python may have one of its own, which Python can tell of but not set again.
    def set_handler(number: int, handler: Any) -> None:
        if handler is None:
            raise TypeError("signal handler must be signal.SIG_IGN, signal.SIG_DFL, or a callable object")

    done = []
    with monkeypatch.context() as changed:
        changed.setattr(signal, "getsignal", lambda number: None)
        changed.setattr(signal, "signal", set_handler)
        with uninterrupted():
            done.append(1)
    assert done
