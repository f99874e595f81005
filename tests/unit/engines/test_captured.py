"""Captured passes against passes that run as they are: the static form, here run again in place of a CUDA graph."""

import logging

import pytest
import torch

from afd_scale.config.cast import Pass
from afd_scale.engines.captured import CapturedPasses, choose_capture, run_again
from afd_scale.layers.lora import Adapters
from afd_scale.layers.ops import ModelOps
from afd_scale.planning.host import captured_passes
from afd_scale.rollout.sampler import Noise, Sampler
from tests.networks import make_policy

FRAMES = 12
FIELDS = {"dim": 24, "ffn_dim": 40, "num_heads": 2, "num_layers": 2, "freq_dim": 16, "text_dim": 8, "text_length": 5,
          "latent_channels": 3, "prediction": "velocity", "chunk_frames": 2, "timesteps": (1000, 700, 400)}  # fmt: skip


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_network(adapters=None, **fields):
    network = make_policy({**FIELDS, **fields}, ModelOps(adapters=adapters))
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=number) / 5)
    return network


def roll_out(network, calls, seed, videos=2, rows=4):
    text = randn(videos, 3, 8, seed=seed)
    noise = Noise(randn(videos, FRAMES, 3, rows, 6, seed=seed + 1), randn(2, videos, FRAMES, 3, rows, 6, seed=seed + 2))
    return Sampler(network.sampler).rollout(calls, text, noise)


class Counting:
    """`run_again`, and how often passes were captured and replayed."""

    def __init__(self):
        self.captured = self.replayed = 0

    def __call__(self, run):
        output, replay = run_again(run)
        self.captured += 1

        def count():
            self.replayed += 1
            replay()

        return output, count


# Six chunks of three steps are 18 passes where each chunk begins in the pass that ends the one before. Of each rollout
# passes captured, and replayed: a kind is captured when a second chunk meets it.
CASES = {
    # In the first rollout each chunk sees another length. In the second all but the first pass are met again: of one
    # chunk six lengths, of two five.
    "no window": ({}, (0, 0), (6 + 5, 17)),
    # Once the window is full, the last three chunks are of the third one's kind: 3 steps each and 2 clean passes.
    "a window": ({"window_frames": 6, "sink_frames": 2}, (1, 3 * 3 + 2), (2 + 2, 2 + 1 + 2 + 1 + 3 + 3 * 3 + 2)),
}


@pytest.mark.parametrize(("fields", "first", "second"), CASES.values(), ids=CASES)
def test_replayed_passes_generate_the_same_videos(fields, first, second):
    network, capture = make_network(**fields), Counting()
    captured = CapturedPasses(network, lambda: capture)
    for seed, expected in ((10, first), (20, second)):  # another text and other noise, in the same buffers
        before = capture.captured, capture.replayed
        torch.testing.assert_close(
            roll_out(network, captured, seed), roll_out(network, network, seed), rtol=1e-5, atol=1e-5
        )
        assert (capture.captured - before[0], capture.replayed - before[1]) == expected
        if seed == 10:
            addresses = buffers(captured)
    assert buffers(captured) == addresses
    for options in ({"videos": 3}, {"rows": 8}):
        others = [roll_out(network, calls, 30, **options) for calls in (captured, network)]
        torch.testing.assert_close(*others, rtol=1e-5, atol=1e-5)


def test_what_a_replay_gave_stays():
    network = make_network()
    captured, text = CapturedPasses(network, Counting), randn(1, 3, 8)
    given = {}
    for rollout in range(3):
        cache = captured.new_cache(FRAMES)
        for step in range(3):
            chunk = randn(1, 2, 3, 4, 6, seed=step)
            given[rollout, step] = captured(chunk, torch.full((1, 2), 500.0), text, cache=cache)
    for step in range(3):
        torch.testing.assert_close(given[2, step], given[0, step], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fields", [*(fields for fields, *_ in CASES.values()), {"first_chunk_timesteps": (1000,)}])
def test_the_planner_counts_the_passes_of_python(fields):
    network, capture = make_network(**fields), Counting()
    captured, ran = CapturedPasses(network, lambda: capture), []
    network.register_forward_hook(lambda *_: ran.append(1))
    for videos in (2, 2, 2, 1):  # seven rollouts, two at once
        roll_out(network, captured, 10, videos)
    rollouts = Pass("rollout", "old_policy", "rollout", videos=7, at_once=2)
    launched, replayed = captured_passes(network.sampler, FRAMES, rollouts)
    assert capture.replayed == replayed
    # In place of a graph each replay runs the network, which capturing does once: warming up is a GPU's.
    assert len(ran) - replayed == launched - capture.captured
    assert capture.captured > 3


def buffers(captured):
    (layers, *_) = captured.buffers.values()
    return [tensor.data_ptr() for layer in layers for tensor in (layer.k_BLND, layer.v_BLND, *layer.text_kv)]


def test_each_adapter_has_passes_of_its_own():
    network = make_network(Adapters(("one", "other"), 2, 1.0))
    captured = CapturedPasses(network, Counting)

    class Policy:
        def __init__(self, calls, adapter):
            self.calls, self.adapter, self.new_cache = calls, adapter, calls.new_cache

        def __call__(self, *arguments, **options):
            return self.calls(*arguments, adapter=self.adapter, **options)

    videos = {}
    for adapter in ("one", "other", "one"):
        videos[adapter] = roll_out(network, Policy(captured, adapter), 10)
        expected = roll_out(network, Policy(network, adapter), 10)
        torch.testing.assert_close(videos[adapter], expected, rtol=1e-5, atol=1e-5)
    assert (videos["one"] - videos["other"]).abs().max() > 1e-3


def test_what_cannot_be_captured_runs_as_it_is_and_says_why(caplog):
    def capture(run):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    network = make_network()
    captured = CapturedPasses(network, lambda: capture)
    with caplog.at_level(logging.WARNING):
        videos = [roll_out(network, captured, 10) for _ in range(2)]
    assert all(torch.equal(video, roll_out(network, network, 10)) for video in videos)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith("one kernel at a time: operation not permitted when stream is capturing")


def test_graphs_are_of_gpus():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_capture("auto", cpu, shares_tokens=False) is None
    assert choose_capture(False, gpu, shares_tokens=False) is None
    assert choose_capture("auto", gpu, shares_tokens=True) is None
    with pytest.raises(ValueError, match=r"^rollout.graphs \(true\) must be auto or false on a cpu"):
        choose_capture(True, cpu, shares_tokens=False)
