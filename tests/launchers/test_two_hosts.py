"""`deepspeed --hostfile` over two machines with ssh between them."""

import subprocess
from pathlib import Path

import pytest

from tests.distributed.processes import ROOT
from tests.launchers.machines import Machine, lacking, machines, sshd_on
from tests.launchers.runs import shortest_run, summary

TRAIN = ROOT / "launch" / "train.py"
STEPS = 2
REASON = lacking("sshd", "ssh", "ssh-keygen", "pdsh")
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.slow]


def test_hostfile_leads_a_run_to_its_end_where_own_names_are_loopback(tmp_path: Path) -> None:
    own_names = {"node-a": "127.0.0.1", "node-b": "127.0.1.1"}
    config = shortest_run(tmp_path, STEPS)
    with machines(tmp_path, ["node-a", "node-b"], own_names) as both, sshd_on(both, tmp_path):
        done = hostfile_run(both[0], tmp_path, "--config", config)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert summary(tmp_path) == (2, STEPS)


def hostfile_run(machine: Machine, folder: Path, *options: str | Path) -> subprocess.CompletedProcess[str]:
    """`deepspeed --hostfile` on a machine, one rank on each; variables by the file that docs/cluster.md names."""
    hosts, variables = folder / "hosts", folder / "variables"
    hosts.write_text("node-a slots=1\nnode-b slots=1\n")
    variables.write_text("OMP_NUM_THREADS=1\n")
    return machine.run("deepspeed", "--hostfile", hosts, TRAIN, *options, timeout=280, DS_ENV_FILE=str(variables))
