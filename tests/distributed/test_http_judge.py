"""Runs that a server judges, which hangs, fails and answers nonsense: what they leave, and that they go on exactly.

Run as a script this file is one rank.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.distributed.processes import ROOT, leave, on_ranks
from tests.distributed.small_run import write_small_run
from tests.distributed.test_training import metrics, succeed, without_time
from tests.judge_server import JudgeServer

STEPS, RANKS = 4, 2
Kept = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run of AFD."""
    path = write_small_run(tmp_path_factory.mktemp("configs"), STEPS)
    tree = yaml.safe_load(path.read_text())
    tree["evaluation"] = {"metrics": "none", "samples": 0}
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    server = JudgeServer()
    yield server
    server.close()


def judged(config: Path, server: JudgeServer, name: str, *more: str) -> CompletedProcess[str]:
    """Two ranks; each sends the videos of a step in one request."""
    judge = f"{{name: http, url: '{server.url}', optimizer: null, timeout_seconds: 5, retries: 0}}"
    command = ["--config", config, f"name={name}", f"method.judges.taste={judge}", *more]
    return on_ranks(RANKS, ROOT / "launch" / "train.py", *command)


def alone(config: Path) -> Path:
    """The same without a discriminator."""
    tree = yaml.safe_load(config.read_text())
    method = {name: value for name, value in tree["method"].items() if not name.startswith("discriminator_")}
    path = config.with_name("alone.yaml")
    path.write_text(yaml.safe_dump({**tree, "method": {**method, "discriminator": None}}))
    return path


def runs(config: Path) -> Path:
    return config.parent / "runs"


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step_*"))


def state(run: Path) -> Kept:
    """All networks of the last checkpoint."""
    files = sorted((run / "checkpoints" / f"step_{STEPS:08d}").rglob("*.safetensors"))
    return {f"{file.parent.name}/{file.name}/{name}": x for file in files for name, x in load_file(file).items()}


def the_line(result: CompletedProcess[str], url: str) -> str:
    (line,) = [line for line in result.stderr.splitlines() if url in line]
    assert "Traceback" not in result.stderr
    return line


def test_a_server_that_hangs_ends_the_run_where_it_goes_on_exactly(config: Path, server: JudgeServer) -> None:
    succeed(judged(config, server, "whole"))
    whole = metrics(runs(config) / "whole")
    assert len(server.asked) == STEPS * RANKS
    assert len({line["discriminator/taste/reward_mean"] for line in whole}) == STEPS

    server.asked.clear()
    server.told = {2: "500", RANKS * 2 + 2: "hang"}  # one rank's, in steps 2 and 3, one request of step 2 made twice
    broken = judged(
        config, server, "broken", "method.judges.taste.retries=1", "method.judges.taste.timeout_seconds=1.5"
    )
    assert broken.returncode == 0, "with an attempt left it goes on"
    assert len(server.asked) == STEPS * RANKS + 2

    server.asked.clear()
    server.told = {RANKS * 2: "hang"}
    stopped = judged(config, server, "stopped")
    assert stopped.returncode == 3, stopped.stderr[-3000:]
    assert checkpoints(runs(config) / "stopped") == ["step_00000002"]
    line = the_line(stopped, server.url)
    assert f"stopped ends, step 2 is saved: the judge at {server.url} gave no answer: " in line
    assert line.endswith("attempt 1 of 1, each of 5 s, ended with timed out; start it again to go on")

    server.told = {}
    succeed(judged(config, server, "stopped"))
    kept = state(runs(config) / "whole")
    assert any(name.startswith("discriminator/") for name in kept)
    for name in ("broken", "stopped"):
        assert [without_time(line) for line in metrics(runs(config) / name)] == [without_time(line) for line in whole]
        again = state(runs(config) / name)
        assert kept.keys() == again.keys()
        assert [key for key in kept if not torch.equal(kept[key], again[key])] == []


def test_nonsense_ends_the_run_in_one_line(config: Path, server: JudgeServer) -> None:
    """And a run goes well whose only judge is the server."""
    server.told = {1: "html"}
    path, run = alone(config), runs(config) / "alone"
    ended = judged(path, server, "alone")
    assert ended.returncode == 2, ended.stderr[-3000:]
    said = f"alone ends, no step is finished: the judge at {server.url} must answer"
    assert said in the_line(ended, server.url)
    assert checkpoints(run) == []

    server.asked.clear()
    server.told = {RANKS * 2 + 1: "nan"}
    ended = judged(path, server, "alone")
    assert ended.returncode == 2, ended.stderr[-3000:]
    said = f"alone ends, step 2 is saved: the judge at {server.url} must answer finite numbers"
    assert said in the_line(ended, server.url)
    assert checkpoints(run) == ["step_00000002"]

    server.asked.clear()
    server.told = {0: "nan"}
    saved = (run / "checkpoints" / "step_00000002" / "state.json").stat().st_mtime_ns
    assert judged(path, server, "alone").returncode == 2
    assert (run / "checkpoints" / "step_00000002" / "state.json").stat().st_mtime_ns == saved, "it is there already"

    server.told = {}
    succeed(judged(path, server, "alone"))
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(line["student/gradient_norm"] > 0 and "discriminator/loss" not in line for line in lines)


def check_agreement() -> None:
    """Every rank: each fails in its own way, and all raise what the first one does."""
    from afd_scale.parallel.launchers import launched_as
    from afd_scale.parallel.ranks import start_ranks
    from afd_scale.types import JudgeError, UnreachableJudgeError

    with start_ranks(launched_as(os.environ), timeout_minutes=1) as ranks:

        def fail() -> None:
            raise (UnreachableJudgeError if ranks.rank == 0 else JudgeError)(f"rank {ranks.rank}")

        with pytest.raises(UnreachableJudgeError, match="rank 0"):
            ranks.run_on_all(fail)


def test_ranks_that_fail_in_their_own_ways_agree() -> None:
    succeed(on_ranks(RANKS, __file__))


if __name__ == "__main__":
    check_agreement()
    leave()
