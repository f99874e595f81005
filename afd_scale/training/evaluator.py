"""Looks at policies: generates clips of the data's prompts, has them measured and writes what people see.

Clip i is of prompt i modulo P, and its noise is keyed by i: it is the same for every policy, on any number of ranks,
and whichever other clips are asked for.
"""

import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from afd_scale.codecs.codec import Codec
from afd_scale.codecs.conversions import to_uint8, to_unit
from afd_scale.config import ConfigError, RunConfig
from afd_scale.data.reader import distinct_prompts, read_rows, videos_of
from afd_scale.data.schema import DatasetFacts
from afd_scale.data.storage import evaluation_prompts, teacher_data
from afd_scale.evaluation import shortcuts
from afd_scale.evaluation.kept_clips import read_clips, write_clips
from afd_scale.evaluation.lengths import by_span
from afd_scale.evaluation.suites import Metric, Suite, Timing, make_suite, parts_of
from afd_scale.evaluation.suites.video import chunk_borders
from afd_scale.evaluation.video import write_comparison_mp4, write_grid
from afd_scale.flow.randomness import Randomness
from afd_scale.mp4 import FrameArray
from afd_scale.parallel.ranks import Ranks
from afd_scale.protocols import Policy
from afd_scale.rollout.sampler import Noise, Sampler
from afd_scale.types import Prompts, Videos, pieces

log = logging.getLogger(__name__)

SHORTCUT_PIXELS = 600 * 2**20  # of each side's clips that are looked through for shortcuts; 30 million take a second
LONG = "long"  # folder among the samples, of clips that are longer than the data's
MEASURED_BYTES = 32 * 2**30  # of all clips that are measured at the end of a run


ByPolicy = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Comparison:
    """What was measured on the main rank; both are empty on other ranks, and where nothing is.

    Attributes:
        metrics: of base, student and teacher, by policy.
        by_length: of student and teacher beyond the data's length, by policy and span.
    """

    metrics: ByPolicy
    by_length: dict[str, ByPolicy]

    @property
    def summary(self) -> dict[str, Any]:
        """Its part of summary.json."""
        return {"metrics": self.metrics} | ({"metrics_by_length": self.by_length} if self.by_length else {})


class Evaluator:
    """Evaluation of one run. Every rank generates; the main rank has the frames, measures and draws.

    Args:
        codec: of the data's latents; None where nothing here decodes them, and nothing is looked at.
    """

    def __init__(self, config: RunConfig, ranks: Ranks, codec: Codec | None):
        self.config, self.ranks, self.codec = config, ranks, codec
        self.suite = make_suite(config)
        self.sampler, self.randomness = Sampler(config.sampler), Randomness(config.seed)
        self.samples = config.folder / "samples"

    @property
    def suite_metrics(self) -> Mapping[str, Metric]:
        """How to read the suite's metrics; none where nothing is measured."""
        return {} if self.suite is None else self.suite.metrics

    def check(self) -> None:
        """Refuse what could only fail after training: prompts that the suite cannot read, clips that nothing holds.

        Raises:
            ConfigError: names the first thing.
        """
        metrics, clips, data = self.config.evaluation.metrics, self.config.evaluation.clips, self.config.data
        if data.start_frames and len(self.clips) and self._renderer is None and not self._has_videos:
            raise ConfigError(f"evaluation.prompts ({self.config.evaluation.prompts}) must hold videos with "
                              f"data.start_frames ({data.start_frames}): what is looked at begins as they do"
                              )  # fmt: skip
        if self.suite is None:
            return
        if self.codec is None:
            raise ConfigError(f"evaluation.metrics ({metrics}) must be none without a codec of the data's latents: "
                              "codec.models names Wan's VAE")  # fmt: skip
        try:
            self.suite.check(self.prompts)
        except ValueError as error:
            raise ConfigError(f"evaluation.metrics ({metrics}) must be none for prompts that it cannot read: {error}"
                              ) from error  # fmt: skip
        pixels = data.latent_height * data.latent_width * self.codec.spatial**2
        bytes_each = self.codec.frames(data.latent_frames) * pixels * (1 if self.codec.colour == "gray" else 3)
        bytes_each *= 2 + self.config.evaluation.lengths  # only the student's are longer than the data's
        if clips * bytes_each > MEASURED_BYTES:
            raise ConfigError(f"evaluation.clips ({clips}) must be at most {MEASURED_BYTES // bytes_each} for "
                              "videos of this size: base's, student's and teacher's are measured in the main rank's "
                              "memory; tools/evaluate.py measures more, one by one")  # fmt: skip

    def keep_base(self, policy: Policy) -> bool:
        """The start policy's clips, before it is trained, in a file that the starts of a run share.

        Returns:
            Whether they were made now.
        """
        if not self.clips:
            return False
        if self.ranks.run_on_main(lambda: self._read_base([0]) is not None):
            log.info("%s has its base's clips from an earlier start", self.config.name)
            return False
        base = self.frames(policy, self.clips)
        self.ranks.run_on_main(self._write_base, base)
        return True

    def warn_of_shortcuts(self) -> None:
        """Say what trivial things tell the teacher's clips from the base's: a judge would learn them first."""
        data = self.config.data
        assert self.codec is not None, "who has clips has a codec"
        pixels = self.codec.frames(data.latent_frames) * data.latent_height * data.latent_width * self.codec.spatial**2
        affordable = max(shortcuts.LEAST_CLIPS, SHORTCUT_PIXELS // pixels)
        places = range(min(len(self.clips), shortcuts.MOST_WARNED_OF, affordable))
        teacher = self._teacher([self.clips[place] for place in places])

        def warn() -> None:
            base = self._read_base(places)
            if teacher is None or base is None:
                return
            captions = [self.prompts.texts[self.clips[place] % len(self.prompts)] for place in places]
            for line in shortcuts.warnings(teacher, base, captions):
                log.warning("%s", line)

        self.ranks.run_on_main(warn)

    def sample(self, policy: Policy, step: int) -> None:
        """Videos of the shown prompts in the middle of training: teacher, base and student side by side."""
        if self.codec is None or not self.shown:
            return
        student, teacher = self.frames(policy, self.shown), self.teacher_shown
        if student is not None:
            self._draw({"teacher": teacher, "base": self._read_base(self._rows_shown), "student": student}, step)

    def compare(self, policy: Policy) -> Comparison:
        """Metrics of the policies; sample clips in the run folder."""
        nothing = Comparison({}, {})
        if not self.clips:
            return nothing
        lengths = self.config.evaluation.lengths
        student = self.frames(policy, self.clips, lengths)
        teacher = self.teacher_shown if self.suite is None else self._teacher(self.clips, lengths)
        if student is None:
            return nothing
        made = {"base": self._read_base(range(len(self.clips))), "student": student, "teacher": teacher}
        long = {name: frames for name, frames in made.items() if frames is not None}
        clips = {name: frames[:, : self.frames_each()] for name, frames in long.items()}
        self._draw({name: frames[self._rows_shown] for name, frames in clips.items()}, self.config.train.steps)
        if self.suite is None:
            return nothing
        return Comparison(self.suite.measure(clips, self.prompts, self.timing()), self._by_length(long))

    def _by_length(self, long: Mapping[str, FrameArray]) -> dict[str, ByPolicy]:
        """What is measured part by part of the policies' clips, as far as each lasts; one part is measured already."""
        suite, lengths = self.suite, self.config.evaluation.lengths
        if suite is None or lengths == 1:
            return {}
        parts: dict[str, list[dict[str, float]]] = {"student": [], "teacher": []}
        for part in parts_of(self.frames_each(), lengths):
            clips = {name: long[name] for name in parts if name in long and long[name].shape[1] >= part.stop}
            for name, found in suite.measure_part(clips, self.prompts, self.timing(lengths), part).items():
                parts[name].append(found)
        self._draw_long(long)
        return {name: by_span(found) for name, found in parts.items() if found}

    def frames_each(self, lengths: int = 1) -> int:
        """Of a clip so many times as long as the data's."""
        assert self.codec is not None, "without a codec nothing is looked at"
        return self.codec.frames(lengths * self.config.data.latent_frames)

    def frames(self, policy: Policy, clips: Sequence[int], lengths: int = 1) -> FrameArray | None:
        """Generate clips so many times as long as the data's: (N, T, H, W) or (N, T, H, W, 3) uint8 on the main rank,
        None elsewhere. The start of a longer clip is the shorter one."""
        with policy.resident(sampling=True):
            return self._gathered(clips, lambda mine: self._generated(policy, mine, lengths))

    def folder(self, step: int) -> Path:
        """Of a step's samples."""
        return self.samples / f"step_{step:08d}"

    @cached_property
    def teacher_shown(self) -> FrameArray | None:
        """The teacher's clips of the shown prompts; the first to ask are all ranks together."""
        return self._teacher(self.shown)

    def _teacher(self, clips: Sequence[int], lengths: int = 1) -> FrameArray | None:
        """The teacher's clips on the main rank, the suite's, or else the data's, which are as long as they are; None
        where these are prompts alone."""
        if self._renderer is not None:
            if not self.ranks.is_main:
                return None
            return self._renderer.teacher(self.prompts, max(clips) + 1, lengths)[list(clips)]
        if not self._has_videos:
            return None
        return self._gathered(clips, lambda mine: iter(self._videos(mine).latents.split(1, dim=1)))

    @cached_property
    def prompts(self) -> Prompts:
        """What the policies are asked for, each under the position of its first sample."""
        config = self.config
        return distinct_prompts(evaluation_prompts(config), config.student.text_length, config.evaluation.split)

    @cached_property
    def shown(self) -> list[int]:
        """Clips that people see, of as many prompts."""
        evaluation = self.config.evaluation
        prompts = min(len(self.prompts), evaluation.clips)
        return random.Random(0).sample(range(prompts), min(evaluation.samples, prompts))

    @cached_property
    def clips(self) -> Sequence[int]:
        """Clips of a policy that are looked at: measured, or only shown."""
        if self.codec is None:
            return ()
        return self.shown if self.suite is None else range(self.config.evaluation.clips)

    @property
    def _rows_shown(self) -> list[int]:
        """Where the shown ones stand among them."""
        return [self.clips.index(clip) for clip in self.shown]

    def _gathered(self, clips: Sequence[int], make: Callable[[Sequence[int]], Iterator[Tensor]]) -> FrameArray | None:
        """Frames of clips, shared among the ranks, on the main rank.

        Every rank makes as many, or a collective inside a policy would wait for ever; they go to the main rank a
        batch at a time.

        Args:
            make: chunks of some clips' latents; decoded one by one by the first rank of each sequence.
        """
        frames = None
        data_size = self.ranks.data_size
        share = -(-len(clips) // data_size)
        for part in pieces(share, self.config.evaluation.batch):
            # Places in `clips`, by data rank: those beyond its end are made too, and not sent.
            places = np.arange(data_size * share).reshape(data_size, share)[:, part]
            made = self.decoded(make([clips[place % len(clips)] for place in places[self.ranks.data_rank]]))
            rows = self.ranks.gather_to_main(made, (places < len(clips)).sum(axis=1).tolist())
            if rows is not None:
                if frames is None:
                    frames = np.empty((len(clips), *rows.shape[1:]), np.uint8)
                frames[places[places < len(clips)]] = rows.numpy()
        if self.codec is not None:
            self.codec.rest()
        return frames

    def _generated(self, policy: Policy, clips: Sequence[int], lengths: int) -> Iterator[Tensor]:
        """Chunks of clips that a policy makes, each length from noise of its own."""
        policy.watch.between()
        data, device = self.config.data, self.ranks.device
        prompts = self.prompts.take([clip % len(self.prompts) for clip in clips], clips)
        shape = (data.latent_frames, self.config.student.latent_channels, data.latent_height, data.latent_width)
        drawn = [
            self.sampler.draw(self.randomness, "evaluation", length, prompts.keys, shape, device)
            for length in range(lengths)
        ]
        initial, again = torch.cat([each.initial for each in drawn], 1), torch.cat([each.again for each in drawn], 2)
        noise = Noise(initial, again, self._starts(clips))
        return self.sampler.chunks(policy, prompts.embeddings.to(device), noise)

    def _starts(self, clips: Sequence[int]) -> Tensor | None:
        """(B, f, C, H, W) clean latents that clips begin with, those of the teacher's; None where none are given."""
        frames, codec = self.config.data.start_frames, self.codec
        if not frames:
            return None
        if self._renderer is not None:
            assert codec is not None, "without a codec nothing is looked at"
            return codec.encode(to_unit(self._rendered_starts[list(clips), ..., None])).to(self.ranks.device)
        return self._videos(clips).latents[:, :frames].to(self.ranks.device)

    @cached_property
    def _rendered_starts(self) -> FrameArray:
        """Of the teacher's clips, by number, the frames that are given."""
        assert self._renderer is not None, "who asks has one"
        assert self.codec is not None, "without a codec nothing is looked at"
        given = self.codec.frames(self.config.data.start_frames)
        return self._renderer.teacher(self.prompts, max(self.clips) + 1)[:, :given].copy()  # the rest is not kept

    def _videos(self, clips: Sequence[int]) -> Videos:
        """The data's videos of clips."""
        samples = [self.prompts.keys[clip % len(self.prompts)] for clip in clips]
        rows = list(read_rows(evaluation_prompts(self.config), samples))
        return videos_of(rows, self.config.student.text_length)

    @property
    def _renderer(self) -> Suite | None:
        """Whose the teacher's clips are; None where they are the data's."""
        return self.suite if self.suite is not None and self.suite.renders_teacher else None

    @property
    def _has_videos(self) -> bool:
        """Whether the data of the prompts has videos of them."""
        location = evaluation_prompts(self.config)
        return DatasetFacts.load(location.folder, location.field).latent_shape is not None

    def decoded(self, chunks: Iterator[Tensor]) -> Tensor:
        """(B, T, H, W) or (B, T, H, W, 3) uint8; nothing on ranks that only help with tokens."""
        if not self.ranks.leads_sequence:
            for _ in chunks:
                pass
            return torch.empty(0, dtype=torch.uint8)
        assert self.codec is not None, "without a codec nothing is looked at"
        data, codec = self.config.data, self.codec
        if data.latent_height * data.latent_width * codec.spatial**2 <= codec.whole_frame_pixels:
            decode = codec.decoder()
            parts = [torch.from_numpy(to_uint8(decode(chunk))) for chunk in chunks]
        else:  # tiles keep no memory between chunks
            parts = [torch.from_numpy(to_uint8(codec.decode(torch.cat(list(chunks), dim=1))))]
        return torch.cat(parts, dim=1).squeeze(-1)

    def _draw(self, clips: Mapping[str, FrameArray | None], step: int) -> None:
        """A grid and an mp4 a prompt: teacher, base and student, as far as they are there."""
        if not self.shown:
            return
        there = {name: clips.get(name) for name in ("teacher", "base", "student")}
        columns = {name: frames for name, frames in there.items() if frames is not None}
        captions = [self.prompts.texts[clip] for clip in self.shown]
        write_grid(columns, captions, self.folder(step) / "grid.png")
        write_comparison_mp4(columns, captions, self.folder(step), self.fps)

    def _draw_long(self, long: Mapping[str, FrameArray]) -> None:
        """An mp4 a prompt of the clips that are longer than the data's: teacher and student, or the student alone."""
        frames = long["student"].shape[1]
        columns = {name: long[name][self._rows_shown] for name in ("teacher", "student")
                   if name in long and long[name].shape[1] == frames}  # fmt: skip
        if self.shown:
            captions = [self.prompts.texts[clip] for clip in self.shown]
            write_comparison_mp4(columns, captions, self.samples / LONG, self.fps)

    @cached_property
    def fps(self) -> float:
        """Frames a second of the teacher's videos."""
        location = teacher_data(self.config)
        return float(next(read_rows(location, [0]))["fps"])

    def timing(self, lengths: int = 1) -> Timing:
        """When the frames of this run's clips, so many times as long as the data's, are shown and made."""
        assert self.codec is not None, "without a codec nothing is looked at"
        first, both = map(self.codec.frames, map(self.config.sampler.chunks.start, (1, 2)))
        return Timing(self.fps, chunk_borders(self.frames_each(lengths), both - first, first))

    def _write_base(self, frames: FrameArray) -> None:
        write_clips(frames, self._base_path, self._base_facts)

    def _read_base(self, rows: Sequence[int]) -> FrameArray | None:
        return read_clips(self._base_path, self._base_facts, rows)

    @property
    def _base_path(self) -> Path:
        return self.samples / "base.safetensors"

    @cached_property
    def _base_facts(self) -> dict[str, str]:
        return start_facts(self.config, self.codec, self.prompts) | {"clips": str(self.clips)}


def start_facts(config: RunConfig, codec: Codec | None, prompts: Prompts) -> dict[str, str]:
    """All that a run's clips of these prompts follow from, as it started."""
    data, weights, sampler = config.data, config.student.weights, config.sampler
    later = {"start_frames": data.start_frames, "first_chunk_frames": sampler.first_chunk_frames}
    digest = hashlib.sha256(json.dumps([prompts.texts, prompts.ids]).encode())
    digest.update(prompts.embeddings.numpy().tobytes())
    return {
        "seed": str(config.seed),
        "codec": json.dumps(codec and codec.provenance, sort_keys=True),
        "prompts": digest.hexdigest(),
        "shape": str((data.latent_frames, data.latent_height, data.latent_width)),
        "precision": config.precision,
        "student": config.student.model_dump_json(),
        "sampler": sampler.model_dump_json(exclude={"first_chunk_frames"}),
        "weights written": str(weights and weights.stat().st_mtime_ns),
        **{name: str(value) for name, value in later.items() if value},  # earlier runs' files say none
    }
