"""Places in the window: keys that are kept as they are and turned when they are used, against absolute positions."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from afd_scale.chunks import Chunks
from afd_scale.config import ConfigError, load_config
from afd_scale.config.sampler import SamplerConfig
from afd_scale.engines.captured import CapturedPasses, run_again
from afd_scale.flow.randomness import Randomness
from afd_scale.layers.attention import AttentionLayout
from afd_scale.layers.kv_cache import KVCache
from afd_scale.layers.rope import Rotation, WindowRotation, _turn
from afd_scale.rollout.sampler import Noise, Sampler
from tests.networks import make_policy

FRAMES, SIZE, TEXT_WIDTH = 16, 2, 8
FIELDS = {"dim": 24, "ffn_dim": 40, "num_heads": 2, "num_layers": 2, "freq_dim": 16, "text_dim": TEXT_WIDTH,
          "text_length": 5, "latent_channels": 3, "prediction": "velocity", "chunk_frames": SIZE,
          "timesteps": (1000, 500)}  # fmt: skip
# Window and sink; whether places in the window make a difference in a video of FRAMES.
WINDOWS = {
    "no sink": ({"window_frames": 6}, False),
    "a chunk": ({"window_frames": 2}, False),
    "a sink in a short video": ({"window_frames": 16, "sink_frames": 4}, False),
    "a sink far away": ({"window_frames": 8, "sink_frames": 2}, True),
    "a sink and a chunk": ({"window_frames": 4, "sink_frames": 2}, True),
}
every_window = pytest.mark.parametrize(("window", "differs"), WINDOWS.values(), ids=WINDOWS)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TEXT, NOISE = randn(2, 3, 8, seed=1), Noise(randn(2, FRAMES, 3, 4, 6), randn(1, 2, FRAMES, 3, 4, 6, seed=2))


def build(positions="window", **fields):
    policy = make_policy({**FIELDS, **fields, "positions": positions})
    with torch.no_grad():
        for number, parameter in enumerate(policy.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=number) / 3)
    return policy


def rollout(policy, calls=None):
    return Sampler(policy.sampler).rollout(calls or policy, TEXT, NOISE)


@every_window
def test_places_in_the_window_matter_where_the_sink_is_far_away(window, differs):
    """Scores depend on differences of positions alone."""
    videos, absolute = (rollout(build(positions, **window)) for positions in ("window", "absolute"))
    full = window["window_frames"]
    torch.testing.assert_close(videos[:, :full], absolute[:, :full], rtol=1e-4, atol=1e-4)
    if differs:
        assert (videos - absolute)[:, full:].abs().max() > 2e-3
    else:
        torch.testing.assert_close(videos, absolute, rtol=1e-4, atol=1e-4)


@every_window
@torch.no_grad()
def test_training_s_one_pass_sees_the_same_differences_unless_the_sink_is_far_away(window, differs):
    """What a run refuses, see below, and no other layout."""
    policy, clean, noisy = build(**window), NOISE.initial, NOISE.again[0]
    timestep = torch.linspace(150, 950, FRAMES // SIZE).repeat_interleave(SIZE).expand(2, -1)
    cache, cached = policy.new_cache(FRAMES), []
    for start in range(0, FRAMES, SIZE):
        here = slice(start, start + SIZE)
        cached.append(policy(noisy[:, here], timestep[:, here], TEXT, cache=cache))
        if start + SIZE < FRAMES:
            policy(clean[:, here], torch.zeros(2, SIZE), TEXT, cache=cache)
            cache.advance()
    forced, full = policy(noisy, timestep, TEXT, clean=clean), window["window_frames"]
    difference = (torch.cat(cached, dim=1) - forced).abs()
    assert difference[:, :full].max() < 1e-4
    assert (difference.max() > 2e-3) == differs
    assert difference.max() < 1e-4 or differs


@pytest.mark.parametrize("window", [{"window_frames": 8, "sink_frames": 2}, {"window_frames": 8, "sink_frames": 4}])
@torch.no_grad()
def test_a_chunk_sees_the_sink_directly_before_the_others(window):
    """In one layer keys know of no others, so a pass without a cache over what is in the window is the same."""
    policy, clean = build(num_layers=1, **window), NOISE.initial
    cache, config = policy.new_cache(None), policy.sampler
    for chunk in range(FRAMES // SIZE):
        here = slice(chunk * SIZE, (chunk + 1) * SIZE)
        timestep = torch.full((2, SIZE), 500.0)
        velocity = policy(NOISE.again[0][:, here], timestep, TEXT, cache=cache)
        past = [frame for each in config.past_of(chunk) for frame in range(each * SIZE, (each + 1) * SIZE)]
        seen = torch.cat([clean[:, past], NOISE.again[0][:, here]], dim=1)
        times = torch.cat([torch.zeros(2, len(past)), timestep], dim=1)
        rotation = policy.rotation(seen, range(seen.shape[1]))
        layout = AttentionLayout.block_causal(seen.shape[1], Chunks(SIZE))
        expected = policy._predict(seen, times, TEXT, rotation, layout, None)[:, -SIZE:]
        torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-4)
        policy(clean[:, here], torch.zeros(2, SIZE), TEXT, cache=cache)
        cache.advance()


@pytest.mark.parametrize(("capacity", "sink"), [(1, 0), (4, 0), (4, 1), (5, 3), (2, 1)])
def test_each_slot_s_place_is_its_chunk_s_among_those_that_are_seen(capacity, sink):
    cache, slots = KVCache(1, None, Chunks(2), 2 * capacity, 2 * sink, turned_in_window=True), {}
    config = SamplerConfig(chunk_frames=2, window_frames=2 * capacity, sink_frames=2 * sink)
    for chunk in range(4 * capacity):
        slots[cache.ring.slot] = chunk
        cache.begin_pass(2)
        own, seen = cache.positions()
        places = [frame for run in seen for frame in run]
        in_order = [*config.past_of(chunk), chunk]
        expected = [2 * in_order.index(slots[slot]) + frame for slot in range(len(slots)) for frame in (0, 1)]
        assert places == expected
        assert [frame for run in own for frame in run] == expected[2 * cache.ring.slot :][:2]
        if cache.has_room_ahead:
            cache.begin_pass(4)
            own, seen = cache.positions()
            assert [*own[0]] == [*range(2 * chunk, 2 * chunk + 4)]
            assert seen == (range(2 * chunk + 4),)
        cache.advance()


def test_positions_stay_in_the_window_for_ever(monkeypatch):
    policy, asked = build(window_frames=6, sink_frames=2), set()
    make = policy.rotation
    monkeypatch.setattr(policy, "rotation", lambda latents, *frames: asked.add(frames) or make(latents, *frames))
    sampler = Sampler(policy.sampler)
    noise = sampler.stream(Randomness(0), "live", 0, (1, 2), (3, 4, 6), torch.device("cpu"))
    assert all(chunk.isfinite().all() for chunk in islice(sampler.chunks(policy, TEXT, noise), 30))
    assert max(run.stop for frames in asked for run in frames) == 6
    assert len(asked) < 12, "and are the same again and again: angles are computed once"


@every_window
def test_captured_passes_turn_the_window_s_keys(window, differs):
    policy = build(**window)
    captured = CapturedPasses(policy, lambda: run_again)
    for _ in range(3):
        torch.testing.assert_close(rollout(policy, captured), rollout(policy), rtol=1e-4, atol=1e-4)
    assert captured.passes


def test_the_operator_for_gpus_turns_queries_and_keys_apart():
    q, k = randn(1, 12, 2, 24), randn(1, 30, 2, 24, seed=1)
    own, seen = (Rotation(frames, 1, 2, 3, 24, torch.device("cpu")) for frames in
                 ((range(3, 5),), (range(1), range(3, 5), range(1, 3))))  # fmt: skip
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    torch.ops.afd_scale.rotate_apart(q, k, own.turns, seen.turns, q_out, k_out)
    turned = WindowRotation(own, seen)(q, k)
    for ours, expected, by_hand in zip(
        (q_out, k_out), turned, (_turn(q, own.turns), _turn(k, seen.turns)), strict=True
    ):
        assert torch.equal(ours, expected)
        assert torch.equal(ours, by_hand)
    last = Rotation((range(1, 3),), 1, 2, 3, 24, torch.device("cpu"))
    assert torch.equal(seen.turns[18:], last.turns)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"positions \(window\) needs window_frames"):
        SamplerConfig(positions="window")
    longlive = Path(__file__).parents[3] / "configs/wan_1_3b/longlive.yaml"  # 21 latent frames, a window of 12, a sink
    with pytest.raises(ConfigError) as error:
        load_config(longlive, ["sampler.positions=window"])
    assert str(error.value) == (
        "sampler.positions (window) must be absolute with sampler.sink_frames (3) where data.latent_frames (21) exceed "
        "sampler.window_frames (12): a training pass has all chunks of a video at once, and to each the sink would "
        "stand elsewhere"
    )
    for other in ("data.latent_frames=12", "sampler.sink_frames=0"):
        assert load_config(longlive, ["sampler.positions=window", other]).sampler.positions == "window"
    with pytest.raises(ConfigError, match="positions"):
        SamplerConfig(window_frames=3).with_fields({"positions": "relative"})
