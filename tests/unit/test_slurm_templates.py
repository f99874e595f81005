"""What the SLURM templates hand to the program; with a real SLURM they run in tests/launchers."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("template", ["single_node", "multi_node"])
@pytest.mark.parametrize(("restarts", "last"), [("0", "train.resume=false"), ("1", "train.resume=true")])
def test_a_requeued_job_does_not_begin_anew_again(template: str, restarts: str, last: str, tmp_path: Path) -> None:
    programs = {"activate": "", "scontrol": "", "srun": f'printf "%s\\n" "$@" > {tmp_path}/said'}
    (tmp_path / "bin").mkdir()
    for name, body in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin", "VENV": str(tmp_path), "SLURM_SUBMIT_DIR": str(ROOT), "PROCESSES": "1",
        "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a", "SLURM_CPUS_PER_TASK": "2", "SLURM_RESTART_COUNT": restarts,
        "TMPDIR": str(tmp_path),
    }  # fmt: skip
    command = ["bash", str(ROOT / "launch" / "slurm" / f"{template}.sbatch"), "--config", "x", "train.resume=false"]
    subprocess.run(command, env=environment, check=True)
    assert (tmp_path / "said").read_text().splitlines()[-1] == last


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (3, True)])
def test_a_task_of_a_study_that_was_told_to_stop_goes_on_later(code: int, requeued: bool, tmp_path: Path) -> None:
    programs = {"activate": "", "scontrol": f'echo "$@" > {tmp_path}/asked',
                "srun": f'printf "%s\\n" "$@" > {tmp_path}/said; exit {code}'}  # fmt: skip
    (tmp_path / "bin").mkdir()
    for name, body in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "VENV": str(tmp_path), "SLURM_SUBMIT_DIR": str(ROOT),
                   "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "2"}  # fmt: skip
    command = ["bash", str(ROOT / "launch" / "slurm" / "study.sbatch"), "a.yaml", "--jobs", "2"]
    assert subprocess.run(command, env=environment, check=False).returncode == code
    said = (tmp_path / "said").read_text().splitlines()
    assert said == ["--cpus-per-task=2", "python", "tools/compare.py", "a.yaml", "--jobs", "2"]
    assert (tmp_path / "asked").exists() == requeued
    if requeued:
        assert (tmp_path / "asked").read_text() == "requeue 7\n"
