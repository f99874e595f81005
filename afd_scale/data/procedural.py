"""The toy world's teacher as a source of datasets. Clips are rendered here and in evaluation, never while training."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from afd_scale.config.run import ProceduralSource
from afd_scale.data.codec import SpaceTimeToDepth, to_unit
from afd_scale.data.schema import DatasetFacts, TeacherSample
from afd_scale.data.text import embed_words
from afd_scale.data.toy_world import FRAME_SIZE, NUM_FRAMES, ToyPrompt, render_clips, toy_prompts
from afd_scale.data.writer import write_dataset

TEXT_LENGTH = 16
TEXT_DIM = 32
FRAMES_PER_SECOND = 8.0
_CLIPS_AT_ONCE = 256
_ORDER_STREAM = 0  # the toy world's own streams are 1 and 2


def make_procedural_shards(
    source: ProceduralSource,
    folder: Path,
    *,
    field: str = "out",
    on_clip: Callable[[], None] | None = None,
) -> DatasetFacts:
    """Render the source's clips into a dataset.

    Args:
        source: how many clips, of which physics and seed.
        folder: does not exist yet.
        field: the user's setting that names the folder, for errors.
        on_clip: called after each clip, for a progress bar.
    Returns:
        The dataset's facts.
    Raises:
        ConfigError: the folder exists or cannot be made.
    """
    codec = SpaceTimeToDepth()
    size = FRAME_SIZE // codec.pixels
    facts = DatasetFacts(
        latent_shape=(NUM_FRAMES // codec.frames, codec.channels, size, size),
        text_shape=(TEXT_LENGTH, TEXT_DIM),
        codec=f"space_time_to_depth:{codec.frames}x{codec.pixels}x{codec.pixels}",
        teacher=_teacher_name(source),
        num_samples=source.clips,
        provenance={"source": source.model_dump(mode="json")},
    )
    return write_dataset(_reporting(procedural_samples(source), on_clip), facts, folder, field=field)


def procedural_samples(source: ProceduralSource) -> Iterator[TeacherSample]:
    """Yield the source's clips as samples, rendered a batch at a time.

    Every prompt comes once, in a random order, before any comes again. The first n samples do not depend on
    `source.clips`.
    """
    codec = SpaceTimeToDepth()
    teacher = _teacher_name(source)
    prompts = prompt_order(source.clips, source.seed)
    text = {prompt: embed_words(prompt.sentence, max_words=TEXT_LENGTH, dim=TEXT_DIM) for prompt in toy_prompts()}
    for begin in range(0, len(prompts), _CLIPS_AT_ONCE):
        block = prompts[begin : begin + _CLIPS_AT_ONCE]
        frames = render_clips(block, seed=source.seed, first_index=begin, physics=source.physics)
        latents = codec.encode(to_unit(torch.from_numpy(frames))).to(torch.float16).numpy()
        for row, prompt in enumerate(block):
            yield TeacherSample(
                prompt=prompt.sentence,
                prompt_id=prompt.prompt_id,
                text_embedding=text[prompt],
                latents=latents[row],
                teacher=teacher,
                fps=FRAMES_PER_SECOND,
                meta={"clip": begin + row},
            )


def prompt_order(clips: int, seed: int) -> list[ToyPrompt]:
    """The prompt of each clip: as many random orders of all prompts as it takes, the last one cut short."""
    prompts = toy_prompts()
    order: list[ToyPrompt] = []
    for cycle in range(-(-clips // len(prompts))):
        sequence = np.random.SeedSequence((seed, _ORDER_STREAM, cycle))
        keys = np.random.Generator(np.random.Philox(sequence)).random(len(prompts))
        order.extend(prompts[index] for index in np.argsort(keys))
    return order[:clips]


def _teacher_name(source: ProceduralSource) -> str:
    return f"procedural:{source.physics}"


def _reporting(samples: Iterator[TeacherSample], on_clip: Callable[[], None] | None) -> Iterator[TeacherSample]:
    for sample in samples:
        yield sample
        if on_clip is not None:
            on_clip()
