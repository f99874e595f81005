"""The few-step sampler: which passes a policy makes and what comes of them, chunk by chunk."""

from dataclasses import replace

import pytest
import torch

from afd_scale.config.methods.method import SigmaConfig
from afd_scale.config.sampler import SamplerConfig
from afd_scale.flow.randomness import Randomness
from afd_scale.rollout.sampler import Noise, Sampler
from tests.networks import make_policy

FRAMES, TEXT = 6, torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(4))
TWO_STEPS = {"chunk_frames": 2, "timesteps": (1000, 500), "timestep_shift": 1.0}
FIRST = {**TWO_STEPS, "first_chunk_timesteps": (1000, 800, 400, 200)}
TINY = {"dim": 24, "ffn_dim": 40, "num_heads": 2, "num_layers": 2, "freq_dim": 16, "text_dim": 8, "text_length": 5,
        "latent_channels": 3, "prediction": "velocity"}  # fmt: skip


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noise(renoisings):
    return Noise(randn(2, FRAMES, 3, 4, 6), randn(renoisings, 2, FRAMES, 3, 4, 6, seed=1))


class Recording:
    """A policy whose velocity is half of what it gets; a cache that counts.

    Attributes:
        passes: of each, the chunk by number, its timestep, what it got.
    """

    has_room_ahead = False

    def __init__(self):
        self.passes, self.advanced = [], 0

    def new_cache(self, frames):
        assert frames == FRAMES
        return self

    def advance(self):
        self.advanced += 1

    def __call__(self, noisy, timestep, text, *, cache):
        assert cache is self
        assert text is TEXT
        assert timestep.shape == noisy.shape[:2]
        (level,) = timestep.unique().tolist()
        self.passes.append((self.advanced, level, noisy))
        return noisy / 2


def levels(policy):
    """Of every pass: chunk and timestep."""
    return [(chunk, round(level)) for chunk, level, _ in policy.passes]


def test_a_hand_worked_chunk():
    policy, start = Recording(), noise(1)
    chunk = next(Sampler(SamplerConfig(**TWO_STEPS)).chunks(policy, TEXT, start))
    initial, again = start.initial[:, :2], start.again[0, :, :2]
    # sigma 1: x0 = x - x / 2. Noised to 0.5: x0 / 2 + noise / 2. Then x0 = x - 0.5 x / 2.
    expected = 0.75 * (initial / 4 + again / 2)
    torch.testing.assert_close(chunk, expected)
    assert levels(policy) == [(0, 1000), (0, 500)]


def test_a_chunk_is_cached_clean_before_the_next_and_the_last_is_not():
    policy = Recording()
    videos = Sampler(SamplerConfig(**TWO_STEPS)).rollout(policy, TEXT, noise(1))
    one_chunk = [1000, 500, 0]
    assert levels(policy) == [(chunk, level) for chunk in range(3) for level in one_chunk][:-1]
    cached = [got for _, level, got in policy.passes if level == 0]
    assert torch.equal(torch.cat(cached, dim=1), videos[:, :4])


@pytest.mark.parametrize(("exit", "steps"), [(0.1, (1, 1)), (0.5, (2, 1)), (0.51, (3, 2)), (1.0, (4, 2))])
def test_an_exit_ends_every_chunk_at_the_same_part_of_its_steps(exit, steps):
    sampler, policy = Sampler(SamplerConfig(**FIRST)), Recording()
    start = noise(3)
    noisy, clean = (torch.cat(x, dim=1) for x in zip(*sampler.last_steps(policy, TEXT, start, exit), strict=True))
    first, later = FIRST["first_chunk_timesteps"][: steps[0]], FIRST["timesteps"][: steps[1]]
    assert levels(policy) == [(number, level) for number, chunk in enumerate((first, later, later))
                              for level in (*chunk, 0)][:-1]  # fmt: skip
    sigma = sampler.last_sigmas(exit, clean)
    expected = torch.tensor([first[-1]] * 2 + [later[-1]] * 4) / 1000
    torch.testing.assert_close(sigma, expected.expand(2, -1))
    assert torch.equal(noisy[:, 4:], policy.passes[-1][2]), "what the last step saw"
    torch.testing.assert_close(clean, noisy - sigma[..., None, None, None] * noisy / 2)
    if exit == 1.0:
        assert torch.equal(clean, sampler.rollout(Recording(), TEXT, start))


def test_the_first_chunk_takes_its_own_steps():
    config, policy = SamplerConfig(**FIRST), Recording()
    Sampler(config).rollout(policy, TEXT, noise(3))
    first, rest = [1000, 800, 400, 200, 0], [1000, 500, 0]
    expected = [(0, t) for t in first] + [(1, t) for t in rest] + [(2, t) for t in rest[:-1]]
    assert levels(policy) == expected
    assert config.passes(FRAMES) == [5, 3, 2], "what is planned is what runs"


def trained_policy(**fields):
    """Some weights: an untrained one predicts nothing."""
    policy = make_policy({**TINY, **TWO_STEPS, **fields})
    with torch.no_grad():
        for number, parameter in enumerate(policy.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=number) / 5)
    return policy


class Counting:
    """A policy, and the frames of its passes; `room` takes the cache's room away."""

    def __init__(self, policy, room):
        self.policy, self.room, self.frames = policy, room, []

    def new_cache(self, frames):
        cache = self.policy.new_cache(frames)
        return cache if self.room else Narrow(cache)

    def __call__(self, noisy, timestep, text, *, cache):
        self.frames.append(noisy.shape[1])
        return self.policy(noisy, timestep, text, cache=cache.cache if isinstance(cache, Narrow) else cache)


class Narrow:
    has_room_ahead = False

    def __init__(self, cache):
        self.cache, self.advance = cache, cache.advance


@pytest.mark.parametrize(
    ("window", "frames"),
    [({}, [2, 2, 4, 2, 4, 2]), ({"window_frames": 4, "sink_frames": 2}, [2, 2, 4, 2, 2, 2, 2])],
    ids=["no window", "a full window has no room"],
)
def test_a_clean_chunk_and_the_next_ones_first_step_are_one_pass(window, frames):
    config, start, policy = SamplerConfig(**TWO_STEPS, **window), noise(1), trained_policy(**window)
    joined, apart = Counting(policy, room=True), Counting(policy, room=False)
    videos = [Sampler(config).rollout(each, TEXT, start) for each in (joined, apart)]
    torch.testing.assert_close(*videos, rtol=1e-5, atol=1e-5)
    assert joined.frames == frames
    assert apart.frames == [2] * 8


def test_what_is_given_is_cached_and_the_first_generated_chunk_begins_with_it():
    config, start, policy = SamplerConfig(**TWO_STEPS), noise(1), trained_policy()
    start = replace(start, given=randn(2, 2, 3, 4, 6, seed=7))
    joined, apart = Counting(policy, room=True), Counting(policy, room=False)
    videos = [Sampler(config).rollout(each, TEXT, start) for each in (joined, apart)]
    torch.testing.assert_close(*videos, rtol=1e-5, atol=1e-5)
    assert torch.equal(videos[0][:, :2], start.given)
    assert joined.frames == [4, 2, 4, 2]


def test_the_warp_moves_the_steps():
    policy = Recording()
    next(Sampler(SamplerConfig(timesteps=(1000, 500), timestep_shift=3.0)).chunks(policy, TEXT, noise(1)))
    assert levels(policy) == [(0, 1000), (0, 750)]  # 3 * 0.5 / (1 + 2 * 0.5)


def test_a_chunk_is_handed_out_before_later_passes_run():
    policy = Recording()
    chunks = Sampler(SamplerConfig(**FIRST)).chunks(policy, TEXT, noise(3))
    assert policy.passes == []
    next(chunks)
    assert levels(policy) == [(0, 1000), (0, 800), (0, 400), (0, 200)]
    assert policy.advanced == 0
    next(chunks)
    assert levels(policy)[4:] == [(0, 0), (1, 1000), (1, 500)]
    assert len(list(chunks)) == 1


@pytest.mark.parametrize("fields", [TWO_STEPS, FIRST, {**FIRST, "chunk_frames": 1, "timestep_shift": 5.0}], ids=str)
def test_a_rollout_is_its_chunks_and_a_plain_loop(fields):
    """The loop caches nothing: it makes the whole clean past again for each pass."""
    sampler = Sampler(SamplerConfig(**fields))
    model = make_policy({**TINY, **fields})
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(0.2 * randn(*parameter.shape, seed=seed))
    start, size = noise(3), sampler.config.chunk_frames
    videos = sampler.rollout(model, TEXT, start)
    assert torch.equal(torch.cat(list(sampler.chunks(model, TEXT, start)), dim=1), videos)
    assert not videos.requires_grad

    done = start.initial[:, :0]
    for first in range(0, FRAMES, size):
        here = slice(first, first + size)
        steps = fields.get("first_chunk_timesteps", fields["timesteps"]) if first == 0 else fields["timesteps"]
        shift = fields["timestep_shift"]
        sigmas = [shift * t / 1000 / (1 + (shift - 1) * t / 1000) for t in steps]
        x = start.initial[:, here]
        for step, sigma in enumerate(sigmas):
            if step:
                x = (1 - sigma) * clean + sigma * start.again[step - 1, :, here]  # noqa: F821 - of the step before
            timestep = torch.cat([torch.zeros(2, first), torch.full((2, size), 1000 * sigma)], dim=1)
            with torch.no_grad():
                clean = x - sigma * model(torch.cat([done, x], dim=1), timestep, TEXT)[:, first:]
        done = torch.cat([done, clean], dim=1)
    torch.testing.assert_close(videos, done, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("fields", "renoisings"), [(TWO_STEPS, 1), (FIRST, 3)])
def test_noise_is_enough_for_every_chunk_and_a_video_s_own(fields, renoisings):
    sampler, shape = Sampler(SamplerConfig(**fields)), (FRAMES, 3, 4, 6)
    drawn = sampler.draw(Randomness(0), "rollout", 1, (7, 3), shape, torch.device("cpu"))
    assert drawn.initial.shape == (2, *shape)
    assert drawn.again.shape == (renoisings, 2, *shape)
    alone = sampler.draw(Randomness(0), "rollout", 1, (3,), shape, torch.device("cpu"))
    assert torch.equal(alone.initial[0], drawn.initial[1])
    assert torch.equal(alone.again[:, 0], drawn.again[:, 1])
    different = torch.cat([drawn.initial[None], drawn.again]).flatten(2).flatten(0, 1)
    assert len(different.unique(dim=0)) == len(different), "no noise is used twice"


def test_training_levels_are_the_sampler_s():
    sampler = Sampler(SamplerConfig(**FIRST))
    latents = torch.empty(200, FRAMES, 1, 1, 1)
    sigma = sampler.draw_sigma(SigmaConfig(name="steps"), Randomness(0), "sigma", 1, range(200), latents)
    in_first, in_rest = ({round(1000 * x) for x in part.unique().tolist()} for part in (sigma[:, :2], sigma[:, 2:]))
    assert in_first == {1000, 800, 400, 200}
    assert in_rest == {1000, 500}
    assert torch.equal(sigma[:, ::2], sigma[:, 1::2]), "a chunk has one level"


def test_given_chunks_are_cached_and_not_denoised():
    policy, start = Recording(), noise(1)
    given = randn(2, 4, 3, 4, 6, seed=5)
    chunks = list(Sampler(SamplerConfig(**TWO_STEPS)).chunks(policy, TEXT, replace(start, given=given)))
    assert levels(policy) == [(0, 0), (1, 0), (2, 1000), (2, 500)]
    assert torch.equal(torch.cat(chunks[:2], dim=1), given)
    own = list(Sampler(SamplerConfig(**TWO_STEPS)).chunks(Recording(), TEXT, start))
    assert torch.equal(chunks[2], own[2])  # this policy looks at nothing else
    assert SamplerConfig(**TWO_STEPS).passes(FRAMES, given=4) == [1, 1, 2], "what is planned is what runs"


@pytest.mark.parametrize("given", [0, 2, 4])
@pytest.mark.parametrize("window", [None, 2, 4])
def test_calls_behind_given_chunks_are_those_that_are_planned(window, given):
    config = SamplerConfig(**TWO_STEPS, window_frames=window)
    policy, run = trained_policy(window_frames=window), []
    call = policy.forward

    def counted(noisy, *arguments, **options):
        run.append(noisy.shape[1] // 2)
        return call(noisy, *arguments, **options)

    policy.forward = counted
    start = replace(noise(1), given=randn(2, given, 3, 4, 6, seed=5))
    Sampler(config).rollout(policy, TEXT, start)
    assert run == [chunks for _, chunks, _ in config.order_of_calls(FRAMES, given)]
