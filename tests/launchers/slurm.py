"""A SLURM cluster of such machines, with its own configuration, keys and state in a folder."""

import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.launchers.machines import Machine, machines

NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "munged")
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")

_GPUS = ("/dev/null", "/dev/zero")  # some device has to be there for each; nobody opens it
# What is fast here and slow on a real cluster is said; the rest is what a small cluster has.
_CONFIG = """
ClusterName=test
SlurmctldHost={first}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its credential has run out, by default two minutes.
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
ReturnToService=2
KillWait=5
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmdSpoolDir=/run/slurmd
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%h.log
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


@dataclass(frozen=True)
class Cluster:
    """A running one."""

    nodes: Sequence[Machine]
    folder: Path

    def call(self, *command: str | Path, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run a command of SLURM on the first node."""
        return self.nodes[0].run(*command, SLURM_CONF=str(self.folder / "slurm.conf"), **settings)

    def must(self, *command: str | Path, **settings: str) -> str:
        """What a command of SLURM prints that has to succeed."""
        done = self.call(*command, **settings)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}\n{self.daemons()}"
        return done.stdout

    def submit(self, *command: str | Path, **settings: str) -> int:
        """`sbatch command`; the job's number. Its log is `job-NUMBER.log` in the cluster's folder."""
        log = self.folder / "job-%j.log"
        return int(self.must("sbatch", "--parsable", f"--output={log}", *command, **settings).strip())

    def log(self, job: int) -> str:
        """What a job has printed."""
        path = self.folder / f"job-{job}.log"
        return path.read_text() if path.exists() else ""

    def facts(self, job: int) -> dict[str, str]:
        """What `scontrol show job` says."""
        return dict(re.findall(r"(\w+)=(\S*)", self.must("scontrol", "show", "job", str(job))))

    def wait_for(self, job: int, *states: str, timeout: float = 150) -> dict[str, str]:
        """Wait until a job is in one of these states; its facts.

        Raises:
            AssertionError: it does not get there, or ends in another way; with what it has printed.
        """
        deadline = time.monotonic() + timeout
        while True:
            facts = self.facts(job)
            state = facts["JobState"]
            if state in states:
                return facts
            assert state not in ENDED, f"{state}, not {states}\n{self._found(job)}"
            assert time.monotonic() < deadline, f"{state}, not {states}\n{self._found(job)}"
            time.sleep(0.2)

    def wait_for_line(self, job: int, line: str, timeout: float = 150) -> None:
        """Wait until a job has printed something."""
        deadline = time.monotonic() + timeout
        while line not in self.log(job):
            assert self.facts(job)["JobState"] not in ENDED, f"{line!r} is not printed\n{self._found(job)}"
            assert time.monotonic() < deadline, f"{line!r} is not printed\n{self._found(job)}"
            time.sleep(0.2)

    def _found(self, job: int) -> str:
        return f"job {job} has printed:\n{self.log(job)[-4000:]}\n{self.daemons()}"

    def daemons(self) -> str:
        """The last of what they say."""
        paths = sorted(self.folder.glob("slurm*.log"))
        return "\n".join(f"{path.name}:\n{path.read_text()[-800:]}" for path in paths)


@contextmanager
def slurm(folder: Path, names: Sequence[str], own_name_is: Mapping[str, str] | None = None) -> Iterator[Cluster]:
    """A cluster; the first machine has the controller as well."""
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(bytes(range(256)) * 4)
    key.chmod(0o400)
    with machines(folder, names, own_name_is) as all_:
        nodes = "\n".join(
            f"NodeName={each.name} NodeAddr={each.address} CPUs=8 RealMemory=4000 Gres=gpu:{len(_GPUS)} State=UNKNOWN"
            for each in all_
        )
        (folder / "slurm.conf").write_text(
            _CONFIG.format(first=f"{names[0]}({all_[0].address})", folder=folder, nodes=nodes)
        )
        (folder / "gres.conf").write_text("".join(f"Name=gpu File={file}\n" for file in _GPUS))
        (folder / "cgroup.conf").write_text("")
        cluster = Cluster(all_, folder)
        for each in all_:
            each.must("mkdir", "-p", "/run/munge", "/run/slurmd")
            each.must("chmod", "755", "/run/munge")
            each.must("munged", "--force", f"--key-file={key}", f"--log-file={folder}/munged-{each.name}.log",
                      "--seed-file=/run/munge/seed", "--pid-file=/run/munge/pid")  # fmt: skip
        cluster.must("slurmctld", "-f", folder / "slurm.conf")
        for each in all_:
            each.must("slurmd", "-f", folder / "slurm.conf")
        deadline = time.monotonic() + 30
        while cluster.call("sinfo", "--noheader", "--format=%T", "--partition=low").stdout.strip() != "idle":
            assert time.monotonic() < deadline, cluster.daemons()
            time.sleep(0.2)
        yield cluster
