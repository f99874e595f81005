"""The few data classes that cross packages."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

RankMean = Callable[[Tensor], Tensor]  # the mean of a tensor over the data ranks


@dataclass(frozen=True)
class Batch:
    """Prompts with one teacher video each; this rank's share of a step.

    Attributes:
        prompts, prompt_ids: B strings.
        samples: B positions in the dataset; they key the randomness of a sample, whatever rank holds it.
        text: (B, T, E) text embeddings.
        latents: (B, F, C, H, W) clean latents of the teacher's videos.
    """

    prompts: tuple[str, ...]
    prompt_ids: tuple[str, ...]
    samples: tuple[int, ...]
    text: Tensor
    latents: Tensor

    def to(self, device: torch.device) -> "Batch":
        return replace(self, text=self.text.to(device), latents=self.latents.to(device))

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: slice) -> "Batch":
        return Batch(self.prompts[rows], self.prompt_ids[rows], self.samples[rows], self.text[rows], self.latents[rows])
