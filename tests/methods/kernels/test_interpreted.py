"""The Triton kernels on a CPU, by Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# One process, as most of its time goes into imports.
PROGRAM = "import runpy, sys; [runpy.run_path(worker, run_name='__main__') for worker in sys.argv[1:]]"


def test_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    workers = sorted((Path(__file__).parent / "workers").glob("interpreted_*.py"))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, workers)],
        # It is chosen before Triton is imported.
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout.splitlines() == [worker.stem for worker in workers], done.stdout[-4000:] + done.stderr[-8000:]
