"""What Qwen2-VL and Qwen2.5-VL take: a video's patches and a prompt's tokens, as transformers' processor makes them.

Shape suffixes: B batch, T frames, C colours, H rows, W columns, N patches, P numbers of a patch, L tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from afd_scale.config import ConfigError
from afd_scale.config.judges import VlmDiscriminatorConfig

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, of red, green, blue
START, PAD, END = "<|vision_start|>", "<|video_pad|>", "<|vision_end|>"


@dataclass(frozen=True)
class PatchGrid:
    """How a video is cut.

    Attributes:
        patch, temporal: pixels along a patch's side, frames that it goes through.
        merge: patches along the side of a square that the language model sees as one token.
    """

    patch: int = 14
    temporal: int = 2
    merge: int = 2

    def shown_frames(self, frames: int, fps: float, wanted_fps: float) -> list[int]:
        """Numbers of the frames that are seen, a whole number of patches, from the first to the last."""
        wanted = max(1, round(frames / fps * wanted_fps / self.temporal)) * self.temporal
        return torch.linspace(0, frames - 1, wanted, dtype=torch.float64).round().int().tolist()

    def frame_size(self, height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
        """The size that a frame is brought to: whole tokens, its aspect ratio, no fewer and no more pixels."""
        side = self.patch * self.merge
        rows, columns = round(height / side), round(width / side)
        if rows * columns * side**2 > max_pixels:
            shrink = math.sqrt(height * width / max_pixels) * side
            rows, columns = max(1, math.floor(height / shrink)), max(1, math.floor(width / shrink))
        elif rows * columns * side**2 < min_pixels:
            enlarge = math.sqrt(min_pixels / (height * width)) / side
            rows, columns = math.ceil(height * enlarge), math.ceil(width * enlarge)
        return rows * side, columns * side

    def patches(self, pixels_BTCHW: Tensor) -> Tensor:
        """(B N, P) of normalised frames; those of a merged square side by side."""
        squares = (-1, self.merge, self.patch)
        x = pixels_BTCHW.unflatten(4, squares).unflatten(3, squares).unflatten(1, (-1, self.temporal))
        # (B, t, temporal, C, h, merge, patch, w, merge, patch)
        return x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).flatten(6).flatten(0, 5)

    def shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Patches along time, rows and columns."""
        return frames // self.temporal, height // self.patch, width // self.patch


def normalised_frames(pixels_BTCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels in [-1, 1], grey or coloured, at another size as CLIP wants them, float32."""
    x = (pixels_BTCHW.float() + 1) / 2
    x = F.interpolate(x.flatten(0, 1), size, mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (x.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return ((x - mean) / std).unflatten(0, pixels_BTCHW.shape[:2])


class PromptTokens:
    """From prompts to tokens by a template.

    Args:
        tokenizer: of the model; it gains the reward tokens that it lacks.
        rows: of the model's table of tokens.
    Raises:
        ConfigError: the tokenizer has no tokens for videos or for an answer, or the table no row for a reward token.

    Attributes:
        video, rewards, answers: numbers of tokens; the last are of head `yes_no`.
    """

    def __init__(self, config: VlmDiscriminatorConfig, tokenizer: Any, rows: int):
        asks = config.head == "yes_no"
        self.template, self.tokenizer, tokens = config.template, tokenizer, () if asks else config.reward_tokens
        tokenizer.add_special_tokens(
            {"additional_special_tokens": list(tokens)}, replace_additional_special_tokens=False
        )
        if len(tokenizer) > rows:
            raise ConfigError(f"reward_tokens ({', '.join(tokens)}) must have rows in the table of {config.model}: it "
                              f"has {rows}, and the tokenizer {len(tokenizer)} tokens")  # fmt: skip
        known = tokenizer.get_vocab()
        if absent := [token for token in (START, PAD, END) if token not in known]:
            raise ConfigError(f"model ({config.model}) must have Qwen2-VL's tokens: there is no {absent[0]}")
        self.video, self.rewards = known[PAD], [known[token] for token in tokens]
        encoded = [tokenizer.encode(answer, add_special_tokens=False) for answer in config.answers if asks]
        if any(len(answer) != 1 for answer in encoded) or (asks and encoded[0] == encoded[1]):
            raise ConfigError(f"answers ({', '.join(config.answers)}) must be a token each of {config.model}")
        self.answers: list[int] = [token for (token,) in encoded]

    def __call__(self, prompts: Sequence[str], video_tokens: int) -> tuple[Tensor, Tensor]:
        """(B, L) tokens, padded at their ends, and (B,) how many are no padding.

        Args:
            video_tokens: of every video.
        """
        rows = [self._encode(prompt, video_tokens) for prompt in prompts]
        lengths = torch.tensor([len(row) for row in rows])
        padding = self.tokenizer.pad_token_id or 0
        padded = [row + [padding] * (int(lengths.max()) - len(row)) for row in rows]
        return torch.tensor(padded), lengths

    def _encode(self, prompt: str, video_tokens: int) -> list[int]:
        before, after = self.template.split("{video}")  # in pieces, so that nothing in a prompt passes for a place
        prompt = prompt.replace("<|", "< |")  # nor for one of the model's special tokens
        text = f"{START}{PAD}{END}".join(part.replace("{prompt}", prompt) for part in (before, after))
        tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        at = tokens.index(self.video)
        return [*tokens[:at], *[self.video] * video_tokens, *tokens[at + 1 :]]
