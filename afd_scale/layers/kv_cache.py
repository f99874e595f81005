"""What a self-attention layer sees besides its own tokens: the clean past of teacher forcing, or a rollout's cache.

A layer's past takes its current keys and values and returns all to attend to. It may keep the text's too, which are
the same in every pass of a rollout.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from afd_scale.chunks import Chunks
from afd_scale.layers.attention.layout import AttentionLayout
from afd_scale.layers.rope import Rotation, WindowRotation

Pair = tuple[Tensor, Tensor]  # keys and values, (B, L, N, D) each


class Past(Protocol):
    """What a self-attention layer may see besides its own tokens."""

    def room(self, k_BLND: Tensor) -> Tensor | None:
        """Where keys of this shape are to be written once they are rotated; None is anywhere."""
        ...

    def extend(self, k_BLND: Tensor, v_BLND: Tensor) -> Pair:
        """All keys and values, the current ones included."""
        ...

    def text(self, project: Callable[[], Pair]) -> Pair:
        """Keys and values of the text, projected here or in an earlier pass."""
        ...


@dataclass(frozen=True)
class CleanPast:
    """One layer's keys and values of the clean chunks, for teacher forcing; functional."""

    k_BLND: Tensor
    v_BLND: Tensor

    def room(self, k_BLND: Tensor) -> Tensor | None:
        return None

    def extend(self, k_BLND: Tensor, v_BLND: Tensor) -> Pair:
        return torch.cat([self.k_BLND, k_BLND], dim=1), torch.cat([self.v_BLND, v_BLND], dim=1)

    def text(self, project: Callable[[], Pair]) -> Pair:
        return project()


@dataclass
class Ring:
    """Which slots of all layers the current pass fills.

    Attributes:
        chunks: as long as which the slots are, one behind the other.
        capacity: slots.
        slot: of the chunk that is generated.
        filled: slots that it sees, its own included.
        ahead: chunks after it in the same pass, 0 or 1.
        places: (tokens of the pass,) their places in the buffers, on the device, for a pass that is captured once and
            replayed for other slots; None writes by `slot`.
    """

    chunks: Chunks
    capacity: int
    slot: int = 0
    filled: int = 0
    ahead: int = 0
    places: Tensor | None = None

    @property
    def frames(self) -> int:
        """Latent frames of all slots."""
        return self.chunks.start(self.capacity)

    @property
    def visible(self) -> range:
        """Places of the frames that the current pass sees, its own included."""
        return range(self.chunks.start(self.filled + self.ahead))

    @property
    def own(self) -> range:
        """Places of its own frames."""
        return range(self.chunks.start(self.slot), self.chunks.start(self.slot + 1 + self.ahead))


@dataclass
class LayerCache:
    """One layer's slots. A pass overwrites those of the chunks that it computes."""

    ring: Ring
    k_BLND: Tensor | None = None
    v_BLND: Tensor | None = None
    text_kv: Pair | None = None
    text_is_current: bool = False
    _room: Tensor | None = None

    def room(self, k_BLND: Tensor) -> Tensor | None:
        """Without copying them; a pass that is replayed finds its places when it runs."""
        self._room = None if self.ring.places is not None else self._slots(self._buffers(k_BLND)[0], k_BLND.shape[1])
        return self._room

    def extend(self, k_BLND: Tensor, v_BLND: Tensor) -> Pair:
        ring, tokens = self.ring, k_BLND.shape[1]
        keys, values = self._buffers(k_BLND)
        if ring.places is None:
            if k_BLND is not self._room:
                self._slots(keys, tokens).copy_(k_BLND)
            self._slots(values, tokens).copy_(v_BLND)
        else:
            keys.index_copy_(1, ring.places, k_BLND)
            values.index_copy_(1, ring.places, v_BLND)
        visible = len(ring.visible) * tokens // len(ring.own)
        return keys.narrow(1, 0, visible), values.narrow(1, 0, visible)

    def text(self, project: Callable[[], Pair]) -> Pair:
        if self.text_kv is None:
            self.text_kv = project()
        elif not self.text_is_current:  # of an earlier rollout: its buffers stay where they are
            for buffer, new in zip(self.text_kv, project(), strict=True):
                buffer.copy_(new)
        self.text_is_current = True
        return self.text_kv

    def _buffers(self, like_BLND: Tensor) -> Pair:
        if self.k_BLND is None or self.v_BLND is None:
            slots = self.ring.frames * like_BLND.shape[1] // len(self.ring.own)
            shape = (like_BLND.shape[0], slots, *like_BLND.shape[2:])
            self.k_BLND, self.v_BLND = like_BLND.new_empty(shape), like_BLND.new_empty(shape)
        return self.k_BLND, self.v_BLND

    def _slots(self, buffer: Tensor, tokens: int) -> Tensor:
        own = self.ring.own
        return buffer.narrow(1, own.start * tokens // len(own), tokens)


@dataclass
class KVCache:
    """The cache of a rollout: for each layer a ring that holds the sink and the newest chunks, and the text.

    The newest chunk takes the slot of the oldest one after the sink: a full window costs no copy. Keys are stored after
    RoPE at absolute positions, so the order of the slots does not matter; or as they are, and turned in each pass for
    the places that they then have in the window. Not for passes with gradient.

    Attributes:
        num_layers: self-attention layers.
        frames, chunks: of the video to generate; no frames where it has no end, which takes a window.
        window_frames, sink_frames: None keeps all; both count latent frames, whole chunks. Where the first is of
            another length, the sink has it.
        turned_in_window: keys are stored as they are, see `positions`.
        rotation: of a pass that is replayed; None is that of the current frames.
    """

    num_layers: int
    frames: int | None
    chunks: Chunks
    window_frames: int | None = None
    sink_frames: int = 0
    turned_in_window: bool = False
    rotation: Rotation | WindowRotation | None = field(default=None, init=False)
    chunk: int = field(default=0, init=False)
    turn: int = field(default=0, init=False)  # of the current chunk among those that were put into the ring
    ring: Ring = field(init=False)
    layers: list[LayerCache] = field(init=False)

    def __post_init__(self) -> None:
        limits = [limit for limit in (self.frames, self.window_frames) if limit is not None]
        assert limits, "a video without an end has a window"
        self.ring = Ring(self.chunks, self.chunks.count(min(limits)))
        self.layers = [LayerCache(self.ring) for _ in range(self.num_layers)]
        self._point_to(0, turn=0)

    @property
    def first_frame(self) -> int:
        """Absolute position of the current chunk."""
        return self.chunks.start(self.chunk)

    def positions(self) -> tuple[tuple[range, ...], tuple[range, ...] | None]:
        """Positions of the frames of the current pass, once that has begun; and of all that it sees, as they stand in
        the slots, where keys are turned in each pass.

        In a window the sink stands at its beginning and the newest chunk at its end, in between the others in order; a
        window that is not full yet begins at 0 too.
        """
        ring, frames, sink = self.ring, len(self.ring.own), self.sink_frames
        if not self.turned_in_window:
            return (range(self.first_frame, self.first_frame + frames),), None
        own = (ring.visible[-frames:],)
        if self.turn < ring.capacity:
            return own, (ring.visible,)
        older = sink + ring.frames - ring.own.stop  # up to there stand those of the slots after the newest one
        return own, tuple(run for run in (range(sink), range(older, ring.frames), range(sink, older)) if run)

    @property
    def visible_frames(self) -> int:
        """Latent frames that the current pass sees, its own included."""
        return len(self.ring.visible)

    @property
    def has_text(self) -> bool:
        """Whether the text's keys and values are those of this rollout."""
        return self.layers[-1].text_is_current

    @property
    def is_new(self) -> bool:
        """Whether no pass has run."""
        return self.layers[-1].k_BLND is None

    @property
    def has_room_ahead(self) -> bool:
        """Whether one pass may finish the current chunk and begin the next: no slot that the first of them still sees
        is taken by the second."""
        return self._is_in_video(self.chunk + 1) and self.turn + 1 < self.ring.capacity

    def begin_pass(self, frames: int) -> AttentionLayout:
        """Which frames see which in a pass over the current chunk, or over it and the next."""
        lengths = self.chunks.lengths(self.first_frame + frames, self.first_frame)
        self.ring.ahead = len(lengths) - 1
        assert self.ring.ahead == 0 or (self.ring.ahead == 1 and self.has_room_ahead), "no room for the next chunk"
        return AttentionLayout.after_past(lengths, self.visible_frames)

    def advance(self, to: int | None = None) -> None:
        """The current chunk is finished: keep its slot and move to the next, or to a later one."""
        chunk = self.chunk + 1 if to is None else to
        assert self._is_in_video(chunk), "the last chunk has no next"
        self._point_to(chunk, self.turn + 1)

    def restart(self, chunk: int) -> None:
        """Forget all chunks and the text, and go on at a chunk of the same video, which sees none before it."""
        self.forget_text()
        self._point_to(chunk, turn=0)

    def forget_text(self) -> None:
        """The next pass reads its text anew."""
        for layer in self.layers:
            layer.text_is_current = False

    def adopt(self, layers: list[LayerCache]) -> None:
        """Go on in the buffers of an earlier rollout, which is over; before the first pass."""
        for layer in layers:
            layer.ring, layer.text_is_current = self.ring, False
        self.layers = layers

    def still(self, places: Tensor, rotation: Rotation | WindowRotation) -> "KVCache":
        """The cache as the current pass finds it, in the same buffers, for a pass that is replayed.

        Args:
            places, rotation: what each replay changes.
        """
        still = copy(self)
        still.ring, still.rotation = replace(self.ring, places=places), rotation
        still.layers = [replace(layer, ring=still.ring) for layer in self.layers]
        return still

    def _is_in_video(self, chunk: int) -> bool:
        return self.frames is None or chunk < self.chunks.count(self.frames)

    def _point_to(self, chunk: int, turn: int) -> None:
        self.chunk, self.turn, ring = chunk, turn, self.ring
        sink = self.chunks.count(self.sink_frames)
        ring.slot = turn if turn < ring.capacity else sink + (turn - sink) % (ring.capacity - sink)
        ring.filled, ring.ahead = min(turn + 1, ring.capacity), 0
