"""Runs that are told to stop, lose a rank or their launcher, or meet gradients that are not finite."""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.processes import ROOT, TORCHRUN, free_port, on_ranks, start
from tests.distributed.small_run import without_machine, write_small_run

STEPS = 5


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_run(tmp_path_factory.mktemp("stops"), STEPS)


def run(config: Path, name: str, what: str, *overrides: str, ranks: int = 2) -> CompletedProcess[str]:
    """Train under a name, and let something happen in it."""
    return on_ranks(ranks, __file__, what, "--config", config, f"name={name}", *overrides)


def lines(config: Path, name: str) -> list[dict[str, Any]]:
    text = (config.parent / "runs" / name / "metrics.jsonl").read_text()
    return [without_machine(line) for line in map(json.loads, text.splitlines()) if line["step"] > 0]


def last_tensors(config: Path, name: str) -> dict[str, torch.Tensor]:
    last = config.parent / "runs" / name / "checkpoints" / f"step_{STEPS:08d}"
    return {f"{path.relative_to(last)} {key}": tensor for path in sorted(last.rglob("*.safetensors"))
            for key, tensor in load_file(path).items()}  # fmt: skip


@pytest.fixture(scope="module")
def in_peace(config: Path) -> str:
    result = run(config, "in-peace", "nothing")
    assert result.returncode == 0, result.stderr[-3000:]
    return "in-peace"


def same(config: Path, first: str, second: str) -> None:
    assert lines(config, first) == lines(config, second)
    tensors, others = last_tensors(config, first), last_tensors(config, second)
    assert tensors.keys() == others.keys()
    assert len(tensors) > 10
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def test_a_step_that_is_given_up_is_done_again_exactly(config: Path, in_peace: str) -> None:
    """It is when the judge has learned already, and on one of the ranks alone."""
    stopped = run(config, "given-up", "stop in a step")
    assert stopped.returncode == 3, stopped.stderr[-3000:]
    assert "given-up was told to stop and saved step 2; start it again to go on" in stopped.stderr
    assert [line["step"] for line in lines(config, "given-up")] == [1, 2]
    assert run(config, "given-up", "nothing").returncode == 0
    same(config, "given-up", in_peace)


def test_told_to_stop_before_its_first_step_a_run_ends_at_once(config: Path) -> None:
    stopped = run(config, "early", "stop before")
    assert stopped.returncode == 3, stopped.stderr[-3000:]
    assert "early was told to stop, with nothing to save; start it again to go on" in stopped.stderr


def test_told_to_stop_while_its_last_step_is_saved_a_run_saves_it(config: Path) -> None:
    stopped = run(config, "late", "stop in the last save")
    assert stopped.returncode == 3, stopped.stderr[-3000:]
    assert f"late was told to stop and saved step {STEPS}; start it again to go on" in stopped.stderr
    assert last_tensors(config, "late")


@pytest.mark.parametrize(("what", "said"), [
    ("die", r"rank 1 \(\S+, pid \d+\) is gone; its last sign was step 2 for \d+ s, in \S+:\d+ "),
    ("fail", r"rank 1 \(\S+, pid \d+\) failed at step 2 for \d+ s, in .*: RuntimeError: it burns"),
])  # fmt: skip
def test_a_rank_that_is_lost_is_named(config: Path, what: str, said: str) -> None:
    result = run(config, what, what)
    assert result.returncode != 0
    (named,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert re.fullmatch(f"error: rank 0: {said}.*", named), named


def test_ranks_end_with_their_launcher_and_the_run_is_free(config: Path, in_peace: str) -> None:
    folder = config.parent / "runs" / "orphans"
    command = [*TORCHRUN, "2", f"--master-port={free_port()}", ROOT / "launch" / "train.py", "--config", config]
    with start(sys.executable, *command, "name=orphans", "train.steps=1000") as launcher:
        wait_for(lambda: (folder / "metrics.jsonl").exists() and '"step": 2,' in (folder / "metrics.jsonl").read_text())
        ranks = psutil.Process(launcher.pid).children()
        assert len(ranks) == 2
        second = run(config, "orphans", "nothing")
        assert second.returncode == 2
        assert f"one job at a time: pid {ranks[0].pid} on " in second.stderr
        launcher.kill()
        launcher.wait()
        _, alive = psutil.wait_procs(ranks, timeout=60)
        assert not alive
    assert list((folder / "checkpoints").glob("step_*")), "what was done is saved"


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_update_that_is_not_finite_is_left_out_on_all_ranks(config: Path) -> None:
    result = run(config, "skips", "one nan")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "step 3: the gradient of student is not finite, its update is left out (1 in a row)" in result.stderr
    tensors = last_tensors(config, "skips")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    losses = [line["student/loss"] for line in lines(config, "skips")]
    assert losses[2] is None
    assert None not in losses[:2] + losses[3:]


def test_a_run_goes_back_once_when_updates_stay_not_finite(config: Path) -> None:
    settings = ("train.most_skipped_steps=2", "train.save_every=1", "train.keep_checkpoints=9")
    result = run(config, "goes-back", "two nans", *settings)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "step 4: going back to step 2, and on with the data that comes next" in result.stderr
    assert [line["step"] for line in lines(config, "goes-back")] == list(range(1, STEPS + 1))

    result = run(config, "ends", "nans", *settings)
    assert result.returncode == 2
    assert "error: gradients of student must be finite: those of 2 steps in a row to step " in result.stderr
    assert "Traceback" not in result.stderr


def happen(what: str) -> None:
    """Change the program so that something happens in step 2 or 3; the launcher says on which rank."""
    from afd_scale.checkpoint.run_state import RunCheckpoints
    from afd_scale.methods.afd import Afd
    from afd_scale.training import preemption
    from afd_scale.training.evaluator import Evaluator

    finish = RunCheckpoints.finish
    train_student, loss_of, keep_base = Afd._train_student, Afd._student_loss, Evaluator.keep_base
    second, nans = os.environ["RANK"] == "1", {"one nan": 1, "two nans": 2, "nans": 100}.get(what, 0)
    left = [nans]

    def in_a_step(self: Any, rollouts: Any, weight: Any, step: int, update: int) -> Any:
        if second and what == "stop in a step" and step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        if second and what == "die" and step == 2:
            time.sleep(1.5)  # for a sign of it
            os.kill(os.getpid(), signal.SIGKILL)
        if second and what == "fail" and step == 2:
            raise RuntimeError("it burns")
        self.step_now = step
        return train_student(self, rollouts, weight, step, update)

    def loss(self: Any, *arguments: Any) -> Any:
        value, metrics = loss_of(self, *arguments)
        if left[0] and self.step_now >= 3:
            left[0] -= 1
            value = value * float("nan") if second else value
            metrics = {**metrics, "student/loss": value.detach()}
        return value, metrics

    def before(self: Any, policy: Any) -> Any:
        if what == "stop before":
            os.kill(os.getpid(), signal.SIGTERM)
        return keep_base(self, policy)

    def last_save(self: Any) -> None:
        if second and what == "stop in the last save":
            os.kill(os.getpid(), signal.SIGTERM)
        finish(self)

    preemption.LONG_STEP_SECONDS = 0.0
    RunCheckpoints.finish = last_save  # type: ignore[method-assign]
    Afd._train_student, Afd._student_loss, Evaluator.keep_base = in_a_step, loss, before  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "launch"))
    import train

    happen(sys.argv.pop(1))
    train.leave(train.main())
