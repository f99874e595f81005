"""What is generated, for whom, and what is kept."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from afd_scale.codecs.identity import IdentityCodec
from afd_scale.config import ConfigError
from afd_scale.config.run import ProceduralSource
from afd_scale.data.teachers.procedural import ProceduralTeacher
from afd_scale.evaluation.video import read_mp4
from afd_scale.parallel.ranks import Ranks
from afd_scale.training.evaluator import Comparison
from tests.toy_datasets import make_procedural_shards
from tests.toy_evaluation import PROMPTS, make_evaluator, make_policy

CLIPS = 2 * PROMPTS + 1


@pytest.fixture
def alone() -> Iterator[Ranks]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield Ranks(0, 1, 0, 1, torch.device("cpu"))
    dist.destroy_process_group()


def counting(policy: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Clips that are asked of a policy, a number a rollout."""
    made: list[int] = []
    new_cache, run = policy.new_cache, type(policy).__call__

    def call(self: Any, noisy: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if made[-1] == 0:
            made[-1] = len(noisy)
        return run(self, noisy, *arguments, **options)

    def begin(frames: int) -> Any:
        made.append(0)
        return new_cache(frames)

    monkeypatch.setattr(policy, "new_cache", begin)
    monkeypatch.setattr(type(policy), "__call__", call)
    return made


def test_a_clip_is_the_same_whichever_others_are_asked_for(tmp_path: Path, alone: Ranks) -> None:
    evaluator = make_evaluator(tmp_path, alone, clips=CLIPS, batch=4)
    policy = make_policy(evaluator.config)
    whole = evaluator.frames(policy, range(CLIPS))
    assert whole is not None
    assert whole.shape == (CLIPS, 12, 16, 16)
    some = evaluator.frames(policy, [7, 2, 10])
    assert some is not None
    assert np.abs(some.astype(int) - whole[[7, 2, 10]]).max() <= 1, "but for rounding"
    assert np.abs(whole[7].astype(int) - whole[2]).max() > 20, "one prompt, another noise"


def test_in_the_middle_only_what_is_shown_is_generated(
    tmp_path: Path, alone: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = make_evaluator(tmp_path, alone, clips=CLIPS, batch=2, samples=3)
    policy = make_policy(evaluator.config)
    made = counting(policy, monkeypatch)
    evaluator.sample(policy, 7)
    assert made == [2, 1]
    assert (tmp_path / "run/samples/step_00000007/grid.png").is_file()


def test_a_later_start_has_the_bases_clips(
    tmp_path: Path, alone: Ranks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"clips": CLIPS, "samples": 2}
    evaluator = make_evaluator(tmp_path, alone, **options)
    policy = make_policy(evaluator.config)
    whole = evaluator.frames(policy, range(CLIPS))
    assert whole is not None
    made = counting(policy, monkeypatch)
    evaluator.keep_base(policy)
    assert made == [CLIPS]

    later = make_evaluator(tmp_path, alone, **options)
    later.keep_base(policy)
    assert made == [CLIPS], "not again"
    for parameter in policy.network.parameters():
        parameter.data.mul_(0.5)
    shown: dict[str, Any] = {}
    monkeypatch.setattr(later, "_draw", lambda clips, step: shown.update(clips))
    measured = later.compare(policy)
    assert list(measured.metrics) == ["base", "student", "teacher"]
    assert measured.by_length == {}
    assert np.array_equal(shown["base"], whole[later.shown])
    assert not np.array_equal(shown["base"], shown["student"])

    made.clear()
    make_evaluator(tmp_path, alone, clips=CLIPS - 1).keep_base(policy)
    assert made == [CLIPS - 1], "other settings, other clips"
    made.clear()
    another = make_evaluator(tmp_path, alone, clips=CLIPS - 1)
    another.codec = IdentityCodec(3, 4, text_shape=(7, 7))
    another.codec.provenance = {"name": "another VAE"}
    another.keep_base(policy)
    assert made == [CLIPS - 1], "another codec, other clips"
    assert "are not used: clips changed since" in caplog.text
    file = tmp_path / "run/samples/base.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    made.clear()
    make_evaluator(tmp_path, alone, clips=CLIPS - 1).keep_base(policy)
    assert made == [CLIPS - 1], "a damaged file"
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(("metrics", "of_teacher"), [("toy", ["0-1x", "1-2x", "2-3x"]), ("video", ["0-1x"])])
def test_longer_clips_are_measured_by_length(
    tmp_path: Path, alone: Ranks, monkeypatch: pytest.MonkeyPatch, metrics: str, of_teacher: list[str]
) -> None:
    evaluator = make_evaluator(tmp_path, alone, clips=4, batch=3, lengths=3, samples=2, metrics=metrics)
    of_data = evaluator._teacher if metrics == "toy" else lambda *_: np.full((4, 12, 16, 16), 90, np.uint8)
    monkeypatch.setattr(evaluator, "_teacher", of_data)
    policy = make_policy(evaluator.config)
    evaluator.keep_base(policy)
    noises: list[torch.Tensor] = []
    chunks = evaluator.sampler.chunks

    def spy(policy: Any, text: torch.Tensor, noise: Any) -> Iterator[torch.Tensor]:
        noises.append(noise.initial)
        return chunks(policy, text, noise)

    with monkeypatch.context() as patched:
        patched.setattr(evaluator.sampler, "chunks", spy)
        shorter, longer = evaluator.frames(policy, range(4)), evaluator.frames(policy, range(4), 3)
    short, long = noises[0], noises[2]  # of two batches each
    first, second, third = long.chunk(3, dim=1)
    assert torch.equal(first, short)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    assert shorter is not None
    assert longer is not None
    assert longer.shape == (4, 36, 16, 16)
    assert np.abs(longer[:, :12].astype(int) - shorter).max() <= 1, "one start, but for rounding"

    measured = evaluator.compare(policy)
    assert measured.metrics["base"] == pytest.approx(measured.metrics["student"], rel=0.05)
    assert {name: list(spans) for name, spans in measured.by_length.items()} == {
        "student": ["0-1x", "1-2x", "2-3x"], "teacher": of_teacher,
    }  # fmt: skip
    for name in ("sharpness", *(["trajectory_fd"] if metrics == "toy" else ["motion"])):
        assert measured.by_length["student"]["0-1x"][name] == pytest.approx(measured.metrics["student"][name])
    videos = sorted((tmp_path / "run/samples/long").glob("*.mp4"))
    assert [len(read_mp4(path)[0]) for path in videos] == [36, 36]
    assert len(list(evaluator.folder(evaluator.config.train.steps).glob("*.mp4"))) == 2


def test_prompts_that_the_suite_cannot_read_are_refused(tmp_path: Path, alone: Ranks) -> None:
    evaluator = make_evaluator(tmp_path, alone)
    evaluator.check()
    evaluator.prompts = replace(evaluator.prompts, texts=(*evaluator.prompts.texts[1:], "a cat"))
    with pytest.raises(ConfigError, match=r"evaluation.metrics \(toy\) must be none for prompts .* \('a cat'\)"):
        evaluator.check()


def test_without_a_codec_nothing_is_generated(tmp_path: Path, alone: Ranks) -> None:
    evaluator = make_evaluator(tmp_path, alone, metrics="none")
    evaluator.codec = None
    policy: Any = None
    evaluator.check()
    evaluator.keep_base(policy)
    evaluator.sample(policy, 1)
    assert evaluator.compare(policy) == Comparison({}, {})
    assert not (tmp_path / "run").exists()


def test_without_a_suite_only_what_is_shown_is_generated(
    tmp_path: Path, alone: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = make_evaluator(tmp_path, alone, metrics="none", samples=3)
    evaluator.teacher_shown = np.full((3, 12, 16, 16), 7, np.uint8)
    policy = make_policy(evaluator.config)
    made = counting(policy, monkeypatch)
    shown: list[tuple[int, dict[str, Any]]] = []
    monkeypatch.setattr(evaluator, "_draw", lambda clips, step: shown.append((step, dict(clips))))
    evaluator.keep_base(policy)
    base = evaluator.frames(policy, evaluator.shown)
    for parameter in policy.network.parameters():
        parameter.data.mul_(0.5)
    evaluator.sample(policy, 4)
    assert evaluator.compare(policy) == Comparison({}, {})
    assert made == [3, 3, 3, 3]
    assert [step for step, _ in shown] == [4, evaluator.config.train.steps]
    for _, clips in shown:
        assert clips.keys() == {"teacher", "base", "student"}
        assert np.array_equal(clips["base"], base)
        assert clips["teacher"].mean() == 7
        assert np.abs(clips["student"].astype(int) - base).max() > 20


def test_nothing_is_shown_where_nothing_is_asked_for(tmp_path: Path, alone: Ranks) -> None:
    evaluator = make_evaluator(tmp_path, alone, clips=4, samples=0)
    policy = make_policy(evaluator.config)
    evaluator.keep_base(policy)
    evaluator.sample(policy, 1)
    assert list(evaluator.compare(policy).metrics) == ["base", "student", "teacher"]
    assert [path.name for path in (tmp_path / "run/samples").iterdir()] == ["base.safetensors"]


def test_more_clips_than_the_main_rank_holds_are_refused(tmp_path: Path, alone: Ranks) -> None:
    evaluator = make_evaluator(tmp_path, alone, metrics="video", clips=10_000)
    evaluator.check()
    data = evaluator.config.data.model_copy(update={"latent_height": 400, "latent_width": 400})
    evaluator.config = evaluator.config.model_copy(update={"data": data})
    with pytest.raises(ConfigError, match=r"evaluation\.clips \(10000\) must be at most 372 for videos of this size"):
        evaluator.check()
    longer = evaluator.config.evaluation.model_copy(update={"lengths": 4})
    evaluator.config = evaluator.config.model_copy(update={"evaluation": longer})
    with pytest.raises(ConfigError, match=r"evaluation\.clips \(10000\) must be at most 186 for"):
        evaluator.check()


def test_chunks_meet_where_their_frames_do(tmp_path: Path, alone: Ranks) -> None:
    evaluator = make_evaluator(tmp_path, alone, metrics="video")
    assert evaluator.timing().borders == (3, 6, 9)
    monkeyed: Any = evaluator.codec
    monkeyed.frames = lambda latent_frames: 1 + 4 * (latent_frames - 1)  # as Wan's
    assert evaluator.timing().borders == (1, 5, 9)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_teachers_videos_come_from_the_data(tmp_path: Path, alone: Ranks) -> None:
    make_procedural_shards(ProceduralSource(clips=150), tmp_path / "shards")
    evaluator = make_evaluator(tmp_path, alone, metrics="none", samples=2)
    data = evaluator.config.data.model_copy(update={"shards": str(tmp_path / "shards")})
    evaluator.config = evaluator.config.model_copy(update={"data": data})
    del evaluator.prompts, evaluator.fps  # of the data from here on
    teacher = ProceduralTeacher(ProceduralSource(clips=150))
    first = {clip.prompt: clip for clip in reversed(teacher.clips())}
    assert evaluator.teacher_shown is not None
    for clip, frames in zip(evaluator.shown, evaluator.teacher_shown, strict=True):
        expected = teacher.frames(first[evaluator.prompts.texts[clip]], teacher.form)
        assert np.array_equal(frames, expected[..., 0])
    assert evaluator.fps == 8.0


@pytest.mark.parametrize("lengths", [1, 2])
def test_clips_begin_as_those_that_a_suite_renders(tmp_path: Path, alone: Ranks, lengths: int) -> None:
    evaluator = make_evaluator(tmp_path, alone, start_frames=1, clips=CLIPS, batch=4)
    policy, teacher = make_policy(evaluator.config), evaluator._teacher(range(CLIPS))
    made = evaluator.frames(policy, range(CLIPS), lengths)
    assert made is not None
    assert teacher is not None
    assert np.array_equal(made[:, :3], teacher[:, :3])
    assert np.abs(made[:, 3:12].astype(int) - teacher[:, 3:]).max() > 20, "and go on by themselves"
    some = evaluator.frames(policy, [7, 2], lengths)
    assert some is not None
    assert np.abs(some.astype(int) - made[[7, 2]]).max() <= 1
    free = make_evaluator(tmp_path, alone, clips=CLIPS)
    assert free._base_facts.keys() == evaluator._base_facts.keys() - {"start_frames"}


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_clips_begin_as_the_datas_where_no_suite_renders_any(tmp_path: Path, alone: Ranks) -> None:
    make_procedural_shards(ProceduralSource(clips=150), tmp_path / "shards")
    evaluator = make_evaluator(tmp_path, alone, start_frames=1, metrics="none", samples=3)
    data = evaluator.config.data.model_copy(update={"shards": str(tmp_path / "shards")})
    evaluator.config = evaluator.config.model_copy(update={"data": data})
    del evaluator.prompts
    evaluator.check()
    made = evaluator.frames(make_policy(evaluator.config), evaluator.shown)
    assert made is not None
    assert evaluator.teacher_shown is not None
    assert np.array_equal(made[:, :3], evaluator.teacher_shown[:, :3])
    facts = tmp_path / "shards" / "dataset.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"latent_shape": None}))
    with pytest.raises(
        ConfigError, match=r"evaluation\.prompts \(None\) must hold videos with data\.start_frames \(1\)"
    ):
        evaluator.check()
