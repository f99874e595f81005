"""tools/generate.py on several ranks: by prompts and by sequence, the same videos as on one."""

from pathlib import Path

import numpy as np
import pytest
import torch

from afd_scale.checkpoint.weights import save_weights
from afd_scale.codecs.codec import VideoForm
from afd_scale.config.models import PolicyConfig
from afd_scale.data.toy_world import toy_prompts
from afd_scale.data.video import read_video
from afd_scale.models.wan import CausalWan
from tests.distributed.processes import on_ranks
from tests.tools import call_tool

SHAPE = {"architecture": "toy", "dim": 64, "num_heads": 4, "ffn_dim": 48, "num_layers": 2}
TEXTS = [prompt.sentence for prompt in toy_prompts()[:3]]


@pytest.mark.parametrize("sequence", [1, 2])
def test_ranks_share_the_videos(tmp_path: Path, sequence: int) -> None:
    policy = PolicyConfig.model_validate({"student": SHAPE})
    network = CausalWan(policy.student, policy.sampler)
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.1, generator=generator)
    save_weights(network.state_dict().items(), tmp_path / "student", policy)
    asked = [part for text in TEXTS for part in ("--prompt", text)]
    alone = call_tool("generate", tmp_path / "student", *asked, "--out", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    done = on_ranks(2, "tools/generate.py", tmp_path / "student", *asked, "--out", tmp_path / "shared",
                    "--sequence", str(sequence), "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"files"') == 1  # one rank speaks
    form = VideoForm(12, 8.0, 16, 16)
    names = sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "shared").iterdir())
    for name in names[:3]:
        one, both = (read_video(tmp_path / folder / name, form).astype(int) for folder in ("alone", "shared"))
        assert np.abs(one - both).mean() < 0.5
