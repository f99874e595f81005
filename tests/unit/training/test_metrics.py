"""What a run writes of its steps: each step once, whatever happened in between."""

import io
import json
import logging
import re
import sys
from contextlib import closing

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from afd_scale.training.metrics import MetricsWriter, Progress


def _records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _write(folder, steps, **options):
    with closing(MetricsWriter(folder, enabled=True, **options)) as writer:
        for step in steps:
            writer.write(step, {"student/loss": step / 10})


def test_each_write_is_a_line_at_once_and_a_tensorboard_scalar(tmp_path):
    writer = MetricsWriter(tmp_path / "run", enabled=True)
    writer.write(10, {"student/loss": 0.5, "rollout/reward_mean": -1})
    assert _records(tmp_path / "run") == [{"step": 10, "student/loss": 0.5, "rollout/reward_mean": -1.0}]
    writer.close()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("student/loss")] == [(10, 0.5)]


def test_a_resumed_run_has_each_step_once(tmp_path):
    _write(tmp_path, [10, 20, 30, 40])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "stu')  # killed while it wrote
    _write(tmp_path, [30, 40, 50], resume_step=20)
    assert [record["step"] for record in _records(tmp_path)] == [10, 20, 30, 40, 50]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("student/loss")] == [10, 20, 30, 40, 50]


def test_a_run_that_starts_anew_forgets_the_old_one(tmp_path):
    _write(tmp_path, [10, 20])
    _write(tmp_path, [10])
    assert [record["step"] for record in _records(tmp_path)] == [10]


def test_values_that_are_not_finite_become_null_and_are_warned_of(tmp_path, caplog):
    with closing(MetricsWriter(tmp_path, enabled=True)) as writer:
        writer.write(3, {"student/loss": float("nan"), "student/gradient_norm": float("inf"), "rollout/x": 1.0})
    assert _records(tmp_path) == [{"step": 3, "student/loss": None, "student/gradient_norm": None, "rollout/x": 1.0}]
    assert "student/loss is nan at step 3" in caplog.text
    assert "student/gradient_norm is inf at step 3" in caplog.text


def test_other_ranks_write_nothing(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    writer, progress = MetricsWriter(tmp_path / "run", enabled=False), Progress("run", total=1, enabled=False)
    writer.write(1, {"student/loss": 1.0})
    progress.update(1, {"student/loss": 1.0})
    writer.close()
    progress.close()
    assert not (tmp_path / "run").exists()
    assert not caplog.records


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""
    now = [100.0]
    monkeypatch.setattr("afd_scale.training.metrics.time.monotonic", lambda: now[0])
    return now


def test_without_a_terminal_progress_is_a_log_line_every_few_steps(caplog, monkeypatch, clock):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with closing(Progress("toy-afd", total=100, enabled=True, start=20, log_every=10)) as progress:
        for step in range(21, 41):
            clock[0] += 0.5
            logged = {"student/loss": 0.1234, "rollout/reward_mean": -0.4, "system/step_seconds": 9.0}
            progress.update(step, logged if step == 30 else None)
    assert [record.getMessage() for record in caplog.records] == [
        "toy-afd  30/100  student/loss 0.123  rollout/reward_mean -0.4  2 steps/s  0:00:35 left",
        "toy-afd  40/100  student/loss 0.123  rollout/reward_mean -0.4  2 steps/s  0:00:30 left",
    ]


def test_slow_steps_are_told_in_seconds(caplog, monkeypatch, clock):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with closing(Progress("wan", total=3, enabled=True)) as progress:
        for step in (1, 2, 3):
            clock[0] += 90
            progress.update(step)
    assert [record.getMessage() for record in caplog.records] == ["wan  3/3  90 s/step  0:00:00 left"]


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_progress_is_one_live_line_below_the_log(caplog, monkeypatch, clock):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sys, "stderr", terminal := _Terminal())
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    handler = logging.StreamHandler(terminal)
    monkeypatch.setattr(logging.getLogger(), "handlers", [*logging.getLogger().handlers, handler])
    with closing(Progress("toy-afd", total=4, enabled=True, log_every=1)) as progress:
        for step in range(1, 5):
            clock[0] += 0.25
            progress.update(step, {"student/loss": 0.5})
        logging.getLogger("afd_scale").info("saved a checkpoint")
    assert [record.getMessage() for record in caplog.records] == ["saved a checkpoint"]
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", terminal.getvalue())
    assert "\rsaved a checkpoint\n" in shown, "it does not stand behind the bar"
    last = re.split(r"[\r\n]+", shown.strip())[-1]
    assert re.fullmatch(r"toy-afd \S+ 4/4 student/loss 0.5  4 steps/s  0:00:00 left *", last)
    assert handler.stream is terminal, "it is given back"
