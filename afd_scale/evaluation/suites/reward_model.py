"""A judge that the user has weights of: a video-language model of transformers, asked whether a video shows its prompt.

The reward is the log-odds of its yes, as VQAScore has it for images (arXiv:2404.01291). So any model does that takes
videos and is fine-tuned or prompted to answer: a general one, or a reward model that answers in words. Models with a
head of their own that transformers does not know, such as VideoAlign's, are not read.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from afd_scale.config import ConfigError, one_line
from afd_scale.config.judges import ANSWERS, QUESTION
from afd_scale.evaluation.suites.suite import Metric
from afd_scale.mp4 import FrameArray
from afd_scale.torchvision_ops import define_torchvision_ops

NAME = "reward"
METRIC = Metric("Reward", "higher", "log-odds of the reward model's yes to: does the video show the prompt")
FRAMES_PER_SECOND = 2.0  # that it sees, as VideoAlign (arXiv:2501.13918)
LEAST_FRAMES = 4


class RewardModel:
    """A model with its processor.

    Args:
        folder: of `save_pretrained`, with the processor and its chat template.
    Raises:
        ConfigError: it cannot be loaded, or has no word for an answer.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise ConfigError(f"reward_model ({folder}) must be a folder of a model and its processor: there is none")
        define_torchvision_ops()
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.folder = folder
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        own: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}  # no code of the folder's runs
        try:
            self._processor = AutoProcessor.from_pretrained(folder, **own)
            model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", use_safetensors=True, **own)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ConfigError(f"reward_model ({folder}) must be a video-language model of transformers with its "
                              f"processor: {one_line(error)}") from error  # fmt: skip
        self._model: Any = model.eval()
        tokens = [self._processor.tokenizer.encode(answer, add_special_tokens=False) for answer in ANSWERS]
        if any(len(answer) > 1 for answer in tokens):
            raise ConfigError(f"reward_model ({folder}) must have one token for each of {', '.join(ANSWERS)}")
        self._answers = [answer[0] for answer in tokens]

    @torch.no_grad()
    def score(self, clip: FrameArray, prompt: str, fps: float) -> float:
        """The reward of a clip, uint8 (T, H, W[, 1 or 3])."""
        self._model.to(self._device)  # not before: what is judged may have to be made first, by another model
        content = [{"type": "video", "video": seen_frames(clip, fps)},
                   {"type": "text", "text": QUESTION.format(prompt=prompt)}]  # fmt: skip
        inputs = self._processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt", do_sample_frames=False,
        )  # fmt: skip
        logits = self._model(**inputs.to(self._device, self._model.dtype)).logits[0, -1].float()
        yes, no = logits[self._answers].tolist()
        return yes - no


def seen_frames(clip: FrameArray, fps: float) -> FrameArray:
    """(n, H, W, 3), n even, frames at even distances from the first to the last: the model joins frames in pairs."""
    wanted = max(LEAST_FRAMES, round(len(clip) / fps * FRAMES_PER_SECOND))
    frames = clip[np.linspace(0, len(clip) - 1, wanted + wanted % 2).round().astype(int)]
    return frames if frames.shape[3:] == (3,) else np.repeat(frames.reshape(*frames.shape[:3], 1), 3, axis=3)
