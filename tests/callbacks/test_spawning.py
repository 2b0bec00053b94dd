"""Runs in processes that Lightning starts by itself, which hand nothing but weights back."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_WORKER = Path(__file__).parent / "workers" / "spawned.py"
_TESTS = Path(__file__).parents[1]


def _run(case: str, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_TESTS.parent), str(_TESTS)])}
    done = subprocess.run(
        [sys.executable, _WORKER, folder, case],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("case", ["spawned", "forked", "tied"])
def test_the_main_process_gets_the_values_of_the_tables(case: str, tmp_path: Path) -> None:
    said = _run(case, tmp_path)
    assert "the same" in said
    assert said.count("load_from_checkpoint(LanguageModel") == 1


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("untied", "tie='untie'.*'encoder'"),
        ("compressed", r"densify\(module\)"),
        ("configured", "Configured in processes"),
    ],
)
def test_what_cannot_be_handed_back_is_refused(case: str, message: str, tmp_path: Path) -> None:
    said = _run(case, tmp_path)
    assert re.search(f"refused:.*{message}", said, re.DOTALL)
