"""A causal few-step Wan as a diffusers pipeline: prompt in, frames out, chunk by chunk.

    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    frames = pipe("a cat", num_frames=81, height=480, width=832).frames[0]
    for frames in pipe.stream("a cat", height=480, width=832):  # without end, where the student has a window
        ...

An exported folder holds a copy of this file, which needs torch and diffusers alone; the text encoder, transformers,
and ftfy, without which prompts beyond ASCII may be embedded otherwise than in training.

The network is a WanTransformer3DModel; causal is how it is called. A chunk of latent frames is denoised in a few steps.
Each step predicts the clean chunk and noises it again, to the next level. Self-attention sees the clean chunks
before it by their keys and values, which one last pass at timestep 0 leaves in a cache.

Latents are (B, C, F, H, W) throughout, as everywhere in diffusers. Shape suffixes: L tokens, N heads, D head width.

Sources: Self-Forcing, arXiv:2506.08009; Wan, arXiv:2503.20314.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from diffusers.utils import is_ftfy_available, logging
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor

ROPE_BASE = 10000.0
USUAL_FRAMES = 21  # latent frames of the videos that Wan was made for
TIMESTEPS = 1000  # the transformer's timestep is 1000 sigma

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Chunks:
    """Where a video's chunks begin, in latent frames: all are of one size, but perhaps for the first.

    What our package's own `Chunks` says, which an exported folder is without.
    """

    size: int
    first: int

    def __str__(self) -> str:
        behind = f" behind a first one of {self.first}" if self.first != self.size else ""
        return f"{self.size} latent frames each{behind}"

    def start(self, chunk: int) -> int:
        """Of a chunk; so many chunks have as many frames."""
        return self.first + (chunk - 1) * self.size if chunk else 0

    def count(self, frames: int) -> int:
        """Whole chunks among so many first frames."""
        return max(0, 1 + (frames - self.first) // self.size)

    def are_whole(self, frames: int) -> bool:
        """Whether so many first frames are whole chunks."""
        return self.start(self.count(frames)) == frames


@dataclass
class KVCache:
    """Each layer's keys and values of the chunks that the current one sees, itself included, in a ring of slots.

    In a full window the current chunk takes the slot of the oldest one after the sink. Keys are kept after RoPE at
    absolute positions, so the order of the slots does not matter; or before it, and turned in each pass.

    Attributes:
        chunks: a slot is as long as the chunk of its number. A first chunk of another length never leaves its own.
        capacity, sink: slots, and how many of them are never given up; both in chunks.
        chunk: number of the current chunk.
        own, seen: cosines and sines, (1, L, 1, D / 2) each, of the current chunk's rotation, and of that of all that it
            sees, where keys are kept before it.
    """

    chunks: Chunks
    capacity: int
    sink: int
    chunk: int = 0
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    own: tuple[Tensor, Tensor] = field(init=False)
    seen: tuple[Tensor, Tensor] | None = None

    @property
    def slot(self) -> int:
        """Of the current chunk."""
        if self.chunk < self.capacity:
            return self.chunk
        return self.sink + (self.chunk - self.sink) % (self.capacity - self.sink)

    def places(self) -> list[int]:
        """Of the chunk in each slot, in the window: the sink first, the current chunk last."""
        filled, older = min(self.chunk + 1, self.capacity), self.capacity - 1 - self.slot
        if self.chunk < self.capacity:
            return list(range(filled))
        return [*range(self.sink), *range(self.sink + older, filled), *range(self.sink, self.sink + older)]

    def extend(self, layer: int, key_BLND: Tensor, value_BLND: Tensor) -> tuple[Tensor, Tensor]:
        """Put the current chunk's keys, before RoPE, and values into its slot; all that it sees, after RoPE."""
        batch, length, *heads = key_BLND.shape
        start = self.chunks.start
        tokens = length // (start(self.chunk + 1) - start(self.chunk))  # of a frame
        if layer not in self.layers:
            shape = (batch, start(self.capacity) * tokens, *heads)
            self.layers[layer] = key_BLND.new_empty(shape), value_BLND.new_empty(shape)
        here = slice(start(self.slot) * tokens, start(self.slot + 1) * tokens)
        keys, values = self.layers[layer]
        keys[:, here] = key_BLND if self.seen else rotate(key_BLND, *self.own)
        values[:, here] = value_BLND
        filled = start(min(self.chunk + 1, self.capacity)) * tokens
        keys, values = keys[:, :filled], values[:, :filled]
        return rotate(keys, *self.seen) if self.seen else keys, values


def rotate(x_BLND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: turns neighbouring pairs (x[2i], x[2i + 1]) of every head."""
    real, imaginary = x_BLND.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = (real * cos - imaginary * sin, real * sin + imaginary * cos)
    return torch.stack(rotated, dim=-1).flatten(-2).to(x_BLND.dtype)


class CausalSelfAttention(WanAttnProcessor):
    """Wan's self-attention; while it has a cache, a causal one."""

    def __init__(self, layer: int):
        super().__init__()
        self.layer = layer
        self.cache: KVCache | None = None

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.cache is None:
            return super().__call__(attn, hidden_states, *args, **kwargs)
        query, key, value = (projection(hidden_states) for projection in (attn.to_q, attn.to_k, attn.to_v))
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))
        keys, values = self.cache.extend(self.layer, key, value)
        attended = dispatch_attention_fn(rotate(query, *self.cache.own), keys, values, backend=self._attention_backend)
        project, dropout = attn.to_out
        return dropout(project(attended.flatten(2).to(query.dtype)))


def cleaned(prompt: str) -> str:
    """A prompt as training data has it: cleaned as Wan does, which takes ftfy, until nothing changes any more."""
    if not (prompt.isascii() or is_ftfy_available()):
        logger.warning("ftfy is not installed: prompts beyond ASCII may be embedded otherwise than in training")
    for _ in range(8):
        before, prompt = prompt, prompt_clean(prompt)
        if prompt == before:
            break
    return prompt


class CausalWanPipeline(DiffusionPipeline):
    """Generates videos with a causal few-step Wan.

    Without a VAE it takes and gives latents alone, and num_frames, height and width count those; without a text
    encoder it takes `prompt_embeds`.
    """

    model_cpu_offload_seq = "text_encoder->transformer"
    _exclude_from_cpu_offload = ["vae"]  # it decodes between the transformer's chunks
    _optional_components = ["tokenizer", "text_encoder", "vae"]

    def __init__(
        self, tokenizer: Any, text_encoder: Any, vae: AutoencoderKLWan, transformer: WanTransformer3DModel,
        scheduler: FlowMatchEulerDiscreteScheduler, chunk_frames: int = 3, first_chunk_frames: int | None = None,
        timesteps: Any = (1000, 750, 500, 250), first_chunk_timesteps: Sequence[int] | None = None,
        window_frames: int | None = None, sink_frames: int = 0, positions: str = "absolute",
        prediction: str = "velocity", text_length: int = 512,
    ):  # fmt: skip
        """Any of the numbers can be given to `from_pretrained`, in place of the folder's own.

        Args:
            scheduler: only its `shift` is used, the warp of the noise levels.
            chunk_frames: latent frames denoised together.
            first_chunk_frames: those of the first chunk; None is as many.
            timesteps: denoising steps in (0, 1000], falling, before the warp.
            first_chunk_timesteps: those of the first chunk; None takes `timesteps`.
            window_frames: latent frames a chunk may attend to, itself and the sink included; None is all.
            sink_frames: first latent frames that never leave the window.
            positions: where RoPE counts latent frames from: `absolute`, the video's beginning; `window`, that of the
                window, in which the sink stands first and the newest chunk last.
            prediction: what the transformer outputs, `velocity` (noise - x0) or `x0`.
            text_length: rows a text embedding is padded to, with zeros; all are attended.
        """
        super().__init__()
        chunks = Chunks(chunk_frames, chunk_frames if first_chunk_frames is None else first_chunk_frames)
        if min(chunks.size, chunks.first) < 1:
            raise ValueError(f"chunk_frames ({chunk_frames}) must be 1 or more, and first_chunk_frames "
                             f"({first_chunk_frames}) too")  # fmt: skip
        if window_frames is None:
            fits = not sink_frames
        else:
            are_whole = chunks.are_whole(sink_frames) and chunks.are_whole(window_frames)
            fits = are_whole and window_frames - sink_frames >= chunk_frames
        if not fits:
            raise ValueError(f"window_frames ({window_frames}) and sink_frames ({sink_frames}) must be whole chunks, "
                             f"{chunks}, and a window hold the sink and one more")  # fmt: skip
        if window_frames and chunks.first != chunks.size and not sink_frames:
            raise ValueError(f"sink_frames (0) must hold the first chunk with first_chunk_frames ({chunks.first}): "
                             "in a window others take the place of one that leaves")  # fmt: skip
        if positions != "absolute" and (positions != "window" or window_frames is None):
            raise ValueError(
                f"positions ({positions}) must be absolute, or window where window_frames says how long it is"
            )
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )
        self.register_to_config(
            chunk_frames=chunk_frames, first_chunk_frames=first_chunk_frames, timesteps=timesteps,
            first_chunk_timesteps=first_chunk_timesteps, window_frames=window_frames, sink_frames=sink_frames,
            positions=positions, prediction=prediction, text_length=text_length,
        )  # fmt: skip
        self._chunks = chunks
        self.temporal_factor = 1 if vae is None else vae.config.scale_factor_temporal
        self.spatial_factor = 1 if vae is None else vae.config.scale_factor_spatial
        self.video_processor = VideoProcessor(vae_scale_factor=self.spatial_factor)
        self._attention = [CausalSelfAttention(layer) for layer in range(len(transformer.blocks))]
        for block, processor in zip(transformer.blocks, self._attention, strict=True):
            block.attn1.set_processor(processor)

    @torch.no_grad()
    def __call__(
        self, prompt: str | list[str] | None = None, num_frames: int | None = None, height: int = 480,
        width: int = 832, *, output_type: str = "np", callback_on_chunk: Callable[[int, Tensor], None] | None = None,
        return_dict: bool = True, **options: Any,
    ) -> WanPipelineOutput | tuple[Any]:  # fmt: skip
        """Generate whole videos.

        Args:
            num_frames: None is as many whole chunks as 21 latent frames hold, or one: 81 frames for chunks of 3.
            output_type: `np` (B, T, H, W, 3) in [0, 1], `pt` (B, T, 3, H, W), `pil` (a list a video) or `latent`.
            callback_on_chunk: called with the number of each chunk and its clean latents, once it is there.
            return_dict: give a WanPipelineOutput, or a tuple.
            prompt, height, width, options: as of `latent_chunks`.
        """
        if num_frames is None:
            num_frames = self._video_frames(self._chunks.start(max(1, self._chunks.count(USUAL_FRAMES))))
        decode = None if output_type == "latent" else self.decoder()
        chunks = self.latent_chunks(prompt, num_frames, height, width, **options)
        parts = []
        for number, chunk in enumerate(self.progress_bar(chunks)):
            if callback_on_chunk is not None:
                callback_on_chunk(number, chunk)
            parts.append(chunk if decode is None else decode(chunk))
        frames = torch.cat(parts, dim=2)
        if decode is not None:
            frames = self.video_processor.postprocess_video(frames, output_type=output_type)
        self.maybe_free_model_hooks()
        return WanPipelineOutput(frames=frames) if return_dict else (frames,)

    def stream(
        self, prompt: str | list[str] | None = None, num_frames: int | None = None, height: int = 480,
        width: int = 832, *, output_type: str = "np", **options: Any,
    ) -> Iterator[Any]:  # fmt: skip
        """Give the frames of each chunk as soon as it is there.

        Args:
            output_type: as of a whole video.
            prompt, num_frames, height, width, options: as of `latent_chunks`.
        """
        if output_type == "latent":
            return self.latent_chunks(prompt, num_frames, height, width, **options)
        decode, postprocess = self.decoder(), self.video_processor.postprocess_video
        chunks = self.latent_chunks(prompt, num_frames, height, width, **options)
        return (postprocess(decode(chunk), output_type=output_type) for chunk in chunks)

    @torch.no_grad()
    def latent_chunks(
        self, prompt: str | list[str] | None = None, num_frames: int | None = None, height: int = 480,
        width: int = 832, *, prompt_embeds: Tensor | None = None, image: Any = None,
        start_latents: Tensor | None = None, generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None, renoise: Tensor | None = None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Give the clean latents of each chunk, (B, C, F, H, W), as soon as it is there.

        Args:
            prompt: one, or one a video.
            num_frames: of the video. None goes on without end, which needs a window: the cache would grow for ever.
            height, width: pixels.
            prompt_embeds: (B, T, E), in place of a prompt.
            image: the video's first frame, scaled to its size; for students whose first chunk is one latent frame.
            start_latents: (B, C, F, H, W) clean latents that the video starts with, whole chunks; they are given too.
            generator: draws noise chunk by chunk, so that a longer video starts as a shorter one does.
            latents: (B, C, F, H, W) noise in place of the generator's; the video has its size.
            renoise: (steps - 1, B, C, F, H, W) in place of the generator's: added after each step but the last.
        """
        if image is not None and start_latents is not None:
            raise ValueError("image and start_latents must not both be given: the video starts with one of them")
        if latents is not None:
            num_frames = self._video_frames(latents.shape[2])
            height, width = (size * self.spatial_factor for size in latents.shape[-2:])
        num_chunks, (rows, columns) = self._num_chunks(num_frames), self._latent_size(height, width)
        text = self._text(prompt, prompt_embeds)
        batch, channels = len(text), self.transformer.config.in_channels
        if image is not None:
            start_latents = self.encode_image(image, height, width)
        name = "start_latents" if image is None else "image"
        start = self._checked_start(start_latents, (batch, channels, rows, columns), name)

        def noise(frames: slice, step: int) -> Tensor:
            given = latents if step == 0 else None if renoise is None else renoise[step - 1]
            if given is None:
                shape = (batch, channels, frames.stop - frames.start, rows, columns)
                return randn_tensor(shape, generator=generator, device=self._execution_device)
            return given[:, :, frames].to(self._execution_device, torch.float32)

        return self._generate(text, num_chunks, start, noise)

    @torch.no_grad()
    def encode_prompt(self, prompt: str | list[str]) -> Tensor:
        """(B, T, E) UMT5 hidden states, zero after a prompt's end; rounded to float16, as training data is."""
        if self.text_encoder is None:
            raise ValueError("prompt must be given as prompt_embeds: this pipeline has no text encoder")
        prompts = [cleaned(one) for one in ([prompt] if isinstance(prompt, str) else prompt)]
        tokens = self.tokenizer(prompts, padding="max_length", max_length=self.config.text_length, truncation=True,
                                return_attention_mask=True, return_tensors="pt").to(self._execution_device)  # fmt: skip
        hidden = self.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return hidden.to(torch.float16) * tokens.attention_mask[..., None]

    @torch.no_grad()
    def encode_image(self, image: Any, height: int, width: int) -> Tensor:
        """(B, C, 1, H, W) latents of an image, or of a list of them, scaled to this size."""
        if self.vae is None:
            raise ValueError("image must be given as start_latents: this pipeline has no VAE")
        pixels = self.video_processor.preprocess(image, height, width)[:, :, None]
        mode = self.vae.encode(pixels.to(self._execution_device, self.vae.dtype)).latent_dist.mode()
        mean, std = self._statistics()
        return (mode.float() - mean) / std

    def decoder(self) -> Callable[[Tensor], Tensor]:
        """A decoder of one video's chunks from its start, (B, C, F, H, W) latents to (B, 3, T, H, W) in [-1, 1].

        Frame by frame as the VAE itself decodes, but what its convolutions remember outlives a chunk. A video's first
        latent frame gives one frame, every other `temporal_factor`.
        """
        if self.vae is None:
            raise ValueError("output_type must be latent: this pipeline has no VAE")
        memory: dict[int, Any] = defaultdict(lambda: None)

        @torch.no_grad()
        def decode(chunk: Tensor) -> Tensor:
            mean, std = self._statistics()
            latents = self.vae.post_quant_conv((chunk * std + mean).to(self.vae.dtype))
            frames = [
                self.vae.decoder(latent, feat_cache=memory, feat_idx=[0], first_chunk=not memory)
                for latent in latents.split(1, dim=2)
            ]
            return unpatchify(torch.cat(frames, dim=2), self.vae.config.patch_size or 1).float().clamp(-1.0, 1.0)

        return decode

    @torch.no_grad()
    def _generate(
        self, text: Tensor, num_chunks: int | None, start: Tensor, noise: Callable[[slice, int], Tensor]
    ) -> Iterator[Tensor]:
        """Clean chunks one after the other: those of `start`, then those denoised from noise(frames, step)."""
        config, chunks = self.config, self._chunks
        limits = (num_chunks, config.window_frames and chunks.count(config.window_frames))
        cache = KVCache(chunks, min(limit for limit in limits if limit), chunks.count(config.sink_frames))
        first_sigmas = self._sigmas(config.first_chunk_timesteps or config.timesteps)
        sigmas = self._sigmas(config.timesteps)
        while True:
            here = slice(chunks.start(cache.chunk), chunks.start(cache.chunk + 1))
            if config.positions == "window":
                places = [frame for place in cache.places()
                          for frame in range(chunks.start(place), chunks.start(place + 1))]  # fmt: skip
                newest = max(places) + 1
                cache.own = self._rotation(range(newest - (here.stop - here.start), newest), *start.shape[-2:])
                cache.seen = self._rotation(places, *start.shape[-2:])
            else:
                cache.own = self._rotation(range(here.start, here.stop), *start.shape[-2:])
            chunk = start[:, :, here]
            if not chunk.shape[2]:
                chunk = self._denoise(text, cache, sigmas if cache.chunk else first_sigmas, partial(noise, here))
            yield chunk
            if cache.chunk + 1 == num_chunks:
                return
            self._predict(chunk, 0.0, text, cache)
            cache.chunk += 1

    def _denoise(self, text: Tensor, cache: KVCache, sigmas: list[float], noise: Callable[[int], Tensor]) -> Tensor:
        """A clean chunk: each step predicts it, and noises the prediction to the next level."""
        x = noise(0)
        for step, sigma in enumerate(sigmas, start=1):
            output = self._predict(x, sigma, text, cache)
            x0 = output if self.config.prediction == "x0" else x - sigma * output
            if step < len(sigmas):
                x = (1 - sigmas[step]) * x0 + sigmas[step] * noise(step)
        return x0

    def _predict(self, x: Tensor, sigma: float, text: Tensor, cache: KVCache) -> Tensor:
        """The transformer's output for a chunk that sees the cached ones, in float32."""
        timestep = torch.full(x.shape[:1], TIMESTEPS * sigma, device=x.device)
        for processor in self._attention:  # for one pass: several videos may be under way
            processor.cache = cache
        try:
            return self.transformer(x.to(self.transformer.dtype), timestep, text, return_dict=False)[0].float()
        finally:
            for processor in self._attention:
                processor.cache = None

    def _sigmas(self, timesteps: Sequence[int]) -> list[float]:
        """Noise levels of denoising steps: s sigma / (1 + (s - 1) sigma)."""
        shift = self.scheduler.config.shift
        return [shift * t / (TIMESTEPS + (shift - 1) * t) for t in timesteps]

    def _rotation(self, frames: Sequence[int], height: int, width: int) -> tuple[Tensor, Tensor]:
        """(1, L, 1, D / 2) cosines and sines of RoPE; the pairs of a head split over frame, row and column."""
        _, p, q = self.transformer.config.patch_size
        axes = (torch.tensor(frames), torch.arange(height // p), torch.arange(width // q))
        pairs = self.transformer.config.attention_head_dim // 2
        counts = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
        angles = [
            position.flatten()[:, None] * ROPE_BASE ** -(torch.arange(count, dtype=torch.float64) / count)
            for position, count in zip(torch.meshgrid(*axes, indexing="ij"), counts, strict=True)
        ]
        angle = torch.cat(angles, dim=-1)[None, :, None].to(self._execution_device)
        return angle.cos().float(), angle.sin().float()

    def _num_chunks(self, num_frames: int | None) -> int | None:
        if num_frames is None:
            if self.config.window_frames is None:
                raise ValueError("num_frames must be given: without window_frames a chunk sees all before it")
            return None
        chunks, wanted = self._chunks, (num_frames - 1) / self.temporal_factor + 1
        count = max(1, round(1 + (wanted - chunks.first) / chunks.size))
        nearest = self._video_frames(chunks.start(count))
        if num_frames != nearest:
            raise ValueError(f"num_frames ({num_frames}) must be of whole chunks, {chunks}: "
                             f"the nearest is {nearest}")  # fmt: skip
        return count

    def _video_frames(self, latent_frames: int) -> int:
        return 1 + (latent_frames - 1) * self.temporal_factor

    def _latent_size(self, height: int, width: int) -> tuple[int, int]:
        _, p, q = self.transformer.config.patch_size
        for name, size, patch in (("height", height, p), ("width", width, q)):
            if size % (patch * self.spatial_factor):
                raise ValueError(f"{name} ({size}) must be a multiple of {patch * self.spatial_factor}: of a token")
        return height // self.spatial_factor, width // self.spatial_factor

    def _checked_start(self, start: Tensor | None, shape: tuple[int, ...], name: str) -> Tensor:
        """(B, C, F, H, W) clean latents, none of them where nothing is given; `shape` is without the frames."""
        batch, channels, rows, columns = shape
        if start is None:
            start = torch.zeros(1, channels, 0, rows, columns)
        if not self._chunks.are_whole(start.shape[2]):
            raise ValueError(f"{name} ({start.shape[2]} latent frames) must be whole chunks, {self._chunks}: a chunk"
                             " is given or generated as a whole")  # fmt: skip
        sizes = ((start.shape[1], *start.shape[3:]), (channels, rows, columns))
        found, needed = (f"{c} channels, {h} x {w}" for c, h, w in sizes)
        if found != needed:
            raise ValueError(f"{name} ({found}) must be {needed}")
        return start.to(self._execution_device, torch.float32).expand(batch, -1, -1, -1, -1)

    def _text(self, prompt: str | list[str] | None, prompt_embeds: Tensor | None) -> Tensor:
        """(B, text_length, E), zero rows after the embeddings."""
        if prompt is not None and prompt_embeds is None:
            prompt_embeds = self.encode_prompt(prompt)
        elif prompt is not None or prompt_embeds is None:
            raise ValueError("prompt or prompt_embeds must be given, one of them")
        rows = self.config.text_length - prompt_embeds.shape[1]
        if rows < 0:
            raise ValueError(f"prompt_embeds ({prompt_embeds.shape[1]} rows) must have at most "
                             f"{self.config.text_length}")  # fmt: skip
        return F.pad(prompt_embeds.to(self._execution_device, self.transformer.dtype), (0, 0, 0, rows))

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """(C, 1, 1, 1) mean and standard deviation of the VAE's latents."""
        config = self.vae.config
        mean, std = (torch.tensor(x, device=self.vae.device) for x in (config.latents_mean, config.latents_std))
        return mean.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1)
