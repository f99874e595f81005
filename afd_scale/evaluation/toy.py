"""The toy world's measure: trajectories of generated clips, read from pixels, against fresh clips of the teacher."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from afd_scale.codecs.conversions import to_uint8
from afd_scale.codecs.identity import IdentityCodec
from afd_scale.data.toy_world import parse_prompt, render_clips
from afd_scale.evaluation.trajectory import score

REFERENCE_CLIPS = 1536
REFERENCE_SEED = 1_000_003  # of clips that no shard holds: shards are made with small seeds
TEACHER_SEED = 1_000_004

Frames = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


def decode(latents: Tensor) -> Frames:
    """(N, F, C, H, W) latents to (N, frames, rows, columns) uint8 video."""
    return to_uint8(IdentityCodec().decode(latents))[..., 0]


def check_sentences(sentences: Sequence[str]) -> None:
    """ValueError for the first prompt that is not the toy world's."""
    for sentence in sentences:
        parse_prompt(sentence)


def teacher_clips(sentences: Sequence[str], clips: int) -> Frames:
    """Fresh teacher clips, clip i of prompt i modulo P: what a perfect student would score."""
    prompts = [parse_prompt(sentences[i % len(sentences)]) for i in range(clips)]
    return render_clips(prompts, seed=TEACHER_SEED, physics="teacher")


def measure(clips: dict[str, Frames], sentences: Sequence[str]) -> dict[str, dict[str, float]]:
    """Scores of each policy's clips, clip i of prompt i modulo P."""
    prompts = [parse_prompt(sentence) for sentence in sentences]
    reference_prompts = [prompts[i % len(prompts)] for i in range(REFERENCE_CLIPS)]
    reference = render_clips(reference_prompts, seed=REFERENCE_SEED, physics="teacher")
    return {
        policy: score(frames, [prompts[i % len(prompts)] for i in range(len(frames))], reference)
        for policy, frames in clips.items()
    }
