"""What a video-language judge costs: its two stacks of layers, a vision tower over patches and a decoder over tokens.

A decoder layer of width E, keys and values of K, feed-forward H, on T tokens with causal attention:

    products      T (2 E^2 + 2 E K + 3 E H) of weights, 2 E T (T + 1) / 2 of attention
    autograd      two inputs of norms in float32; their outputs, q, k, v, attended and what is projected of it,
                  gate, its activation, up, their product: 5 E + 2 K + 4 H; two more E where weights are trained

A vision block is the same, each frame pair attending to itself; Qwen2-VL's has layer norms, and 3 H of a plain
feed-forward. Frames are prepared a video at a time, in PREPARING copies. What a video has of patches and tokens follows
from the config; assumed are PROMPT_TOKENS of a prompt, CHARACTERS_OF_TOKEN in a template, and frame rates by codec.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

from afd_scale.config import RunConfig
from afd_scale.config.judges import VlmDiscriminatorConfig
from afd_scale.models.vlm import read_vlm_config
from afd_scale.models.vlm_inputs import PatchGrid

FLOAT32 = 4
PROMPT_TOKENS = 100
CHARACTERS_OF_TOKEN = 4
PREPARING = 4


@dataclass(frozen=True)
class Shown:
    """A decoded video.

    Attributes:
        frames, height, width, colours: of its pixels.
        fps: frames a second, as the codec's data usually has.
    """

    frames: int
    height: int
    width: int
    colours: int
    fps: float

    @property
    def bytes(self) -> int:
        """Of its pixels, float32."""
        return self.frames * self.height * self.width * self.colours * FLOAT32


def shown_video(config: RunConfig, latent_frames: int | None = None) -> Shown:
    """What a run's codec makes of its latents: Wan's VAE, or the toy world's patch of 3 frames and 4 x 4 pixels.

    Args:
        latent_frames: that are decoded; None is all.
    """
    data, frames = config.data, latent_frames or config.data.latent_frames
    if config.codec.name == "wan":
        return Shown(1 + 4 * (frames - 1), 8 * data.latent_height, 8 * data.latent_width, 3, 16.0)
    return Shown(3 * frames, 4 * data.latent_height, 4 * data.latent_width, 1, 8.0)


@dataclass(frozen=True)
class Stack:
    """Layers of one kind, on one video.

    Attributes:
        layers, tokens: how many.
        width: of the stream.
        inputs: numbers that go into them, float32.
        linears: (in, out) of a layer.
        outside: multiply-adds with weights before and behind the layers.
        pairs: that attend, all layers together.
        saved, upcast: numbers a token that autograd keeps of a layer, in its own dtype and in float32.
        adapters: whether its layers have them; otherwise they are trained or frozen as a whole.
        gradient: whether one passes through.
    """

    layers: int
    tokens: int
    width: int
    inputs: int
    linears: tuple[tuple[int, int], ...]
    outside: int
    pairs: int
    saved: int
    upcast: int
    adapters: bool
    gradient: bool

    @property
    def weights(self) -> int:
        """Multiply-adds with weights."""
        return self.layers * self.tokens * sum(a * b for a, b in self.linears) + self.outside

    @property
    def adapter(self) -> int:
        """Multiply-adds of adapters of rank 1."""
        return self.layers * self.tokens * sum(a + b for a, b in self.linears) if self.adapters else 0

    @property
    def attention(self) -> int:
        """Multiply-adds of queries, keys and values."""
        return 2 * self.pairs * self.width

    def saved_by_layer(self, itemsize: int, rank: int) -> int:
        """Bytes that the backward pass of a layer needs."""
        bottlenecks = rank * len(self.linears) if self.adapters else 0
        return self.tokens * ((self.saved + bottlenecks) * itemsize + self.upcast * FLOAT32)


def stacks(network: VlmDiscriminatorConfig, shown: Shown, text_tokens: int | None = None) -> tuple[Stack, Stack]:
    """The vision tower and the language model of one video.

    Args:
        text_tokens: beside the video's; None is as assumed.
    """
    described = _described(network)
    vision, text = described.vision_config, described.text_config
    grid = PatchGrid(vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)
    size = grid.frame_size(shown.height, shown.width, network.min_pixels, network.max_pixels)
    frames = len(grid.shown_frames(shown.frames, shown.fps, network.frames_per_second))
    times, rows, columns = grid.shape(frames, *size)
    patches, merged = times * rows * columns, times * rows * columns // grid.merge**2
    if text_tokens is None:
        text_tokens = len(network.template) // CHARACTERS_OF_TOKEN + PROMPT_TOKENS
    tower = _vision(vision, text.hidden_size, patches, rows * columns, network)
    return tower, _language(text, merged + text_tokens, network)


def _vision(vision: Any, out: int, patches: int, of_frame: int, network: VlmDiscriminatorConfig) -> Stack:
    if vision.model_type == "qwen2_vl":
        width, hidden, gated = vision.embed_dim, int(vision.embed_dim * vision.mlp_ratio), False
        pairs = vision.depth * patches * of_frame
    else:
        width, hidden, gated = vision.hidden_size, vision.intermediate_size, True
        full, window = len(vision.fullatt_block_indexes), (vision.window_size // vision.patch_size) ** 2
        pairs = patches * (full * of_frame + (vision.depth - full) * min(window, of_frame))
    square = vision.spatial_merge_size**2
    inputs = patches * vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    merger = patches // square * (square * width) * (square * width + out)
    trained = network.lora is None
    return Stack(
        layers=vision.depth, tokens=patches, width=width, outside=merger + inputs * width, pairs=pairs,
        linears=((width, 3 * width), (width, width), *[(width, hidden)] * (1 + gated), (hidden, width)),
        inputs=inputs,
        saved=(7 if gated else 9) * width + (4 if gated else 3) * hidden + (2 * width if gated and trained else 0),
        upcast=2 * width if gated else 0,
        adapters=network.lora_vision, gradient=trained or network.lora_vision,
    )  # fmt: skip


def _language(text: Any, tokens: int, network: VlmDiscriminatorConfig) -> Stack:
    width, hidden = text.hidden_size, text.intermediate_size
    keys = width // text.num_attention_heads * text.num_key_value_heads
    trained = network.lora is None
    return Stack(
        layers=text.num_hidden_layers, tokens=tokens, width=width, inputs=0, outside=width,
        pairs=text.num_hidden_layers * tokens * (tokens + 1) // 2,
        linears=((width, width), (width, keys), (width, keys), (width, width),
                 (width, hidden), (width, hidden), (hidden, width)),
        saved=5 * width + 2 * keys + 4 * hidden + (2 * width if trained else 0), upcast=2 * width,
        adapters=not trained, gradient=True,
    )  # fmt: skip


def activation_bytes(
    network: VlmDiscriminatorConfig, both: tuple[Stack, Stack], videos: int, itemsize: int, gradient: bool
) -> int:
    """Peak of a pass of so many videos; with gradient of its backward pass too."""
    rank = network.lora.rank if network.lora else 0
    prepared = sum(stack.inputs for stack in both) * FLOAT32
    kept = working = passing = 0
    for stack in both:
        layer = stack.saved_by_layer(itemsize, rank)
        widest = max(b for _, b in stack.linears)
        if not gradient or not stack.gradient:  # a layer at a time: its widest tensors, its input and the residual
            passing = max(passing, stack.tokens * (4 * widest + 4 * stack.width) * itemsize)
        elif network.activation_checkpointing:
            kept += stack.layers * stack.tokens * stack.width * itemsize
            working = max(working, layer + 2 * stack.tokens * widest * itemsize)
        else:
            kept += stack.layers * layer
            working = max(working, 2 * stack.tokens * widest * itemsize)
    return max(videos * (prepared + max(kept + working, passing)), (videos - 1 + PREPARING) * prepared)


@cache
def _described(network: VlmDiscriminatorConfig) -> Any:
    return read_vlm_config(network)
