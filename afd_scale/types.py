"""The few data classes that cross packages: prompts, videos of prompts, a step's batch.

Rows of a step stand prompt by prompt: P prompts, G rollouts of each, S noised states of a rollout. `repeat` goes one
level down, and numbers the keys of its rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

RankMean = Callable[[Tensor], Tensor]  # the mean of a tensor over the data ranks
View = Callable[[Tensor], Tensor]  # of one video's pixels, (1, T, C, H, W)


class JudgeError(Exception):
    """A fixed judge said nothing that could be a score, in one line that names it; the step has changed no network."""


class UnreachableJudgeError(JudgeError):
    """It could not be reached in time: the same may succeed later."""


def pieces(rows: int, at_once: int | None, group: int | None = None) -> list[slice]:
    """Rows 0 .. rows in slices of at most `at_once`, none of which has rows of two groups of so many; None is all."""
    group = group or rows
    at_once = min(at_once or group, group)
    return [
        slice(start, min(start + at_once, first + group, rows))
        for first in range(0, rows, group or 1)
        for start in range(first, first + group, at_once)
    ]


def repeat_keys(keys: Sequence[int], count: int) -> tuple[int, ...]:
    """Keys of `count` rows for each row: of their own, whichever rank holds them."""
    return tuple(key * count + number for key in keys for number in range(count))


@dataclass(frozen=True)
class Prompts:
    """What is asked for.

    Attributes:
        texts, ids: B strings; equal ids share a prompt.
        keys: B numbers that key the randomness of a row.
        embeddings: (B, T, E) of the texts.
    """

    texts: tuple[str, ...]
    ids: tuple[str, ...]
    keys: tuple[int, ...]
    embeddings: Tensor

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: slice) -> "Prompts":
        return Prompts(self.texts[rows], self.ids[rows], self.keys[rows], self.embeddings[rows])

    def take(self, rows: Sequence[int], keys: Sequence[int]) -> "Prompts":
        """Some of them, as often as they are named, under other keys."""
        texts, ids = (tuple(column[row] for row in rows) for column in (self.texts, self.ids))
        return Prompts(texts, ids, tuple(keys), self.embeddings[list(rows)])

    def __add__(self, other: "Prompts") -> "Prompts":
        embeddings = torch.cat([self.embeddings, other.embeddings])
        return Prompts(self.texts + other.texts, self.ids + other.ids, self.keys + other.keys, embeddings)

    def repeat(self, count: int) -> "Prompts":
        """Each prompt `count` times, side by side, under keys of their own."""
        texts, ids = (tuple(x for x in column for _ in range(count)) for column in (self.texts, self.ids))
        return Prompts(texts, ids, repeat_keys(self.keys, count), self.embeddings.repeat_interleave(count, dim=0))


@dataclass(frozen=True)
class Place:
    """Where a window was cut out of a longer video.

    Attributes:
        first_frame: latent frame of the video that it begins with.
        context: (f, C, H, W) clean latent frames before it that its chunks see: those of the sink, and the newest, or
            all of them.
    """

    first_frame: int
    context: Tensor


@dataclass(frozen=True)
class Videos:
    """What is judged, shown or generated.

    Attributes:
        prompts: B, one a video.
        latents: (B, F, C, H, W), clean.
        fps: frames a second of the decoded videos.
        decode: from latents to (B, T, C, H, W) in [-1, 1]; None where nothing here can.
        views: B, through which pixels are seen; None, for one or all, sees them as they are.
        numbers: B, by which ranks that hold the same videos share them; None numbers them from 0.
        places: B, where they are windows of longer videos; None where they are whole.
    """

    prompts: Prompts
    latents: Tensor
    fps: float | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    views: tuple[View | None, ...] | None = None
    numbers: tuple[int, ...] | None = None
    places: tuple[Place, ...] | None = None
    _decoded: list[list[Tensor]] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert len(self.prompts) == len(self.latents), "a video has a prompt"
        for column in (self.views, self.numbers, self.places):
            assert column is None or len(column) == len(self.latents), "and what each has, if any does"
        self._decoded.extend([] for _ in range(len(self)))  # a video's pixels, once they are there

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: slice) -> "Videos":
        views = None if self.views is None else self.views[rows]
        numbers = None if self.numbers is None else self.numbers[rows]
        places = None if self.places is None else self.places[rows]
        part = replace(self, prompts=self.prompts[rows], latents=self.latents[rows], views=views, numbers=numbers,
                       places=places)  # fmt: skip
        return part._sharing(self._decoded[rows])

    def take(self, rows: Sequence[int]) -> "Videos":
        """Some of them, in this order."""
        prompts = self.prompts.take(rows, [self.prompts.keys[row] for row in rows])
        views = None if self.views is None else tuple(self.views[row] for row in rows)
        numbers = None if self.numbers is None else tuple(self.numbers[row] for row in rows)
        places = None if self.places is None else tuple(self.places[row] for row in rows)
        part = replace(self, prompts=prompts, latents=self.latents[list(rows)], views=views, numbers=numbers,
                       places=places)  # fmt: skip
        return part._sharing([self._decoded[row] for row in rows])

    def __add__(self, other: "Videos") -> "Videos":
        views = numbers = None
        if self.views is not None or other.views is not None:
            views = (self.views or (None,) * len(self)) + (other.views or (None,) * len(other))
        if self.numbers is not None and other.numbers is not None:
            numbers = self.numbers + other.numbers
        places = self.places + other.places if self.places is not None and other.places is not None else None
        both = replace(
            self, prompts=self.prompts + other.prompts, latents=torch.cat([self.latents, other.latents]), views=views,
            numbers=numbers, places=places,
        )  # fmt: skip
        return both._sharing(self._decoded + other._decoded)

    def of(self, latents: Tensor) -> "Videos":
        """Other latents of the same prompts."""
        return replace(self, latents=latents)

    def start(self, frames: int, count: int, rows: slice) -> Tensor | None:
        """(b, frames, C, H, W) first latent frames of each, `count` times side by side; of these, rows. None is of no
        frames."""
        return self.latents[:, :frames].repeat_interleave(count, dim=0)[rows] if frames else None

    def after(self, frames: int) -> "Videos":
        """What comes behind so many latent frames, these being its context: other videos, with pixels of their own."""
        if not frames:
            return self
        assert self.places is None, "whole videos have a beginning"
        places = tuple(Place(frames, latents[:frames]) for latents in self.latents)
        return replace(self, latents=self.latents[:, frames:], places=places)

    @property
    def in_context(self) -> dict[str, Any]:
        """What a policy is given with noised latents of these videos, which are of one place: `clean` ones, and before
        a window's its context; and the window's `first_frame`."""
        if self.places is None:
            return {"clean": self.latents}
        context = torch.stack([place.context for place in self.places])
        clean = torch.cat([context, self.latents], dim=1)
        return {"clean": clean, "first_frame": self.places[0].first_frame}

    @property
    def begun(self) -> list[bool] | None:
        """B, whether each is a later part of a longer video; None where all are whole."""
        return None if self.places is None else [place.first_frame > 0 for place in self.places]

    def windows(self, starts: Sequence[int], frames: int) -> "Videos":
        """So many latent frames of each, from a start of its own: other videos, with pixels of their own."""
        parts = [self.latents[row, start : start + frames] for row, start in enumerate(starts)]
        return replace(self, latents=torch.stack(parts))

    def under(self, prompts: Prompts) -> "Videos":
        """The same videos under other prompts."""
        return replace(self, prompts=prompts)._sharing(self._decoded)

    def numbered(self, numbers: Sequence[int]) -> "Videos":
        """The same videos, to be shared by these numbers."""
        return replace(self, numbers=tuple(numbers))._sharing(self._decoded)

    def seen(self, views: Sequence[View | None]) -> "Videos":
        """The same videos, each through a view of its own."""
        return replace(self, views=tuple(views))._sharing(self._decoded)

    @torch.no_grad()
    def pixels(self) -> Tensor:
        """(B, T, C, H, W) in [-1, 1], without gradient.

        A video is decoded once, and alone: whatever it is cut out of or added to shares its pixels, and each looks at
        them through its views.
        """
        for row, decoded in enumerate(self._decoded):
            if not decoded:
                assert self.decode is not None, "who judges pixels is given a codec"
                decoded.append(self.decode(self.latents[row : row + 1]))
        shown = [pixels for (pixels,) in self._decoded]
        if self.views is not None:
            shown = [view(pixels) if view else pixels for view, pixels in zip(self.views, shown, strict=True)]
        return shown[0] if len(self) == 1 else torch.cat(shown)

    def let_go(self) -> None:
        """Of the pixels of these videos, wherever they are shared."""
        for decoded in self._decoded:
            decoded.clear()

    def _sharing(self, decoded: list[list[Tensor]]) -> "Videos":
        self._decoded[:] = decoded
        return self


@dataclass(frozen=True)
class Batch:
    """This rank's share of a step.

    Attributes:
        teacher: videos with their prompts.
        extra: prompts without a video.
    """

    teacher: Videos
    extra: Prompts

    @property
    def prompts(self) -> Prompts:
        """All of them, those with a video first."""
        return self.teacher.prompts + self.extra if len(self.extra) else self.teacher.prompts

    def map(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        """Its tensors elsewhere."""
        prompts, extra = (replace(p, embeddings=move(p.embeddings)) for p in (self.teacher.prompts, self.extra))
        return Batch(replace(self.teacher, prompts=prompts, latents=move(self.teacher.latents)), extra)

    def to(self, device: torch.device) -> "Batch":
        """On a device; from pinned memory, without waiting for the copy."""
        return self.map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """In memory that a GPU copies from by itself."""
        return self.map(torch.Tensor.pin_memory)
