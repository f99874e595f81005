"""What the command lines of tools share."""

import io

import pytest

from afd_scale.config import command_line
from afd_scale.config.command_line import Parser, progress_bar


def test_bad_usage_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        Parser("what").parse_args(["--nonsense"])
    assert capsys.readouterr().err == "error: unrecognized arguments: --nonsense\n"


def test_a_log_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(command_line.time, "monotonic", lambda: now[0])
    with progress_bar("Clips") as on_clips:
        for done in range(1, 41):
            now[0] += 1.0
            on_clips(done, 40)
    assert capsys.readouterr().err.splitlines() == ["Clips: 15 of 40", "Clips: 30 of 40"]
    with progress_bar("Clips", shown=False) as on_clips:
        now[0] += 100.0
        on_clips(1, 2)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with progress_bar("Clips") as on_clips:
        on_clips(1, 2)
    assert "Clips" in terminal.getvalue()
    assert "1/2" in terminal.getvalue()
