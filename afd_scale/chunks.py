"""Where the chunks of a video begin and end, in latent frames."""

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Chunks:
    """Of one length, all but perhaps the first: an image, or a clip, to go on from.

    Attributes:
        size: latent frames of a chunk.
        first: of the first one; None is `size`.
    """

    size: int
    first: int | None = None

    def __str__(self) -> str:
        return str(self.size) if self.are_alike else f"{self.size} behind a first one of {self.first}"

    @property
    def are_alike(self) -> bool:
        """Whether the first is as long as the others."""
        return self.first in (None, self.size)

    def start(self, chunk: int) -> int:
        """The latent frame that a chunk begins with, the first is 0; so many chunks have as many."""
        return (self.first or self.size) + (chunk - 1) * self.size if chunk else 0

    def frames(self, chunk: int) -> range:
        """Those of a chunk."""
        return range(self.start(chunk), self.start(chunk + 1))

    def count(self, frames: int) -> int:
        """Whole chunks among so many first frames, and so the number of the chunk that the next frame is of."""
        behind = frames - (self.first or self.size)
        return 0 if behind < 0 else 1 + behind // self.size

    def are_whole(self, frames: int) -> bool:
        """Whether so many first frames are whole chunks."""
        return self.start(self.count(frames)) == frames

    def ranges(self, stop: int, begin: int = 0) -> list[tuple[int, int]]:
        """Start and stop of each chunk of the frames `begin` .. `stop`.

        Raises:
            ValueError: one of the two is within a chunk.
        """
        for frames in (begin, stop):
            if not self.are_whole(frames):
                raise ValueError(f"frames ({frames}) must be whole chunks of {self}")
        return list(pairwise(map(self.start, range(self.count(begin), self.count(stop) + 1))))

    def lengths(self, stop: int, begin: int = 0) -> list[int]:
        """Latent frames of each of these; errors as of `ranges`."""
        return [after - start for start, after in self.ranges(stop, begin)]
