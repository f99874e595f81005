"""The toy worlds, by the name that `data.source.world` gives: what their teachers are asked and render."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Literal

from afd_scale.data.worlds import drop, kick
from afd_scale.data.worlds.ball import FrameArray
from afd_scale.data.worlds.words import Vocabulary, is_unseen

Part = Literal["all", "seen", "unseen"]


@dataclass(frozen=True)
class World:
    """One of them.

    Attributes:
        version: of what is rendered; part of what shards were made from.
        frames: of a clip.
        prompts: all of them, with `sentence` and `prompt_id`.
        vocabulary: the words of each of a prompt's fields.
        parse: the prompt that a sentence asks for by its words; ValueError where there is none.
        paraphrases: other sentences, with the names of a prompt's fields in braces.
        render: (N, frames, FRAME_SIZE, FRAME_SIZE) uint8 of N prompts, by seed, first_index, physics, and of a longer
            motion by begin and frames.
    """

    version: int | str
    frames: int
    prompts: Sequence[Any]
    vocabulary: Vocabulary
    parse: Callable[[str], Any]
    paraphrases: Sequence[str]
    render: Callable[..., FrameArray]

    def paraphrase(self, prompt: Any, number: int) -> str:
        """One of the other sentences of a prompt's words; numbers go round."""
        return self.paraphrases[number % len(self.paraphrases)].format(**vars(prompt))

    def part(self, name: Part) -> Sequence[Any]:
        """All prompts, or those that are seen or unseen where a source leaves a quarter out."""
        if name == "all":
            return self.prompts
        unseen = name == "unseen"
        return [prompt for prompt in self.prompts if is_unseen(astuple(prompt), self.vocabulary) == unseen]


WORLDS: Mapping[str, World] = {
    "drop": World(
        drop.WORLD_VERSION, drop.NUM_FRAMES, drop.toy_prompts(), drop.VOCABULARY, drop.parse_prompt, drop.PARAPHRASES,
        drop.render_clips,
    ),
    "kick": World(
        kick.WORLD_VERSION, kick.NUM_FRAMES, kick.prompts(), kick.VOCABULARY, kick.parse_prompt, kick.PARAPHRASES,
        kick.render_clips,
    ),
}  # fmt: skip
