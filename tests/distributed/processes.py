"""Start real gloo processes from a test."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import NoReturn

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")


def torchrun(num_ranks: int, *command: str | Path, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """Run a script on so many ranks; returns the finished process, whatever its exit code."""
    return run(sys.executable, *TORCHRUN, str(num_ranks), *command, timeout=timeout)


def on_ranks(num_ranks: int, *command: str | Path, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """The same without a launcher, which would import torch for seconds before the ranks start to.

    When a rank fails the others are killed, as launchers do.
    """
    arguments = [sys.executable, *(str(part) for part in command)]
    world = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": free_port()}  # fmt: skip
    with ExitStack() as stack:
        outputs = [[stack.enter_context(TemporaryFile("w+")) for _ in range(2)] for _ in range(num_ranks)]
        ranks = [
            subprocess.Popen(arguments, cwd=ROOT, env={**environment(), **world, "RANK": str(r), "LOCAL_RANK": str(r)},
                             stdout=outputs[r][0], stderr=outputs[r][1])
            for r in range(num_ranks)
        ]  # fmt: skip
        try:
            code = _wait(ranks, time.monotonic() + timeout)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        texts = []
        for kind in zip(*outputs):
            for file in kind:
                file.seek(0)
            texts.append("".join(file.read() for file in kind))
    return subprocess.CompletedProcess(arguments, code, *texts)


def _wait(ranks: list[subprocess.Popen[bytes]], deadline: float) -> int:
    """Until all have ended or one has failed: its code, or 0."""
    while True:
        codes = [process.poll() for process in ranks]
        failed = [code for code in codes if code]
        if failed or None not in codes:
            time.sleep(1.0 if failed and None in codes else 0.0)  # the others say why too
            return failed[0] if failed else 0
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks have not ended: {codes}")
        time.sleep(0.05)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def deepspeed(num_ranks: int, *command: str | Path, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """The same under DeepSpeed's launcher."""
    launcher = Path(sys.executable).with_name("deepspeed")
    return run(launcher, "--num_accelerators", str(num_ranks), "--master_port", free_port(), *command, timeout=timeout)


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
