"""A rank outlives its launcher when that is killed outright; it is then told to stop, as the launcher would have."""

import logging
import os
import signal
import threading

import psutil

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
_TORCHRUN = ("torchrun", "torch.distributed.run", "torch/distributed/run.py")
_DEEPSPEED = ("deepspeed.launcher.launch", "deepspeed/launcher/launch.py")
_RUNNER = ("deepspeed", "deepspeed.launcher.runner", "deepspeed/launcher/runner.py")


def stop_with_launcher() -> None:
    """From now on the end of this process's launcher is a SIGTERM; without a launcher nothing happens."""
    launchers = launchers_of(psutil.Process())
    if launchers:
        threading.Thread(target=_watch, args=(launchers,), name="launcher watch", daemon=True).start()


def launchers_of(process: psutil.Process) -> list[psutil.Process]:
    """torchrun's agent, or DeepSpeed's launcher of this machine and, where it is here, its runner.

    Those behind them are not meant: a shell that is closed leaves what runs with nohup alone.
    """
    parent = process.parent()
    if parent is None or not _is_one_of(parent, _TORCHRUN + _DEEPSPEED):
        return []
    runner = parent.parent() if _is_one_of(parent, _DEEPSPEED) else None
    return [parent] if runner is None or not _is_one_of(runner, _RUNNER) else [parent, runner]


def _watch(launchers: list[psutil.Process]) -> None:
    wait = threading.Event().wait
    while not wait(_LOOK_SECONDS):
        for launcher in launchers:
            if not _lives(launcher):
                log.warning("the launcher (pid %d) is gone: this rank stops", launcher.pid)
                os.kill(os.getpid(), signal.SIGTERM)
                return


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _is_one_of(process: psutil.Process, names: tuple[str, ...]) -> bool:
    """Whether a program, module or script of these names is what it runs; a shell that mentions one is not."""
    try:
        command = process.cmdline()[:4]  # python -u -m MODULE
    except psutil.Error:
        return False
    return any(argument == name or argument.endswith(f"/{name}") for argument in command for name in names)
