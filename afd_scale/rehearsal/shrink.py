"""A run's config made small: every width and length is, every choice stays.

Who chooses (method, roles, adapters, judges, sampler, layout of chunks, recomputation, schedules) is asked nothing: a
number becomes smaller and remains on the same side of every rule. Heads stay as many as they are, for they decide which
sequence degrees there are.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from afd_scale.config import RunConfig

HEAD_WIDTH = 8  # all attention kernels take multiples of it
LINEAR_MULTIPLE = 32  # what every FP8 scaling takes
LAYERS = 2
LORA_RANK = 4
CHUNKS = 3  # of a video: a first one, one behind it, one behind that with all of a past
PATCHES = (2, 3)  # rows and columns of a latent frame, in tokens: not square, to tell one from the other
PROMPTS = 2  # of a data rank and step
EVALUATED = {"clips": 4, "lengths": 2, "batch": 2, "samples": 2, "diagnosed_prompts": 2, "diagnosed_rollouts": 2}
VLM_PIXELS = 56 * 56
TOY_CLIPS = 64
# Fields of a method and its networks by their names, in whatever section they are, and the most they may be.
AT_MOST = {
    "warmup_steps": 1, "freeze_after": 1, "student_every": 2, "prior_every": 2, "channels": 16, "head_channels": 16,
    "workers": 1, "min_pixels": VLM_PIXELS, "max_pixels": VLM_PIXELS,
}  # fmt: skip
SAVE_EVERY = 2
LOOK_EVERY = 4  # sample videos and diagnostics: not between the first checkpoint and the signal that follows it
STEPS = 1000  # it is told to stop long before


@dataclass(frozen=True)
class Layout:
    """Ranks, data x sequence."""

    data: int
    sequence: int

    @property
    def ranks(self) -> int:
        return self.data * self.sequence

    def __str__(self) -> str:
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        return f"{ranks}, data {self.data} x sequence {self.sequence}"


def small_layout(full: Layout, most: int) -> Layout:
    """The nearest layout of at most so many ranks: both axes where there are two of them, then as many ranks as
    possible, then those that share a video."""
    layouts = [
        Layout(data, sequence)
        for sequence in range(1, full.sequence + 1) if full.sequence % sequence == 0
        for data in range(1, full.data + 1) if data * sequence <= max(1, most)
    ]  # fmt: skip

    def likeness(layout: Layout) -> tuple[int, int, int]:
        same_axes = ((layout.data > 1) == (full.data > 1)) + ((layout.sequence > 1) == (full.sequence > 1))
        return same_axes, layout.ranks, layout.sequence

    return max(layouts, key=likeness)


def small_wan(heads: int, head_width: int, layers: int) -> dict[str, int]:
    """Sizes of a small Wan, by their names in its section."""
    dim = heads * head_width
    return {"dim": dim, "ffn_dim": 4 * dim, "num_heads": heads, "num_layers": layers, "text_dim": 32,
            "text_length": 16, "freq_dim": 32}  # fmt: skip


def shrink(config: RunConfig, full: Layout, small: Layout) -> RunConfig:
    """The same run with small networks and short videos, for fewer ranks.

    Paths and what a machine must have stay as they are (`machine.adapt`, `stand_ins`).

    Args:
        full: how the config runs.
        small: how the result does.
    """
    tree = config.model_dump(mode="json")
    for section in _sections(tree["method"]):
        _shrink_section(section, config)
    for section in _sections(tree["student"]):
        _shrink_section(section, config)
    _shrink_data(tree, config, full, small)
    tree["parallel"]["sequence"] = small.sequence
    tree["train"] |= {"steps": STEPS, "log_every": 1, "save_every": SAVE_EVERY, "resume": True}
    for name in ("sample_every", "diagnose_every"):
        if tree["train"][name] is not None:
            tree["train"][name] = LOOK_EVERY
    tree["evaluation"] |= {name: min(most, tree["evaluation"][name]) for name, most in EVALUATED.items()}
    if not config.sampler.chunks.are_whole(tree["evaluation"]["lengths"] * tree["data"]["latent_frames"]):
        tree["evaluation"]["lengths"] = 1
    return RunConfig.model_validate(tree)


def small_frames(config: RunConfig) -> int:
    """Latent frames of a short video: some chunks, and where a window slides in the long one, enough to move it."""
    sampler, frames = config.sampler, config.data.latent_frames
    wanted, window = sampler.chunks.start(CHUNKS), sampler.window_frames
    if window is not None and window < frames:
        wanted = max(wanted, window + sampler.chunk_frames)
    return min(wanted, frames)


def keeps_data(config: RunConfig) -> bool:
    """Whether the videos' form is the toy world's, which has one."""
    return config.data.source is not None


def _sections(tree: Any) -> Iterator[dict[str, Any]]:
    """Every mapping within, itself too."""
    if isinstance(tree, dict):
        yield tree
        for value in list(tree.values()):
            yield from _sections(value)


def _shrink_section(section: dict[str, Any], config: RunConfig) -> None:
    if {"dim", "num_heads", "num_layers"} <= section.keys():
        _shrink_wan(section, config)
    if {"rank", "alpha"} <= section.keys():
        rank = min(LORA_RANK, section["rank"])
        section |= {"rank": rank, "alpha": section["alpha"] * rank / section["rank"]}
    for name, most in AT_MOST.items():
        if isinstance(section.get(name), int):
            section[name] = min(most, section[name])
    if section.get("judged_frames"):
        judged = _in_proportion(section["judged_frames"], config)
        section["judged_frames"] = max(judged, _small_start(config) + config.sampler.chunk_frames)
    if section.get("judged_windows", 1) > 1 and not keeps_data(config):  # as few as hold all of a video
        section["judged_windows"] = math.ceil(small_frames(config) / section["judged_frames"])
    if section.get("long_rollouts") and not keeps_data(config):
        _shrink_long_rollouts(section["long_rollouts"], config)


def _shrink_wan(section: dict[str, Any], config: RunConfig) -> None:
    heads, features = section["num_heads"], section.get("features") or ()
    width = next(w for w in (HEAD_WIDTH, 2 * HEAD_WIDTH, 4 * HEAD_WIDTH) if heads * w % LINEAR_MULTIPLE == 0)
    layers = min(section["num_layers"], max(LAYERS, 2 * config.fp8_keep_blocks + 1, len(features)))
    sizes = small_wan(heads, width, layers)
    if keeps_data(config):
        sizes |= {name: section[name] for name in ("text_dim", "text_length")}
    section |= {name: min(size, section[name]) for name, size in sizes.items()}
    if features:
        section["features"] = [1 + place for place in range(len(features))]


def _shrink_long_rollouts(section: dict[str, Any], config: RunConfig) -> None:
    """As many times as long as the small videos."""
    for name in ("frames", "from_frames", "context_frames"):
        if section[name] is not None:
            section[name] = _in_proportion(section[name], config)
    section["frames"] = max(section["frames"], small_frames(config) + config.sampler.chunk_frames)


def _small_start(config: RunConfig) -> int:
    """Latent frames that are given of a small video."""
    frames = config.data.start_frames
    return _in_proportion(frames, config) if frames else 0


def _in_proportion(frames: int, config: RunConfig) -> int:
    """The same part of a video, in whole chunks."""
    if keeps_data(config):
        return frames
    chunks = config.sampler.chunks
    return chunks.start(max(1, chunks.count(frames * small_frames(config) // config.data.latent_frames)))


def _shrink_data(tree: dict[str, Any], config: RunConfig, full: Layout, small: Layout) -> None:
    data = tree["data"]
    prompts = min(PROMPTS, math.ceil(config.data.global_batch / full.data))
    data["global_batch"] = prompts * small.data
    data["prompts_per_step"] = min(1, config.data.prompts_per_step) * small.data
    if keeps_data(config):
        data["source"]["clips"] = min(TOY_CLIPS, data["source"]["clips"])
        return
    _, rows, columns = config.student.patch
    data |= {"latent_frames": small_frames(config), "start_frames": _small_start(config)}
    data["latent_height"] = min(PATCHES[0] * rows, data["latent_height"])
    data["latent_width"] = min(PATCHES[1] * columns, data["latent_width"])
