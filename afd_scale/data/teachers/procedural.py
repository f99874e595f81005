"""The toy world's teacher. Clips are rendered when shards are made and in evaluation, never while training."""

from functools import lru_cache
from typing import Any

import numpy as np

from afd_scale.codecs.codec import VideoForm
from afd_scale.config import ConfigError
from afd_scale.config.run import ProceduralSource
from afd_scale.data.clips import Clip, Frames, Teacher
from afd_scale.data.toy_world import FRAME_SIZE, NUM_FRAMES, WORLD_VERSION, ToyPrompt, render_clips, toy_prompts

FORM = VideoForm(frames=NUM_FRAMES, fps=8.0, height=FRAME_SIZE, width=FRAME_SIZE, colour="gray")

_CLIPS_AT_ONCE = 256
_ORDER_STREAM = 0  # the toy world's own streams are 1 and 2


class ProceduralTeacher(Teacher):
    """Renders the clips of a source.

    Every prompt comes once, in a random order, before any comes again. The first n clips do not depend on
    `source.clips`.
    """

    def __init__(self, source: ProceduralSource):
        self.source = source
        self.name = f"procedural:{source.physics}"
        self.provenance: dict[str, Any] = {**source.model_dump(mode="json"), "world": WORLD_VERSION}
        self._order = prompt_order(source.clips, source.seed)
        self._block = lru_cache(maxsize=1)(self._render)  # clips are asked for in their order

    def clips(self) -> list[Clip]:
        cycle = len(toy_prompts())
        return [
            Clip(f"{position:06d}", prompt.sentence, prompt.prompt_id, position // cycle)
            for position, prompt in enumerate(self._order)
        ]

    def frames(self, clip: Clip, form: VideoForm) -> Frames:
        if form != FORM:
            raise ConfigError(f"form ({form}) must be the toy world's, {FORM}: it is rendered in no other")
        block, row = divmod(int(clip.video), _CLIPS_AT_ONCE)
        return self._block(block)[row][..., None]

    def _render(self, block: int) -> Frames:
        begin, source = block * _CLIPS_AT_ONCE, self.source
        prompts = self._order[begin : begin + _CLIPS_AT_ONCE]
        return render_clips(prompts, seed=source.seed, first_index=begin, physics=source.physics)


def prompt_order(clips: int, seed: int) -> list[ToyPrompt]:
    """The prompt of each clip: as many random orders of all prompts as it takes, the last one cut short."""
    prompts = toy_prompts()
    order: list[ToyPrompt] = []
    for cycle in range(-(-clips // len(prompts))):
        sequence = np.random.SeedSequence((seed, _ORDER_STREAM, cycle))
        keys = np.random.Generator(np.random.Philox(sequence)).random(len(prompts))
        order.extend(prompts[index] for index in np.argsort(keys))
    return order[:clips]
