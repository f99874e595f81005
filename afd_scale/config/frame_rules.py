"""How many latent frames a chunk, a video, its start, long rollouts and what is seen of them may have together."""

import math
from collections.abc import Sequence

from afd_scale.config.cast import Pass
from afd_scale.config.sampler import SamplerConfig


def check_frames(passes: Sequence[Pass], sampler: SamplerConfig, teachers: int, start: int, lengths: int) -> None:
    """Look at the method's passes.

    Args:
        teachers: latent frames of the teacher's videos.
        start: of them, those that are given.
        lengths: how often as long the student's clips are that are evaluated.
    Raises:
        ValueError: names the first field that breaks a rule.
    """
    chunks, size, field = sampler.chunks, sampler.chunk_frames, f"sampler.chunk_frames ({sampler.chunk_frames})"
    if not chunks.are_alike:
        first = f"sampler.first_chunk_frames ({sampler.first_chunk_frames})"
        field += f" behind {first}"
        _check_alike(passes, first)
    if not chunks.are_whole(teachers):
        raise ValueError(f"data.latent_frames ({teachers}) must be whole chunks of {field}: a video is made of these")
    if not chunks.are_whole(lengths * teachers):
        raise ValueError(f"evaluation.lengths ({lengths}) must be 1, or times data.latent_frames ({teachers}) whole "
                         f"chunks of {field}: the student's clips are made of these")  # fmt: skip
    if not chunks.are_whole(start) or start >= teachers:
        raise ValueError(f"data.start_frames ({start}) must be whole chunks of {field}, and less than "
                         f"data.latent_frames ({teachers}): what comes behind is generated")  # fmt: skip
    longest = f"data.latent_frames ({teachers})", teachers
    for each in passes:
        if each.kind == "score" and each.frames and (each.frames > teachers or each.frames % size):
            raise ValueError(f"method.judged_frames ({each.frames}) must be whole chunks of {field}, and at most "
                             f"data.latent_frames ({teachers})")  # fmt: skip
        if each.kind == "score" and each.frames and each.frames <= start:
            raise ValueError(f"method.judged_frames ({each.frames}) must be more than data.start_frames ({start}): in "
                             "a window of given frames rollouts are as the teacher's videos")  # fmt: skip
        if each.windows > 1:
            seen = each.frames or teachers
            least, most = math.ceil(teachers / seen), (teachers - seen) // size + 1
            if not least <= each.windows <= most:
                may_be = f"1, or {least} to {most}" if most > 1 else "1"
                raise ValueError(f"method.judged_windows ({each.windows}) must be {may_be}: windows of "
                                 f"method.judged_frames ({each.frames}) that differ, and together hold all of "
                                 f"data.latent_frames ({teachers})")  # fmt: skip
        if each.kind == "rollout" and each.frames is not None:
            if start:
                raise ValueError(f"data.start_frames ({start}) must be 0 with method.long_rollouts: most windows are "
                                 "far behind a start")  # fmt: skip
            longest = f"method.long_rollouts.frames ({each.frames})", each.frames
            if each.frames <= teachers or each.frames % size:
                raise ValueError(f"{longest[0]} must be whole chunks of {field}, and more than data.latent_frames "
                                 f"({teachers})")  # fmt: skip
        if each.context is not None and (sampler.window_frames is None or each.context % size):
            raise ValueError(f"method.long_rollouts.context_frames ({each.context}) must be whole chunks of {field}, "
                             "and left out without sampler.window_frames, where all is context")  # fmt: skip
    window = sampler.window_frames or longest[1]
    if sampler.positions == "window" and sampler.sink_frames and longest[1] > window:
        raise ValueError(f"sampler.positions (window) must be absolute with sampler.sink_frames ({sampler.sink_frames})"
                         f" where {longest[0]} exceed sampler.window_frames ({window}): a training pass has all chunks "
                         "of a video at once, and to each the sink would stand elsewhere")  # fmt: skip


def _check_alike(passes: Sequence[Pass], first: str) -> None:
    """Raises ValueError where windows begin with any chunk, and are of one length."""
    for kind, name in (("rollout", "method.long_rollouts"), ("score", "method.judged_frames")):
        if any(each.kind == kind and each.frames for each in passes):
            raise ValueError(f"{first} must be left out with {name}: windows begin with any chunk, and are of one "
                             "length")  # fmt: skip
