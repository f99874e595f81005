"""Looks at policies: generates clips of the data's prompts, has them measured and writes what people see.

Clip i is of prompt i modulo P, and its noise is keyed by i: it is the same for every policy, on any number of ranks,
and whichever other clips are asked for.
"""

import hashlib
import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from afd_scale.codecs.conversions import to_uint8
from afd_scale.config import ConfigError, RunConfig
from afd_scale.data.reader import distinct_prompts
from afd_scale.data.storage import evaluation_prompts
from afd_scale.evaluation.kept_clips import read_clips, write_clips
from afd_scale.evaluation.suites import make_suite
from afd_scale.evaluation.video import FrameArray, write_comparison_mp4, write_grid
from afd_scale.flow.randomness import Randomness
from afd_scale.parallel.ranks import Ranks
from afd_scale.protocols import Policy
from afd_scale.rollout.sampler import Sampler
from afd_scale.types import Prompts, Videos, pieces

log = logging.getLogger(__name__)


class Evaluator:
    """Evaluation of one run. Every rank generates; the main rank has the frames, measures and draws.

    Args:
        decode: from latents to pixels, as `Videos.decode`; None where nothing is evaluated.
    """

    def __init__(self, config: RunConfig, ranks: Ranks, decode: Callable[[Tensor], Tensor] | None):
        self.config, self.ranks, self.decode = config, ranks, decode
        self.suite = make_suite(config)
        self.sampler, self.randomness = Sampler(config.sampler), Randomness(config.seed)
        self.samples = config.folder / "samples"

    def check_prompts(self) -> None:
        """Refuse prompts that the suite cannot read.

        Raises:
            ConfigError: names the first one.
        """
        if self.suite is not None:
            if self.decode is None:
                raise ConfigError(f"evaluation.metrics ({self.config.evaluation.metrics}) must be none: nothing here "
                                  "decodes latents of this dataset's codec")  # fmt: skip
            try:
                self.suite.check(self.prompts)
            except ValueError as error:
                raise ConfigError(f"evaluation.metrics ({self.config.evaluation.metrics}) must be none for prompts "
                                  f"that it cannot read: {error}") from error  # fmt: skip

    def keep_base(self, policy: Policy) -> None:
        """The start policy's clips, before it is trained, in a file that the starts of a run share."""
        if self.suite is None:
            return
        if self.ranks.run_on_main(lambda: self._read_base() is not None):
            log.info("%s has its base's clips from an earlier start", self.config.name)
            return
        base = self.frames(policy, range(self.config.evaluation.clips))
        self.ranks.run_on_main(self._write_base, base)

    def sample(self, policy: Policy, step: int) -> None:
        """A grid of the sample prompts in the middle of training."""
        if self.suite is not None:
            student = self.frames(policy, self.shown)
            if student is not None:
                self._draw({"student": student}, step)

    def compare(self, policy: Policy) -> dict[str, dict[str, float]]:
        """Metrics of base, student and teacher on the main rank; sample clips in the run folder."""
        if self.suite is None:
            return {}
        student = self.frames(policy, range(self.config.evaluation.clips))
        if student is None:
            return {}
        made = {
            "base": self._read_base(),
            "student": student,
            "teacher": self.suite.teacher(self.prompts, len(student)),
        }
        clips = {name: frames for name, frames in made.items() if frames is not None}
        self._draw({name: frames[self.shown] for name, frames in clips.items()}, self.config.train.steps)
        return self.suite.measure(clips, self.prompts)

    def frames(self, policy: Policy, clips: Sequence[int]) -> FrameArray | None:
        """Generate clips: (N, T, H, W) or (N, T, H, W, 3) uint8 on the main rank, None elsewhere.

        Every rank makes as many, or a collective inside the policy would wait for ever; they go to the main rank a
        batch at a time.
        """
        frames = None
        share = -(-len(clips) // self.ranks.data_size)
        places = np.arange(self.ranks.data_size * share).reshape(-1, share)  # in `clips`, by data rank; some beyond
        with policy.resident():
            for part in pieces(share, self.config.evaluation.batch):
                mine = [clips[place % len(clips)] for place in places[self.ranks.data_rank, part]]
                pixels = to_uint8(self._generate(policy, mine).pixels())
                rows = self.ranks.gather_to_main(torch.from_numpy(pixels).squeeze(-1))
                if rows is not None:
                    made = places[:, part].flatten()
                    if frames is None:
                        frames = np.empty((len(clips), *rows.shape[1:]), np.uint8)
                    frames[made[made < len(clips)]] = rows.numpy()[made < len(clips)]
        return frames

    @cached_property
    def prompts(self) -> Prompts:
        """What the policies are asked for."""
        config = self.config
        return distinct_prompts(evaluation_prompts(config), config.student.text_length, config.evaluation.split)

    @cached_property
    def shown(self) -> list[int]:
        """Clips that people see, of as many prompts."""
        prompts = min(len(self.prompts), self.config.evaluation.clips)
        return random.Random(0).sample(range(prompts), min(self.config.evaluation.samples, prompts))

    def _generate(self, policy: Policy, clips: Sequence[int]) -> Videos:
        device = self.ranks.device
        rows = [clip % len(self.prompts) for clip in clips]
        texts, ids = (tuple(column[row] for row in rows) for column in (self.prompts.texts, self.prompts.ids))
        prompts = Prompts(texts, ids, tuple(clips), self.prompts.embeddings[rows].to(device))
        noise = self.sampler.draw(self.randomness, "evaluation", 0, prompts.keys, self._shape, device)
        return Videos(prompts, self.sampler.rollout(policy, prompts.embeddings, noise), decode=self.decode)

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        """(F, C, H, W) of a clip's latents."""
        data = self.config.data
        return data.latent_frames, self.config.student.latent_channels, data.latent_height, data.latent_width

    def _draw(self, clips: Mapping[str, FrameArray], step: int) -> None:
        """A grid and an mp4 a prompt: teacher, base and student, as far as they are there."""
        columns = {name: clips[name] for name in ("teacher", "base", "student") if name in clips}
        captions = [self.prompts.texts[clip] for clip in self.shown]
        folder = self.samples / f"step_{step:08d}"
        write_grid(columns, captions, folder / "grid.png")
        write_comparison_mp4(columns, captions, folder)

    def _write_base(self, frames: FrameArray) -> None:
        write_clips(frames, self._base_path, self._base_facts)

    def _read_base(self) -> FrameArray | None:
        return read_clips(self._base_path, self._base_facts)

    @property
    def _base_path(self) -> Path:
        return self.samples / "base.safetensors"

    @cached_property
    def _base_facts(self) -> dict[str, str]:
        """All that the base's clips follow from, as the run started."""
        config, prompts = self.config, self.prompts
        weights = config.student.weights
        digest = hashlib.sha256(json.dumps([prompts.texts, prompts.ids]).encode())
        digest.update(prompts.embeddings.numpy().tobytes())
        return {
            "seed": str(config.seed),
            "clips": str(config.evaluation.clips),
            "prompts": digest.hexdigest(),
            "shape": str(self._shape),
            "precision": config.precision,
            "student": config.student.model_dump_json(),
            "sampler": config.sampler.model_dump_json(),
            "weights written": str(weights and weights.stat().st_mtime_ns),
        }
