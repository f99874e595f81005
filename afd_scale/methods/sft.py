"""Flow matching on the teacher's videos: the supervised baseline, and what pretrains the toy base.

One step: noise each chunk to a level of its own, condition it on the clean chunks before it (teacher forcing), regress
the velocity.
"""

import torch
from torch import Tensor

from afd_scale.config.methods import SftConfig
from afd_scale.config.models import StudentConfig
from afd_scale.flow import losses
from afd_scale.flow.process import add_noise
from afd_scale.flow.randomness import Randomness
from afd_scale.flow.schedule import TIMESTEPS
from afd_scale.methods.accumulate import accumulate, pieces
from afd_scale.methods.learning_rate import learning_rate
from afd_scale.methods.sigma import sigma_draw
from afd_scale.protocols import AveragedPolicy, Metrics, TrainedPolicy
from afd_scale.types import Batch


class Sft:
    """Supervised flow matching.

    Args:
        micro_batch: videos that pass through the network together; None is all of a step.
    """

    warmup_steps = 0

    def __init__(
        self, config: SftConfig, student_config: StudentConfig, steps: int, randomness: Randomness,
        student: TrainedPolicy, average: AveragedPolicy | None, micro_batch: int | None = None,
    ):  # fmt: skip
        self.config, self.student_config, self.steps, self.randomness = config, student_config, steps, randomness
        self.student, self.average, self.micro_batch = student, average, micro_batch
        self.sigma_draw = sigma_draw(config.sigma, student_config)

    def train_step(self, batch: Batch, step: int) -> Metrics:
        def loss_of(rows: slice) -> tuple[Tensor, Metrics]:
            return self._loss(batch[rows], step)

        metrics = accumulate(self.student, pieces(len(batch), self.micro_batch), loss_of)
        rate = learning_rate(self.config.optimizer, step, self.steps)
        gradient_norm = self.student.step(rate)
        if self.average is not None:
            # Early weights are forgotten faster than the decay says, or a short run would average its random start.
            self.average.follow(self.student, min(self.config.ema_decay, step / (step + 10)))
        return {**metrics, "student/gradient_norm": gradient_norm, "student/learning_rate": torch.tensor(rate)}

    def _loss(self, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        x0 = batch.latents
        noise = self.randomness.normal("sft/noise", step, batch.samples, tuple(x0.shape[1:]), x0.device)
        sigma = self.sigma_draw(self.randomness, "sft/sigma", step, batch.samples, x0)
        velocity = self.student(add_noise(x0, noise, sigma), sigma * TIMESTEPS, batch.text, clean=x0)
        loss = losses.flow_matching_loss(velocity, x0, noise, sigma, space=self.student_config.prediction).mean()
        return loss, {"student/loss": loss.detach()}
