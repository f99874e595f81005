"""Looks at judges and student in the middle of training: the same prompts, the same noise, every so many steps.

Each data rank generates rollouts of its share of the prompts, every judge of the run scores them and the teacher's
videos, and the main rank measures: whether a judge tells them apart and how surely, whether it agrees with what is
measured from the pixels, how much rollouts of a prompt differ, how far they are from the base's. What is drawn follows
from the prompt alone, so figures compare over time and between numbers of ranks.

P prompts, G rollouts each: rows stand as (P, G), see types.py.
"""

import json
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afd_scale.config import RunConfig
from afd_scale.config.cast import Load
from afd_scale.data.reader import distinct_prompts, read_rows, videos_of
from afd_scale.data.schema import DatasetFacts
from afd_scale.data.storage import Location, evaluation_prompts, teacher_data
from afd_scale.evaluation.agreement import finite, goodness, group_agreement, judge_report
from afd_scale.evaluation.kept_clips import read_clips, write_clips
from afd_scale.evaluation.run_files import DIAGNOSED
from afd_scale.files import write_text
from afd_scale.methods.updates import without_gradient
from afd_scale.mp4 import FrameArray
from afd_scale.protocols import Policy
from afd_scale.training.build import Run
from afd_scale.training.evaluator import Evaluator, start_facts
from afd_scale.types import Batch, Prompts, Videos, pieces, repeat_keys

log = logging.getLogger(__name__)

TEACHER = "teacher"  # whose column of logits this is, beside the student's


@dataclass(frozen=True)
class Look:
    """What the main rank has of all prompts.

    Attributes:
        logits: by judge, (P,) of the teacher's videos and (P, G) of the student's.
        diversity: (P,) standard deviation of a latent's values over the rollouts.
        clips: (P G, T, H, W[, 3]) the student's; None without a codec.
        teacher: (P, T, H, W[, 3]).
    """

    logits: dict[str, tuple[NDArray[Any], NDArray[Any]]]
    diversity: NDArray[Any]
    clips: FrameArray | None
    teacher: FrameArray | None


class Diagnostics:
    """Of one run, on all ranks together.

    Args:
        evaluator: whose codec, suite and sampler these are.
    """

    def __init__(self, config: RunConfig, built: Run, evaluator: Evaluator):
        self.config, self.built, self.evaluator, self.ranks = config, built, evaluator, evaluator.ranks
        self.group = config.evaluation.diagnosed_rollouts
        scored = {each.role: each.frames for each in config.method.passes(Load(prompts=1)) if each.kind == "score"}
        self.judges = {role.name: scored[role.name] for role in config.cast if role.name in scored}
        self.trained = {name for name in self.judges if config.role(name).optimizer is not None}
        self.base_path = evaluator.samples / "diagnosed_base.safetensors"

    def begin(self) -> None:
        """Before training: say what is looked at, and keep the base's clips, of which all starts of a run share a file.

        The exported policy still has its start weights.
        """
        self.ranks.run_on_main(self._say)
        if self.evaluator.codec is None or self.ranks.run_on_main(lambda: self._base() is not None):
            return
        parts = [self.evaluator.decoded(iter([latents])) for _, latents, _ in self._rolled_out()]
        clips = self._gathered(torch.cat(parts), self.group)
        self.ranks.run_on_main(self._write_base, clips)

    def look(self) -> dict[str, float]:
        """`diagnostics/...` of the policy as it is."""
        look = self._look()
        if self.evaluator.codec is not None:
            self.evaluator.codec.rest()
        found: dict[str, float] = self.ranks.run_on_main(self._report, look)
        return found

    def _report(self, look: Look | None) -> dict[str, float]:
        assert look is not None, "the main rank has all of it"
        metrics: dict[str, float] = {"diversity": float(look.diversity.mean())}
        of_clips, good = self._measured(look)
        metrics |= of_clips
        for judge, (teacher, rollouts) in look.logits.items():
            said = judge_report(teacher, rollouts)
            said |= {f"agreement/{name}": group_agreement(rollouts, value) for name, value in good.items()}
            place = "" if len(self.judges) == 1 else f"{judge}/"
            metrics |= {place + name: value for name, value in said.items()}
        return {f"diagnostics/{name}": value for name, value in finite(metrics).items()}

    def _measured(self, look: Look) -> tuple[dict[str, float], dict[str, NDArray[Any]]]:
        """The suite's metrics of the clips, with drift from the base; and (P, G) of each, turned so that more is
        better."""
        metrics: dict[str, float] = {}
        if look.clips is None or look.teacher is None:
            return {}, {}
        base = self._base()
        if base is not None:
            metrics["drift"] = float(np.mean([np.abs(new.astype(np.int16) - old).mean()
                                              for new, old in zip(look.clips, base, strict=True)])) / 255  # fmt: skip
        suite, good = self.evaluator.suite, {}
        if suite is None:
            return metrics, {}
        timing, prompts = self.evaluator.timing(), self.prompts
        each = suite.measure_each(look.clips, prompts.repeat(self.group), timing)
        of_teacher = suite.measure_each(look.teacher, prompts, timing)
        for name, values in each.items():
            better = suite.metrics[name].better
            wanted = float(np.nanmean(of_teacher[name])) if name in of_teacher else np.nan
            metrics |= {name: float(np.nanmean(values)), f"{TEACHER}/{name}": wanted}
            if better is not None:
                good[name] = goodness(values, better, wanted).reshape(-1, self.group)
        return metrics, good

    def _look(self) -> Look | None:
        logits: dict[str, list[tuple[Tensor, Tensor]]] = {judge: [] for judge in self.judges}
        diversity, clips, shown = [], [], []
        for prompts, latents, teacher in self._rolled_out():
            rollouts = replace(teacher, prompts=prompts.repeat(self.group), latents=latents)
            for judge in self.judges:
                # A fixed judge sees no teacher's video, here neither.
                of_teacher = self._ask(judge, teacher[: len(teacher) if judge in self.trained else 0])
                logits[judge].append((of_teacher, self._ask(judge, rollouts)))
            generated = latents[:, self.config.data.start_frames :].float().unflatten(0, (-1, self.group))
            diversity.append(generated.std(dim=1).flatten(1).mean(dim=1))
            if self.evaluator.codec is not None:
                clips.append(self.evaluator.decoded(iter([latents])))
                shown.append(self.evaluator.decoded(iter([teacher.latents])))
        of_judges = {
            judge: [
                self._gathered(torch.cat(parts), rows)
                for parts, rows in zip(zip(*said), (int(judge in self.trained), self.group))
            ]
            for judge, said in logits.items()
        }
        of_groups = self._gathered(torch.cat(diversity), 1)
        frames = [self._gathered(torch.cat(parts), rows) if parts else None
                  for parts, rows in ((clips, self.group), (shown, 1))]  # fmt: skip
        if of_groups is None:
            return None
        arrays = {judge: (real.numpy(), fake.unflatten(0, (-1, self.group)).numpy())
                  for judge, (real, fake) in of_judges.items() if real is not None and fake is not None}  # fmt: skip
        student, teacher_clips = (None if part is None else part.numpy() for part in frames)
        return Look(arrays, of_groups.numpy(), student, teacher_clips)

    def _rolled_out(self) -> Iterator[tuple[Prompts, Tensor, Videos]]:
        """This rank's share, a few prompts at a time: the prompts, latents of their rollouts, the teacher's videos.

        Every rank has as many, or a collective inside a policy would wait for ever.
        """
        config, policy = self.config, self.built.exported
        data = config.data
        shape = (data.latent_frames, config.student.latent_channels, data.latent_height, data.latent_width)
        share = -(-len(self.prompts) // self.ranks.data_size)
        at_once = config.evaluation.batch
        for part in pieces(share, max(1, at_once // self.group)):
            places = [(self.ranks.data_rank * share + place) % len(self.prompts) for place in range(share)[part]]
            rows = list(read_rows(self.location, [self.prompts.keys[place] for place in places]))
            teacher = self._on_device(videos_of(rows, config.student.text_length))
            text = teacher.prompts.embeddings.repeat_interleave(self.group, dim=0)
            keys = repeat_keys(teacher.prompts.keys, self.group)
            with policy.resident(sampling=True):
                latents = torch.cat([
                    self._rollout(policy, text[rows], keys[rows], shape,
                                  teacher.start(data.start_frames, self.group, rows))
                    for rows in pieces(len(text), at_once)
                ])  # fmt: skip
            yield teacher.prompts, latents, teacher

    def _rollout(
        self, policy: Policy, text: Tensor, keys: Sequence[int], shape: tuple[int, ...], given: Tensor | None
    ) -> Tensor:  # fmt: skip
        sampler, randomness = self.evaluator.sampler, self.evaluator.randomness
        noise = sampler.draw(randomness, "diagnostics", 0, keys, shape, self.ranks.device, given=given)
        return sampler.rollout(policy, text, noise)

    def _on_device(self, videos: Videos) -> Videos:
        codec, device = self.evaluator.codec, self.ranks.device
        decode = None if codec is None else codec.decode
        return replace(Batch(videos, videos.prompts[:0]).to(device).teacher, decode=decode)

    def _ask(self, judge: str, videos: Videos) -> Tensor:
        if not len(videos):
            return torch.zeros(0, device=videos.latents.device)
        engine, frames = self.built.engines[judge], self.judges[judge]
        if frames is not None:  # of the windows that it is used to, always the first
            videos = videos.windows([0] * len(videos), frames)
        return without_gradient(engine, len(videos), lambda rows: engine(videos[rows]))

    def _gathered(self, x: Tensor, rows_of_prompt: int) -> Tensor | None:
        """Rows of all prompts in their order, on the main rank."""
        share = -(-len(self.prompts) // self.ranks.data_size)
        counts = [min(max(len(self.prompts) - rank * share, 0), share) * rows_of_prompt
                  for rank in range(self.ranks.data_size)]  # fmt: skip
        return self.ranks.gather_to_main(x, counts)

    @cached_property
    def location(self) -> Location:
        """Of the prompts."""
        held_out = evaluation_prompts(self.config)
        if DatasetFacts.load(held_out.folder, held_out.field).latent_shape is None:
            return teacher_data(self.config)
        return held_out

    @cached_property
    def prompts(self) -> Prompts:
        """Those that are looked at, drawn from the dataset's, keyed by the samples that have the teacher's videos."""
        evaluation, location = self.config.evaluation, self.location
        split = evaluation.split if location == evaluation_prompts(self.config) else None
        there = distinct_prompts(location, self.config.student.text_length, split)
        count = min(evaluation.diagnosed_prompts, len(there))
        rows = sorted(random.Random(0).sample(range(len(there)), count))
        return there.take(rows, [there.keys[row] for row in rows])

    @property
    def is_held_out(self) -> bool:
        """Whether training does not see these videos."""
        return self.location.shards != self.config.data.shards

    def _say(self) -> None:
        facts = {"dataset": self.location.shards, "held_out": self.is_held_out, "prompts": len(self.prompts),
                 "rollouts": self.group}  # fmt: skip
        whose = "held-out prompts" if self.is_held_out else "the training data's own prompts: evaluation.prompts " \
                "names no others with the teacher's videos"  # fmt: skip
        log.info("%s is diagnosed on %d prompts of %s, %d rollouts each, %s", self.config.name, len(self.prompts),
                 self.location.shards, self.group, whose)  # fmt: skip
        self.config.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.config.folder / DIAGNOSED, json.dumps(facts, indent=1) + "\n")

    def _write_base(self, clips: Tensor | None) -> None:
        assert clips is not None, "the main rank has what is gathered"
        write_clips(clips.numpy(), self.base_path, self._base_facts)

    def _base(self) -> FrameArray | None:
        if not self.base_path.is_file():
            return None
        return read_clips(self.base_path, self._base_facts, range(len(self.prompts) * self.group))

    @cached_property
    def _base_facts(self) -> dict[str, str]:
        facts = start_facts(self.config, self.evaluator.codec, self.prompts)
        return facts | {"samples": str(self.prompts.keys), "rollouts": str(self.group)}
