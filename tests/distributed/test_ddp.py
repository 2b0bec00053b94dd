"""Callbacks under DDP: the processes stay equal, share the work, and resume exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
WORKER = Path(__file__).parent / "workers" / "ddp.py"
GROUP_REDUCE = {"method": "group_reduce", "ratio": 2, "at_epoch": 1, "refine_at_epochs": [2, 3], "groups": 3}
SHARED_BASIS = {**GROUP_REDUCE, "method": "shared_basis"}
CASES = {
    "refined": {"callbacks": [SHARED_BASIS], "optimizer": "sgd", "resume_from": [0, 2]},
    "searched": {"callbacks": [{"method": "shared_basis", "max_perplexity_increase": "2%", "at_epoch": 2}]},
    "tied, twice": {
        "tied": True,
        "callbacks": [
            {"method": "cp", "ratio": 2, "at_epoch": 1, "refine_at_epochs": [2]},
            {"method": "product_quantization", "ratio": 4, "at_epoch": 3},
        ],
        "strategy": {"find_unused_parameters": True},
        "resume_from": [2],
    },
}
MORE: dict[str, Any] = {
    "paper": {"callbacks": [GROUP_REDUCE], "resume_from": [0, 1, 2, 3]},
    "statistics anew": {"callbacks": [{**SHARED_BASIS, "refresh_statistics": True}], "resume_from": [0, 1, 2, 3]},
    "refined": {**CASES["refined"], "resume_from": [0, 1, 2, 3], "strategy": {"gradient_as_bucket_view": True}},
    "each its own": {
        "callbacks": [
            {"method": "tucker", "ratio": 2, "at_epoch": 0, "tables": "encoder", "refine_at_epochs": [1, 4]},
            {"method": "weighted_low_rank", "ratio": 4, "at_epoch": 2, "tables": "decoder"},
        ],
        "strategy": {"static_graph": True},
        "resume_from": [0, 1, 2, 3],
    },
    "untied": {"tied": True, "callbacks": [{**SHARED_BASIS, "tie": "untie"}], "resume_from": [0, 1, 2, 3]},
}


def _check(said: str, cases: dict[str, Any]) -> None:
    (line,) = [line for line in said.splitlines() if line.startswith("RESULT ")]
    every = json.loads(line.removeprefix("RESULT "))
    for results in every:
        assert results.keys() == cases.keys()
        for name, result in results.items():
            case = cases[name]
            assert result["apart"] == [0.0] * 5, name
            assert set(result["resumed"]) == {str(epoch) for epoch in case.get("resume_from", [])}
            for epoch, equal in result["resumed"].items():
                assert equal == {"state": True, "optimizer": True, "perplexity": True}, (name, epoch)
            *_, last = case["callbacks"]
            assert all(method == last["method"] for table, method, _ in result["tables"] if "tables" not in last)
            # The mean over all processes, not that of each.
            assert result["perplexity"] == every[0][name]["perplexity"]
            assert result["perplexity"][-1]["final"] < result["perplexity"][0]["dense"]
            made, alive = result["wrappers"]
            assert (made > 1, alive) == (True, 1), name


def test_two_processes(torchrun: Callable[..., str], tmp_path: Path) -> None:
    _check(torchrun(WORKER, tmp_path, json.dumps(CASES)), CASES)


@pytest.mark.full
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("name", MORE)
def test_more(torchrun: Callable[..., str], tmp_path: Path, name: str, processes: int) -> None:
    _check(torchrun(WORKER, tmp_path, json.dumps({name: MORE[name]}), processes=processes), {name: MORE[name]})
