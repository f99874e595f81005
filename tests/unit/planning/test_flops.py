"""FLOPs: against a case worked by hand, against torch's own counter, and against figures computed before."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from afd_scale.config.models import StudentConfig
from afd_scale.layers.attention.layout import AttentionLayout
from afd_scale.planning.flops import (
    Flops,
    discriminator_update_flops,
    forward_flops,
    rollout_flops,
    rollout_passes,
    score_flops,
    student_forward,
    teacher_forcing_flops,
    update_flops,
)
from afd_scale.rollout.causal import rollout
from tests.unit.planning.networks import adapter, build_discriminator, build_student, draw, make_config

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


def test_one_block_worked_by_hand():
    network = make_config("narrow").student.model_copy(
        update={"dim": 2, "ffn_dim": 3, "num_layers": 1, "text_length": 5, "text_dim": 7, "freq_dim": 4,
                "latent_channels": 1}
    )  # fmt: skip
    flops = forward_flops(network, AttentionLayout.block_causal(2, 1), tokens_per_frame=10, outputs=4, adapter_rank=1)
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


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("shape", ["narrow", "wide"])
def test_forward_passes_equal_torchs_count(shape, lora):
    config = make_config(shape, lora=lora, states=2)
    network, inputs, tokens = build_student(config), draw(config), TOKENS[shape]
    rank, frames = 8 if lora else 0, config.data.latent_frames
    plain = {name: inputs[name][:1] for name in ("noisy", "timestep", "text")}
    with torch.no_grad():
        layout = AttentionLayout.block_causal(frames, 1)
        assert counted(lambda: network(**plain, adapter=adapter(config))) == (
            student_forward(config.student, layout, tokens, rank).total
        )
        context, states = teacher_forcing_flops(config.student, frames, tokens, 2, rank)
        assert counted(lambda: network(**inputs, adapter=adapter(config))) == (context + states).total
        scored = counted(lambda: build_discriminator(config)(inputs["clean"], inputs["text"]))
        assert scored == score_flops(config, config.method.discriminator, tokens).total


@pytest.mark.parametrize("window", [None, 2])
def test_a_rollout_equals_torchs_count(window):
    config = make_config("narrow")
    student = config.student.model_copy(update={"window_frames": window})
    network, inputs = build_student(config.model_copy(update={"student": student})), draw(config)
    calls = []

    class Policy:
        def __call__(self, *arguments, **options):
            calls.append(options)
            return network(*arguments, **options)

        def new_cache(self, frames):
            return network.new_cache(frames)

    noise = inputs["noisy"]
    sigmas = torch.tensor([1.0, 0.9, 0.8, 0.6])
    total = counted(lambda: rollout(Policy(), inputs["text"], noise, torch.randn(3, *noise.shape), sigmas))
    assert len(calls) == rollout_passes(student, 4) == 4 * 5 - 1
    assert total == rollout_flops(student, 4, TOKENS["narrow"]).total


@pytest.mark.parametrize("context_gradient", [False, True], ids=["", "context"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_updates_are_within_three_percent_of_torchs_count(lora, checkpointing, context_gradient):
    """Not equal: the first layers pass no gradient on, and a recomputation stops before a block's last product."""
    config = make_config("wide", lora=lora, checkpointing=checkpointing, states=2)
    network, inputs, tokens = build_student(config), draw(config), TOKENS["wide"]
    torch.nn.init.normal_(network.head.head.weight)
    expected = update_flops(
        config.student, 3, tokens, 2, context_gradient=context_gradient, recompute=True
    ).total  # fmt: skip
    total = counted(
        lambda: network(**inputs, clean_gradient=context_gradient, adapter=adapter(config)).square().mean().backward()
    )
    assert total == pytest.approx(expected, rel=0.03)
    judge = build_discriminator(config)
    total = counted(lambda: judge(inputs["clean"], inputs["text"]).sum().backward())
    expected = discriminator_update_flops(config, config.method.discriminator, tokens, recompute=True).total
    assert total == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    ("architecture", "forward", "both", "generated"), [("wan-1.3b", 0.198, 0.65, 0.99), ("wan-14b", 1.30, 4.16, 6.5)]
)
def test_wan_costs_what_was_computed_before(architecture, forward, both, generated):
    """Figures in PFLOP worked out independently, for 832x480 and 21 latent frames."""
    student = StudentConfig.model_validate({"architecture": architecture, "family": "self-forcing"})
    flops = student_forward(student, AttentionLayout.block_causal(21, 3), 1560, 0)
    assert flops.total / 1e15 == pytest.approx(forward, rel=0.03)
    assert (flops + flops.backward(base_is_trained=True)).total / 1e15 == pytest.approx(both, rel=0.03)
    # Computed with 5 passes for every chunk; the last has no pass that fills the cache.
    assert rollout_flops(student, 21, 1560).total / 1e15 == pytest.approx(generated, rel=0.05)
