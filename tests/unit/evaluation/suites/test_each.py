"""What suites measure of each clip: its mean is what they measure of the set."""

import numpy as np
import pytest
import torch

from afd_scale.config import RunConfig
from afd_scale.config.run import WORLD_OF
from afd_scale.data.worlds import WORLDS
from afd_scale.data.worlds.drop import ToyPrompt, render_clips
from afd_scale.evaluation.suites import SUITES, Timing
from tests.networks import make_prompts

OF_A_SET = {"trajectory_fd", "gravity_slope"}
TIMING = Timing(8.0, (3, 6, 9))


@pytest.mark.parametrize("name", SUITES)
def test_the_mean_over_clips_is_the_measure_of_the_set(name):
    suite = SUITES[name](RunConfig.model_validate({"method": "sft"}))
    world = WORLDS[WORLD_OF.get(name, "drop")]
    asked = world.prompt.every()[:3]
    prompts = make_prompts(torch.zeros(3, 1, 1))
    prompts = type(prompts)(tuple(prompt.sentence for prompt in asked), prompts.ids, prompts.keys, prompts.embeddings)
    clips = world.render([*asked, *asked], seed=3, physics="wrong")
    whole = suite.measure({"student": clips}, prompts, TIMING)["student"]
    each = suite.measure_each(clips, prompts, TIMING)
    assert each.keys() == whole.keys() - OF_A_SET
    assert all(len(values) == 6 for values in each.values())
    for metric, values in each.items():
        assert np.nanmean(values) == pytest.approx(whole[metric]), metric
    assert any(len(set(values)) > 2 for values in each.values()), "clips differ"


def test_what_a_clip_lacks_is_missing():
    suite = SUITES["video"](RunConfig.model_validate({"method": "sft"}))
    clips = render_clips(ToyPrompt.every()[:2], seed=0, physics="teacher")
    each = suite.measure_each(clips, make_prompts(torch.zeros(2, 1, 1)), Timing(8.0, ()))
    assert "border_jump" not in each
