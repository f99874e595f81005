"""tools/generate.py on several ranks: by prompts and by sequence, the same videos as on one."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from afd_scale.checkpoint.weights import save_weights
from afd_scale.codecs.codec import VideoForm
from afd_scale.config.models import PolicyConfig
from afd_scale.data.video import read_video
from afd_scale.data.worlds.drop import ToyPrompt
from afd_scale.models.wan import CausalWan
from tests.distributed.processes import environment, free_port, on_ranks, side_by_side
from tests.tools import call_tool

SHAPE = {"architecture": "toy", "dim": 64, "num_heads": 4, "ffn_dim": 48, "num_layers": 2}
TEXTS = [prompt.sentence for prompt in ToyPrompt.every()[:3]]


@pytest.mark.parametrize("sequence", [1, 2])
def test_ranks_share_the_videos(tmp_path: Path, sequence: int) -> None:
    policy = PolicyConfig.model_validate({"student": SHAPE})
    network = CausalWan(policy.student, policy.sampler)
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.1, generator=generator)
    save_weights(network.state_dict().items(), tmp_path / "student", policy)
    asked = [part for text in TEXTS for part in ("--prompt", text)]
    if sequence == 2:  # the window is full after the third of four chunks
        asked += ["--window", "3", "--sink", "1", "--positions", "window"]
    alone = call_tool("generate", tmp_path / "student", *asked, "--out", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    done = on_ranks(2, "tools/generate.py", tmp_path / "student", *asked, "--out", tmp_path / "shared",
                    "--sequence", str(sequence), "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"files"') == 1  # one rank speaks
    form = VideoForm(12, 8.0, 16, 16)
    names = sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "shared").iterdir())
    alone_and_shared = [
        [read_video(tmp_path / folder / name, form).astype(int) for folder in ("alone", "shared")] for name in names[:3]
    ]
    for one, both in alone_and_shared:  # rounding, which H.264 makes more of in noise
        assert np.abs(one - both).mean() < 2
    (first, _), (second, _), *_ = alone_and_shared
    assert np.abs(first - second).mean() > 20, "another video is further away"


def save_toy(folder: Path) -> Path:
    policy = PolicyConfig.model_validate({"student": SHAPE})
    save_weights(CausalWan(policy.student, policy.sampler).state_dict().items(), folder, policy)
    return folder


def under_mpirun(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Two ranks as Open MPI starts them: it sets no RANK."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    worlds = [dict(zip((f"OMPI_COMM_WORLD_{name}" for name in names), (rank, "2", rank, "2"), strict=True))
              for rank in "01"]  # fmt: skip
    return side_by_side([[str(part) for part in command]] * 2, [environment(**place, **world) for world in worlds], 280)


FULL_ON_THE_SECOND = """
import errno, os, sys
from afd_scale.generation import generate
from tests.tools import load_tool
def full(*arguments, **more):
    raise OSError(errno.ENOSPC, "No space left on device")
if os.environ["RANK"] == "1":
    generate.writing_mp4 = full
sys.exit(load_tool("generate").main(sys.argv[1:]))
"""


def test_a_rank_that_cannot_go_on_says_so_itself(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(FULL_ON_THE_SECOND)
    done = on_ranks(2, tmp_path / "script.py", save_toy(tmp_path / "student"), "--prompt", "a", "--prompt", "b",
                    "--out", tmp_path / "out")  # fmt: skip
    assert done.returncode in (1, 2), done.stderr  # the first one fails when it finds the other gone
    (error,) = (said for said in done.stderr.splitlines() if said.startswith("error: "))
    assert "No space left on device; " in error
    assert "finished" in error


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (("--prompt", "a", "--prompt", "word " * 20), "must have at most 16 words"),  # only the second rank knows
        (("--prompt", "a", "--size", "12x16"), "must have a height of whole tokens"),
        (("--prompt", "a", "--sequence", "3"), "sequence (3) must divide the 2 ranks"),
    ],
)
def test_a_failure_of_any_rank_is_one_line_and_leaves_nothing(tmp_path: Path, more: tuple[str], line: str) -> None:
    command = ("tools/generate.py", save_toy(tmp_path / "student"), *more, "--out", tmp_path / "out")
    for start in (lambda *command: on_ranks(2, *command), under_mpirun):
        done = start(*command)
        assert done.returncode == 2, done.stderr
        errors = [said for said in done.stderr.splitlines() if "error: " in said]
        assert len(errors) == 1, done.stderr
        assert line in errors[0]
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()
