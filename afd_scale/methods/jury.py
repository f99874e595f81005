"""The judges of a run together: each learns from the same pairs, and their scores of a rollout are one reward."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from afd_scale.config import RunConfig
from afd_scale.config.methods import AfdConfig
from afd_scale.flow.advantage import centre, window_starts
from afd_scale.flow.randomness import Randomness
from afd_scale.methods.judges import Lesson, prefixed, train_judge
from afd_scale.methods.long_rollouts import Times, teacher_windows
from afd_scale.methods.updates import without_gradient
from afd_scale.protocols import Metrics, Scorer
from afd_scale.types import RankMean, Videos

SCALE_DECAY = 0.99  # of the running mean and deviation of a judge's logits, per step


class Jury:
    """Judges that learn, fixed ones, and those that are frozen on the way.

    Args:
        engines: by role.

    Attributes:
        memory: the running mean and mean square of each judge's logits where there are several, and their steps.
    """

    def __init__(self, run: RunConfig, config: AfdConfig, engines: Mapping[str, Any], mean_over_ranks: RankMean):
        self.config, self.mean_over_ranks, self.chunk_frames = config, mean_over_ranks, run.sampler.chunk_frames
        self.judges: dict[str, Any] = {name: engines[name] for name in config.all_judges}
        self.memory: dict[str, Tensor] = {}
        self.times = Times(config.long_rollouts, run.data.latent_frames, mean_over_ranks)

    def hear(
        self, teacher: Videos, rollouts: Videos, randomness: Randomness, step: int, steps: int
    ) -> tuple[Metrics, dict[str, Tensor]]:
        """Train those that learn; below step 1 nothing else.

        Those that do not come first: where one fails, as a server may, the step has changed nothing.

        Args:
            rollouts: of the teacher's prompts, then of prompts alone, which teach nothing.
        Returns:
            Metrics, and each judge's logits of all rollouts: prompt by prompt, or window by window of each prompt.
        """
        logits: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        shown = self._numbered(*self._windows(teacher, rollouts, randomness, step))
        asked = self._everywhere(rollouts) if self.config.judged_windows > 1 and step >= 1 else shown[1]
        teacher, rollouts = shown
        learns = {name: judge.learns_at(step) for name, judge in self.config.all_judges.items()}
        for name in (name for name in learns if step >= 1 and not learns[name]):
            logits[name] = self._ask(name, asked)
            metrics |= prefixed(name, {"reward_mean": logits[name].mean()})
        paired = len(teacher) * self.config.rollouts_per_prompt
        lesson = Lesson(teacher, self._taught(rollouts[:paired]), randomness, step, steps)
        for name in (name for name in learns if learns[name]):
            others = self._ask(name, rollouts[paired:]) if self.config.reuse_logits and step >= 1 else None
            learned, said, won = self._train(name, lesson)
            metrics |= learned
            metrics |= prefixed(name, self.times.means("accuracy", won, lesson.rollouts))
            if step >= 1:
                logits[name] = self._ask(name, asked) if others is None else torch.cat([said, others])
        for videos in (teacher, rollouts, asked):
            videos.let_go()
        return metrics, logits

    def reward(self, logits: Mapping[str, Tensor]) -> Tensor:
        """(P, G) one number for each rollout, or (P W, G) for each window: the logit of the only judge, or standardised
        logits added up."""
        rewards = {name: each.unflatten(0, (-1, self.config.rollouts_per_prompt)) for name, each in logits.items()}
        if len(rewards) == 1:
            return next(iter(rewards.values()))
        weights = {name: judge.weight for name, judge in self.config.all_judges.items()}
        steps = self.memory["steps"] = self.memory.get("steps", torch.zeros(())) + 1
        decay = min(SCALE_DECAY, float((steps - 1) / (steps + 9)))  # early values are forgotten faster
        return torch.stack([weights[name] * self._standardised(name, rewards[name], decay) for name in weights]).sum(0)

    def _standardised(self, name: str, reward: Tensor, decay: float) -> Tensor:
        """Minus the running mean, over the running deviation of what the baseline leaves."""
        left = centre(reward, self.config.advantage.baseline, self.mean_over_ranks)
        now = {"mean": self.mean_over_ranks(reward.mean()), "square": self.mean_over_ranks(left.square().mean())}
        for key, value in now.items():
            before = self.memory.get(f"{name}/{key}", value).to(value)
            self.memory[f"{name}/{key}"] = decay * before + (1 - decay) * value
        floor = self.config.advantage.spread_floor
        mean, deviation = self.memory[f"{name}/mean"], self.memory[f"{name}/square"].sqrt().clamp(min=floor)
        return (reward - mean) / deviation

    def _windows(self, teacher: Videos, rollouts: Videos, randomness: Randomness, step: int) -> tuple[Videos, Videos]:
        """What judges see of them: of each prompt's videos the same window."""
        frames, group = self.config.judged_frames, self.config.rollouts_per_prompt
        if rollouts.places is not None:  # they are windows already
            paired = rollouts[: group * len(teacher)]
            return teacher_windows(teacher, paired, randomness, step, self.chunk_frames), rollouts
        if frames is None:
            return teacher, rollouts
        # A key of the first rollout, which extra prompts have too.
        keys = rollouts.prompts.keys[::group]
        places = (rollouts.latents.shape[1] - frames) // self.chunk_frames + 1
        drawn = randomness.uniform("judge/window", step, keys, ()).tolist()
        starts = [int(place * places) * self.chunk_frames for place in drawn]
        everywhere = [start for start in starts for _ in range(group)]
        return teacher.windows(starts[: len(teacher)], frames), rollouts.windows(everywhere, frames)

    def _everywhere(self, rollouts: Videos) -> Videos:
        """All windows by which rollouts are weighed: of a prompt the first ones of its rollouts, then the next ones."""
        group, frames, size = self.config.rollouts_per_prompt, self.config.judged_frames, self.chunk_frames
        assert frames is not None, "several windows are shorter than a video"
        starts = window_starts(rollouts.latents.shape[1] // size, frames // size, self.config.judged_windows)
        rows = torch.arange(len(rollouts)).view(-1, 1, group).expand(-1, len(starts), -1)
        first = torch.tensor(starts)[:, None].expand(rows.shape) * size
        windows = rollouts.take(rows.flatten().tolist()).windows(first.flatten().tolist(), frames)
        return windows.numbered(range(len(windows)))

    def _numbered(self, teacher: Videos, rollouts: Videos) -> tuple[Videos, Videos]:
        """Prompt by prompt, the teacher's video and then its rollouts: ranks that share any part of them get alike."""
        of_prompt = 1 + self.config.rollouts_per_prompt
        numbers = range(of_prompt * (len(rollouts) // self.config.rollouts_per_prompt))
        of_rollouts = [number for number in numbers if number % of_prompt]
        return teacher.numbered(numbers[::of_prompt][: len(teacher)]), rollouts.numbered(of_rollouts)

    def _taught(self, rollouts: Videos) -> Videos:
        """Those that judges are trained on, the first ones of each prompt."""
        group, trained = self.config.rollouts_per_prompt, self.config.trained_rollouts
        if trained in (None, group):
            return rollouts
        return rollouts.take([row for row in range(len(rollouts)) if row % group < trained])

    def _train(self, name: str, lesson: Lesson) -> tuple[Metrics, Tensor, Tensor]:
        judge, section = self.judges[name], self.config.all_judges[name]
        at_once = self.config.prompts_at_once(section, lesson.group, judge.micro_batch)
        return train_judge(name, judge, section, lesson, at_once)

    def _ask(self, name: str, rollouts: Videos) -> Tensor:
        judge: Scorer = self.judges[name]
        if not len(rollouts):
            return torch.zeros(0, device=rollouts.latents.device)
        return without_gradient(judge, len(rollouts), lambda rows: judge(rollouts[rows]))
