"""The few data classes that cross packages."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

RankMean = Callable[[Tensor], Tensor]  # the mean of a tensor over the data ranks


@dataclass(frozen=True)
class Batch:
    """Prompts, the first of them with one teacher video each; this rank's share of a step.

    Attributes:
        prompts, prompt_ids: B strings.
        samples: B positions in the data; they key the randomness of a sample, whatever rank holds it.
        text: (B, T, E) text embeddings.
        latents: (V, F, C, H, W) clean latents of the teacher's videos, V at most B.
    """

    prompts: tuple[str, ...]
    prompt_ids: tuple[str, ...]
    samples: tuple[int, ...]
    text: Tensor
    latents: Tensor

    @property
    def paired(self) -> "Batch":
        """The prompts with a video."""
        return self[: len(self.latents)]

    def to(self, device: torch.device) -> "Batch":
        """On a device; from pinned memory, without waiting for the copy."""
        return replace(
            self, text=self.text.to(device, non_blocking=True), latents=self.latents.to(device, non_blocking=True)
        )

    def pin_memory(self) -> "Batch":
        """In memory that a GPU copies from by itself."""
        return replace(self, text=self.text.pin_memory(), latents=self.latents.pin_memory())

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: slice) -> "Batch":
        return Batch(self.prompts[rows], self.prompt_ids[rows], self.samples[rows], self.text[rows], self.latents[rows])
