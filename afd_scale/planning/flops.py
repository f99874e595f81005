"""Floating-point operations of a step: what is executed, a multiplication and an addition counting as two.

Counted are matrix products and attention; norms, RoPE and activations are left out, as everywhere. Attention costs
4 x pairs x width forward, with the pairs that the layout makes visible.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from afd_scale.config import RunConfig
from afd_scale.config.cast import NetworkConfig, Pass
from afd_scale.config.judges import LatentDiscriminatorConfig, VlmDiscriminatorConfig
from afd_scale.config.models import Recomputation, WanConfig
from afd_scale.layers.attention.layout import AttentionLayout
from afd_scale.planning.counted import counted_flops
from afd_scale.planning.vlm import Stack, shown_video, stacks
from afd_scale.planning.workload import Workload

ATTENTION_BACKWARD = 2.5  # of its forward: kernels compute the scores again, five products where forward has two


@dataclass(frozen=True)
class Flops:
    """By what they are spent on: their backward passes differ.

    Attributes:
        linear: products with weights of the base.
        adapter: products with weights of one adapter.
        attention: products of queries, keys and values.
    """

    linear: float = 0.0
    adapter: float = 0.0
    attention: float = 0.0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.linear + other.linear, self.adapter + other.adapter, self.attention + other.attention)

    def __rmul__(self, times: float) -> "Flops":
        return Flops(times * self.linear, times * self.adapter, times * self.attention)

    @property
    def total(self) -> float:
        return self.linear + self.adapter + self.attention

    def backward(self, base_is_trained: bool, adapter_is_trained: bool = True) -> "Flops":
        """Of the backward pass of what this counts forward: a frozen weight passes a gradient on and gets none."""
        linear, adapter = (2 if trained else 1 for trained in (base_is_trained, adapter_is_trained))
        return Flops(linear * self.linear, adapter * self.adapter, ATTENTION_BACKWARD * self.attention)


def forward_flops(
    network: WanConfig, layout: AttentionLayout, tokens_per_frame: int, outputs: int, adapter_rank: int = 0
) -> Flops:
    """One video through a trunk and its head; what becomes of its text is not counted.

    Args:
        layout: of self-attention.
        outputs: numbers that the head makes of a token; 0 is no head.
        adapter_rank: of an adapter in use; 0 is none.
    """
    dim, ffn_dim, frames = network.dim, network.ffn_dim, layout.query_frames
    tokens, rows = frames * tokens_per_frame, network.text_length
    patch = network.latent_channels * network.patch[1] * network.patch[2]
    # Self-attention has q, k, v, o on tokens, cross-attention q and o.
    block = 2 * tokens * (6 * dim**2 + 2 * dim * ffn_dim)
    adapter = 2 * adapter_rank * tokens * (6 * 2 * dim + 2 * (dim + ffn_dim))
    embeddings = 2 * tokens * patch * dim + 2 * frames * (network.freq_dim * dim + dim**2 + 6 * dim**2)
    attention = 4 * dim * (layout.pairs(tokens_per_frame) + tokens * rows)
    layers = network.layers_run
    return Flops(embeddings + 2 * tokens * dim * outputs + layers * block, layers * adapter, layers * attention)


def text_flops(network: WanConfig, adapter_rank: int = 0) -> Flops:
    """One text: its embedding, and its keys and values in every layer."""
    dim, rows, layers = network.dim, network.text_length, network.layers_run
    embedding = 2 * rows * (network.text_dim * dim + dim**2)
    return Flops(embedding + layers * 2 * rows * 2 * dim**2, layers * 2 * adapter_rank * rows * 2 * 2 * dim)


def step_flops(config: RunConfig, load: Workload, *, recompute: bool = True) -> dict[str, Flops]:
    """What one rank executes in a step, by phase; of what does not run in every step, its share.

    Args:
        recompute: count the second forward pass of activation checkpointing. Without it this is what the models need.
    """

    def share(each: Pass) -> Flops:
        return (1 / each.every) * pass_flops(config, load, each, recompute=recompute)

    return {phase: sum(map(share, passes), Flops()) for phase, passes in load.phases.items()}


def pass_flops(config: RunConfig, load: Workload, each: Pass, *, recompute: bool = True) -> Flops:
    """What one rank executes in a pass whenever it runs."""
    videos = load.videos_of_rank(each, isinstance(config.role(each.role).network, WanConfig))
    return videos * video_flops(config, load, each, recompute=recompute)


def video_flops(config: RunConfig, load: Workload, each: Pass, *, recompute: bool = True) -> Flops:
    """One video of a pass, its backward pass included; of a network that is no transformer all is called linear."""
    role = config.role(each.role)
    network = role.network
    rank = role.lora.rank if role.lora and role.adapter else 0
    if isinstance(network, VlmDiscriminatorConfig):
        return _judge_flops(network, stacks(network, shown_video(config, each.frames)), rank, each.gradient, recompute)
    if not isinstance(network, WanConfig):
        return Flops(counted_flops(config, network, gradient=each.gradient, of_input=each.of_input, frames=each.frames))
    text = text_flops(network, rank)
    *before, last = (
        times * forward_flops(network, layout, load.tokens_per_frame, outputs, rank)
        for times, layout, outputs in _layouts(config, load, each, network)
    )
    if each.kind == "rollout":  # which reads its text once
        return sum(before, last) + text
    last += text
    flops = sum([each + text for each in before], last)
    if each.gradient and not (each.trains and has_frozen_trunk(network)):
        if recompute:
            flops += recomputed(last, network.activation_checkpointing)
        flops += last.backward(each.trains and network.lora is None, each.trains)
    return flops


def recomputed(forward: Flops, choice: Recomputation) -> Flops:
    """What the backward pass does again of a forward pass."""
    if choice == "none":
        return Flops()
    return replace(forward, attention=0) if choice == "keep_attention" else forward


def has_frozen_trunk(network: NetworkConfig) -> bool:
    """Whether training passes have no gradient through all but a head that is too small to count."""
    return isinstance(network, LatentDiscriminatorConfig) and bool(network.features)


def _judge_flops(
    network: VlmDiscriminatorConfig, both: Sequence[Stack], rank: int, gradient: bool, recompute: bool
) -> Flops:
    """One video through a video-language judge."""
    flops = Flops()
    for stack in both:
        forward = Flops(2 * stack.weights, 2 * rank * stack.adapter, 2 * stack.attention)
        flops += forward
        if gradient and stack.gradient:
            again = 1 if recompute and network.activation_checkpointing else 0
            flops += again * forward + forward.backward(base_is_trained=network.lora is None)
    return flops


def _layouts(
    config: RunConfig, load: Workload, each: Pass, network: WanConfig
) -> list[tuple[int, AttentionLayout, int]]:  # fmt: skip
    """What a video runs through, in order: how often, under which attention, to how many outputs of a token.

    A gradient goes through the last.
    """
    sampler, frames = config.sampler, load.frames_of(each)
    outputs = network.latent_channels * network.patch[1] * network.patch[2]
    if each.kind == "score":
        return [(1, AttentionLayout.full(frames), 1)]
    if each.kind == "bidirectional":
        return [(1, AttentionLayout.full(frames), outputs)]
    if each.kind == "rollout":  # chunk by chunk, with the KV cache
        return [
            (times, AttentionLayout.full(stop - start, sampler.cached_frames(stop)), outputs)
            for (start, stop), times in zip(
                sampler.chunks.ranges(frames), sampler.passes(frames, each.given), strict=True
            )
        ]
    window = load.window_of(each)
    layout, place = (window.end, *sampler.layout), (each.states, window.first_frame, window.gap)
    if each.gradient and each.context_gradient:
        return [(1, AttentionLayout.clean_and_noisy(*layout, *place), outputs)]
    context = AttentionLayout.block_causal(*layout, window.gap)
    return [(1, context, 0), (1, AttentionLayout.teacher_forcing(*layout, *place), outputs)]
