"""The teacher of a toy world. Clips are rendered when shards are made and in evaluation, never while training."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from afd_scale.codecs.codec import VideoForm
from afd_scale.config import ConfigError
from afd_scale.config.run import ProceduralSource
from afd_scale.data.clips import Clip, Frames, Teacher
from afd_scale.data.worlds import WORLDS
from afd_scale.data.worlds.ball import FPS, FRAME_SIZE, uniform_draws

_CLIPS_AT_ONCE = 256
_ORDER_STREAM, _BEGIN_STREAM = 0, 100  # the worlds' own streams are other numbers


def form_of(world: str) -> VideoForm:
    """Of a world's clips."""
    return VideoForm(frames=WORLDS[world].frames, fps=FPS, height=FRAME_SIZE, width=FRAME_SIZE, colour="gray")


class ProceduralTeacher(Teacher):
    """Renders the clips of a source.

    Every prompt comes once, in a random order, before any comes again. The first n clips do not depend on
    `source.clips`.
    """

    def __init__(self, source: ProceduralSource):
        self.source, self._world = source, WORLDS[source.world]
        self.name = f"procedural:{source.physics}"
        self.form = form_of(source.world)
        # Without what it does not use: shards from before `prompts` and `begin` were there are the same.
        left_out = {"prompts"} if source.prompts == "all" else set()
        settings = source.model_dump(mode="json", exclude=left_out, exclude_none=True)
        self.provenance: dict[str, Any] = {**settings, "world": self._world.version}
        self._prompts = self._world.part(source.prompts)
        self._order = prompt_order(self._prompts, source.clips, source.seed)
        self._block = lru_cache(maxsize=1)(self._render)  # clips are asked for in their order

    def clips(self) -> list[Clip]:
        cycle = len(self._prompts)
        return [
            Clip(f"{position:06d}", prompt.sentence, prompt.prompt_id, position // cycle)
            for position, prompt in enumerate(self._order)
        ]

    def frames(self, clip: Clip, form: VideoForm) -> Frames:
        if form != self.form:
            raise ConfigError(f"form ({form}) must be the toy world's, {self.form}: it is rendered in no other")
        block, row = divmod(int(clip.video), _CLIPS_AT_ONCE)
        return self._block(block)[row][..., None]

    def _render(self, block: int) -> Frames:
        first, source = block * _CLIPS_AT_ONCE, self.source
        prompts = self._order[first : first + _CLIPS_AT_ONCE]
        how: dict[str, Any] = {"seed": source.seed, "first_index": first, "physics": source.physics}
        if source.begin is None:
            return self._world.render(prompts, **how)
        begins = _begins(source.begin, source.seed, first, len(prompts))
        clips: Frames = np.empty((len(prompts), self.form.frames, FRAME_SIZE, FRAME_SIZE), np.uint8)
        for begin in np.unique(begins):
            clips[begins == begin] = self._world.render(
                prompts, begin=int(begin), frames=self.form.frames, **how
            )[begins == begin]  # fmt: skip
        return clips


def _begins(limits: tuple[int, int], seed: int, first_index: int, count: int) -> Any:
    """(count,) frames of a motion that clips begin with, each by the number of its clip."""
    low, high = limits
    drawn = uniform_draws(seed, _BEGIN_STREAM, first_index, count, 1)[:, 0]
    return low + np.floor(drawn * (high - low + 1)).astype(int)


def prompt_order(prompts: Sequence[Any], clips: int, seed: int) -> list[Any]:
    """The prompt of each clip: as many random orders of all prompts as it takes, the last one cut short."""
    order: list[Any] = []
    for cycle in range(-(-clips // len(prompts))):
        sequence = np.random.SeedSequence((seed, _ORDER_STREAM, cycle))
        keys = np.random.Generator(np.random.Philox(sequence)).random(len(prompts))
        order.extend(prompts[index] for index in np.argsort(keys))
    return order[:clips]
