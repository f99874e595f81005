"""Start real gloo processes from a test."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def torchrun(num_ranks: int, *command: str | Path, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """Run a script on so many ranks; returns the finished process, whatever its exit code."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
    return run(sys.executable, *launcher, *command, timeout=timeout)


def deepspeed(num_ranks: int, *command: str | Path, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """The same under DeepSpeed's launcher."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = Path(sys.executable).with_name("deepspeed")
    return run(launcher, "--num_accelerators", str(num_ranks), "--master_port", port, *command, timeout=timeout)


def run(*command: str | Path, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """Run a command at the root of the source tree, one thread a process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
