"""Keys and values of the past, as attention meets them: `extend` adds the current ones and returns all to attend to."""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class Past(Protocol):
    """What a self-attention layer may see besides its own tokens."""

    def extend(self, k_BLND: Tensor, v_BLND: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, the current ones included."""
        ...


@dataclass(frozen=True)
class CleanPast:
    """One layer's keys and values of the clean chunks, for teacher forcing; functional."""

    k_BLND: Tensor
    v_BLND: Tensor

    def extend(self, k_BLND: Tensor, v_BLND: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([self.k_BLND, k_BLND], dim=1), torch.cat([self.v_BLND, v_BLND], dim=1)


@dataclass
class LayerCache:
    """One layer's ring of chunk slots. A pass overwrites the slot of the chunk that is being generated."""

    capacity: int
    slot: int = 0
    filled: int = 0
    k_BLND: Tensor | None = None
    v_BLND: Tensor | None = None

    def extend(self, k_BLND: Tensor, v_BLND: Tensor) -> tuple[Tensor, Tensor]:
        chunk = k_BLND.shape[1]
        if self.k_BLND is None or self.v_BLND is None:
            shape = (k_BLND.shape[0], self.capacity * chunk, *k_BLND.shape[2:])
            self.k_BLND, self.v_BLND = k_BLND.new_empty(shape), v_BLND.new_empty(shape)
        here = slice(self.slot * chunk, (self.slot + 1) * chunk)
        self.k_BLND[:, here], self.v_BLND[:, here] = k_BLND, v_BLND
        visible = self.filled * chunk
        return self.k_BLND[:, :visible], self.v_BLND[:, :visible]


@dataclass
class KVCache:
    """The cache of a rollout: for each layer a ring that holds the sink and the newest chunks.

    Keys are stored after RoPE at absolute positions, so the order of the slots does not matter and a full window costs
    no copy: the newest chunk takes the slot of the oldest one after the sink. Not for passes with gradient.

    Attributes:
        num_layers: self-attention layers.
        frames, chunk_frames: of the video to generate.
        window_frames, sink_frames: None keeps all; both count latent frames, multiples of chunk_frames.
    """

    num_layers: int
    frames: int
    chunk_frames: int
    window_frames: int | None = None
    sink_frames: int = 0
    chunk: int = field(default=0, init=False)
    layers: list[LayerCache] = field(init=False)

    def __post_init__(self) -> None:
        capacity = min(self.frames, self.window_frames or self.frames) // self.chunk_frames
        self.layers = [LayerCache(capacity) for _ in range(self.num_layers)]
        self._point_to(0)

    @property
    def first_frame(self) -> int:
        """Absolute position of the current chunk."""
        return self.chunk * self.chunk_frames

    @property
    def visible_frames(self) -> int:
        """Latent frames that the current chunk sees, itself included."""
        return self.layers[0].filled * self.chunk_frames

    def advance(self) -> None:
        """The current chunk is finished: keep its slot and move to the next."""
        assert (self.chunk + 1) * self.chunk_frames < self.frames, "the last chunk has no next"
        self._point_to(self.chunk + 1)

    def _point_to(self, chunk: int) -> None:
        self.chunk = chunk
        capacity, sink = self.layers[0].capacity, self.sink_frames // self.chunk_frames
        slot = chunk if chunk < capacity else sink + (chunk - sink) % (capacity - sink)
        for layer in self.layers:
            layer.slot, layer.filled = slot, min(chunk + 1, capacity)
