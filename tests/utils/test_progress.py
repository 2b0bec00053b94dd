"""Progress: bars on a terminal, lines in a log."""

from __future__ import annotations

import re
import threading
import time

import pytest
from lightning.pytorch.utilities import rank_zero_only

from lightning_embcompress.compression.report import say
from lightning_embcompress.utils import progress
from lightning_embcompress.utils.progress import output_console, progress_bar


def _shown() -> list[str]:
    return [task.description for display in progress._shown for task in display.tasks]


def test_a_bar_within_another_is_a_line_below_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # For rich, a terminal.
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_bar("Outer", total=2) as advance:
        with progress_bar("Inner", total=1) as advance_inner:
            advance_inner(1)
            assert _shown() == ["Outer", "Inner"]
            say("a result [1]")
        advance(1)
        assert _shown() == ["Outer"]
        with pytest.raises(InterruptedError), progress_bar("Failing", total=1):
            raise InterruptedError
        assert _shown() == ["Outer"]
    assert _shown() == []
    assert not output_console().stderr
    # Above the bars, not at the end of one.
    assert "a result [1]\n" in capsys.readouterr().err


def test_a_short_step_leaves_nothing_in_a_log_file(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("Outer", total=2), progress_bar("Inner", total=1) as advance:
        advance(1)
        say("a result")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("a result\n", "")


def test_a_log_file_gets_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.05)
    written: list[str] = []

    def wait_for(line: str) -> None:
        end = time.monotonic() + 10
        while not any(line in one for one in written):
            assert time.monotonic() < end, written
            written.extend(capsys.readouterr().err.splitlines())
            time.sleep(0.01)

    with progress_bar("Outer", total=4) as advance:
        advance(1)
        with progress_bar("Inner", total=1000, unit="tokens") as advance_inner:
            # Also while nothing advances.
            wait_for("; Inner: 0%, 0:00:0")
            assert any(re.match(r"Outer: 25%, 0:00:0\d elapsed, 0:00:0\d left; Inner", one) for one in written)
            advance_inner(900)
            wait_for("; Inner: 90%, ")
            assert re.search(r"Inner: 90%, [\d,]+ tokens/s, 0:00:0\d elapsed, 0:00:0\d left", "\n".join(written))
            advance_inner(100)
        with progress_bar("Unknown", total=None, unit="words") as advance_inner:
            advance_inner(7)
            wait_for("; Unknown: 7 words, ")
        with progress_bar("Short", total=1):
            pass
    written.extend(capsys.readouterr().err.splitlines())
    ends = [line.partition(":")[0] for line in written if line.endswith(", done")]
    assert ends[:2] == ["Inner", "Unknown"]
    assert ends[-1] == "Outer"
    assert not any(thread.name == "embcompress progress" for thread in threading.enumerate())


def test_only_the_first_process_shows_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.01)
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    with progress_bar("Outer", total=2) as advance:
        advance(1)
        time.sleep(0.05)
    assert capsys.readouterr().err == ""
