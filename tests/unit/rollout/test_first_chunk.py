"""Videos whose first chunk has another length: every pass sees what the others do."""

from dataclasses import replace
from itertools import islice

import pytest
import torch

from afd_scale.chunks import Chunks
from afd_scale.config.methods.method import SigmaConfig
from afd_scale.config.sampler import SamplerConfig
from afd_scale.engines.captured import CapturedPasses, run_again
from afd_scale.flow.randomness import Randomness
from afd_scale.rollout.sampler import Noise, Sampler, scheduled
from tests.networks import make_policy

STEPS = {"timesteps": (1000, 500), "first_chunk_timesteps": (1000, 800, 400)}
FIELDS = {"dim": 24, "ffn_dim": 40, "num_heads": 2, "num_layers": 2, "freq_dim": 16, "text_dim": 8,
          "text_length": 5, "latent_channels": 3, "prediction": "velocity", **STEPS}  # fmt: skip
IMAGE, CLIP = {"chunk_frames": 3, "first_chunk_frames": 1}, {"chunk_frames": 2, "first_chunk_frames": 3}
LENGTHS = {1: [1, 3, 3, 3, 3], 3: [3, 2, 2, 2, 2]}  # by the first chunk's
EVERYTHING = {"image": IMAGE, "clip": CLIP}
WINDOWS = {
    "image stays": IMAGE | {"window_frames": 7, "sink_frames": 1},
    "image and a chunk stay": IMAGE | {"window_frames": 7, "sink_frames": 4},
    "clip stays": CLIP | {"window_frames": 7, "sink_frames": 3},
    "the video fits": IMAGE | {"window_frames": 13, "sink_frames": 1, "positions": "window"},
}
every_video = pytest.mark.parametrize("fields", (EVERYTHING | WINDOWS).values(), ids=EVERYTHING | WINDOWS)
TEXTS = [torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(seed)) for seed in (11, 12)]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(**fields):
    policy = make_policy({**FIELDS, **fields})
    with torch.no_grad():
        for number, parameter in enumerate(policy.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=number) / 3)
    return policy


def parts_of(fields):
    """Each chunk's frames."""
    lengths = LENGTHS[fields["first_chunk_frames"]]
    starts = [sum(lengths[:chunk]) for chunk in range(len(lengths))]
    return [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)]


def noise_of(fields):
    frames = parts_of(fields)[-1].stop
    return Noise(randn(2, frames, 3, 4, 6), randn(2, 2, frames, 3, 4, 6, seed=1))


@pytest.mark.parametrize("joint", [False, True])
@every_video
def test_cached_velocities_are_those_of_one_pass(fields, joint):
    policy, parts, noise = build(**fields), parts_of(fields), noise_of(fields)
    noisy, clean = noise.initial, noise.again[0]
    levels = torch.linspace(150, 950, len(parts))
    timestep = torch.cat(
        [level.expand(2, part.stop - part.start) for level, part in zip(levels, parts, strict=True)], 1
    )
    cache, cached = policy.new_cache(parts[-1].stop), []
    with torch.no_grad():
        for part in parts:
            cached.append(policy(noisy[:, part], timestep[:, part], TEXTS[0], cache=cache))
            if part != parts[-1]:
                policy(clean[:, part], torch.zeros_like(timestep[:, part]), TEXTS[0], cache=cache)
                cache.advance()
    cached = torch.cat(cached, dim=1)
    for first in (0, *(part.start for part in parts[1:3])):  # of these the rest, behind a start that is given
        here = slice(first, None)
        options = {"clean": clean, "first_frame": first, "clean_gradient": joint}
        forced = policy(noisy[:, here], timestep[:, here], TEXTS[0], **options)
        torch.testing.assert_close(forced.detach(), cached[:, here], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def plain_loop(policy, fields, noise, text_of):
    """Without a cache: the whole clean past again, under the text of the chunk, for each of its steps."""
    done = noise.initial[:, :0]
    for number, part in enumerate(parts_of(fields)):
        sampler, text = Sampler(policy.sampler), text_of(number)
        if noise.given is not None and part.stop <= noise.given.shape[1]:
            done = noise.given[:, : part.stop]
            continue
        x = noise.initial[:, part]
        for step, sigma in enumerate((sampler.sigmas if number else sampler.first_sigmas).tolist()):
            if step:
                x = (1 - sigma) * clean + sigma * noise.again[step - 1][:, part]  # noqa: F821 - of the step before
            times = torch.cat([torch.zeros(2, part.start), torch.full((2, x.shape[1]), 1000 * sigma)], dim=1)
            clean = x - sigma * policy(torch.cat([done, x], dim=1), times, text)[:, part]
        done = torch.cat([done, clean], dim=1)
    return done


class Counted:
    """A policy, and the frames of its passes."""

    def __init__(self, policy):
        self.policy, self.new_cache, self.frames = policy, policy.new_cache, []

    def __call__(self, noisy, timestep, text, **options):
        assert timestep.shape == noisy.shape[:2], "a frame has a time"
        self.frames.append(noisy.shape[1])
        return self.policy(noisy, timestep, text, **options)


@pytest.mark.parametrize("given", [0, 1, 2])
@every_video
def test_a_rollout_is_a_plain_loop_and_what_was_planned(fields, given):
    policy, noise, parts = build(**fields), noise_of(fields), parts_of(fields)
    start = parts[given].start
    if given:
        noise = replace(noise, given=noise.again[1][:, :start])
    counted = Counted(policy)
    videos = Sampler(policy.sampler).rollout(counted, TEXTS[0], noise)
    torch.testing.assert_close(videos, plain_loop(policy, fields, noise, lambda _: TEXTS[0]), rtol=1e-4, atol=1e-4)
    lengths = LENGTHS[fields["first_chunk_frames"]]
    planned = policy.sampler.order_of_calls(noise.frames, start)
    assert counted.frames == [sum(lengths[chunk : chunk + chunks]) for chunk, chunks, _ in planned]


@pytest.mark.parametrize("change", [1, 2, 3])
@pytest.mark.parametrize("fields", EVERYTHING.values(), ids=EVERYTHING)
def test_a_prompt_that_changes_is_read_with_all_chunks_before_it(fields, change):
    policy, noise = build(**fields), noise_of(fields)
    text = scheduled([(0, TEXTS[0]), (change, TEXTS[1])])
    videos = Sampler(policy.sampler).rollout(Counted(policy), text, noise)
    torch.testing.assert_close(videos, plain_loop(policy, fields, noise, text), rtol=1e-4, atol=1e-4)
    assert (videos - Sampler(policy.sampler).rollout(policy, TEXTS[0], noise)).abs().max() > 1e-2


@every_video
def test_captured_passes_are_the_same(fields):
    policy, noise = build(**fields), noise_of(fields)
    captured = CapturedPasses(policy, lambda: run_again)
    for seed in range(3):
        drawn = replace(noise, initial=randn(*noise.initial.shape, seed=seed))
        made, expected = (Sampler(policy.sampler).rollout(calls, TEXTS[0], drawn) for calls in (captured, policy))
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)
    assert captured.passes


@pytest.mark.parametrize("positions", ["absolute", "window"])
@pytest.mark.parametrize("window", ["image stays", "image and a chunk stay", "clip stays"])
def test_a_video_without_an_end(window, positions):
    policy = build(**WINDOWS[window], positions=positions)
    sampler, lengths = Sampler(policy.sampler), LENGTHS[policy.sampler.first_chunk_frames]

    def stream(calls, frames=None):
        noise = sampler.stream(Randomness(0), "live", 0, (7, 3), (3, 4, 6), torch.device("cpu"), frames=frames)
        return sampler.chunks(calls, TEXTS[0], noise)

    chunks = list(islice(stream(policy), 12))
    assert [chunk.shape[1] for chunk in chunks] == [lengths[0], *[lengths[1]] * 11]
    assert all(chunk.isfinite().all() for chunk in chunks)
    captured = list(islice(stream(CapturedPasses(policy, lambda: run_again)), 12))
    torch.testing.assert_close(torch.cat(captured, dim=1), torch.cat(chunks, dim=1), rtol=1e-5, atol=1e-5)
    short = list(stream(policy, frames=sum(lengths[:3])))
    torch.testing.assert_close(torch.cat(short, dim=1), torch.cat(chunks[:3], dim=1), rtol=1e-5, atol=1e-5)


def test_a_chunk_has_one_level_in_training():
    for fields in EVERYTHING.values():
        sampler, parts = Sampler(SamplerConfig(**STEPS, **fields)), parts_of(fields)
        for first in (0, 1):
            frames = parts[-1].stop - parts[first].start
            latents, begun = torch.empty(200, frames, 1, 1, 1), [True] * 200 if first else None
            sigma = sampler.draw_sigma(SigmaConfig(name="uniform"), Randomness(0), "s", 1, range(200), latents, begun)
            assert (sigma.diff(dim=1) != 0).all(dim=0).nonzero().flatten().tolist() == [
                part.start - parts[first].start - 1 for part in parts[first + 1 :]
            ]
            assert (sigma.diff(dim=1) != 0).any(dim=0).sum() == len(parts) - first - 1
        exits = sampler.last_sigmas(1.0, torch.empty(2, parts[-1].stop, 1, 1, 1))
        assert torch.equal(exits[:, parts[0]], sampler.first_sigmas[-1].expand(2, parts[0].stop))
        assert (exits[:, parts[0].stop :] == sampler.sigmas[-1]).all()


def test_what_a_chunk_sees_besides_itself():
    config = SamplerConfig(**WINDOWS["image stays"])
    assert [config.past_of(chunk) for chunk in (0, 1, 2, 3, 9)] == [[], [0], [0, 1], [0, 2], [0, 8]]
    assert SamplerConfig(**CLIP).past_of(3) == [0, 1, 2]
    assert config.chunks == Chunks(3, 1)
    assert config.passes(7, given=1) == [1, 5, 4]
