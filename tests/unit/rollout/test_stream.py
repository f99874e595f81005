"""Texts that change between chunks, and videos without an end."""

import gc
import weakref
from copy import copy
from dataclasses import replace
from itertools import islice

import pytest
import torch

from afd_scale.chunks import Chunks
from afd_scale.config.sampler import SamplerConfig
from afd_scale.engines.captured import CapturedPasses, run_again
from afd_scale.flow.randomness import Randomness
from afd_scale.layers.attention import AttentionLayout
from afd_scale.rollout.sampler import Noise, Sampler, scheduled
from tests.networks import make_policy

FRAMES, SIZE = 12, 2
FIELDS = {"dim": 24, "ffn_dim": 40, "num_heads": 2, "num_layers": 2, "freq_dim": 16, "text_dim": 8, "text_length": 5,
          "latent_channels": 3, "prediction": "velocity", "chunk_frames": SIZE, "timesteps": (1000, 500)}  # fmt: skip
WINDOWS = {
    "no window": {},
    "window": {"window_frames": 6},
    "window and sink": {"window_frames": 8, "sink_frames": 4},
    "places in the window": {"window_frames": 8, "sink_frames": 4, "positions": "window"},
    "a sink and the chunk itself": {"window_frames": 4, "sink_frames": 2},
    "the chunk itself": {"window_frames": 2},
}
every_window = pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TEXTS = [randn(2, 3, 8, seed=seed) for seed in (1, 2, 3)]
NOISE = Noise(randn(2, FRAMES, 3, 4, 6, seed=4), randn(1, 2, FRAMES, 3, 4, 6, seed=5))


def build(**fields):
    """A student of some weights: an untrained one predicts nothing."""
    policy = make_policy({**FIELDS, **fields})
    with torch.no_grad():
        for number, parameter in enumerate(policy.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=number) / 4)
    return policy


def videos_of(policy, text, noise=NOISE, calls=None):
    return Sampler(policy.sampler).rollout(calls or policy, text, noise)


class Watched:
    """A policy that keeps its denoising passes of one chunk: what they got and gave, by timestep."""

    def __init__(self, policy, chunk):
        self.policy, self.new_cache, self.chunk, self.passes = policy, policy.new_cache, chunk, []

    def __call__(self, noisy, timestep, text, *, cache):
        velocity = self.policy(noisy, timestep, text, cache=cache)
        if cache.chunk == self.chunk and noisy.shape[1] == SIZE and timestep.min() > 0:
            self.passes.append((noisy, timestep, velocity))
        return velocity


@torch.no_grad()
def seeing(policy, past, clean, noisy, timestep, text):
    """The velocity of a chunk after these, without a cache: one pass over all, at their places in the video."""
    frames = [frame for chunk in past for frame in range(chunk * SIZE, (chunk + 1) * SIZE)]
    in_window = policy.sampler.positions == "window"
    after, places = (len(frames), range(len(frames))) if in_window else (len(clean[0]), frames)
    rotation = policy.rotation(noisy, range(after, after + SIZE))
    turns = [policy.rotation(noisy, range(place, place + 1)).turns for place in places]
    rotation = replace_turns(rotation, torch.cat([*turns, rotation.turns]))
    latents, times = torch.cat([clean[:, frames], noisy], dim=1), timestep.new_zeros(2, len(frames))
    layout = AttentionLayout.block_causal(len(frames) + SIZE, Chunks(SIZE))
    return policy._predict(latents, torch.cat([times, timestep], dim=1), text, rotation, layout, None)[:, -SIZE:]


def replace_turns(rotation, turns):
    rotation = copy(rotation)
    rotation.turns = turns
    return rotation


@pytest.mark.parametrize("given", [False, True])
@every_window
def test_one_text_as_a_stream_is_that_text(window, given):
    policy, noise = build(**window), replace(NOISE, given=NOISE.initial[:, :4]) if given else NOISE
    assert torch.equal(videos_of(policy, lambda chunk: TEXTS[0], noise), videos_of(policy, TEXTS[0], noise))


@every_window
def test_a_recomputed_cache_is_a_fresh_one_of_the_same_latents_under_the_new_text(window):
    policy = build(**window)
    config = policy.sampler
    for change in range(1, FRAMES // SIZE):
        watched = Watched(policy, change)
        videos = videos_of(policy, scheduled([(0, TEXTS[0]), (change, TEXTS[1])]), calls=watched)
        assert torch.equal(videos[:, : change * SIZE], videos_of(policy, TEXTS[0])[:, : change * SIZE])
        assert len(watched.passes) == 2
        for noisy, timestep, velocity in watched.passes:
            expected = seeing(policy, config.past_of(change), videos[:, : change * SIZE], noisy, timestep, TEXTS[1])
            torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-4)
            old = seeing(policy, config.past_of(change), videos[:, : change * SIZE], noisy, timestep, TEXTS[0])
            assert (velocity - old).abs().max() > 1e-2, "the text must be seen"


def kept_by_hand(policy, changes):
    """Chunk by chunk: each reads its own text, and so does the pass that leaves it in the cache."""
    cache, done = policy.new_cache(FRAMES), []
    sigmas = Sampler(policy.sampler).sigmas
    with torch.no_grad():
        for number in range(FRAMES // SIZE):
            here, text = slice(number * SIZE, (number + 1) * SIZE), TEXTS[sum(at <= number for at in changes)]
            x = NOISE.initial[:, here]
            for step, sigma in enumerate(sigmas.tolist()):
                cache.forget_text()
                x0 = x - sigma * policy(x, torch.full((2, SIZE), 1000 * sigma), text, cache=cache)
                if step == 0:
                    x = (1 - sigmas[1]) * x0 + sigmas[1] * NOISE.again[0][:, here]
            done.append(x0)
            if number + 1 < FRAMES // SIZE:
                policy(x0, torch.zeros(2, SIZE), text, cache=cache)
                cache.advance()
    return torch.cat(done, dim=1)


@every_window
def test_a_kept_cache_stays_as_it_is(window):
    policy = build(**window, at_prompt_change="keep")
    schedule = scheduled([(0, TEXTS[0]), (2, TEXTS[1]), (4, TEXTS[2])])
    videos = videos_of(policy, schedule)
    torch.testing.assert_close(videos, kept_by_hand(policy, (2, 4)), rtol=1e-4, atol=1e-4)
    if policy.sampler.past_of(2):
        other = videos_of(build(**window), schedule)
        assert torch.equal(other[:, :4], videos[:, :4])
        assert (other - videos)[:, 4:6].abs().max() > 1e-3, "a recomputed one is another"


@pytest.mark.parametrize("change", ["recompute", "keep"])
@every_window
def test_captured_passes_follow_a_text_that_changes(window, change):
    policy = build(**window, at_prompt_change=change)
    captured = CapturedPasses(policy, lambda: run_again)
    for texts in ((0, 1, 0), (2, 0, 1), (1, 2, 0)):  # in the second rollout passes are captured, and replayed
        schedule = scheduled([(start, TEXTS[text]) for start, text in zip((0, 2, 4), texts, strict=True)])
        torch.testing.assert_close(
            videos_of(policy, schedule, calls=captured), videos_of(policy, schedule), rtol=1e-4, atol=1e-4
        )
    assert captured.passes
    assert len(captured.buffers) == 1


def test_a_text_is_asked_for_when_its_chunk_is():
    policy, asked = build(), []

    def text(chunk):
        asked.append(chunk)
        return TEXTS[0]

    chunks = Sampler(policy.sampler).chunks(policy, text, NOISE)
    assert asked == []
    for number, _ in enumerate(chunks):
        assert asked == list(range(number + 1)), "once each, and none before the one before it is handed out"


def test_a_schedule_begins_with_the_video_and_rises():
    text = scheduled([(0, TEXTS[0]), (3, TEXTS[1]), (4, TEXTS[2])])
    assert [next(i for i, x in enumerate(TEXTS) if x is text(chunk)) for chunk in range(7)] == [0, 0, 0, 1, 2, 2, 2]
    for starts in ((), (1,), (0, 3, 3), (0, 4, 2)):
        with pytest.raises(ValueError, match=r"^starts \(.*\) must rise from 0"):
            scheduled([(start, TEXTS[0]) for start in starts])


def stream_of(policy, keys=(7, 3), **options):
    return Sampler(policy.sampler).stream(Randomness(0), "live", 0, keys, (3, 4, 6), torch.device("cpu"), **options)


def test_noise_comes_chunk_by_chunk_and_is_a_video_s_own():
    policy = build(first_chunk_timesteps=(1000, 800, 400), window_frames=6)
    stream, alone = stream_of(policy), stream_of(policy, keys=(3,))
    drawn = [stream.of_chunk(chunk, Chunks(SIZE)) for chunk in range(3)]
    assert all(each.initial.shape == (2, SIZE, 3, 4, 6) and each.again.shape == (2, 2, SIZE, 3, 4, 6) for each in drawn)
    assert torch.equal(alone.of_chunk(1, Chunks(SIZE)).again[:, 0], drawn[1].again[:, 1])
    different = torch.cat([torch.cat([each.initial[None], each.again]) for each in drawn]).flatten(2).flatten(0, 1)
    assert len(different.unique(dim=0)) == len(different), "no noise is used twice"


@every_window
def test_a_longer_video_begins_as_a_shorter_one(window):
    policy = build(**window)
    whole, part = (videos_of(policy, TEXTS[0], stream_of(policy, frames=frames)) for frames in (FRAMES, 8))
    torch.testing.assert_close(whole[:, :8], part, rtol=1e-5, atol=1e-5)
    assert whole.shape == (2, FRAMES, 3, 4, 6)
    together = [stream_of(policy).of_chunk(chunk, Chunks(SIZE)) for chunk in range(6)] if window else []
    if together:
        noise = Noise(torch.cat([x.initial for x in together], dim=1), torch.cat([x.again for x in together], dim=2))
        torch.testing.assert_close(videos_of(policy, TEXTS[0], noise), whole, rtol=1e-5, atol=1e-5)


def test_a_video_without_an_end_takes_no_more_memory():
    policy = build(window_frames=6, sink_frames=2)
    texts = [randn(2, 3, 8, seed=seed) for seed in range(3)]
    caches, alive = [], []

    class Calls:
        def new_cache(self, frames):
            assert frames is None
            caches.append(policy.new_cache(frames))
            return caches[0]

        def __call__(self, *arguments, **options):
            return policy(*arguments, **options)

    stream = Sampler(policy.sampler).chunks(Calls(), lambda chunk: texts[chunk // 7 % 3], stream_of(policy))
    shapes = set()
    for number, chunk in enumerate(islice(stream, 40)):
        alive.append(weakref.ref(chunk))
        assert chunk.isfinite().all()
        del chunk
        gc.collect()
        if number > 3:
            assert sum(ref() is not None for ref in alive) <= 3
        shapes |= {layer.k_BLND.shape for layer in caches[0].layers}
    assert shapes == {(2, 6 * 2 * 3, 2, 12)}


def test_a_video_without_an_end_needs_a_window():
    with pytest.raises(ValueError, match=r"^frames \(None\) must be given without sampler.window_frames"):
        stream_of(build())


def test_what_a_chunk_sees_besides_itself():
    config = SamplerConfig(chunk_frames=2, window_frames=8, sink_frames=2)
    assert [config.past_of(chunk) for chunk in (0, 1, 3, 4, 9)] == [[], [0], [0, 1, 2], [0, 2, 3], [0, 7, 8]]
    assert SamplerConfig(chunk_frames=2, window_frames=4, sink_frames=2).past_of(5) == [0]
    assert SamplerConfig(chunk_frames=2, window_frames=2).past_of(5) == []
    assert SamplerConfig(chunk_frames=2).past_of(3) == [0, 1, 2]
