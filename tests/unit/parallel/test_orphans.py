"""Which processes are a rank's launcher."""

from types import SimpleNamespace
from typing import Any

import pytest

from afd_scale.parallel.orphans import launchers_of

SHELL = ["bash", "-c", "cd /home/me/torchrun && deepspeed.launcher.launch"]
TORCHRUN = ["/opt/venv/bin/python", "/opt/venv/bin/torchrun", "--standalone", "launch/train.py"]
LAUNCH = ["/opt/venv/bin/python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x"]
RUNNER = ["/opt/venv/bin/python", "/opt/venv/bin/deepspeed", "launch/train.py"]


def process(*commands: list[str]) -> Any:
    """One whose parent, and its parent, and so on, were started so."""
    parent = process(*commands[1:]) if len(commands) > 1 else None
    return SimpleNamespace(cmdline=lambda: commands[0], parent=lambda: parent)


@pytest.mark.parametrize(
    ("parents", "watched"),
    [
        ((SHELL,), 0),
        ((TORCHRUN, SHELL), 1),
        ((["python", "-m", "torch.distributed.run", "x.py"], SHELL), 1),
        ((LAUNCH, RUNNER, SHELL), 2),
        ((LAUNCH, SHELL), 1),  # on a machine of its own: ssh is behind it
    ],
)
def test_launchers_are_watched_and_shells_are_not(parents: tuple[list[str], ...], watched: int) -> None:
    assert len(launchers_of(process(["python", "launch/train.py"], *parents))) == watched
