"""Which latent frames see which: the block-causal layout as one object.

Every pass of a causal student is a list of segments: one chunk of queries and the ranges of keys that it sees. Ranges
count latent frames until `token_segments` scales them; nothing here knows how many tokens a frame has.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from afd_scale.chunks import Chunks

Range = tuple[int, int]
NO_GAP: Range = (0, 0)


@dataclass(frozen=True)
class Segment:
    """Queries [start, stop) that see the keys of `keys`, ranges in rising order that do not touch."""

    query: Range
    keys: tuple[Range, ...]


@dataclass(frozen=True)
class AttentionLayout:
    """Segments over `query_frames` queries and `key_frames` keys, both in latent frames."""

    query_frames: int
    key_frames: int
    segments: tuple[Segment, ...]

    @classmethod
    def full(cls, query_frames: int, key_frames: int | None = None) -> "AttentionLayout":
        """Every query sees every key."""
        key_frames = query_frames if key_frames is None else key_frames
        return cls(query_frames, key_frames, (Segment((0, query_frames), ((0, key_frames),)),))

    @classmethod
    def after_past(cls, lengths: Sequence[int], key_frames: int) -> "AttentionLayout":
        """Chunks of these lengths at the end of all keys: each sees what is before it, and itself."""
        query_frames = sum(lengths)
        past = key_frames - query_frames
        segments = tuple(
            Segment((stop - length, stop), ((0, past + stop),))
            for length, stop in zip(lengths, accumulate(lengths), strict=True)
        )
        return cls(query_frames, key_frames, segments)

    @classmethod
    def block_causal(
        cls, frames: int, chunks: Chunks, window_frames: int | None = None, sink_frames: int = 0, gap: Range = NO_GAP
    ) -> "AttentionLayout":  # fmt: skip
        """Chunk i sees chunks <= i; with a window, the sink and the newest frames of it, itself included.

        Args:
            gap: frames that are not there, whole chunks: those behind them move up.
        """
        segments = []
        for start, stop in chunks.ranges(frames):
            if not gap[0] <= start < gap[1]:
                ((begin, end),) = _closed([(start, stop)], gap)
                segments.append(Segment((begin, end), _closed(_visible(stop, window_frames, sink_frames), gap)))
        there = frames - (gap[1] - gap[0])
        return cls(there, there, tuple(segments))

    @classmethod
    def teacher_forcing(
        cls, frames: int, chunks: Chunks, window_frames: int | None = None, sink_frames: int = 0,
        num_states: int = 1, first_frame: int = 0, gap: Range = NO_GAP,
    ) -> "AttentionLayout":  # fmt: skip
        """Noisy chunk i sees clean chunks < i and itself, for several noised states of one video.

        Queries are the states one after the other, keys the clean frames [0, frames) and then the states.

        Args:
            first_frame: of the states: those before it are clean only.
            gap: clean frames before it that are not there, as in `block_causal`.
        """
        segments = []
        clean, noisy = frames - (gap[1] - gap[0]), frames - first_frame
        for state in range(num_states):
            for start, stop in chunks.ranges(frames, first_frame):
                visible = _visible(stop, window_frames, sink_frames)
                past = _closed([(a, min(b, start)) for a, b in visible if a < min(b, start)], gap)
                begin, end = (state * noisy + frame - first_frame for frame in (start, stop))
                segments.append(Segment((begin, end), (*past, (clean + begin, clean + end))))
        return cls(num_states * noisy, clean + num_states * noisy, tuple(segments))

    @classmethod
    def clean_and_noisy(
        cls, frames: int, chunks: Chunks, window_frames: int | None = None, sink_frames: int = 0,
        num_states: int = 1, first_frame: int = 0, gap: Range = NO_GAP,
    ) -> "AttentionLayout":  # fmt: skip
        """Teacher forcing in one pass: queries and keys are the clean frames, block-causal, and then the states."""
        window = (window_frames, sink_frames)
        clean = cls.block_causal(frames, chunks, *window, gap)
        noisy = cls.teacher_forcing(frames, chunks, *window, num_states, first_frame, gap)
        offset = clean.query_frames
        shifted = tuple(Segment((s.query[0] + offset, s.query[1] + offset), s.keys) for s in noisy.segments)
        return cls(noisy.key_frames, noisy.key_frames, (*clean.segments, *shifted))

    @property
    def is_full(self) -> bool:
        """Whether every query sees every key."""
        first, *others = self.segments
        return not others and first.query == (0, self.query_frames) and first.keys == ((0, self.key_frames),)

    def tokens_per_frame(self, query_tokens: int, key_tokens: int) -> int:
        """Of sequences that this layout describes."""
        tokens = query_tokens // self.query_frames
        assert query_tokens == self.query_frames * tokens, "queries do not fit the layout"
        assert key_tokens == self.key_frames * tokens, "keys do not fit the layout"
        return tokens

    def token_segments(self, tokens_per_frame: int) -> tuple[Segment, ...]:
        """The segments with ranges in tokens."""

        def scale(r: Range) -> Range:
            return r[0] * tokens_per_frame, r[1] * tokens_per_frame

        return tuple(Segment(scale(s.query), tuple(scale(k) for k in s.keys)) for s in self.segments)

    def dense_mask(self, tokens_per_frame: int) -> Tensor:
        """(query tokens, key tokens) bool, True where a query sees a key: the definition that kernels are tested by."""
        mask = torch.zeros(self.query_frames * tokens_per_frame, self.key_frames * tokens_per_frame, dtype=torch.bool)
        for segment in self.token_segments(tokens_per_frame):
            for start, stop in segment.keys:
                mask[segment.query[0] : segment.query[1], start:stop] = True
        return mask

    def pairs(self, tokens_per_frame: int) -> int:
        """Query-key pairs that are computed: attention costs 4 x pairs x width FLOPs forward."""
        frames = sum((s.query[1] - s.query[0]) * sum(b - a for a, b in s.keys) for s in self.segments)
        return frames * tokens_per_frame**2


def _closed(ranges: Sequence[Range], gap: Range) -> tuple[Range, ...]:
    """Rising ranges of frames where those of a gap are left out, and the ones behind it move up."""
    begin, end = gap
    closed: list[Range] = []
    for start, stop in ranges:
        start, stop = (x if x <= begin else max(x, end) - (end - begin) for x in (start, stop))
        if closed and closed[-1][1] == start:
            closed[-1] = (closed[-1][0], stop)
        elif start < stop:
            closed.append((start, stop))
    return tuple(closed)


def _visible(stop: int, window_frames: int | None, sink_frames: int) -> tuple[Range, ...]:
    """Frames that the chunk ending at `stop` sees."""
    if window_frames is None or stop <= window_frames:
        return ((0, stop),)
    recent = (stop - (window_frames - sink_frames), stop)
    return ((0, sink_frames), recent) if sink_frames else (recent,)
