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


def roll_out(network, calls, seed, videos=2):
    text = randn(videos, 3, 8, seed=seed)
    noise = Noise(randn(videos, FRAMES, 3, 4, 6, seed=seed + 1), randn(2, videos, FRAMES, 3, 4, 6, seed=seed + 2))
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


# Six chunks of three steps. Passes of one chunk: each chunk's second and third step, and where there is no room ahead
# its clean pass and the next one's first step too. A kind runs as it is when it is first met.
CASES = {
    "no window": ({}, 6, 6),
    # Of the last four chunks, which see a full window, all passes but the third's first are one kind.
    "a window": ({"window_frames": 6, "sink_frames": 2}, 3, 2 + (3 + 4 + 4 + 3 - 1)),
}


@pytest.mark.parametrize(("fields", "kinds", "replays"), CASES.values(), ids=CASES)
def test_replayed_passes_generate_the_same_videos(fields, kinds, replays):
    network, capture = make_network(**fields), Counting()
    captured = CapturedPasses(network, capture)
    for seed in (10, 20):  # another text and other noise, in the same buffers
        torch.testing.assert_close(
            roll_out(network, captured, seed), roll_out(network, network, seed), rtol=1e-5, atol=1e-5
        )
        if seed == 10:
            assert (capture.captured, capture.replayed) == (kinds, replays)
            addresses = buffers(captured)
    assert capture.captured > kinds or fields, "joint passes are met again in the second rollout"
    assert buffers(captured) == addresses
    more_videos = roll_out(network, captured, 30, videos=3)
    torch.testing.assert_close(more_videos, roll_out(network, network, 30, videos=3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fields", [*(fields for fields, _, _ in CASES.values()), {"first_chunk_timesteps": (1000,)}])
def test_the_planner_counts_the_passes_of_python(fields):
    network, capture = make_network(**fields), Counting()
    captured, ran = CapturedPasses(network, capture), []
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
    captured = CapturedPasses(network, Counting())

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
    captured = CapturedPasses(network, capture)
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
