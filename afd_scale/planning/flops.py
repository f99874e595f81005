"""Floating-point operations of a step: what is executed, a multiplication and an addition counting as two.

Counted are matrix products and attention; norms, RoPE and activations are left out, as everywhere. Attention costs
4 x pairs x width forward, with the pairs that the layout makes visible.
"""

from dataclasses import dataclass

from afd_scale.config import RunConfig
from afd_scale.config.methods import AfdConfig
from afd_scale.config.models import LatentDiscriminatorConfig, StudentConfig, WanArchitecture
from afd_scale.layers.attention.layout import AttentionLayout
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

    def backward(self, base_is_trained: bool) -> "Flops":
        """Of the backward pass of what this counts forward: a frozen weight passes a gradient on and gets none."""
        return Flops((2 if base_is_trained else 1) * self.linear, 2 * self.adapter, ATTENTION_BACKWARD * self.attention)


def forward_flops(
    network: WanArchitecture, layout: AttentionLayout, tokens_per_frame: int, outputs: int, adapter_rank: int = 0
) -> Flops:
    """One video through a trunk and its head.

    Args:
        layout: of self-attention.
        outputs: numbers that the head makes of a token; 0 is no head.
        adapter_rank: of an adapter in use; 0 is none.
    """
    dim, ffn_dim, frames = network.dim, network.ffn_dim, layout.query_frames
    tokens, rows = frames * tokens_per_frame, network.text_length
    patch = network.latent_channels * network.patch[1] * network.patch[2]
    # Self-attention has q, k, v, o on tokens; cross-attention q and o on tokens, k and v on the text.
    block = 2 * tokens * (6 * dim**2 + 2 * dim * ffn_dim) + 2 * rows * 2 * dim**2
    adapter = 2 * adapter_rank * (tokens * (6 * 2 * dim + 2 * (dim + ffn_dim)) + rows * 2 * 2 * dim)
    embeddings = (
        2 * tokens * patch * dim
        + 2 * rows * (network.text_dim * dim + dim**2)
        + 2 * frames * (network.freq_dim * dim + dim**2 + 6 * dim**2)
    )
    attention = 4 * dim * (layout.pairs(tokens_per_frame) + tokens * rows)
    layers = network.num_layers
    return Flops(embeddings + 2 * tokens * dim * outputs + layers * block, layers * adapter, layers * attention)


def student_forward(student: StudentConfig, layout: AttentionLayout, tokens_per_frame: int, adapter_rank: int) -> Flops:
    """One video through the student."""
    outputs = student.latent_channels * student.patch[1] * student.patch[2]
    return forward_flops(student, layout, tokens_per_frame, outputs, adapter_rank)


def rollout_passes(student: StudentConfig, frames: int) -> int:
    """Forward passes of one cached rollout: the steps of each chunk, and one to cache it unless it is the last."""
    return frames // student.chunk_frames * (len(student.timesteps) + 1) - 1


def rollout_flops(student: StudentConfig, frames: int, tokens_per_frame: int, adapter_rank: int = 0) -> Flops:
    """One video, generated chunk by chunk with its KV cache."""
    chunk, total = student.chunk_frames, Flops()
    for first in range(0, frames, chunk):
        passes = len(student.timesteps) + (first + chunk < frames)
        layout = AttentionLayout.full(chunk, student.cached_frames(first + chunk))
        total += passes * student_forward(student, layout, tokens_per_frame, adapter_rank)
    return total


def teacher_forcing_flops(
    student: StudentConfig, frames: int, tokens_per_frame: int, num_states: int, adapter_rank: int = 0
) -> tuple[Flops, Flops]:
    """One video's pass over the clean context, and the pass over its noised states."""
    window = (student.chunk_frames, student.window_frames, student.sink_frames)
    context = forward_flops(
        student, AttentionLayout.block_causal(frames, *window), tokens_per_frame, 0, adapter_rank
    )  # fmt: skip
    states = student_forward(
        student, AttentionLayout.teacher_forcing(frames, *window, num_states), tokens_per_frame, adapter_rank
    )
    return context, states


def update_flops(
    student: StudentConfig, frames: int, tokens_per_frame: int, num_states: int, *, context_gradient: bool,
    recompute: bool,
) -> Flops:  # fmt: skip
    """Forward and backward of the student on one video.

    Args:
        recompute: count the second forward pass of activation checkpointing. Without it this is what the model needs.
    """
    rank = 0 if student.lora is None else student.lora.rank
    if context_gradient:
        window = (student.chunk_frames, student.window_frames, student.sink_frames)
        layout = AttentionLayout.clean_and_noisy(frames, *window, num_states)
        context, trained = Flops(), student_forward(student, layout, tokens_per_frame, rank)
    else:
        context, trained = teacher_forcing_flops(student, frames, tokens_per_frame, num_states, rank)
    again = (1 if recompute and student.activation_checkpointing else 0) * trained
    return context + trained + again + trained.backward(base_is_trained=student.lora is None)


def score_flops(config: RunConfig, discriminator: LatentDiscriminatorConfig, tokens_per_frame: int) -> Flops:
    """One video through the latent discriminator."""
    rank = 0 if discriminator.lora is None else discriminator.lora.rank
    return forward_flops(
        discriminator, AttentionLayout.full(config.data.latent_frames), tokens_per_frame, 1, rank
    )  # fmt: skip


def discriminator_update_flops(
    config: RunConfig, discriminator: LatentDiscriminatorConfig, tokens_per_frame: int, *, recompute: bool
) -> Flops:
    """Forward and backward of the discriminator on one video."""
    forward = score_flops(config, discriminator, tokens_per_frame)
    again = (1 if recompute and discriminator.activation_checkpointing else 0) * forward
    return forward + again + forward.backward(base_is_trained=discriminator.lora is None)


def step_flops(config: RunConfig, load: Workload, *, recompute: bool = True) -> dict[str, Flops]:
    """What one rank executes in a step, by phase; without recomputation what the models need."""
    student, method, frames, tokens = config.student, config.method, load.frames, load.tokens_per_frame
    if not isinstance(method, AfdConfig):
        update = update_flops(student, frames, tokens, 1, context_gradient=True, recompute=recompute)
        return {"student": (load.videos / load.sequence) * update}
    rank = 0 if student.lora is None else student.lora.rank
    states = method.states_per_rollout
    update = update_flops(
        student, frames, tokens, states, context_gradient=method.context_gradient, recompute=recompute
    )  # fmt: skip
    old_context, old_states = teacher_forcing_flops(student, frames, tokens, states, rank)
    update += old_context + old_states
    if method.prior_weight:
        context, noisy = teacher_forcing_flops(student, frames, tokens, states)
        update += context + noisy
    phases = {"rollout": load.videos * rollout_flops(student, frames, tokens, rank), "discriminator": Flops()}
    if isinstance(method.discriminator, LatentDiscriminatorConfig):
        penalised = 2 if method.r1_weight or method.r2_weight else 1
        trained = discriminator_update_flops(config, method.discriminator, tokens, recompute=recompute)
        reward = score_flops(config, method.discriminator, tokens)
        phases["discriminator"] = (penalised * (load.prompts + load.paired_videos)) * trained + load.videos * reward
    phases["student"] = load.videos * update
    return {name: (1 / load.sequence) * flops for name, flops in phases.items()}
