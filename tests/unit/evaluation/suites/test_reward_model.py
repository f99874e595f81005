"""A tiny random Qwen2-VL, with a home-made tokenizer, as the judge of clips."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from afd_scale.config import ConfigError
from afd_scale.evaluation.suites.reward_model import RewardModel, seen_frames
from tests.judges import save_tiny_judge


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return RewardModel(save_tiny_judge(tmp_path_factory.mktemp("judge")))


def test_the_reward_depends_on_clip_and_prompt_alone(judge):
    first, second = np.random.default_rng(0).integers(0, 256, (2, 12, 32, 48, 3), np.uint8)
    rewards = [judge.score(first, "a cat", 8), judge.score(second, "a cat", 8), judge.score(first, "a dog runs", 8)]
    assert len(set(rewards)) == 3
    assert judge.score(first, "a cat", 8) == rewards[0]


def test_the_reward_is_the_log_odds_of_yes(judge):
    clip = np.zeros((12, 16, 16), np.uint8)
    before = judge.score(clip, "a ball", 8)
    head = judge._model.get_output_embeddings()
    state = head.weight.detach().clone()
    yes, no = judge._answers
    with torch.no_grad():
        head.weight[[yes, no]] = state[[no, yes]]
        assert judge.score(clip, "a ball", 8) == pytest.approx(-before, abs=1e-6)
        head.weight.copy_(state)


def test_frames_are_seen_from_first_to_last():
    clip = np.arange(81, dtype=np.uint8)[:, None, None].repeat(2, axis=2)
    seen = seen_frames(clip, 16)
    assert seen.shape == (10, 1, 2, 3)
    assert (seen[0, 0, 0, 0], seen[-1, 0, 0, 0]) == (0, 80)
    assert len(seen_frames(clip[:5], 16)) == 4


def test_what_is_no_judge_is_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "absent", tmp_path / "empty"):
        with pytest.raises(ConfigError, match=r"^reward_model \(.*\) must be a .*$"):
            RewardModel(folder)
    with pytest.raises(ConfigError, match="one token for each"):
        RewardModel(save_tiny_judge(tmp_path / "judge", words=()))


def test_weights_that_could_run_code_are_not_read(tmp_path):
    folder = save_tiny_judge(tmp_path / "judge")
    (file,) = folder.glob("*.safetensors")
    torch.save(load_file(file), folder / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(ConfigError, match=r"reward_model \("):
        RewardModel(folder)
