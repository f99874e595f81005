"""Flow matching on the teacher's videos: the supervised baseline, and what pretrains the toy base.

One step: noise each chunk to a level of its own, condition it on the clean chunks before it (teacher forcing), regress
the velocity. A start that is given is condition alone.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from afd_scale.config import RunConfig
from afd_scale.config.methods import SftConfig
from afd_scale.flow import losses
from afd_scale.flow.process import add_noise
from afd_scale.flow.randomness import Randomness
from afd_scale.flow.schedule import TIMESTEPS
from afd_scale.methods.updates import accumulate, learning_rate
from afd_scale.protocols import AveragedPolicy, Metrics, TrainedPolicy
from afd_scale.rollout.sampler import Sampler
from afd_scale.types import Batch, RankMean, Videos


class Sft:
    """Supervised flow matching.

    Args:
        engines: by role, as `SftConfig.cast` names them.
    """

    config: SftConfig
    warmup_steps = 0

    def __init__(self, run: RunConfig, engines: Mapping[str, Any], mean_over_ranks: RankMean):
        assert isinstance(run.method, SftConfig)
        self.config, self.steps, self.randomness = run.method, run.train.steps, Randomness(run.seed)
        self.memory = dict[str, Tensor]()
        self.student: TrainedPolicy = engines["student"]
        self.average: AveragedPolicy | None = engines.get("average")
        self.space = run.student.prediction
        self.sampler, self.start_frames = Sampler(run.sampler), run.data.start_frames

    def train_step(self, batch: Batch, step: int) -> Metrics:
        videos, student = batch.teacher.after(self.start_frames), self.student
        metrics = accumulate(student, len(videos), student.micro_batch, lambda rows: self._loss(videos[rows], step))
        rate = learning_rate(self.config.optimizer, step, self.steps)
        gradient_norm = student.step(rate)
        if self.average is not None:
            # Early weights are forgotten faster than the decay says, or a short run would average its random start.
            self.average.follow(student, min(self.config.ema_decay, step / (step + 10)))
        return {**metrics, "student/gradient_norm": gradient_norm, "student/learning_rate": torch.tensor(rate)}

    def _loss(self, videos: Videos, step: int) -> tuple[Tensor, Metrics]:
        x0, keys = videos.latents, videos.prompts.keys
        noise = self.randomness.normal("sft/noise", step, keys, tuple(x0.shape[1:]), x0.device)
        sigma = self.sampler.draw_sigma(self.config.sigma, self.randomness, "sft/sigma", step, keys, x0, videos.begun)
        noisy, text = add_noise(x0, noise, sigma), videos.prompts.embeddings
        velocity = self.student(noisy, sigma * TIMESTEPS, text, **videos.in_context)
        loss = losses.flow_matching_loss(velocity, x0, noise, sigma, space=self.space).mean()
        return loss, {"student/loss": loss.detach()}
