"""Wan's codec: latents by its VAE, embeddings by UMT5, both as diffusers' WanPipeline computes them.

The models come from a folder or a hub repository in diffusers' layout (`vae/`, `text_encoder/`, `tokenizer/`), from
safetensors only. Each is loaded when it is first needed, so whoever only decodes holds no text encoder.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from afd_scale.codecs.cleaning import clean_prompt
from afd_scale.codecs.codec import ChunkDecoder, VideoForm
from afd_scale.codecs.conversions import to_float16
from afd_scale.config import ConfigError, one_line
from afd_scale.torchvision_ops import define_torchvision_ops

NAME = "wan"
TEXT_LENGTH = 512
# Frames of more pixels go through the VAE in tiles. Its widest activations are 96 float32 channels of four whole
# frames, 1.4 GB each at 1280 x 720, and several are alive at once; they grow with the frame's area.
WHOLE_FRAME_PIXELS = 1280 * 720
_CACHED_PROMPTS = 64  # at most 4 MB each for UMT5-XXL; the videos of a prompt follow one another

_FILES = ("vae/config.json", "vae/*.safetensors", "text_encoder/config.json", "text_encoder/*.safetensors",
          "tokenizer/tokenizer_config.json")  # fmt: skip
_END_BYTES = 1 << 20
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")

log = logging.getLogger(__name__)


class WanCodec:
    """Turns pixels into the latents that Wan's transformer works on, and prompts into the text it attends to.

    Attributes:
        name, spatial, whole_frame_pixels, colour, text_shape, provenance: as of any `Codec`.
    """

    colour: Literal["gray", "rgb24"] = "rgb24"

    def __init__(
        self,
        models: str | Path,
        *,
        device: torch.device | str = "cpu",
        vae_dtype: torch.dtype = torch.float32,
        text_dtype: torch.dtype | None = None,
        text_length: int = TEXT_LENGTH,
        whole_frame_pixels: int = WHOLE_FRAME_PIXELS,
    ) -> None:
        """Read the models' sizes; their weights are read later.

        Args:
            models: a folder in diffusers' layout, or the id of a hub repository.
            device: where both models run.
            vae_dtype: float32, in which Wan runs it.
            text_dtype: None is bfloat16 on a GPU, in which Wan runs it, and float32 on a CPU.
            text_length: tokens of an embedding with its padding; longer prompts lose their end.
            whole_frame_pixels: larger frames are encoded and decoded in overlapping tiles, blended where they meet:
                it takes less memory and gives other values than whole frames, most of all near the seams.
        Raises:
            ConfigError: the models are absent or of other classes.
        """
        self._models = str(models)
        self._device = torch.device(device)
        self._vae_dtype = vae_dtype
        self._text_dtype = text_dtype or (torch.float32 if self._device.type == "cpu" else torch.bfloat16)
        self.whole_frame_pixels = whole_frame_pixels
        self._check_files()
        self._vae_config = self._read_vae_config()
        self._temporal = int(self._vae_config["scale_factor_temporal"])
        self.spatial = int(self._vae_config["scale_factor_spatial"])
        self.name = f"{NAME}:{self._temporal}x{self.spatial}x{self.spatial}"
        self._vocabulary, text_dim = self._read_text_sizes()
        self.text_shape = (text_length, text_dim)
        self.provenance: dict[str, Any] = {
            "name": self.name, "models": self._identity(), "whole_frame_pixels": whole_frame_pixels,
            "vae_dtype": str(vae_dtype), "text_dtype": str(self._text_dtype),
        }  # fmt: skip
        self._embeddings: dict[str, NDArray[np.float16]] = {}  # no lru_cache: its cycle would keep a dropped codec

    def latent_shape(self, form: VideoForm) -> tuple[int, int, int, int]:
        """(F, C, H, W) of a video's latents.

        Raises:
            ConfigError: the form is not in colour, or the VAE would drop frames or pixels.
        """
        if form.colour != self.colour:
            raise ConfigError(f"colour ({form.colour}) must be {self.colour}: Wan's VAE takes colour")
        return self._latent_shape(form.frames, form.height, form.width)

    def frames(self, latent_frames: int) -> int:
        """Frames of a video of so many latent frames: the first gives one."""
        return 1 + (latent_frames - 1) * self._temporal

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """(B, T, 3, H, W) pixels to (B, F, C, H', W') latents: the mode of the VAE's distribution, normalised.

        Raises:
            ConfigError: the VAE does not take videos of this size, or its config misstates its factors.
        """
        num_frames, _, height, width = pixels.shape[1:]
        shape = self._latent_shape(num_frames, height, width)
        self._set_tiling(height * width)
        mode = self._vae.encode(pixels.transpose(1, 2).to(self._device, self._vae_dtype)).latent_dist.mode()
        mean, std = self._statistics
        latents = ((mode.float() - mean) / std).transpose(1, 2)
        if latents.shape[1:] != shape:
            raise self._wrong(f"have the factors that vae/config.json states: latents are {tuple(latents.shape[1:])}, "
                              f"and by its scale_factor_temporal and scale_factor_spatial {shape}")  # fmt: skip
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, F, C, H', W') latents to (B, T, 3, H, W) pixels, as `encode` saw them but for the VAE's loss."""
        self._set_tiling(self._frame_pixels(latents))
        return self._vae.decode(self._denormalised(latents)).sample.float().transpose(1, 2)

    def decoder(self) -> ChunkDecoder:
        """A decoder of whole frames, which refuses those that are decoded in tiles.

        The first latent frame of a video gives one frame, every other as many as `scale_factor_temporal`.
        """
        # What each convolution keeps of earlier frames, by its number; every call to the VAE resets the VAE's own.
        memory: dict[int, Any] = defaultdict(lambda: None)

        @torch.no_grad()
        def decode_chunk(chunk: Tensor) -> Tensor:
            from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

            if (size := self._frame_pixels(chunk)) > self.whole_frame_pixels:
                raise ConfigError(f"whole_frame_pixels ({self.whole_frame_pixels}) must be at least a frame's {size} "
                                  "to decode chunk by chunk: tiles would need a memory each")  # fmt: skip
            frames = [
                self._vae.decoder(frame, feat_cache=memory, feat_idx=[0], first_chunk=not memory)
                for frame in self._vae.post_quant_conv(self._denormalised(chunk)).split(1, dim=2)
            ]
            video = unpatchify(torch.cat(frames, dim=2), self._vae_config["patch_size"] or 1)
            return video.clamp(-1.0, 1.0).float().transpose(1, 2)

        return decode_chunk

    def embed(self, prompt: str) -> NDArray[np.float16]:
        """(n, E) UMT5 hidden states of a prompt's n tokens; a prompt of more than T tokens loses its end.

        It is cleaned by `clean_prompt`, unless that was done.

        Raises:
            ConfigError: the text encoder cannot be loaded.
            RejectedError: a value is not finite, or beyond float16.
        """
        embedding = self._embeddings.pop(prompt, None)
        if embedding is None:
            embedding = self._embed(prompt)
        self._embeddings[prompt] = embedding  # the last one
        if len(self._embeddings) > _CACHED_PROMPTS:
            self._embeddings.pop(next(iter(self._embeddings)))
        return embedding.copy()

    @torch.no_grad()
    def _embed(self, prompt: str) -> NDArray[np.float16]:
        tokenizer, encoder = self._text
        length = self.text_shape[0]
        cleaned = clean_prompt(prompt)
        # Padded to the full length although padding is masked: the embeddings are then WanPipeline's to the last bit.
        tokens = tokenizer(cleaned, padding="max_length", max_length=length, truncation=True,
                           return_attention_mask=True, return_tensors="pt")  # fmt: skip
        num_tokens = int(tokens.attention_mask.sum())
        if num_tokens == length:
            needed = len(tokenizer(cleaned, verbose=False).input_ids)
            if needed > length:
                log.warning("prompt %.60r loses its end: it has %d tokens, an embedding %d", prompt, needed, length)
        hidden = encoder(tokens.input_ids.to(self._device), tokens.attention_mask.to(self._device)).last_hidden_state
        return to_float16(hidden[0, :num_tokens], "text embedding")

    def rest(self) -> None:
        """Leave the device until something is encoded or decoded again."""
        if "_loaded_vae" in self.__dict__:
            self._loaded_vae.to("cpu")

    @property
    def _vae(self) -> Any:
        return self._loaded_vae.to(self._device)

    @cached_property
    def _loaded_vae(self) -> Any:
        from diffusers import AutoencoderKLWan

        return self._load(AutoencoderKLWan, "vae", torch_dtype=self._vae_dtype)

    @cached_property
    def _text(self) -> tuple[Any, Any]:
        """The tokenizer and the text encoder."""
        define_torchvision_ops()
        from transformers import T5TokenizerFast, UMT5EncoderModel

        # The class by its name, not AutoTokenizer: that follows what the folder's config asks for.
        try:
            tokenizer = T5TokenizerFast.from_pretrained(self._models, subfolder="tokenizer")
        except Exception as error:  # the tokenizers library raises bare Exception
            raise self._wrong(f"have a T5 tokenizer in tokenizer/: {one_line(error)}") from error
        if len(tokenizer) > self._vocabulary:
            raise self._wrong(f"have the tokenizer of its text encoder: the one has {len(tokenizer)} tokens, "
                              f"the other {self._vocabulary}")  # fmt: skip
        return tokenizer, self._load(UMT5EncoderModel, "text_encoder", dtype=self._text_dtype)

    @cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        """(C, 1, 1, 1) mean and standard deviation of the VAE's latents."""
        mean, std = (torch.tensor(self._vae_config[f"latents_{name}"]) for name in ("mean", "std"))
        return mean.view(-1, 1, 1, 1).to(self._device), std.view(-1, 1, 1, 1).to(self._device)

    def _load(self, model_class: Any, part: str, **dtype: torch.dtype) -> Any:
        try:
            model, loading = model_class.from_pretrained(
                self._models, subfolder=part, use_safetensors=True, output_loading_info=True, **dtype
            )
        except Exception as error:  # OSError, KeyError, SafetensorError, ...: whatever a damaged folder leads to
            raise self._wrong(f"have {model_class.__name__} weights in {part}/: {one_line(error)}") from error
        if missing := sorted(loading["missing_keys"]):
            # Both libraries fill them with random values and warn.
            raise self._wrong(f"have all {model_class.__name__} weights in {part}/: "
                              f"{len(missing)} are absent, the first is {missing[0]}")  # fmt: skip
        return model.to(self._device).eval().requires_grad_(False)

    def _denormalised(self, latents: Tensor) -> Tensor:
        """(B, C, F, H', W') as the VAE's decoder takes them."""
        mean, std = self._statistics
        return (latents.to(self._device, torch.float32).transpose(1, 2) * std + mean).to(self._vae_dtype)

    def _frame_pixels(self, latents: Tensor) -> int:
        return latents.shape[-2] * latents.shape[-1] * self.spatial**2

    def _set_tiling(self, pixels: int) -> None:
        if pixels > self.whole_frame_pixels:
            self._vae.enable_tiling()
        else:
            self._vae.disable_tiling()

    def _latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        if (frames - 1) % self._temporal:
            below = frames - (frames - 1) % self._temporal
            raise ConfigError(f"frames ({frames}) must be 1 + a multiple of {self._temporal}: the VAE takes the first "
                              f"alone; the nearest are {below} and {below + self._temporal}")  # fmt: skip
        for name, size in (("height", height), ("width", width)):
            if size % self.spatial:
                below = size - size % self.spatial
                nearest = f"{below} and {below + self.spatial}" if below else str(self.spatial)
                raise ConfigError(f"{name} ({size}) must be a multiple of {self.spatial}: a latent of Wan's VAE is so "
                                  f"many pixels wide; the nearest: {nearest}")  # fmt: skip
        channels = int(self._vae_config["z_dim"])
        return 1 + (frames - 1) // self._temporal, channels, height // self.spatial, width // self.spatial

    def _check_files(self) -> None:
        folder = Path(self._models)
        if not folder.is_dir():
            if not _HUB_ID.fullmatch(self._models):
                raise self._wrong("be a folder in diffusers' layout or the id of a hub repository: no folder is there")
            return
        for pattern in _FILES:
            if not any(folder.glob(pattern)):
                raise self._wrong(f"have vae/, text_encoder/ and tokenizer/ in diffusers' layout: it has no {pattern}")

    def _identity(self) -> str:
        """Of the models: a hash of a folder's files, of large ones their size and both ends; a repository's commit."""
        folder = Path(self._models)
        if not folder.is_dir():
            return f"{self._models}@{self._commit}"
        digest = xxhash.xxh64()
        for path in sorted(path for pattern in _FILES for path in folder.glob(pattern)):
            digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}")
            with path.open("rb") as file:
                digest.update(file.read(_END_BYTES))
                file.seek(-min(_END_BYTES, path.stat().st_size), 2)
                digest.update(file.read())
        return digest.hexdigest()

    def _read_vae_config(self) -> Any:
        define_torchvision_ops()
        from diffusers import AutoencoderKLWan

        try:
            config, self._commit = AutoencoderKLWan.load_config(self._models, subfolder="vae", return_commit_hash=True)
            found = config.get("_class_name")
            if found != AutoencoderKLWan.__name__:
                raise ValueError(f"it is of {found}")
            # A config may leave fields to the class's defaults; they are filled in by making it.
            with torch.device("meta"):
                return AutoencoderKLWan.from_config(config).config
        except Exception as error:
            raise self._wrong(f"have an AutoencoderKLWan in vae/: {one_line(error)}") from error

    def _read_text_sizes(self) -> tuple[int, int]:
        """Tokens of the text encoder's vocabulary, and the length of an embedding."""
        from transformers import UMT5Config

        try:
            config, _ = UMT5Config.get_config_dict(self._models, subfolder="text_encoder")
            found = config.get("model_type")
            if found != UMT5Config.model_type:
                raise ValueError(f"it is of {found}")
            text = UMT5Config.from_dict(config)
        except Exception as error:
            raise self._wrong(f"have a UMT5EncoderModel in text_encoder/: {one_line(error)}") from error
        return int(text.vocab_size), int(text.d_model)

    def _wrong(self, rule_and_reason: str) -> ConfigError:
        return ConfigError(f"models ({self._models}) must {rule_and_reason}")
