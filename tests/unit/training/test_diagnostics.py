"""A look at judges and student: who is asked about what, what is kept of the base, what is left out without a codec."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from afd_scale.codecs.identity import IdentityCodec
from afd_scale.config import RunConfig
from afd_scale.config.run import ProceduralSource
from afd_scale.engines.cast import build_cast
from afd_scale.engines.plain import Plain
from afd_scale.evaluation.agreement import group_agreement
from afd_scale.parallel.ranks import Ranks
from afd_scale.protocols import Unwatched
from afd_scale.training.diagnostics import Diagnostics
from afd_scale.training.evaluator import Evaluator
from afd_scale.types import Videos
from tests.toy_datasets import make_procedural_shards

CONV = {"name": "conv", "channels": 4}
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def alone() -> Iterator[Ranks]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield Ranks(0, 1, 0, 1, torch.device("cpu"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diagnostics") / "shards"
    make_procedural_shards(ProceduralSource(clips=150), folder)
    return folder


class Brightness:
    """A judge that likes bright clips, and notes what it is shown."""

    micro_batch = 2
    watch = Unwatched()

    def __init__(self) -> None:
        self.shown: list[Videos] = []

    def __call__(self, videos: Videos) -> torch.Tensor:
        self.shown.append(videos)
        return videos.latents.flatten(1).mean(dim=1)

    def resident(self, sampling: bool = False) -> Any:
        return torch.no_grad()


def make(
    folder: Path, shards: Path, ranks: Ranks, codec: bool = True, start_frames: int = 0, **options: Any
) -> Diagnostics:  # fmt: skip
    fields = {
        "method": {"name": "afd", "discriminator": CONV, **options},
        "out": folder, "data": {"shards": str(shards), "start_frames": start_frames},
        "student": {"architecture": "toy", "dim": 16, "ffn_dim": 24, "num_heads": 2, "num_layers": 1, "weights": None},
        "train": {"diagnose_every": 5},
        "evaluation": {"diagnosed_prompts": 3, "diagnosed_rollouts": 3, "batch": 6,
                       "metrics": "toy" if codec else "none"},
    }  # fmt: skip
    config = RunConfig.model_validate(fields)
    engines = build_cast(config, Plain(config, ranks.device))
    generator = torch.Generator().manual_seed(1)
    for parameter in engines["student"].network.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    engines |= {name: Brightness() for name in config.method.all_judges}  # type: ignore[attr-defined]
    built: Any = SimpleNamespace(engines=engines, exported=engines["student"])
    evaluator = Evaluator(config, ranks, IdentityCodec() if codec else None)
    return Diagnostics(config, built, evaluator)


def test_a_judge_sees_the_teachers_videos_and_rollouts_of_the_same_prompts(
    tmp_path: Path, shards: Path, alone: Ranks
) -> None:
    looking = make(tmp_path, shards, alone)
    looking.begin()
    metrics = looking.look()
    judge: Any = looking.built.engines["discriminator"]
    assert [len(videos) for videos in judge.shown] == [2, 2, 2, 2, 1, 2, 1], "two prompts at once, then the third"
    teacher, rollouts = (
        torch.cat([judge(judge.shown[place]) for place in places]) for places in ((0, 4), (1, 2, 3, 5, 6))
    )
    gap = (teacher[:, None] - rollouts.unflatten(0, (3, 3))).mean()
    assert metrics["diagnostics/logit_gap"] == pytest.approx(float(gap), abs=1e-5)
    texts = [text for videos in judge.shown[:7] for text in videos.prompts.texts]
    assert texts[:2] == list(looking.prompts.texts[:2])
    assert texts[2:8] == [text for text in looking.prompts.texts[:2] for _ in range(3)]
    first = judge.shown[0]
    assert first.fps == 8.0
    assert torch.equal(first.decode(first.latents), IdentityCodec().decode(first.latents))


def test_rollouts_begin_as_the_teachers_videos(tmp_path: Path, shards: Path, alone: Ranks) -> None:
    looking = make(tmp_path, shards, alone, start_frames=2)
    metrics = looking.look()
    judge: Any = looking.built.engines["discriminator"]
    teacher, rollouts = (
        torch.cat([judge.shown[place].latents for place in places]) for places in ((0, 4), (1, 2, 3, 5, 6))
    )
    assert torch.equal(rollouts[:, :2], teacher[:, :2].repeat_interleave(3, dim=0))
    expected = rollouts[:, 2:].unflatten(0, (3, 3)).std(dim=1).mean()
    assert metrics["diagnostics/diversity"] == pytest.approx(float(expected), rel=1e-4)


def test_figures_are_of_the_clips_that_are_kept(tmp_path: Path, shards: Path, alone: Ranks) -> None:
    looking = make(tmp_path, shards, alone)
    looking.begin()
    metrics = looking.look()
    base = looking._base()
    assert base is not None
    assert base.shape == (9, 12, 16, 16)
    assert metrics["diagnostics/drift"] == 0
    suite = looking.evaluator.suite
    assert suite is not None
    each = suite.measure_each(base, looking.prompts.repeat(3), looking.evaluator.timing())
    for name, values in each.items():
        assert metrics[f"diagnostics/{name}"] == pytest.approx(values.mean()), name
    brightness = base.reshape(3, 3, -1).mean(axis=2, dtype=np.float64)
    wanted = group_agreement(brightness, -each["mass_error"].reshape(3, 3))
    assert metrics["diagnostics/agreement/mass_error"] == pytest.approx(wanted)
    assert metrics["diagnostics/teacher/prompt_accuracy"] == 1

    for parameter in looking.built.exported.network.parameters():
        parameter.data.mul_(0.5)
    later = make(tmp_path, shards, alone)
    later.built.engines["student"].network.load_state_dict(looking.built.exported.network.state_dict())
    later.begin()
    moved = later.look()
    clips = later._look()
    assert clips is not None
    assert clips.clips is not None
    difference = np.abs(clips.clips.astype(float) - base).mean() / 255
    assert moved["diagnostics/drift"] == pytest.approx(difference)
    assert difference > 0.01, "a later start has the base's clips, whatever its weights are by then"


def test_several_judges_have_names(tmp_path: Path, shards: Path, alone: Ranks) -> None:
    looking = make(tmp_path, shards, alone, judges={"second": CONV})
    looking.begin()
    metrics = looking.look()
    for judge in ("discriminator", "second"):
        for name in ("pair_accuracy", "calibration_error", "logit_gap", "agreement/mass_error"):
            assert f"diagnostics/{judge}/{name}" in metrics
    assert "diagnostics/logit_gap" not in metrics
    assert "diagnostics/diversity" in metrics


def test_without_a_codec_there_are_logits_and_latents_alone(tmp_path: Path, shards: Path, alone: Ranks) -> None:
    looking = make(tmp_path, shards, alone, codec=False)
    looking.begin()
    assert {name.removeprefix("diagnostics/") for name in looking.look()} == {
        "diversity", "pair_accuracy", "win_probability", "calibration_error", "logit_gap", "logit_group_std"
    }  # fmt: skip
    assert not looking.base_path.exists()


def test_held_out_prompts_are_those_with_the_teachers_videos(
    tmp_path: Path, shards: Path, alone: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    held_out = tmp_path / "held"
    make_procedural_shards(ProceduralSource(clips=100, seed=7), held_out)
    looking = make(tmp_path, shards, alone)
    evaluation = looking.config.evaluation.model_copy(update={"prompts": str(held_out)})
    looking.config = looking.config.model_copy(update={"evaluation": evaluation})
    looking._say()
    facts = json.loads((looking.config.folder / "diagnostics.json").read_text())
    assert facts == {"dataset": str(held_out), "held_out": True, "prompts": 3, "rollouts": 3}
    assert caplog.messages[-1].endswith("3 rollouts each, held-out prompts")
    alone_prompts = tmp_path / "prompts"
    alone_prompts.mkdir()
    (alone_prompts / "dataset.json").write_text((held_out / "dataset.json").read_text())
    facts_of = json.loads((alone_prompts / "dataset.json").read_text())
    (alone_prompts / "dataset.json").write_text(json.dumps(facts_of | {"latent_shape": None}))
    without = make(tmp_path, shards, alone)
    evaluation = without.config.evaluation.model_copy(update={"prompts": str(alone_prompts), "split": "nowhere"})
    without.config = without.config.model_copy(update={"evaluation": evaluation})
    assert without.location.shards == str(shards), "prompts alone have no videos of the teacher"
    assert len(without.prompts) == 3, "nor is their split one of the data's"
    assert not without.is_held_out
