"""What all tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from lightning.pytorch import Trainer
from torch import distributed

from lightning_embcompress.utils import progress
from toys import quiet_trainer

# The same examples in every run; `--hypothesis-profile default` draws others.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")

# Two busy threads make tiny tensors many times slower: tests use one, benchmarks choose for themselves.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Scripts that tests start import the toy models too, as pytest's `pythonpath` lets the tests do.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))


@pytest.fixture(autouse=True)
def no_lines_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow machine a line about a long step would come between those that a test reads."""
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 3600.0)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """A quiet Trainer on one CPU, called with callbacks and arguments of the Trainer."""
    return partial(quiet_trainer, tmp_path)


@pytest.fixture
def torchrun(tmp_path: Path) -> Callable[..., str]:
    """Run a script in several processes, as `torchrun` does, and give what it printed.

    Called with the script's path, its arguments, and `processes`, `timeout` in seconds, `fails=True` where it has to
    end with an error, whose text is then given.
    """

    def run(script: Path, *arguments: object, processes: int = 2, timeout: float = 240, fails: bool = False) -> str:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        # The seed that an earlier test has set: Lightning would set it anew in every process.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PL_")}
        done = subprocess.run(
            [*command, str(Path(__file__).with_name("run_worker.py")), str(script), *map(str, arguments)],
            env={**inherited, "OMP_NUM_THREADS": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        said = done.stdout + done.stderr
        assert (done.returncode != 0) == fails, f"exit status {done.returncode}:\n{said[-8000:]}"
        return said if fails else done.stdout

    return run


@pytest.fixture
def process_group() -> Iterator[None]:
    """A group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()
