"""Start real gloo processes from a test."""

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO, NoReturn

import torch

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")


class Forked:
    """`python command ...` as subprocess.Popen has it, forked where torch is imported (tests/fork_server.py)."""

    def __init__(self, command: list[str], env: dict[str, str], stdout: int, stderr: int, leads: bool = False) -> None:
        job = {"command": command, "folder": str(ROOT), "environment": env, "leads": leads}
        status, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(_server(), [json.dumps(job).encode()], [theirs.fileno(), stdout, stderr])
        self._status = status.makefile()
        status.close()
        self.pid = int(self._status.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            ended = select.poll()  # select itself takes no file numbers above 1023, which a long session reaches
            ended.register(self._status, select.POLLIN | select.POLLHUP)
            if not ended.poll(None if timeout is None else 1000 * timeout):
                raise subprocess.TimeoutExpired("forked process", timeout or 0)
            self.returncode = int(self._status.readline())
            self._status.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it may end just now
            if self.poll() is None:
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def fork(
    command: list[str], env: dict[str, str], stdout: int, stderr: int, leads: bool = False
) -> Forked | subprocess.Popen[bytes]:
    """Start `python command ...` at the root of the source tree; a new process where there is a GPU, which does not
    survive a fork."""
    if torch.cuda.is_available():
        return subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=env, stdout=stdout, stderr=stderr, start_new_session=leads
        )
    return Forked(command, env, stdout, stderr, leads)


@cache
def _server() -> socket.socket:
    """The end of a socket whose other end forks; for all tests of a session."""
    requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, str(ROOT / "tests" / "fork_server.py"), str(theirs.fileno())]
        server = subprocess.Popen(command, env=environment(), pass_fds=[theirs.fileno()], start_new_session=True)
    atexit.register(server.wait)
    atexit.register(requests.close)
    return requests


def torchrun(num_ranks: int, *command: str | Path, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """Run a script on so many ranks; returns the finished process, whatever its exit code."""
    return run_fresh(sys.executable, *TORCHRUN, str(num_ranks), *command, timeout=timeout)


def on_ranks(num_ranks: int, *command: str | Path, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """The same without a launcher, forked, so that no rank imports torch.

    When a rank fails the others are killed, as launchers do.
    """
    world = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": free_port()}  # fmt: skip
    arguments = [str(part) for part in command]
    return side_by_side(
        [arguments] * num_ranks,
        [environment(**world, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(num_ranks)],
        timeout,
    )


def side_by_side(
    commands: list[list[str]], environments: list[dict[str, str]], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Scripts at the same time: their outputs one after the other, and the code of the first that failed."""
    with ExitStack() as stack:
        outputs = [[stack.enter_context(TemporaryFile("w+")) for _ in range(2)] for _ in commands]
        ranks = [
            fork(command, env, *(file.fileno() for file in files))
            for command, env, files in zip(commands, environments, outputs)
        ]
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
    return subprocess.CompletedProcess(commands[0], code, *texts)


def _wait(ranks: list[Forked | subprocess.Popen[bytes]], deadline: float) -> int:
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
    return run_fresh(
        launcher, "--num_accelerators", str(num_ranks), "--master_port", free_port(), *command, timeout=timeout
    )


def run(*command: str | Path, timeout: float = 280, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a command at the root of the source tree, one thread a process; what python runs is forked."""
    program, *arguments = [str(part) for part in command]
    if program == sys.executable and arguments[0] != "-m":
        return side_by_side([arguments], [environment(**settings)], timeout)
    return run_fresh(*command, timeout=timeout)


@contextmanager
def forking(
    *command: str | Path, leads: bool = False, **settings: str
) -> Iterator[tuple[Forked | subprocess.Popen[bytes], BinaryIO]]:
    """`python command ...` without waiting, and what it prints; killed at the end if it still runs."""
    reading, writing = os.pipe()
    with open(reading, "rb") as printed:
        try:
            process = fork([str(part) for part in command], environment(**settings), writing, 2, leads)
        finally:
            os.close(writing)
        try:
            yield process, printed
        finally:
            process.kill()
            process.wait()


def run_fresh(*command: str | Path, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """The same as a user has it, in a new process."""
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


def environment(**settings: str) -> dict[str, str]:
    """Of a process that a test starts: one thread, and `tests` can be imported."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **settings}
