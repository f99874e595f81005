"""Random numbers keyed by (seed, stream, step, sample), so that they do not depend on which rank holds a sample."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Randomness:
    """Named random streams of one run; stateless, so there is nothing to save or restore."""

    seed: int

    def normal(
        self, stream: str, step: int, samples: Sequence[int], shape: tuple[int, ...], device: torch.device | str = "cpu"
    ) -> Tensor:
        """(len(samples), *shape) float32 standard normal."""
        return self._draw(torch.randn, stream, step, samples, shape, device)

    def uniform(
        self, stream: str, step: int, samples: Sequence[int], shape: tuple[int, ...], device: torch.device | str = "cpu"
    ) -> Tensor:
        """(len(samples), *shape) float32 uniform on [0, 1)."""
        return self._draw(torch.rand, stream, step, samples, shape, device)

    def _draw(
        self, draw: Callable[..., Tensor], stream: str, step: int, samples: Sequence[int],
        shape: tuple[int, ...], device: torch.device | str,
    ) -> Tensor:  # fmt: skip
        generator = torch.Generator(device)
        rows = []
        for sample in samples:
            generator.manual_seed(_key(self.seed, stream, step, sample))
            rows.append(draw(shape, generator=generator, device=device))
        return torch.stack(rows)


def _key(seed: int, stream: str, step: int, sample: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{stream}/{step}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # a generator takes 63 bits without sign trouble
