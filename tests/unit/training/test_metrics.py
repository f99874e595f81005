"""What a run writes of its steps: each step once, whatever happened in between."""

import io
import json
import logging
import sys
from contextlib import suppress

from afd_scale.training.metrics import recording
from tests.disks import small_disk


def _records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _recording(folder, first=1):
    return recording("run", folder, range(first, 101), [], {}, is_main=True)


def _write(folder, steps, first=1):
    with _recording(folder, first) as record:
        for step in steps:
            record(step, {"student/loss": step / 10})


def test_each_write_is_a_line_at_once_and_told_to_the_trackers(tmp_path):
    class Told:
        steps = []

        def metrics(self, step, values):
            self.steps.append((step, dict(values)))

    with recording("run", tmp_path / "run", range(1, 101), [Told()], {}, is_main=True) as record:
        record(10, {"student/loss": 0.5, "rollout/reward_mean": -1})
        assert _records(tmp_path / "run") == [{"step": 10, "student/loss": 0.5, "rollout/reward_mean": -1.0}]
    assert Told.steps == [(10, {"student/loss": 0.5, "rollout/reward_mean": -1})]


def test_a_resumed_run_has_each_step_once(tmp_path):
    _write(tmp_path, [10, 20, 30, 40])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "stu')  # killed while it wrote
    _write(tmp_path, [30, 40, 50], first=21)
    assert [record["step"] for record in _records(tmp_path)] == [10, 20, 30, 40, 50]


def test_a_run_that_starts_anew_forgets_the_old_one(tmp_path):
    _write(tmp_path, [10, 20])
    _write(tmp_path, [10])
    assert [record["step"] for record in _records(tmp_path)] == [10]


def test_values_that_are_not_finite_become_null_and_are_warned_of(tmp_path, caplog):
    with _recording(tmp_path) as record:
        record(3, {"student/loss": float("nan"), "student/gradient_norm": float("inf"), "rollout/x": 1.0})
    assert _records(tmp_path) == [{"step": 3, "student/loss": None, "student/gradient_norm": None, "rollout/x": 1.0}]
    assert "student/loss is nan at step 3" in caplog.text
    assert "student/gradient_norm is inf at step 3" in caplog.text


def test_other_ranks_record_nothing(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with recording("run", tmp_path / "run", range(1, 2), [], {}, is_main=False) as record:
        record(1, {"student/loss": 1.0})
    assert not (tmp_path / "run").exists()
    assert not caplog.records


def test_a_logged_step_is_written_and_told(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    _write(tmp_path, [10, 20, 30])
    caplog.clear()
    with recording("toy-afd", tmp_path, range(21, 101), [], {}, is_main=True) as record:
        record(30, {"student/loss": 0.1234, "rollout/reward_mean": -0.4, "system/gathered_gib": 9.0})
    assert [record["step"] for record in _records(tmp_path)] == [10, 20, 30]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("toy-afd: 30 of 100  student/loss 0.123  rollout/reward_mean -0.4  0:00:0")


def test_a_full_disk_costs_no_lines(tmp_path, caplog):
    """They are kept until there is room, and none is cut."""
    with small_disk(tmp_path / "disk", kib=16) as disk:
        filler = disk / "filler"
        with _recording(disk) as record:
            record(1, {"student/loss": 1.0})
            with suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
            for step in range(2, 201):
                record(step, {"student/loss": float(step)})
            assert [each["step"] for each in _records(disk)] == list(range(1, len(_records(disk)) + 1))
            assert 1 < len(_records(disk)) < 200
            (warning,) = caplog.messages
            assert "metrics.jsonl cannot be written (No space left on device)" in warning
            filler.unlink()
            record(201, {"student/loss": 1.0})
            assert [each["step"] for each in _records(disk)] == list(range(1, 202))
            with suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
            for step in range(202, 402):
                record(step, {"student/loss": 1.0})
        assert "lacks the last" in caplog.messages[-1]


def test_damaged_lines_are_dropped_when_a_run_goes_on(tmp_path, caplog):
    _write(tmp_path, [10, 20, 30])
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(lines[0] + b"\x00\x01\n" + lines[2])
    _write(tmp_path, [40], first=31)
    assert [record["step"] for record in _records(tmp_path)] == [10, 30, 40]
    assert "1 of 3 lines are damaged" in caplog.text
