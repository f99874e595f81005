"""FLOPs: against a case worked by hand, against torch's own counter, and against figures computed before."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from afd_scale.chunks import Chunks
from afd_scale.config import RunConfig
from afd_scale.config.cast import Pass, Role
from afd_scale.layers.attention.layout import AttentionLayout
from afd_scale.planning.counted import counted_flops
from afd_scale.planning.flops import Flops, forward_flops, text_flops, video_flops
from afd_scale.planning.workload import workload
from afd_scale.rollout.sampler import Noise, Sampler
from tests.unit.planning.networks import FIRST_OF_ONE, FIRST_OF_THREE, adapter, build, draw, judged, make_config

TOKENS = {"narrow": 144, "wide": 192}


def attention_flop(q, k, v, *_, **__):
    """Shapes (B, N, L, D)."""
    return 4 * q[0] * q[1] * q[2] * k[2] * q[3]


def attention_backward_flop(grad_out, q, k, v, *_, **__):
    return 10 * q[0] * q[1] * q[2] * k[2] * q[3]


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flop,
}


def counted(run) -> int:
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        run()
    return counter.get_total_flops()


def flops_of(config: RunConfig, role: str, kind: str, gradient: bool = False) -> Flops:
    """One video of the method's pass."""
    load = workload(config, 1)
    (each,) = (p for p in load.passes if (p.role, p.kind, p.gradient) == (role, kind, gradient))
    return video_flops(config, load, each)


def test_one_block_worked_by_hand():
    network = make_config("narrow").student.model_copy(
        update={"dim": 2, "ffn_dim": 3, "num_layers": 1, "text_length": 5, "text_dim": 7, "freq_dim": 4,
                "latent_channels": 1}
    )  # fmt: skip
    layout = AttentionLayout.block_causal(2, Chunks(1))
    flops = forward_flops(network, layout, tokens_per_frame=10, outputs=4, adapter_rank=1) + text_flops(network, 1)
    # 20 tokens: six linears 2 x 2, feed-forward 2 x 3 twice; 5 text rows: two linears 2 x 2.
    block = 2 * 20 * (6 * 4 + 2 * 6) + 2 * 5 * 2 * 4
    embeddings = 2 * 20 * 4 * 2 + 2 * 5 * (7 * 2 + 2 * 2) + 2 * 2 * (4 * 2 + 2 * 2 + 2 * 12)
    assert flops.linear == block + embeddings + 2 * 20 * 2 * 4
    # Rank 1: six adapters 2 + 2 and two 2 + 3 on tokens, two 2 + 2 on text.
    assert flops.adapter == 2 * (20 * (6 * 4 + 2 * 5) + 5 * 2 * 4)
    # First frame sees itself, second both: 300 pairs; 20 tokens see 5 rows.
    assert flops.attention == 4 * 2 * (300 + 100)
    assert Flops(1, 10, 100).backward(base_is_trained=True).total == 2 + 20 + 250
    assert Flops(1, 10, 100).backward(base_is_trained=False).total == 1 + 20 + 250


def test_an_adapter_runs_where_weights_change():
    trained = make_config("narrow", lora=True).role("student")
    cast = (trained, trained.average("old_policy"), trained.copy("reference"))
    assert [role.adapter for role in cast] == ["student", "old_policy", None]
    assert Role("judge", "method.judge", trained.network).adapter is None, "frozen, with a network of its own"


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("shape", ["narrow", "wide"])
def test_forward_passes_equal_torchs_count(shape, lora):
    config = make_config(shape, lora=lora, states_per_rollout=2)
    network, inputs = build(config, "student"), draw(config)
    with torch.no_grad():
        for role in ("old_policy", "reference"):  # of one base with LoRA: an adapter, and the base itself
            name = adapter(config, role) if role == "old_policy" else None
            counted_here = counted(lambda name=name: network(**inputs, adapter=name))
            assert counted_here == flops_of(config, role, "velocity").total
        plain = {name: inputs[name][:1] for name in ("noisy", "timestep", "text")}
        layout, student = AttentionLayout.block_causal(config.data.latent_frames, Chunks(1)), config.student
        outputs, rank = student.latent_channels * 4, student.lora.rank if lora else 0
        expected = (forward_flops(student, layout, TOKENS[shape], outputs, rank) + text_flops(student, rank)).total
        assert counted(lambda: network(**plain, adapter=adapter(config))) == expected
        both_ways = Pass("scores", "student", "bidirectional", videos=1, at_once=1)
        whole = config.model_copy(
            update={"sampler": config.sampler.model_copy(update={"chunk_frames": config.data.latent_frames})}
        )
        score, arguments = build(whole, "student"), list(plain.values())
        counted_here = counted(lambda: score(*arguments, adapter=adapter(config)))
        assert counted_here == video_flops(whole, workload(whole, 1), both_ways).total
        judge, name = build(config, "discriminator"), adapter(config, "discriminator")
        scored = counted(lambda: judge(judged(inputs), adapter=name))
        assert scored == flops_of(config, "discriminator", "score").total


@pytest.mark.parametrize(
    ("window", "start", "sampler"),
    [(None, 0, {}), (None, 2, {}), (2, 0, {}), (2, 2, {}), (None, 0, FIRST_OF_ONE), (None, 1, FIRST_OF_ONE),
     (None, 0, FIRST_OF_THREE), (None, 3, FIRST_OF_THREE)],
)  # fmt: skip
def test_a_rollout_equals_torchs_count(window, start, sampler):
    config = make_config("narrow", window=window, start=start, sampler=sampler)
    network, inputs = build(config, "student"), draw(config)
    calls = []

    class Policy:
        def __call__(self, *arguments, **options):
            calls.append(options)
            return network(*arguments, **options)

        def new_cache(self, frames):
            return network.new_cache(frames)

    given = torch.randn_like(inputs["noisy"])[:, :start]
    noise = Noise(inputs["noisy"], torch.randn(3, *inputs["noisy"].shape), given)
    total = counted(lambda: Sampler(config.sampler).rollout(Policy(), inputs["text"], noise))
    assert len(calls) == config.sampler.calls(4, start)
    assert total == flops_of(config, "old_policy", "rollout").total


@pytest.mark.parametrize(
    ("window", "start", "sampler"), [(None, 2, {}), (2, 2, {}), (None, 1, FIRST_OF_ONE), (None, 3, FIRST_OF_THREE)]
)
def test_velocities_behind_a_start_equal_torchs_count(window, start, sampler):
    config = make_config("narrow", window=window, start=start, sampler=sampler, states_per_rollout=2)
    network, inputs = build(config, "student"), draw(config)
    inputs |= {name: inputs[name][:, start:] for name in ("noisy", "timestep")}
    with torch.no_grad():
        total = counted(lambda: network(**inputs, first_frame=start))
    assert total == flops_of(config, "old_policy", "velocity").total


@pytest.mark.parametrize("context_gradient", [False, True], ids=["", "context"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_updates_are_within_three_percent_of_torchs_count(lora, checkpointing, context_gradient):
    """Not equal: the first layers pass no gradient on, and a recomputation stops before a block's last product."""
    fields = {"states_per_rollout": 2, "context_gradient": context_gradient}
    config = make_config("wide", lora=lora, checkpointing=checkpointing, **fields)
    network, inputs = build(config, "student"), draw(config)
    torch.nn.init.normal_(network.head.head.weight)
    options = {"clean_gradient": context_gradient, "adapter": adapter(config)}
    total = counted(lambda: network(**inputs, **options).square().mean().backward())
    assert total == pytest.approx(flops_of(config, "student", "velocity", gradient=True).total, rel=0.03)
    judge, name = build(config, "discriminator"), adapter(config, "discriminator")
    total = counted(lambda: judge(judged(inputs), adapter=name).sum().backward())
    update = next(p for p in workload(config, 1).passes if p.role == "discriminator" and p.gradient)
    assert total == pytest.approx(video_flops(config, workload(config, 1), update).total, rel=0.03)
    # A gradient of what passes through alone; torch's counter sees what autograd.grad leaves out.
    latents = inputs["clean"].requires_grad_()
    total = counted(lambda: torch.autograd.grad(judge(judged(inputs), adapter=name).sum(), latents))
    through = video_flops(config, workload(config, 1), replace(update, of_input=True))
    assert total == pytest.approx(through.total, rel=0.03)


@pytest.mark.parametrize(
    ("architecture", "forward", "both", "generated"), [("wan-1.3b", 0.198, 0.65, 0.99), ("wan-14b", 1.30, 4.16, 6.5)]
)
def test_wan_costs_what_was_computed_before(architecture, forward, both, generated):
    """Figures in PFLOP worked out independently, for 832x480 and 21 latent frames."""
    config = RunConfig.model_validate(
        {"method": "sft", "student": {"architecture": architecture}, "sampler": {"family": "self-forcing"},
         "data": {"latent_frames": 21, "latent_height": 60, "latent_width": 104}}
    )  # fmt: skip
    flops = forward_flops(config.student, AttentionLayout.block_causal(21, Chunks(3)), 1560, outputs=64)
    assert flops.total / 1e15 == pytest.approx(forward, rel=0.03)
    assert (flops + flops.backward(base_is_trained=True)).total / 1e15 == pytest.approx(both, rel=0.03)
    # Computed with 5 passes for every chunk; the last has no pass that fills the cache.
    rollout = video_flops(config, workload(config, 1), Pass("rollout", "student", "rollout", videos=1, at_once=1))
    assert rollout.total / 1e15 == pytest.approx(generated, rel=0.05)


CONV = {"name": "conv", "channels": 8, "identity_patch": [3, 4]}


def toy_config(**method) -> RunConfig:
    """Clips of 4 latent frames of 4 x 4: 12 frames of 16 x 16 for a conv judge."""
    return RunConfig.model_validate({
        "student": {"text_dim": 5, "text_length": 3, "latent_channels": 48},
        "data": {"global_batch": 2},
        "method": {"name": "afd", "rollouts_per_prompt": 2, "discriminator": CONV, **method},
    })  # fmt: skip


def test_convolutions_worked_by_hand():
    # 12 frames of 16 x 16 to 8 channels of 8 x 8 and 16 of 4 x 4, by kernels of 4 x 4; then 16 by 3 x 3.
    convolutions = 2 * (8 * 8 * 8 * 12 * 16 + 4 * 4 * 16 * 8 * 16 + 4 * 4 * 16 * 16 * 9)
    # The text to 16 numbers, these to scale and shift of 8, 16 and 16 channels; the score of 16 x 4 x 4 numbers.
    linears = 2 * (5 * 16 + 16 * 2 * (8 + 16 + 16) + 16 * 16)
    config = toy_config()
    network = config.role("discriminator").network
    forward = counted_flops(config, network)
    assert forward == convolutions + linears
    assert flops_of(config, "discriminator", "score").total == forward
    # Each product has two in its backward pass, but the first ones: what they are given gets no gradient.
    first = 2 * 8 * 8 * 8 * 12 * 16 + 2 * 5 * 16
    assert counted_flops(config, network, gradient=True) == 3 * forward - first
    through = counted_flops(config, network, gradient=True, of_input=True)
    assert through == 2 * forward - linears + 2 * 16 * 16, "FiLM and text lead to no latents"


def test_what_has_no_weights_computes_nothing(monkeypatch):
    monkeypatch.setattr("afd_scale.planning.counted.build_network", lambda *_: torch.nn.Identity())
    config = toy_config(discriminator={**CONV, "channels": 9})  # not one that is counted already
    assert counted_flops(config, config.role("discriminator").network) == 0


def test_a_network_that_cannot_run_without_memory_says_so(monkeypatch):
    class Asks(torch.nn.Linear):
        def forward(self, videos):
            return videos.latents.sum().item()

    monkeypatch.setattr("afd_scale.planning.counted.build_network", lambda *_: Asks(1, 1))
    config = toy_config(discriminator={**CONV, "channels": 10})
    with pytest.raises(ValueError, match="Asks must run on tensors without memory, or have a formula"):
        counted_flops(config, config.role("discriminator").network)
