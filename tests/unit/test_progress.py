"""How far something is, on a terminal and in a log."""

import io
import logging
import re
import sys

import pytest

from afd_scale.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that pass only when a test says so."""
    now = [100.0]
    monkeypatch.setattr("afd_scale.progress.time.monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with progress("Clips") as on_clips:
        for done in range(1, 41):
            clock[0] += 1.0
            on_clips(done, 40)
    assert capsys.readouterr().err.splitlines() == [
        "Clips: 15 of 40  0:00:25 left", "Clips: 30 of 40  0:00:10 left"
    ]  # fmt: skip
    with progress("Clips", shown=False) as on_clips:
        clock[0] += 100.0
        on_clips(1, 2)
    assert capsys.readouterr().err == ""


def test_what_is_to_be_said_gets_a_line_at_once(clock: list[float]) -> None:
    lines: list[str] = []
    with progress("toy-afd", begun=20, say=lines.append) as show:
        for step in range(21, 41):
            clock[0] += 0.5
            show(step, 100, "student/loss 0.123" if step % 10 == 0 else "")
    assert lines == [
        "toy-afd: 30 of 100  student/loss 0.123  0:00:35 left", "toy-afd: 40 of 100  student/loss 0.123  0:00:30 left"
    ]  # fmt: skip


def test_a_terminal_gets_one_live_line_below_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    handler = logging.StreamHandler(terminal)
    monkeypatch.setattr(logging.getLogger(), "handlers", [*logging.getLogger().handlers, handler])
    with progress("toy-afd") as show:
        for step in range(1, 5):
            show(step, 4, "student/loss 0.5")
        logging.getLogger("afd_scale").warning("saved a checkpoint")
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", terminal.getvalue())
    assert "\rsaved a checkpoint\n" in shown, "it does not stand behind the bar"
    last = re.split(r"[\r\n]+", shown.strip())[-1]
    assert re.fullmatch(r"toy-afd \S+ 4/4 \S+ student/loss 0.5 *", last)
    assert handler.stream is terminal, "it is given back"
