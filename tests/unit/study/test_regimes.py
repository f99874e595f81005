"""What is measured of a checkpoint: judges with known answers, windows held against the same time, weights as saved."""

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from afd_scale.codecs.conversions import to_uint8
from afd_scale.config import ConfigError, RunConfig
from afd_scale.data.make_shards import encode_frames
from afd_scale.data.worlds.kick import GRAVITY, KickPrompt, render_clips
from afd_scale.engines.plain import Plain
from afd_scale.evaluation.suites.kick import WORST_ERROR, KickSuite, measured_gravity
from afd_scale.evaluation.suites.tracks import track
from afd_scale.study import regimes
from afd_scale.study.regimes import (
    PHYSICS,
    REGIMES,
    SCORINGS,
    Judge,
    Truth,
    judge_quality,
    load_judges,
    load_policy,
    measure,
    measure_checkpoint,
    regimes_of,
    roll_out,
    truth_of,
    world_of,
)
from afd_scale.types import Videos
from tests.random_runs import write_random_run

CLIPS = 72  # four of each of 18 prompts
DISCRIMINATOR = "discriminator"


@pytest.fixture(autouse=True, scope="module")
def few_references() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regimes, "REFERENCE_CLIPS", 216)
        truth_of.cache_clear()
        yield
    truth_of.cache_clear()


def truth(name: str) -> Truth:
    return truth_of("kick", REGIMES[name], CLIPS, 16)


def judge(says: Any, frames: int | None = None) -> Judge:
    engine: Any = says
    return Judge(engine, frames)


def weak_rollouts(of: Truth, times: int) -> torch.Tensor:
    """Latents of clips that fall as they like."""
    clips = render_clips(of.asked, seed=3, physics="wrong", begin=18 * (times - 1))
    return torch.from_numpy(
        np.stack([encode_frames(regimes.IdentityCodec(), clip[..., None]) for clip in clips])
    ).float()


class KnowsGravity:
    """A judge that measures the fall and compares it with what the prompt asks for."""

    def __call__(self, videos: Videos) -> torch.Tensor:
        assert videos.decode is not None
        fall, is_measured = measured_gravity(track(to_uint8(videos.decode(videos.latents))[..., 0]))
        asked = [GRAVITY[KickPrompt.parse(text).gravity] for text in videos.prompts.texts]
        error = np.minimum(np.abs(fall - asked), WORST_ERROR)
        return -torch.from_numpy(np.where(is_measured, error, WORST_ERROR))


@pytest.mark.parametrize("name", ["seen", "paraphrased", "unseen", "2x"])
def test_a_judge_that_measures_gravity_agrees_with_what_is_measured(name: str) -> None:
    shown, regime = truth(name), REGIMES[name]
    found = measure(SCORINGS["kick"], regime, shown, weak_rollouts(shown, regime.times), {"it": judge(KnowsGravity())})
    said = found["judges"]["it"]
    assert said["agreement/physics"] == pytest.approx(1)
    if regime.times == 1:
        assert said["prompt_right/gravity"] == 1
    assert said["prompt_right/brightness"] == said["prompt_right/direction"] == 0.5, "it does not care"
    assert found["student"][PHYSICS] > 5 * found["teacher"][PHYSICS]
    assert ("prompt_accuracy" in found["student"]) == (regime.times == 1), "no kick is asked for in a direction"


def test_a_judge_that_knows_the_teachers_clips_has_the_accuracy_and_calibration_of_its_margin() -> None:
    shown = truth("seen")
    known = {tuple(clip.flatten()[:2000].tolist()) for clip in shown.videos.latents}

    def says(videos: Videos) -> torch.Tensor:
        return torch.tensor([1.0 * (tuple(clip.flatten()[:2000].tolist()) in known) for clip in videos.latents])

    rollouts = shown.videos.of(weak_rollouts(shown, 1))
    said = judge_quality(judge(says), shown, rollouts, {"physics": np.zeros((18, 4))})
    assert said["pair_accuracy"] == said["logit_gap"] == 1
    assert said["calibration_error"] == pytest.approx(1 - 1 / (1 + math.exp(-1)))
    assert said["brier"] == pytest.approx((1 - 1 / (1 + math.exp(-1))) ** 2)
    assert said["prompt_right"] == 0.5
    assert "agreement/physics" not in said, "equal values say nothing"


def test_pairs_are_of_one_prompt() -> None:
    """Logits that are the prompt's alone decide no pair, however far prompts are apart."""
    shown = truth("seen")

    def says(videos: Videos) -> torch.Tensor:
        return torch.tensor([float(sum(map(ord, text))) for text in videos.prompts.texts])

    said = judge_quality(judge(says), shown, shown.videos.of(weak_rollouts(shown, 1)), {})
    assert (said["pair_accuracy"], said["brier"]) == (0.5, 0.25)


def test_a_judge_of_fewer_frames_sees_those() -> None:
    shown, seen = truth("seen"), set()

    def says(videos: Videos) -> torch.Tensor:
        seen.add(videos.latents.shape[1])
        return torch.zeros(len(videos))

    judge_quality(judge(says, frames=2), shown, shown.videos, {})
    assert seen == {2}


def test_a_window_is_held_against_the_same_time() -> None:
    scoring = SCORINGS["kick"]
    for name in ("2x", "4x"):
        shown = truth(name)
        own = measure(scoring, REGIMES[name], shown, shown.videos.latents, {})
        assert own["student"] == pytest.approx(own["teacher"])
        first = measure(scoring, REGIMES[name], shown, truth("seen").videos.latents, {})
        assert first["student"]["trajectory_fd"] > 2 * own["student"]["trajectory_fd"], (
            "another time's clips are not it"
        )
        assert own["teacher"][PHYSICS] < 0.02, "balls that lie on clay are left out"
        assert 9 <= shown.flies.sum() < 18


def test_paraphrases_are_other_sentences_for_the_same_clips() -> None:
    seen, said = truth("seen"), truth("paraphrased")
    assert torch.equal(seen.videos.latents, said.videos.latents)
    assert seen.asked == said.asked
    assert not set(seen.videos.prompts.texts) & set(said.videos.prompts.texts)
    assert not torch.equal(seen.videos.prompts.embeddings, said.videos.prompts.embeddings)
    assert [KickPrompt.parse(text) for text in said.videos.prompts.texts] == list(said.asked)


def test_swapped_prompts_differ_in_one_word() -> None:
    shown = truth("paraphrased")
    assert {name: len(others) for name, others in shown.swapped.items()} == {
        "brightness": 1, "direction": 1, "gravity": 2, "bounciness": 1
    }  # fmt: skip
    for attribute, others in shown.swapped.items():
        for prompts in others:
            for asked, text in zip(shown.asked, prompts.texts, strict=True):
                other = KickPrompt.parse(text)
                assert [name for name in vars(asked) if getattr(asked, name) != getattr(other, name)] == [attribute]
    assert len({prompts.texts[0] for prompts in shown.swapped["gravity"]}) == 2


def test_a_run_is_measured_in_unseen_prompts_where_its_source_left_them_out(tmp_path: Path) -> None:
    for prompts, names in (("all", {"seen", "paraphrased", "2x", "4x"}), ("seen", set(REGIMES))):
        config, _ = write_random_run(tmp_path / prompts, prompts=prompts)
        assert regimes_of(config).keys() == names


def test_a_checkpoint_is_measured_as_it_was_saved(tmp_path: Path) -> None:
    config, engines = write_random_run(tmp_path / "run", steps=(1, 2), prompts="seen")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
    kind = Plain(config, torch.device("cpu"))
    policy, judges = load_policy(kind, checkpoint, None), load_judges(kind, checkpoint)
    assert judges.keys() == {DISCRIMINATOR}
    shown = truth("seen")
    part = shown.videos[:3]
    with torch.no_grad():
        assert torch.equal(judges[DISCRIMINATOR].engine(part), engines[DISCRIMINATOR](part))
    theirs = roll_out(config, engines["student"], part.prompts, 6)
    assert torch.equal(roll_out(config, policy, part.prompts, 6), theirs)
    other = load_policy(kind, checkpoint, "old_policy")
    assert torch.equal(
        roll_out(config, other, part.prompts, 6), roll_out(config, engines["old_policy"], part.prompts, 6)
    )
    long = roll_out(config, policy, part.prompts, 24)
    torch.testing.assert_close(long[:, :6], theirs, msg="a short video is how a long one begins")

    found = measure_checkpoint(config, checkpoint, CLIPS)
    assert list(found) == list(REGIMES)
    rollouts = roll_out(config, policy, shown.videos.prompts, 12)
    clips = to_uint8(shown.videos.decode(rollouts[:, :6]))[..., 0]  # type: ignore[misc]
    suite = KickSuite(config)
    suite_says = suite.measure_each(clips, shown.videos.prompts, None)  # type: ignore[arg-type]
    assert found["seen"]["student"]["prompt_accuracy"] == pytest.approx(suite_says["prompt_accuracy"].mean())
    assert found["seen"]["student"]["gravity_error"] == pytest.approx(suite_says["gravity_error"].mean())
    late = measure(SCORINGS["kick"], REGIMES["2x"], truth("2x"), rollouts[:, 6:], judges)
    assert late["judges"] == found["2x"]["judges"]
    assert late["student"] == pytest.approx(found["2x"]["student"])


def test_the_first_world_is_measured_too(tmp_path: Path) -> None:
    config, _ = write_random_run(tmp_path / "run", world="drop")
    found = measure_checkpoint(config, tmp_path / "run" / "checkpoints" / "step_00000002", 144)
    assert list(found) == ["seen", "paraphrased", "2x", "4x"]
    for name, measured in found.items():
        assert measured["teacher"][PHYSICS] < 0.05
        assert ("physics_strict" in measured["student"]) == (REGIMES[name].times == 1)
        assert 0 <= measured["judges"][DISCRIMINATOR]["pair_accuracy"] <= 1


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"clips \(50\) must be a multiple of the 18 seen prompts"):
        truth_of("kick", REGIMES["seen"], 50, 16)
    with pytest.raises(ConfigError, match=r"evaluation.metrics \(video\) must be toy or kick"):
        world_of(RunConfig.model_validate({"method": "sft", "evaluation": {"metrics": "video"}}))
    supervised = RunConfig.model_validate({"method": "sft"})
    with pytest.raises(ConfigError, match="must have a judge that is trained: sft has none"):
        load_judges(Plain(supervised, torch.device("cpu")), tmp_path)
    config, _ = write_random_run(tmp_path / "run")
    lora = SimpleNamespace(config=config.model_copy(update={"method": RunConfig.model_validate({
        "method": {"name": "afd", "discriminator": {"name": "latent", "architecture": "toy", "lora": {"rank": 2}}}
    }).method}))  # fmt: skip
    partly: Any = lora
    with pytest.raises(ConfigError, match="must be trained whole"):
        load_judges(partly, tmp_path / "run" / "checkpoints" / "step_00000002")
