"""What the command lines of tools share."""

import pytest

from afd_scale.config.command_line import Parser


def test_bad_usage_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        Parser("what").parse_args(["--nonsense"])
    assert capsys.readouterr().err == "error: unrecognized arguments: --nonsense\n"
