"""Start real gloo processes from a test."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")


def torchrun(num_ranks: int, *command: str | Path, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """Run a script on so many ranks; returns the finished process, whatever its exit code."""
    return run(sys.executable, *TORCHRUN, str(num_ranks), *command, timeout=timeout)


def deepspeed(num_ranks: int, *command: str | Path, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """The same under DeepSpeed's launcher."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = Path(sys.executable).with_name("deepspeed")
    return run(launcher, "--num_accelerators", str(num_ranks), "--master_port", port, *command, timeout=timeout)


def run(*command: str | Path, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """Run a command at the root of the source tree, one thread a process."""
    arguments = [str(part) for part in command]
    return subprocess.run(
        arguments, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


@contextmanager
def start(*command: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """The same without waiting; killed at the end, with all that it started, if it still runs."""
    arguments = [str(part) for part in command]
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def leave() -> NoReturn:
    """End a rank whose checks have passed without taking the interpreter down; launch/train.py says why."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def environment() -> dict[str, str]:
    """Of a process that a test starts: one thread, and `tests` can be imported."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
