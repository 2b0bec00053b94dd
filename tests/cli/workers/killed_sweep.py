"""Sweep into a folder, and be killed by the system in the middle of the third measurement.

Arguments: the folder, and the file with the tests of sweeps.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from pathlib import Path


def main(folder: Path, tests: Path) -> None:
    specification = importlib.util.spec_from_file_location("sweep_cases", tests)
    assert specification is not None
    assert specification.loader is not None
    cases = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(cases)
    calls = []

    def evaluate(model: object) -> object:
        calls.append(model)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return cases.measure(model)

    cases.run(folder, evaluate)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
