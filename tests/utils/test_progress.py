"""Progress bars on a terminal."""

from __future__ import annotations

import pytest

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


def test_a_log_file_gets_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("Outer", total=2), progress_bar("Inner", total=1) as advance:
        advance(1)
        say("a result")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("a result\n", "")
