"""Machines made of Linux namespaces: each has its own name, network, processes, hosts file, /run and /dev/shm.

They share the file system, as nodes of a cluster do. Nothing of the real machine is changed, and all of a machine is
gone with its first process.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.processes import ROOT, environment

_NAMESPACES = ("--net", "--mount", "--uts", "--pid")
NETWORK = "10.77.0."
NEEDED = ("ip", "unshare", "nsenter", "mount", "hostname")


@dataclass(frozen=True)
class Machine:
    """One of them.

    Attributes:
        process: number of its first process.
    """

    name: str
    address: str
    process: int

    def enter(self, *command: str | Path) -> list[str]:
        """The command line that runs a command there."""
        return ["nsenter", "--target", str(self.process), *_NAMESPACES, f"--wd={ROOT}", *map(str, command)]

    def run(self, *command: str | Path, timeout: float = 120, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run a command there, at the root of the source tree, to its end.

        Raises:
            subprocess.TimeoutExpired: it is killed then; what it has started goes with the machine.
        """
        return subprocess.run(
            self.enter(*command), env=local_environment(**settings), capture_output=True, text=True,
            timeout=timeout, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def must(self, *command: str | Path) -> str:
        """What a command prints there that has to succeed."""
        done = self.run(*command)
        assert done.returncode == 0, f"{command} on {self.name}: {done.stdout}{done.stderr}"
        return done.stdout


def lacking(*programs: str) -> str | None:
    """Why tests with machines and these programs cannot run here; None where they can."""
    if (reason := lacking_programs(*NEEDED, *programs)) is not None:
        return reason
    if os.geteuid() != 0:
        return "needs root"
    probe = subprocess.run(
        ["unshare", *_NAMESPACES, "--fork", "--mount-proc", "true"], capture_output=True, check=False
    )
    return None if probe.returncode == 0 else f"namespaces are not allowed: {probe.stderr.decode().strip()}"


def lacking_programs(*programs: str) -> str | None:
    """Which of these are not installed, as a reason; None where all are."""
    absent = [name for name in programs if shutil.which(name, path=_path()) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def local_environment(**settings: str) -> dict[str, str]:
    """Of a process on a machine: this interpreter's programs first, and temporary files of its own."""
    bin_folder = str(Path(sys.executable).parent)
    return environment(PATH=f"{bin_folder}:{_path()}", TMPDIR="/run", **settings)


@contextmanager
def machines(
    folder: Path, names: Sequence[str], own_name_is: Mapping[str, str] | None = None
) -> Iterator[list[Machine]]:
    """Machines that reach one another by name.

    Args:
        folder: for their hosts files.
        own_name_is: by machine, what its own name stands for on itself; otherwise its address, as for the others.
    """
    addresses = {name: f"{NETWORK}{number}" for number, name in enumerate(names, 1)}
    with ExitStack() as stack:
        all_ = [stack.enter_context(_machine(name, address)) for name, address in addresses.items()]
        _connect(all_)
        for machine in all_:
            known = addresses | {machine.name: (own_name_is or {}).get(machine.name, machine.address)}
            hosts = folder / f"hosts-{machine.name}"
            hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in known.items()))
            machine.must("mount", "--bind", hosts, "/etc/hosts")
        yield all_


@contextmanager
def _machine(name: str, address: str) -> Iterator[Machine]:
    # bash, because it reaps what others leave behind; it sees its input end with this process, whatever ends that.
    command = ["unshare", *_NAMESPACES, "--fork", "--kill-child", "--mount-proc", "bash", "-c", "read"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as outer:
        try:
            machine = Machine(name, address, _child_of(outer.pid))
            machine.must("hostname", name)
            machine.must("ip", "link", "set", "lo", "up")
            for own in ("/run", "/dev/shm"):
                machine.must("mount", "-t", "tmpfs", "tmpfs", own)
            yield machine
        finally:
            outer.kill()  # and with it, by --kill-child, everything there


def _child_of(process: int) -> int:
    children = Path(f"/proc/{process}/task/{process}/children")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        # Until it is bash, --mount-proc may not have happened.
        for child in children.read_text().split():
            if Path(f"/proc/{child}/comm").read_text().strip() == "bash":
                return int(child)
        time.sleep(0.02)
    raise TimeoutError("unshare has started no process")


def _connect(all_: Sequence[Machine]) -> None:
    """A network cable between two machines; one alone has a network card that leads nowhere."""
    first, *others = all_
    if others:
        (second,) = others
        _must("ip", "link", "add", "eth0", "netns", str(first.process), "type", "veth",
              "peer", "name", "eth0", "netns", str(second.process))  # fmt: skip
    else:
        first.must("ip", "link", "add", "eth0", "type", "dummy")
    for machine in all_:
        machine.must("ip", "addr", "add", f"{machine.address}/24", "dev", "eth0")
        machine.must("ip", "link", "set", "eth0", "up")


def _must(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=local_environment())
    assert done.returncode == 0, f"{command}: {done.stderr}"


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


@contextmanager
def sshd_on(all_: Sequence[Machine], folder: Path) -> Iterator[None]:
    """Let `ssh NAME` lead from each machine to each, without a password or a question."""
    for key in ("user_key", "host_key"):
        _must("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
    allowed = folder / "authorized_keys"
    allowed.write_bytes((folder / "user_key.pub").read_bytes())
    allowed.chmod(0o600)
    client = folder / "ssh_config"
    client.write_text(
        f"Host *\n  IdentityFile {folder / 'user_key'}\n  StrictHostKeyChecking no\n"
        "  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
    for machine in all_:
        server = folder / f"sshd_config-{machine.name}"
        server.write_text(
            f"ListenAddress 0.0.0.0\nHostKey {folder / 'host_key'}\nAuthorizedKeysFile {allowed}\nPidFile none\n"
            "PermitRootLogin yes\nStrictModes no\nPasswordAuthentication no\nUsePAM no\nSetEnv TMPDIR=/run\n"
        )
        machine.must("mkdir", "/run/sshd")
        machine.must("mount", "--bind", client, "/etc/ssh/ssh_config")
        sshd = shutil.which("sshd", path=_path())
        assert sshd is not None, "lacking() has looked"
        machine.must(sshd, "-f", server, "-E", folder / f"sshd-{machine.name}.log")
        _wait_for(machine, 22)
    yield


def _wait_for(machine: Machine, port: int) -> None:
    probe = f"import socket; socket.create_connection(('{machine.address}', {port}), 1)"
    deadline = time.monotonic() + 10
    while machine.run(sys.executable, "-c", probe).returncode != 0:
        assert time.monotonic() < deadline, f"{machine.name} does not listen on port {port}"
