"""The toy worlds, by the name that `data.source.world` gives: what their teachers are asked and render."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from afd_scale.data.worlds import drop, kick
from afd_scale.data.worlds.ball import FrameArray
from afd_scale.data.worlds.words import WorldPrompt, is_unseen

Part = Literal["all", "seen", "unseen"]


@dataclass(frozen=True)
class World:
    """One of them.

    Attributes:
        version: of what is rendered; part of what shards were made from.
        frames: of a clip.
        prompt: the class of its prompts.
        paraphrases: other sentences, with the names of a prompt's fields in braces.
        render: (N, frames, FRAME_SIZE, FRAME_SIZE) uint8 of N prompts, by seed, first_index, physics, and of a longer
            motion by begin and frames.
    """

    version: int | str
    frames: int
    prompt: type[WorldPrompt]
    paraphrases: Sequence[str]
    render: Callable[..., FrameArray]

    def paraphrase(self, prompt: WorldPrompt, number: int) -> str:
        """One of the other sentences of a prompt's words; numbers go round."""
        return self.paraphrases[number % len(self.paraphrases)].format(**vars(prompt))

    def part(self, name: Part) -> Sequence[WorldPrompt]:
        """All prompts, or those that are seen or unseen where a source leaves a quarter out."""
        unseen = name == "unseen"
        return [prompt for prompt in self.prompt.every() if name == "all" or is_unseen(prompt) == unseen]


WORLDS: Mapping[str, World] = {
    "drop": World(drop.WORLD_VERSION, drop.NUM_FRAMES, drop.ToyPrompt, drop.PARAPHRASES, drop.render_clips),
    "kick": World(kick.WORLD_VERSION, kick.NUM_FRAMES, kick.KickPrompt, kick.PARAPHRASES, kick.render_clips),
}
