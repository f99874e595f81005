"""A process that has torch, DeepSpeed and streaming imported and forks itself for each script that a test starts:
a slow machine imports them for ten seconds. `Forked` of tests/distributed/processes.py asks for it.

What is forked goes on as `python script ...` would, with its own random state, signals and exit. Two things differ:
those modules are there already, and all have one hash seed.
"""

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

# The optimizer is what DeepSpeed's engine imports when it starts, and torch's compiler with it.
MODULES = ("deepspeed", "streaming", "deepspeed.runtime.zero.muon.muon_optimizer", "matplotlib.pyplot",
           "torch.utils.tensorboard", "httpx", "afd_scale.training.trainer", "afd_scale.data.make_shards")  # fmt: skip


def preload() -> None:
    from afd_scale.torchvision_ops import define_torchvision_ops

    define_torchvision_ops()
    for name in MODULES:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "what is forked would lack the other threads"
    gc.collect()
    gc.freeze()  # or each collection would go over all of it, and so copy it


def forked(requests: socket.socket) -> list[str]:
    """Fork for each request until the tests end; comes back in what was forked, with its command."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    while True:
        message, files, _, _ = socket.recv_fds(requests, 1 << 20, 3)
        if not message:
            sys.exit()
        if os.fork() == 0:
            break
        for file in files:
            os.close(file)
    requests.close()
    status, *outputs = files
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if child := os.fork():
        keep(child, status, outputs)
    os.close(status)
    for number, file in enumerate(outputs, start=1):
        os.dup2(file, number)
        os.close(file)
    return become(**json.loads(message))


def keep(child: int, status: int, outputs: list[int]) -> None:
    """Tell the number of a forked process, and how it ended; it does not outlive who asked for it."""
    for file in outputs:
        os.close(file)
    os.write(status, b"%d\n" % child)
    if status in select.select([status, os.pidfd_open(child)], [], [])[0]:
        os.kill(child, signal.SIGKILL)
        os._exit(1)
    os.write(status, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    os._exit(0)


def become(command: list[str], folder: str, environment: dict[str, str], leads: bool) -> list[str]:
    """Take on what a process is given when it starts, and start random numbers anew."""
    if leads:
        os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    # The server has the folder of its file and one PYTHONPATH.
    beside = "" if command[0] == "-c" else str(Path(command[0]).absolute().parent)
    sys.path[:2] = [beside, *filter(None, environment.get("PYTHONPATH", "").split(":"))]
    sys.argv[:] = command[:1] + command[2:] if command[0] == "-c" else command
    tempfile.tempdir = None
    torch.seed()
    np.random.seed()
    return command


if __name__ == "__main__":
    preload()
    command = forked(socket.socket(fileno=int(sys.argv[1])))
    if command[0] == "-c":
        exec(command[1])
    else:
        runpy.run_path(command[0], run_name="__main__")
