"""Self-Forcing's own code at the same work: a user's checkout of github.com/guandeh17/Self-Forcing, with our weights.

`load_modules` imports from the folder, `SelfForcing` runs its `CausalInferencePipeline` (a rollout) and its
`WanDiffusionWrapper` with `clean_x` (the teacher-forcing pass) over its `CausalWanModel`. Parameter names are ours.

What is put in the place of theirs, in their modules alone:
    the packages' `__init__`, tokenizer, VAE, text encoder, `demo_utils.memory`   not imported: nothing here calls them,
                      and they want packages and a GPU. Text is given as embeddings, latents are not decoded.
    `from_pretrained`  a model of the config's size with our weights
    sizes             30 layers, 1560 tokens a frame and caches of 12 heads of 128 are written into their pipeline; it
                      gets the config's, and a cache that is allocated once
    `torch.randn_like` in the pipeline hands out the noise that our rollout uses; `print` there is silent
    flash-attn        where it is absent or the dtype is not its: their own fallback,
                      `scaled_dot_product_attention`, without its cast to bfloat16
    flex_attention    on a CPU, where it has no backward: `scaled_dot_product_attention` with their mask, made dense,
                      once
"""

import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from afd_scale.config import RunConfig
from afd_scale.rollout.sampler import Noise

PACKAGES = ("wan", "wan.modules", "utils", "pipeline", "demo_utils")
UNUSED = {
    "wan.modules.tokenizers": ("HuggingfaceTokenizer",),
    "wan.modules.vae": ("_video_vae",),
    "wan.modules.t5": ("umt5_xxl",),
    "demo_utils.memory": ("gpu", "get_cuda_free_memory_gb", "DynamicSwapInstaller",
                          "move_model_to_device_with_memory_preservation"),
}  # fmt: skip
USED = ("wan.modules.attention", "wan.modules.model", "wan.modules.causal_model", "utils.scheduler",
        "utils.wan_wrapper", "pipeline.causal_inference")  # fmt: skip
FLEX_NOTE = ("Self-Forcing's teacher-forcing pass runs flex_attention, which has no backward on a CPU: "
             "scaled_dot_product_attention with its mask, made dense, stands in")  # fmt: skip


def check_checkout(folder: Path) -> None:
    """Raises:
    ValueError: the folder is no checkout of Self-Forcing.
    """
    for name in USED:
        path = Path(*name.split(".")).with_suffix(".py")
        if not (folder / path).is_file():
            raise ValueError(f"--peer ({folder}) must be a checkout of Self-Forcing: {path} is not there")


def load_modules(folder: Path) -> dict[str, Any]:
    """Self-Forcing's modules by name, imported from a checkout; nothing of them stays in `sys.modules`.

    Raises:
        ValueError: the folder is no checkout, or its modules want a package that is not installed.
    """
    check_checkout(folder)
    with _importing(folder):
        try:
            return {name: importlib.import_module(name) for name in USED}
        except ImportError as error:
            raise ValueError(f"--peer ({folder}) cannot be imported: {' '.join(str(error).split())}") from error


@contextlib.contextmanager
def _importing(folder: Path) -> Iterator[None]:
    """Their packages without what their `__init__` imports; afterwards all names mean what they meant before."""
    tops = {package.partition(".")[0] for package in PACKAGES}
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in tops}
    for name in before:
        del sys.modules[name]
    for name in PACKAGES:
        package = ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")).resolve())]
        sys.modules[name] = package
    for name, values in UNUSED.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(dict.fromkeys(values))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] in tops]:
            del sys.modules[name]
        sys.modules.update(before)


def check(config: RunConfig) -> None:
    """Raises:
    ValueError: the config asks for what their code has not.
    """
    student, sampler = config.student, config.sampler
    for field, value, rule, holds in (
        ("precision", config.precision, "must be fp32 or bf16", config.precision != "fp8"),
        ("student.prediction", student.prediction, "must be velocity", student.prediction == "velocity"),
        ("student.lora", student.lora and student.lora.rank, "must be null", student.lora is None),
        ("sampler.first_chunk_timesteps", sampler.first_chunk_timesteps, "must be null: it has one list for all chunks",
         sampler.first_chunk_timesteps is None),
    ):  # fmt: skip
        if not holds:
            raise ValueError(f"{field} ({value}) {rule} beside Self-Forcing, which has no other")
    if not sampler.chunks.are_alike:
        raise ValueError(f"sampler.first_chunk_frames ({sampler.first_chunk_frames}) must be null beside Self-Forcing: "
                         "it is called with chunks of one length")  # fmt: skip


def check_training(config: RunConfig) -> None:
    """Raises:
    ValueError: the config asks for what their teacher-forcing pass has not.
    """
    check(config)
    frames, window = config.data.latent_frames, config.sampler.window_frames
    if 2 * frames * frame_tokens(config) % 128 == 0:
        raise ValueError(f"tokens of a video ({frames * frame_tokens(config)}) must be no multiple of 64 beside "
                         "Self-Forcing: it cuts the padding off its attention's output, and where there is none, "
                         "all of it")  # fmt: skip
    if config.student.activation_checkpointing == "keep_attention":
        raise ValueError("student.activation_checkpointing (keep_attention) must be full or none beside Self-Forcing: "
                         "it recomputes whole blocks")  # fmt: skip
    if window is not None:
        raise ValueError(f"sampler.window_frames ({window}) must be null beside Self-Forcing: its teacher-forcing mask "
                         "has no window")  # fmt: skip


def frame_tokens(config: RunConfig) -> int:
    """Tokens of a latent frame."""
    _, p, q = config.student.patch
    return (config.data.latent_height // p) * (config.data.latent_width // q)


class SelfForcing:
    """Their model with a config's sizes and our weights.

    Args:
        state: weights of a `CausalWan`, by name.
    Raises:
        ValueError: it is no checkout.
    """

    def __init__(self, folder: Path, config: RunConfig, state: Mapping[str, Tensor], device: torch.device):
        self.config, self.device = config, device
        self.modules = load_modules(folder)
        some = next(iter(state.values()))
        self._replace_attention(some.dtype)
        wrapper = self.modules["utils.wan_wrapper"]
        model_class, sampler = wrapper.CausalWanModel, config.sampler
        wrapper.CausalWanModel = SimpleNamespace(from_pretrained=lambda _, **window: self._model(model_class, window))
        self.generator = wrapper.WanDiffusionWrapper(
            timestep_shift=sampler.timestep_shift, is_causal=True,
            local_attn_size=sampler.window_frames or -1, sink_size=sampler.sink_frames,
        )  # fmt: skip
        self.model.load_state_dict(state, strict=True)
        self.generator.to(device, some.dtype)
        self.dtype = some.dtype
        self.frame_tokens = frame_tokens(config)
        frames = config.data.latent_frames
        self.generator.seq_len = max(self.generator.seq_len, frames * self.frame_tokens)
        self.model.num_frame_per_block = sampler.chunk_frames
        self.model.gradient_checkpointing = config.student.activation_checkpointing != "none"
        for block in self.model.blocks:  # 1560 tokens a frame are written into it
            block.self_attn.max_attention_size = (sampler.window_frames or frames) * self.frame_tokens

    @property
    def model(self) -> Any:
        return self.generator.model

    def rollout(self, noise: Noise, text: Tensor) -> Callable[[], Tensor]:
        """A run of their inference pipeline on this noise: (B, F, C, H, W) latents."""
        pipeline_module, sampler = self.modules["pipeline.causal_inference"], self.config.sampler
        given = {"prompt_embeds": text.to(self.dtype)}
        settings = SimpleNamespace(
            denoising_step_list=list(sampler.timesteps), warp_denoising_step=True, context_noise=0,
            num_frame_per_block=sampler.chunk_frames, independent_first_frame=False,
        )  # fmt: skip
        torch_there = _TorchWithNoise(noise, sampler.chunk_frames, self.dtype)
        vars(pipeline_module).update(torch=torch_there, print=lambda *_: None)
        pipeline = pipeline_module.CausalInferencePipeline(
            settings, self.device, self.generator, text_encoder=lambda text_prompts: given,
            vae=SimpleNamespace(decode_to_pixel=lambda latents, use_cache: latents),
        )  # fmt: skip
        student, initial = self.config.student, noise.initial.to(self.dtype)
        cached = self.config.sampler.cached_frames(initial.shape[1]) * self.frame_tokens
        pipeline.num_transformer_blocks, pipeline.frame_seq_length = student.num_layers, self.frame_tokens
        shape = (len(initial), cached, student.num_heads, student.dim // student.num_heads)
        pipeline.kv_cache1 = [self._empty_cache(shape) for _ in range(student.num_layers)]
        pipeline.crossattn_cache = [{"is_init": False} for _ in range(student.num_layers)]

        @torch.no_grad()
        def run() -> Tensor:
            torch_there.rewind()
            _, latents = pipeline.inference(initial, [], return_latents=True)
            return latents

        return run

    def velocity(self, noisy: Tensor, timestep: Tensor, text: Tensor, clean: Tensor) -> Tensor:
        """(B, F, C, H, W) velocity of their teacher-forcing pass.

        Args:
            noisy: S noised states of each row of clean, side by side; each takes a clean copy along, as theirs does.
            timestep: (B, F).
            text, clean: of the B / S rows.
        """
        states = len(noisy) // len(clean)
        rows = [x.repeat_interleave(states, dim=0).to(self.dtype) for x in (text, clean)]
        velocity, _ = self.generator(noisy.to(self.dtype), {"prompt_embeds": rows[0]}, timestep, clean_x=rows[1])
        return velocity

    def _model(self, model_class: Any, window: Mapping[str, int]) -> Any:
        student = self.config.student
        return model_class(
            model_type="t2v", patch_size=student.patch, text_len=student.text_length, in_dim=student.latent_channels,
            dim=student.dim, ffn_dim=student.ffn_dim, freq_dim=student.freq_dim, text_dim=student.text_dim,
            out_dim=student.latent_channels, num_heads=student.num_heads, num_layers=student.num_layers,
            eps=student.eps, **window,
        )  # fmt: skip

    def _empty_cache(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        keys, values = (torch.zeros(shape, device=self.device, dtype=self.dtype) for _ in range(2))
        ends = (torch.zeros(1, dtype=torch.long, device=self.device) for _ in range(2))
        return {"k": keys, "v": values, **dict(zip(("global_end_index", "local_end_index"), ends, strict=True))}

    def _replace_attention(self, dtype: torch.dtype) -> None:
        """Where their kernels cannot run."""
        module, causal = self.modules["wan.modules.attention"], self.modules["wan.modules.causal_model"]
        has_flash = module.FLASH_ATTN_2_AVAILABLE or module.FLASH_ATTN_3_AVAILABLE
        if not has_flash or self.device.type == "cpu" or dtype == torch.float32:
            self.modules["wan.modules.model"].flash_attention = causal.attention = _attend
        if self.device.type == "cpu":
            causal.flex_attention = _DenseMasked()


def _attend(q_BLND: Tensor, k_BLND: Tensor, v_BLND: Tensor, k_lens: None = None) -> Tensor:
    """Their fallback, in the dtype that is there."""
    assert k_lens is None
    q, k, v = (x.transpose(1, 2) for x in (q_BLND, k_BLND, v_BLND))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


class _DenseMasked:
    """Called as flex_attention is, with the one mask that their model makes."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, block_mask: Any) -> Tensor:
        if self.mask is None:
            seen = create_mask(block_mask.mask_mod, None, None, query.shape[2], key.shape[2], device=query.device.type)
            self.mask = torch.zeros_like(seen, dtype=query.dtype).masked_fill_(~seen, float("-inf"))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask)


@dataclass
class _TorchWithNoise:
    """`torch`, whose `randn_like` hands out a rollout's noise: of each chunk, after each of its steps but the last."""

    noise: Noise
    chunk_frames: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        frames = self.noise.initial.shape[1]
        self.drawn = [
            step.flatten(0, 1).to(self.dtype)
            for start in range(0, frames, self.chunk_frames)
            for step in self.noise.again[:, :, start : start + self.chunk_frames]
        ]
        self.rewind()

    def rewind(self) -> None:
        self.left = iter(self.drawn)

    def randn_like(self, x: Tensor) -> Tensor:
        return next(self.left)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
