"""A small AFD run: the toy config with a small random student, few clips and no pretraining."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from afd_scale.checkpoint.weights import save_weights
from afd_scale.config import load_config
from afd_scale.config.models import PolicyConfig
from afd_scale.models.wan import CausalWan
from tests.distributed.processes import ROOT, on_ranks

SHAPE = {"architecture": "toy", "dim": 64, "num_heads": 4, "ffn_dim": 96, "num_layers": 2}
CLIPS = 192


def write_small_run(folder: Path, steps: int) -> Path:
    """Write `afd.yaml` and the student's start weights; the config's path."""
    tree: dict[str, Any] = yaml.safe_load((ROOT / "configs/toy/afd.yaml").read_text())
    tree |= {"requires": None, "out": str(folder / "runs"), "name": "afd"}
    tree["student"] |= {**SHAPE, "weights": str(folder / "start")}
    tree["data"] |= {"shards": str(folder / "shards"), "global_batch": 4}
    tree["data"]["source"] |= {"clips": CLIPS}
    tree["train"] = {"steps": steps, "log_every": 1}
    tree["evaluation"] = {"clips": 4, "batch": 2, "samples": 2}
    tree["method"] |= {"discriminator_warmup_steps": 2, "rollouts_per_prompt": 2}
    path = folder / "afd.yaml"
    path.write_text(yaml.safe_dump(tree))
    config = load_config(path)
    student = CausalWan(config.student, config.sampler)
    generator = torch.Generator().manual_seed(1)
    for parameter in student.parameters():
        parameter.data.normal_(0, 0.1, generator=generator)
    policy = PolicyConfig(student=config.student, sampler=config.sampler)
    save_weights(student.state_dict().items(), folder / "start", policy)
    return path


def check_resuming(folder: Path, steps: int, *options: object) -> Path:
    """Train on two ranks, take the last checkpoint away, and go on: metrics and all tensors are the same bits.

    Args:
        folder: of the run; it logs every step, and saves before the last.
        options: of launch/train.py.
    Returns:
        The last checkpoint.
    """
    last = folder / "checkpoints" / f"step_{steps:08d}"
    found = []
    for again in (False, True):
        if again:
            shutil.rmtree(last)
            (folder / "summary.json").unlink()
        result = on_ranks(2, ROOT / "launch" / "train.py", *options)
        assert result.returncode == 0, result.stderr[-3000:]
        assert (" resumes after step " in result.stderr) == again
        lines = [without_machine(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        files = {path.relative_to(last): load_file(path) for path in last.rglob("*.safetensors")}
        state = json.loads((last / "state.json").read_text())
        found.append((lines, files, state))
    (lines, files, state), (lines_again, files_again, state_again) = found
    assert lines == lines_again
    assert state == state_again
    trained = [line for line in lines if line["step"] > 0]
    assert [line["step"] for line in trained] == list(range(1, steps + 1))
    assert len({line["student/loss"] for line in trained}) > 1, "nothing is learned"
    assert files.keys() == files_again.keys()
    for name, tensors in files.items():
        assert all(torch.equal(tensor, files_again[name][key]) for key, tensor in tensors.items()), name
    return last


def without_machine(line: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in line.items() if not name.startswith("system/")}
