"""The toy teacher as a source: balance, determinism, what a clip becomes."""

from collections import Counter
from itertools import islice

import numpy as np
import torch
from afd_scale.data.procedural import procedural_samples, prompt_order

from afd_scale.config.run import ProceduralSource
from afd_scale.data.codec import SpaceTimeToDepth, to_uint8
from afd_scale.data.text import embed_words
from afd_scale.data.toy_world import render_clips, toy_prompts


def test_every_prompt_comes_before_any_comes_again() -> None:
    order = prompt_order(250, seed=3)
    assert len(order) == 250
    for begin in (0, 96):
        assert set(order[begin : begin + 96]) == set(toy_prompts())
    assert max(Counter(order[192:]).values()) == 1
    assert order[:96] != order[96:192], "each round has its own order"
    assert order[:96] != list(toy_prompts()), "the start of a round must not favour one attribute"


def test_order_is_keyed_by_the_seed_and_does_not_depend_on_the_number_of_clips() -> None:
    assert prompt_order(100, seed=1) == prompt_order(300, seed=1)[:100]
    assert prompt_order(100, seed=1) != prompt_order(100, seed=2)


def test_sample_holds_the_clip_of_its_position() -> None:
    source = ProceduralSource(clips=300, physics="wrong", seed=5)
    samples = list(procedural_samples(source))
    assert len(samples) == 300
    position = 270  # in the second rendered block
    sample, prompt = samples[position], prompt_order(300, seed=5)[position]
    assert (sample.prompt, sample.prompt_id) == (prompt.sentence, prompt.prompt_id)
    assert sample.teacher == "procedural:wrong"
    assert sample.meta == {"clip": position}
    np.testing.assert_array_equal(sample.text_embedding, embed_words(prompt.sentence, max_words=16, dim=32))
    assert sample.latents.shape == (4, 48, 4, 4)
    assert sample.latents.dtype == np.float16
    assert sample.latents.min() >= -1
    assert sample.latents.max() <= 1
    frames = to_uint8(SpaceTimeToDepth().decode(torch.from_numpy(sample.latents)[None])).numpy()
    np.testing.assert_array_equal(frames, render_clips([prompt], seed=5, first_index=position, physics="wrong"))


def test_shorter_sources_are_prefixes_of_longer_ones() -> None:
    short = list(procedural_samples(ProceduralSource(clips=10)))
    long = islice(procedural_samples(ProceduralSource(clips=400)), 10)
    for one, other in zip(short, long, strict=True):
        assert one.prompt_id == other.prompt_id
        np.testing.assert_array_equal(one.latents, other.latents)
