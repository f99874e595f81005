"""SLURM on two machines: srun; both templates to the end, past a time limit, preempted, requeued, failed."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.processes import ROOT
from tests.launchers.machines import lacking
from tests.launchers.runs import held_run, shortest_run, summary, write_hold
from tests.launchers.slurm import NEEDED, Cluster, slurm

SINGLE, MULTI = (ROOT / "launch" / "slurm" / f"{name}_node.sbatch" for name in ("single", "multi"))
# Over what the templates say for real nodes.
SMALL = ("--gpus-per-node=1", "--cpus-per-task=1", "--mem=0")
VENV = sys.prefix
REASON = lacking(*NEEDED)
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Each machine's own name stands for 127.0.1.1 on itself, as Debian has it."""
    own_names = {"node-a": "127.0.1.1", "node-b": "127.0.1.1"}
    with slurm(tmp_path_factory.mktemp("slurm"), ["node-a", "node-b"], own_names) as running:
        yield running


def test_nothing_is_lost_by_a_time_limit_in_a_long_step_nor_by_a_preemption(cluster: Cluster, tmp_path: Path) -> None:
    config, hold = held_run(tmp_path, steps=12, batch=24, micro_batch=1)  # two ranks with twelve micro-batches each
    write_hold(hold, 0.5)
    options = ("--signal=TERM@60", "--time=20", MULTI, "--config", config)
    grace = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "30"}  # half of the step
    job = cluster.submit(*SMALL, *options, VENV=VENV, PROCESSES="1", **grace)
    cluster.wait_for_line(job, "2 of 12")
    write_hold(hold, 5)  # a step of a minute
    cluster.must("scontrol", "update", f"JobId={job}", "TimeLimit=2")  # from its start; the signal comes within 30 s
    assert cluster.wait_for(job, "PENDING")["Restarts"] == "1"
    assert "was told to stop" in cluster.log(job)
    finished = last_step(cluster.log(job))
    cluster.must("scontrol", "update", f"JobId={job}", "TimeLimit=20")
    write_hold(hold, 0.5)
    cluster.wait_for_line(job, f"resumes after step {finished} ")
    cluster.wait_for_line(job, f"{finished + 2} of 12")

    preempt(cluster)
    assert cluster.facts(job)["Restarts"] == "2"
    finished = last_step(cluster.log(job))
    hold.unlink()
    cluster.wait_for(job, "COMPLETED")
    assert f"resumes after step {finished} " in cluster.log(job)
    assert summary(tmp_path) == (2, 12)


def test_run_goes_on_that_was_preempted_as_it_started_and_requeued_as_it_trained(
    cluster: Cluster, tmp_path: Path
) -> None:
    config, hold = held_run(tmp_path, steps=12, batch=4, save_every=1)
    write_hold(hold, 1)
    job = cluster.submit(*SMALL, SINGLE, "--config", config, VENV=VENV, PROCESSES="2")
    cluster.wait_for_line(job, "Setting accelerator")  # what DeepSpeed says when it is imported
    preempt(cluster)
    cluster.wait_for_line(job, "saved ")
    assert cluster.facts(job)["Restarts"] == "1"
    cluster.must("scontrol", "requeue", str(job))
    hold.unlink()
    assert cluster.wait_for(job, "COMPLETED")["Restarts"] == "2"
    assert "resumes after step" in cluster.log(job)
    assert summary(tmp_path) == (2, 12)


@pytest.mark.parametrize("template", [SINGLE, MULTI], ids=["single", "multi"])
def test_failed_run_is_not_requeued(template: Path, cluster: Cluster, tmp_path: Path) -> None:
    config = shortest_run(tmp_path, steps=2)
    job = cluster.submit(*SMALL, template, "--config", config, "student.num_heads=7", VENV=VENV, PROCESSES="1")
    facts = cluster.wait_for(job, "FAILED")
    assert facts["Restarts"] == "0"
    assert facts["ExitCode"] != "0:0"
    assert "error: student.num_heads (7)" in cluster.log(job)


def test_srun_starts_a_rank_in_each_task(cluster: Cluster, tmp_path: Path) -> None:
    config = shortest_run(tmp_path, steps=2)
    tasks = ("--nodes=2", "--ntasks=2", "--gpus-per-task=1", "--kill-on-bad-exit=1")
    cluster.must("srun", *tasks, sys.executable, ROOT / "launch" / "train.py", "--config", config, MASTER_ADDR="node-a")
    assert summary(tmp_path) == (2, 2)


def preempt(cluster: Cluster) -> None:
    """Let a more urgent job have the whole cluster for a while."""
    urgent = cluster.submit("--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 1")
    cluster.wait_for(urgent, "COMPLETED")


def last_step(log: str) -> int:
    """The last that a log tells of."""
    return int(re.findall(r"afd: (\d+) of", log)[-1])
