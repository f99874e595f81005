"""Open MPI: `mpirun` on one machine, and DeepSpeed's `--launcher openmpi` over two."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.processes import ROOT, environment, free_port
from tests.launchers.machines import lacking, lacking_programs, machines, sshd_on
from tests.launchers.runs import shortest_run, summary

TRAIN = ROOT / "launch" / "train.py"
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.skipif(lacking_programs("mpirun") is not None, reason=str(lacking_programs("mpirun")))
def test_mpirun_starts_a_rank_in_each_process(tmp_path: Path) -> None:
    config = shortest_run(tmp_path, steps=2)
    done = subprocess.run(
        ["mpirun", "-n", "2", "--oversubscribe", sys.executable, TRAIN, "--config", config],
        cwd=ROOT, env=environment(**AS_ROOT, MASTER_PORT=free_port()), capture_output=True, text=True, check=False,
        timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert summary(tmp_path) == (2, 2)


@pytest.mark.skipif(
    (reason := lacking("sshd", "ssh", "ssh-keygen", "mpirun", "ompi_info")) is not None, reason=str(reason)
)
def test_deepspeed_leads_a_run_over_two_machines_by_openmpi(tmp_path: Path) -> None:
    config = shortest_run(tmp_path, steps=2)
    hosts, variables = tmp_path / "hosts", tmp_path / "variables"
    hosts.write_text("node-a slots=1\nnode-b slots=1\n")
    own_names = {"node-a": "127.0.1.1", "node-b": "127.0.1.1"}
    with machines(tmp_path, ["node-a", "node-b"], own_names) as both, sshd_on(both, tmp_path):
        variables.write_text(f"OMP_NUM_THREADS=1\nMASTER_ADDR={both[0].address}\n")
        done = both[0].run(
            "deepspeed", "--hostfile", hosts, "--launcher", "openmpi", TRAIN, "--config", config, timeout=280,
            DS_ENV_FILE=str(variables), **AS_ROOT,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert summary(tmp_path) == (2, 2)
