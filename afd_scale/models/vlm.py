"""A judge that sees pixels: a video-language model of transformers, and a linear score of its last hidden states.

The model is transformers' own, with its parameters' names; our adapters stand beside its linears, and each of its
layers is a unit of ZeRO-3. Its attention is torch's, whatever `attention` says of the policies, and its products are
bf16 where `precision` is fp8.

Source: VideoAlign, arXiv:2501.13918, whose scorer has the same parts.
"""

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd_scale.config import ConfigError, one_line
from afd_scale.config.judges import VlmDiscriminatorConfig
from afd_scale.config.presets import VIDEO_LANGUAGE_MODELS
from afd_scale.layers.network import Network
from afd_scale.layers.ops import ModelOps
from afd_scale.models.vlm_inputs import PatchGrid, PromptTokens, normalised_frames
from afd_scale.torchvision_ops import define_torchvision_ops
from afd_scale.types import Videos

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl")
VISION_THETA = 10_000.0  # of the vision tower's RoPE, which transformers has no field for


def read_vlm_config(config: VlmDiscriminatorConfig) -> Any:
    """The model's own config; of a published one also where its files are not here, which a plan does not need.

    Raises:
        ConfigError: there is none, or it is of another kind of model.
    """
    define_torchvision_ops()
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(config.model, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        published = VIDEO_LANGUAGE_MODELS.get(Path(config.model).name)
        if published is None or Path(config.model).exists():
            raise _wrong(
                config, f"be a folder of a model, or a hub id in the local cache: {one_line(error)}"
            ) from error
        return AutoConfig.for_model(**published)
    if found.model_type not in MODEL_TYPES:
        raise _wrong(config, f"be of {' or '.join(MODEL_TYPES)}: it is of {found.model_type}")
    return found


class VlmDiscriminator(Network):
    """Qwen2-VL or Qwen2.5-VL over a video's pixels and its prompt.

    Args:
        ops: its adapters are put beside the linears of the layers.
    """

    def __init__(self, config: VlmDiscriminatorConfig, ops: ModelOps | None = None):
        super().__init__()
        self.config, adapters = config, (ops or ModelOps()).adapters
        described = read_vlm_config(config)
        vision, text = described.vision_config, described.text_config
        for part in (described, vision, text):
            part.dtype = torch.get_default_dtype()  # that of the files is none of a network's that is made here
        text.pad_token_id, text.use_cache, text.attention_dropout = None, False, 0.0
        self.vocabulary = text.vocab_size
        self.tied = bool(text.tie_word_embeddings)  # the head of words is the table of tokens
        self.grid = PatchGrid(vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)
        self.model = _make_model(described)
        # No bias: a Bradley-Terry loss sees differences of logits only.
        self.score = Float32Linear(text.hidden_size, 1, bias=False)
        self.apply(initialise)
        self.adapter: str | None = None
        if adapters is not None:
            (self.adapter,) = adapters.names
            for layer in self.units() if config.lora_vision else self.model.language_model.layers:
                for linear in [module for module in layer.modules() if isinstance(module, nn.Linear)]:
                    adapters.insert(linear)
            # Under frozen weights too every unit that is trained has an input with gradient.
            self.model.language_model.embed_tokens.register_forward_hook(_begin_gradient)
            if config.lora_vision:
                self.model.visual.patch_embed.register_forward_hook(_begin_gradient)
        if config.activation_checkpointing:
            # As `layers.precision.Precision.run_block`, and for its reasons.
            self.model.gradient_checkpointing_enable({"use_reentrant": False, "determinism_check": "none"})

    @cached_property
    def tokens(self) -> PromptTokens:
        """Read when they are asked for: to know the size of a model nobody needs its tokenizer.

        Raises:
            ConfigError: it is absent, or not for this model.
        """
        return PromptTokens(self.config, _read_tokenizer(self.config), self.vocabulary)

    def units(self) -> list[nn.Module]:
        return [*self.model.visual.blocks, *self.model.language_model.layers]

    def starts_anew(self, parameter: str) -> bool:
        return parameter.startswith("score.")

    def forward(self, videos: Videos, *, adapter: str | None = None) -> Tensor:
        """(B,) logits."""
        assert adapter == self.adapter, "the linears of a judge add its one adapter by themselves"
        self._sharpen_rotations()
        frames = torch.cat([self._see(videos[row : row + 1]) for row in range(len(videos))])
        grid = self.grid.shape(frames.shape[1], *frames.shape[3:])
        patches, device = self.grid.patches(frames), frames.device
        del frames
        tokens, lengths = self.tokens(videos.prompts.texts, math.prod(grid) // self.grid.merge**2)
        options: dict[str, Any] = {}
        if self.model.config.model_type == "qwen2_5_vl":
            options["second_per_grid_ts"] = [self.grid.temporal / self.config.frames_per_second] * len(videos)
        # Padding comes last and attention is causal: no token sees it, and no mask is needed.
        hidden_BLE = self.model(
            input_ids=tokens.to(device), pixel_values_videos=patches, video_grid_thw=torch.tensor([grid] * len(videos)),
            use_cache=False, **options,
        ).last_hidden_state  # fmt: skip
        return self.score(self._pool(hidden_BLE, tokens, lengths)).squeeze(1)

    def _see(self, video: Videos) -> Tensor:
        """(1, T, 3, H, W) of one video, as the model wants its frames: of all pixels only these are there together."""
        assert video.fps is not None, "frames are seen at a rate"
        pixels = video.pixels()
        shown = self.grid.shown_frames(pixels.shape[1], video.fps, self.config.frames_per_second)
        height, width = pixels.shape[3:]
        size = self.grid.frame_size(height, width, self.config.min_pixels, self.config.max_pixels)
        return normalised_frames(pixels[:, shown], size)

    def _pool(self, hidden_BLE: Tensor, tokens_BL: Tensor, lengths_B: Tensor) -> Tensor:
        """(B, E) of what is scored, float32.

        Args:
            tokens_BL, lengths_B: on the CPU, where they were made: nothing waits for the device.
        """
        videos, length, _ = hidden_BLE.shape
        if self.config.head == "pooled":
            share_BL = (torch.arange(length) < lengths_B[:, None]) / lengths_B[:, None]
            return (share_BL[..., None].to(hidden_BLE.device) * hidden_BLE).sum(1)
        if self.config.head == "yes_no":
            scored = lengths_B[:, None] - 1
        else:
            scored = torch.isin(tokens_BL, torch.tensor(self.tokens.rewards)).nonzero()[:, 1].view(videos, -1)
        rows = torch.arange(videos)[:, None]
        return hidden_BLE[rows.to(hidden_BLE.device), scored.to(hidden_BLE.device)].float().sum(1)

    def _sharpen_rotations(self) -> None:
        """RoPE's frequencies in float32: ZeRO-3 makes bf16 of them, and angles go wrong where tokens are many."""
        rotary = self.model.language_model.rotary_emb
        rotary.inv_freq, _ = rotary.rope_init_fn(rotary.config, rotary.inv_freq.device)
        vision = self.model.visual.rotary_pos_emb
        exponent = torch.arange(len(vision.inv_freq), dtype=torch.float32, device=vision.inv_freq.device)
        vision.inv_freq = VISION_THETA ** -(exponent / len(exponent))


class Float32Linear(nn.Linear):
    """In float32 whatever its weight is: rollouts of a prompt differ by less than bf16 can say of a logit."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float())


def initialise(module: nn.Module) -> None:
    """What start weights replace; for `Module.apply`, which also works under zero.Init."""
    if isinstance(module, nn.Linear | nn.Conv3d | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
    if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _make_model(described: Any) -> Any:
    """The model without its head of words.

    transformers leaves its start weights to us: its own way finds nothing in weights that are sharded as they are made.
    """
    from transformers import AutoModel
    from transformers.modeling_utils import no_init_weights

    with no_init_weights():
        return AutoModel.from_config(described)


def _read_tokenizer(config: VlmDiscriminatorConfig) -> Any:
    from transformers import Qwen2TokenizerFast

    try:
        # The class by its name, not AutoTokenizer: that follows what the folder's config asks for.
        return Qwen2TokenizerFast.from_pretrained(config.model, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise _wrong(config, f"have Qwen2's tokenizer: {one_line(error)}") from error


def _begin_gradient(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.detach().requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output


def _wrong(config: VlmDiscriminatorConfig, rule: str) -> ConfigError:
    return ConfigError(f"model ({config.model}) must {rule}")
