"""Looks at policies: generates clips of the data's prompts, measures them and writes what people see."""

import random
from functools import cached_property

from torch import Tensor

from afd_scale.config import ConfigError, RunConfig
from afd_scale.data.reader import distinct_prompts
from afd_scale.data.storage import evaluation_prompts
from afd_scale.evaluation import toy
from afd_scale.evaluation.generate import generate
from afd_scale.evaluation.video import write_comparison_mp4, write_grid
from afd_scale.flow.randomness import Randomness
from afd_scale.parallel.ranks import Ranks
from afd_scale.protocols import Policy
from afd_scale.rollout.sampler import Sampler
from afd_scale.types import Prompts


class Judge:
    """Evaluation of one run. Every rank generates; the main rank measures and draws."""

    def __init__(self, config: RunConfig, ranks: Ranks):
        self.config, self.ranks = config, ranks
        self.samples = config.folder / "samples"
        self.base: toy.Frames | None = None

    def check_prompts(self) -> None:
        """Refuse prompts that the metrics cannot read.

        Raises:
            ConfigError: names the first one.
        """
        if self._is_on:
            try:
                toy.check_sentences(self.prompts.texts)
            except ValueError as error:
                raise ConfigError("evaluation.metrics (toy) must be none for prompts from outside the toy world: "
                                  f"{error}") from error  # fmt: skip

    def keep_base(self, policy: Policy) -> None:
        """The start policy's clips, before it is trained."""
        if self._is_on:
            self.base = toy.decode(self._generate(policy, self.config.evaluation.clips))

    def sample(self, policy: Policy, step: int) -> None:
        """A grid of the sample prompts in the middle of training."""
        if self._is_on:
            clips = toy.decode(self._generate(policy, len(self.prompts)))
            if self.ranks.is_main:
                self._draw({"student": clips}, step)

    def compare(self, policy: Policy) -> dict[str, dict[str, float]]:
        """Scores of base, student and teacher on the main rank; sample clips in the run folder."""
        if not self._is_on:
            return {}
        student = toy.decode(self._generate(policy, self.config.evaluation.clips))
        if not self.ranks.is_main:
            return {}
        clips = {} if self.base is None else {"base": self.base}
        clips |= {"student": student, "teacher": toy.teacher_clips(self.prompts.texts, len(student))}
        self._draw(clips, self.config.train.steps)
        return toy.measure(clips, self.prompts.texts)

    def _draw(self, clips: dict[str, toy.Frames], step: int) -> None:
        """A grid and an mp4 a prompt: teacher, base and student, as far as they are there."""
        prompts = min(len(self.prompts), len(clips["student"]))  # clip i is of prompt i, as far as there are clips
        rows = random.Random(0).sample(range(prompts), min(self.config.evaluation.samples, prompts))
        order: list[str] = [name for name in ("teacher", "base", "student") if name in clips]
        columns = {name: clips[name][rows] for name in order}
        captions = [self.prompts.texts[row] for row in rows]
        folder = self.samples / f"step_{step:08d}"
        write_grid(columns, captions, folder / "grid.png")
        write_comparison_mp4(columns, captions, folder)

    @cached_property
    def prompts(self) -> Prompts:
        """What the policies are asked for."""
        config = self.config
        return distinct_prompts(evaluation_prompts(config), config.student.text_length, config.evaluation.split)

    @property
    def _is_on(self) -> bool:
        return self.config.evaluation.metrics == "toy"

    def _generate(self, policy: Policy, clips: int) -> Tensor:
        config, data, ranks = self.config, self.config.data, self.ranks
        return generate(
            policy, self.prompts.embeddings.to(ranks.device),
            (data.latent_frames, config.student.latent_channels, data.latent_height, data.latent_width),
            Sampler(config.sampler), Randomness(config.seed),
            clips=clips, batch=config.evaluation.batch, rank=ranks.data_rank, size=ranks.data_size, gather=ranks.gather,
        )  # fmt: skip
