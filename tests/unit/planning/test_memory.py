"""Memory as modelled against memory as measured: the profiler's account of every allocation on the CPU, in float32.

Parameters and their gradients exist before a measurement, as under ZeRO-3; what is measured comes on top.
"""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from afd_scale.planning.activations import (
    Tokens,
    Trunk,
    forward_working,
    saved_outside_blocks,
    training_activations,
)
from afd_scale.planning.memory import ADAM, cache_bytes
from afd_scale.planning.workload import workload
from afd_scale.rollout.sampler import Noise, Sampler
from tests.unit.planning.networks import FIRST_OF_ONE, FIRST_OF_THREE, adapter, build, draw, judged, make_config

TOKENS = {"narrow": 144, "deep": 144, "wide": 192}
WITHIN = 0.10


def measured_peak(run) -> int:
    """Most bytes allocated at a time on top of what was there before; of two runs, for a busy machine's profiler may
    miss some."""
    return max(_measured_peak(run) for _ in range(2))


def _measured_peak(run) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    now = peak = 0
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for change in sorted(changes, key=lambda event: event.start_ns()):
        now += change.nbytes()
        peak = max(peak, now)
    return peak


def give_gradients(network) -> None:
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


def test_the_measure_sees_an_allocation_and_its_end():
    def run():
        first = torch.empty(1000)
        del first
        kept = torch.empty(500)
        torch.empty(100)
        return kept

    assert measured_peak(run) == 4000


# Shape, noised states, gradient through the context.
PASSES = [("narrow", 2, False), ("narrow", 1, True), ("wide", 1, False), ("deep", 1, True)]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(("shape", "states", "context"), PASSES)
def test_the_students_update(shape, lora, checkpointing, states, context):
    config = make_config(shape, lora=lora, checkpointing=checkpointing, states_per_rollout=states)
    network, inputs = build(config, "student"), draw(config)
    torch.nn.init.normal_(network.head.head.weight)
    give_gradients(network)
    frames = config.data.latent_frames
    video = frames * TOKENS[shape]
    if context:
        tokens = Tokens((1 + states) * video, 0, (1 + states) * frames, 1)
    else:
        tokens = Tokens(states * video, video, states * frames, 1)

    def update():
        network(**inputs, clean_gradient=context, adapter=adapter(config)).square().mean().backward()

    update()  # the kernels' one-time allocations
    modelled = training_activations(Trunk(config.student, 4), tokens)
    assert modelled == pytest.approx(measured_peak(update), rel=WITHIN)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("shape", ["narrow", "wide"])
def test_the_discriminators_update(shape, lora, checkpointing):
    config = make_config(shape, lora=lora, checkpointing=checkpointing)
    network, inputs = build(config, "discriminator"), draw(config, videos=2)
    give_gradients(network)
    frames = 2 * config.data.latent_frames

    def update():
        network(judged(inputs), adapter=adapter(config, "discriminator")).sum().backward()

    update()
    modelled = training_activations(Trunk(config.method.discriminator, 4), Tokens(frames * TOKENS[shape], 0, frames, 2))
    assert modelled == pytest.approx(measured_peak(update), rel=WITHIN)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_pass_without_gradient(lora):
    config = make_config("wide", lora=lora)
    network, inputs, frames = build(config, "student"), draw(config), config.data.latent_frames
    network.fuse()
    del inputs["clean"]

    @torch.no_grad()
    def run():
        network(**inputs, adapter=adapter(config))

    model, tokens = Trunk(config.student, 4), Tokens(frames * TOKENS["wide"], 0, frames, 1)
    modelled = forward_working(model, tokens) + saved_outside_blocks(model, tokens)
    assert modelled == pytest.approx(measured_peak(run), rel=WITHIN)


@pytest.mark.parametrize(
    ("shape", "window", "videos", "lora", "sampler"),
    [("narrow", None, 1, False, {}), ("wide", None, 2, True, {}), ("narrow", 2, 2, False, {}),
     ("narrow", None, 2, False, FIRST_OF_ONE), ("narrow", None, 1, True, FIRST_OF_THREE)],
)  # fmt: skip
def test_a_rollout_and_its_cache(shape, window, videos, lora, sampler):
    config = make_config(shape, lora=lora, window=window, sampler=sampler)
    network, inputs = build(config, "student"), draw(config, videos)
    network.fuse()
    caches = []

    class Policy:
        def __call__(self, *arguments, **options):
            return network(*arguments, **options)  # the adapter is merged

        def new_cache(self, frames):
            caches.append(network.new_cache(frames))
            return caches[-1]

    noise = inputs["noisy"]
    drawn, sampler = Noise(noise, torch.randn(3, *noise.shape)), Sampler(config.sampler)
    peak = measured_peak(lambda: sampler.rollout(Policy(), inputs["text"], drawn))

    model = Trunk(config.student, 4)
    cached = cache_bytes(config, load := workload(config, 1), videos)
    cache = caches[-1]
    kept = [x for layer in cache.layers for x in (layer.k_BLND, layer.v_BLND, *layer.text_kv)]
    assert cached == sum(x.nbytes for x in kept)
    if window:  # keys that are turned when they are used stand beside those that are kept, one layer's at a time
        turned = config.model_copy(update={"sampler": config.sampler.with_fields({"positions": "window"})})
        assert cache_bytes(turned, load, videos) - cached == cache.layers[0].k_BLND.nbytes
    frames = videos * load.frames_at_once
    chunk = Tokens(frames * TOKENS[shape], 0, frames, videos)
    modelled = cached + forward_working(model, chunk, cached=True) + saved_outside_blocks(model, chunk) + noise.nbytes
    assert modelled == pytest.approx(peak, rel=WITHIN)


def test_optimizer_and_gradients():
    config = make_config("narrow")
    network, inputs = build(config, "student"), draw(config)
    optimizer = torch.optim.AdamW(network.parameters())
    network(**inputs).square().mean().backward()
    optimizer.step()
    parameters = sum(p.numel() for p in network.parameters())
    assert sum(p.grad.nbytes for p in network.parameters()) == 4 * parameters
    held = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    assert ADAM * parameters == pytest.approx(held, rel=0.01)
