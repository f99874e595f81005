"""Judges and student of one checkpoint under prompts and lengths that training did and did not show: the measurements.

Each regime has the same prompts and the same noise for every checkpoint of every run. A prompt has as many rollouts as
clips that the teacher's world renders afresh, and each rollout is held against each of these clips. Of a video longer
than the teacher's the last window of the teacher's length is judged, against the teacher's motion at the same time.

P prompts, G clips of each side for a prompt: rows stand prompt by prompt, see types.py.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from afd_scale.checkpoint.load_student import read_student
from afd_scale.checkpoint.roles import open_network
from afd_scale.codecs.codec import Codec
from afd_scale.codecs.conversions import to_uint8
from afd_scale.codecs.identity import IdentityCodec
from afd_scale.config import ConfigError, RunConfig
from afd_scale.config.cast import Load, NetworkConfig
from afd_scale.config.run import WORLD_OF
from afd_scale.data.make_shards import encode_frames
from afd_scale.data.reader import prompts_of
from afd_scale.data.teachers.procedural import form_of
from afd_scale.data.worlds import WORLDS, Part
from afd_scale.data.worlds.ball import FrameArray
from afd_scale.engines.plain import Plain, PlainNetwork
from afd_scale.evaluation.agreement import brier_score, calibration_error, finite, group_agreement, right_pairs
from afd_scale.evaluation.suites.kick import KickSuite
from afd_scale.evaluation.suites.suite import Metric
from afd_scale.evaluation.suites.toy import ToySuite
from afd_scale.evaluation.suites.tracks import Tracks, track
from afd_scale.evaluation.suites.world import REFERENCE_CLIPS, WorldSuite, reference_tracks
from afd_scale.flow.randomness import Randomness
from afd_scale.layers.lora import Adapters
from afd_scale.layers.network import Network
from afd_scale.models.build import build_network
from afd_scale.models.wan import CausalWan
from afd_scale.rollout.sampler import Sampler
from afd_scale.types import Prompts, Videos, pieces

log = logging.getLogger(__name__)

TEACHER_SEED, REFERENCE_SEED = 1_000_005, 1_000_006  # of clips that no shard and no suite has
AT_ONCE = 128  # videos in one pass
PHYSICS = "physics_error"  # of the prompts whose physics the teacher's own clips show, see `Truth.flies`
PHYSICS_METRIC = Metric(
    "Physics error", "lower", "of the fall, over prompts under which the teacher's ball still flies"
)
FLYING = 0.1  # pixels per frame squared: a prompt whose teacher has a larger error shows a ball at rest


@dataclass(frozen=True)
class Regime:
    """What the student is asked for.

    Attributes:
        prompts: seen are those that every run is trained on; unseen those that a run with `data.source.prompts: seen`
            is not.
        paraphrased: in sentences that no run is trained on.
        times: length over the teacher's; the last window of the teacher's length counts.
    """

    prompts: Part
    paraphrased: bool = False
    times: int = 1


REGIMES: Mapping[str, Regime] = {
    "seen": Regime("seen"),
    "paraphrased": Regime("seen", paraphrased=True),
    "unseen": Regime("unseen"),
    "2x": Regime("seen", times=2),
    "4x": Regime("seen", times=4),
}


@dataclass(frozen=True)
class Scoring:
    """How clips of a world are measured.

    Attributes:
        suite: of the world.
        physics: its metric of a clip that says how wrong it falls.
        early: its metrics that mean nothing in a later window: the direction before the first kick, paths from a
            launch, the fall of a ball that may lie.
    """

    suite: type[WorldSuite]
    physics: str
    early: frozenset[str]

    @property
    def metrics(self) -> dict[str, Metric]:
        """How to read them."""
        return {**self.suite.metrics, PHYSICS: PHYSICS_METRIC}


SCORINGS: Mapping[str, Scoring] = {
    "drop": Scoring(
        ToySuite, "acceleration_residual",
        frozenset({"moving_fraction", "prompt_accuracy", "physics_strict", "all_in_one", "acceleration_residual"}),
    ),
    "kick": Scoring(
        KickSuite, "gravity_error",
        frozenset({"prompt_accuracy", *(name for name in KickSuite.metrics if "gravity_error" in name)}),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Truth:
    """What the teacher shows in one regime.

    Attributes:
        groups: P.
        asked: prompt of each clip.
        videos: the teacher's clips under their prompts.
        swapped: by attribute, the clips' prompts with its word changed, once for each other word.
        sharpness: (P,) the teacher's mean.
        flies: (P,) whether the teacher's ball does, so that its fall can be measured: late in a video one on clay lies.
        reference: tracks of many more clips, which sets of clips are measured against.
        scores: the teacher's own, of as many clips as a student's.
    """

    groups: int
    asked: Sequence[Any]
    videos: Videos
    swapped: Mapping[str, Sequence[Prompts]]
    sharpness: np.ndarray[Any, Any]
    flies: np.ndarray[Any, Any]
    reference: Tracks
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Judge:
    """A judge of a checkpoint.

    Attributes:
        frames: latent frames that it sees of a window, from its start; None is all.
    """

    engine: PlainNetwork
    frames: int | None


def world_of(config: RunConfig) -> str:
    """The toy world of a run.

    Raises:
        ConfigError: it is of none, or its videos begin with what is given.
    """
    if config.data.start_frames:
        raise ConfigError(f"data.start_frames ({config.data.start_frames}) must be 0: what judges are asked of here is "
                          "generated whole")  # fmt: skip
    if not config.sampler.chunks.are_alike:
        raise ConfigError(f"sampler.first_chunk_frames ({config.sampler.first_chunk_frames}) must be left out: videos "
                          "of several lengths are whole chunks here")  # fmt: skip
    metrics = config.evaluation.metrics
    if metrics not in WORLD_OF:
        raise ConfigError(f"evaluation.metrics ({metrics}) must be {' or '.join(WORLD_OF)}: judges are held against "
                          "what a world renders")  # fmt: skip
    return WORLD_OF[metrics]


def regimes_of(config: RunConfig) -> dict[str, Regime]:
    """Those that a run can be measured in: unseen is what its source leaves out."""
    leaves_out = config.data.source is not None and config.data.source.prompts == "seen"
    return {name: regime for name, regime in REGIMES.items() if regime.prompts != "unseen" or leaves_out}


def measure_checkpoint(config: RunConfig, checkpoint: Path, clips: int, weights: str | None = None) -> dict[str, Any]:
    """Everything of one checkpoint, in one process.

    Args:
        config: of its run.
        clips: of each side in a regime: a multiple of its prompts, twice them at least.
        weights: whose rollouts, of `read_student`; None is the student that is exported.
    Returns:
        By regime: `student` and `teacher`, each the suite's metrics; `judges`, by name, their quality.
    Raises:
        ValueError: the checkpoint cannot be read, or clips do not divide.
    """
    world, regimes = world_of(config), regimes_of(config)
    kind = Plain(config, torch.device("cpu"))
    policy, judges = load_policy(kind, checkpoint, weights), load_judges(kind, checkpoint)
    found: dict[str, Any] = {}
    for which in dict.fromkeys((regime.prompts, regime.paraphrased) for regime in regimes.values()):
        here = {name: regime for name, regime in regimes.items() if (regime.prompts, regime.paraphrased) == which}
        truths = {name: truth_of(world, regime, clips, config.student.text_length) for name, regime in here.items()}
        prompts = next(iter(truths.values())).videos.prompts
        window, longest = config.data.latent_frames, max(regime.times for regime in here.values())
        latents = roll_out(config, policy, prompts, window * longest)  # a shorter video is how a longer one begins
        for name, regime in here.items():
            last = latents[:, window * (regime.times - 1) : window * regime.times]
            found[name] = measure(SCORINGS[world], regime, truths[name], last, judges)
    return {name: found[name] for name in regimes}


def load_policy(kind: Plain, checkpoint: Path, weights: str | None) -> PlainNetwork:
    """A policy of a checkpoint, its adapters merged; errors as of `read_student`."""
    source = read_student(checkpoint, weights)
    policy = source.config()
    student = policy.student.model_copy(update={"lora": None})
    network = kind.place(
        lambda _: CausalWan(student, policy.sampler, kind.ops(student, None)), None, source.state
    )  # fmt: skip
    return PlainNetwork(network.requires_grad_(False).eval())


def load_judges(kind: Plain, checkpoint: Path) -> dict[str, Judge]:
    """The trained judges of a checkpoint, by role; fixed ones are left out.

    Raises:
        ConfigError: there is none, or one is trained in part, and the checkpoint does not hold all of it.
        ValueError: its shards are damaged.
    """
    config = kind.config
    scored = {each.role: each.frames for each in config.method.passes(Load(prompts=1)) if each.kind == "score"}
    judges = {}
    for role in (role for role in config.cast if role.name in scored and role.optimizer is not None):
        if role.is_partly_trained:
            raise ConfigError(f"{role.section} ({role.name}) must be trained whole: adapters and heads of judges are "
                              "not read here")  # fmt: skip
        build = partial(_build, kind, role.network)
        with torch.device("meta"):
            shapes = {name: tuple(parameter.shape) for name, parameter in build(None).named_parameters()}
        network = kind.place(build, None, open_network(checkpoint, role.name, shapes))
        judges[role.name] = Judge(PlainNetwork(network.requires_grad_(False).eval()), scored[role.name])
    if not judges:
        raise ConfigError(f"run ({config.folder}) must have a judge that is trained: {config.method.name} has none")
    return judges


def _build(kind: Plain, network: NetworkConfig, adapters: Adapters | None) -> Network:
    return build_network(kind.config, network, kind.ops(network, adapters))


def roll_out(config: RunConfig, policy: PlainNetwork, prompts: Prompts, frames: int) -> Tensor:
    """(N, frames, C, H, W) latents of N prompts, whose noise follows from their keys alone."""
    sampler, data = Sampler(config.sampler), config.data
    most = data.latent_frames * max(regime.times for regime in REGIMES.values())
    shape = (most, config.student.latent_channels, data.latent_height, data.latent_width)
    videos = []
    for rows in pieces(len(prompts), AT_ONCE):
        noise = sampler.draw(Randomness(0), "regimes", 0, prompts.keys[rows], shape, torch.device("cpu"))
        videos.append(sampler.rollout(policy, prompts.embeddings[rows], noise.until(frames)))
    return torch.cat(videos)


def measure(
    scoring: Scoring, regime: Regime, truth: Truth, latents: Tensor, judges: Mapping[str, Judge]
) -> dict[str, Any]:
    """Student and judges in one regime.

    Args:
        latents: (P G, F, C, H, W) windows of the rollouts.
    """
    assert truth.videos.decode is not None, "a world's clips have a codec"
    rollouts = truth.videos.of(latents)
    clips = _frames(truth.videos.decode(latents))
    tracks = track(clips)
    each = scoring.suite.score_each(clips, truth.asked, truth.reference)
    sharpness = tracks.sharpness.mean(axis=1).reshape(truth.groups, -1)
    error = np.where(truth.flies[:, None], np.reshape(each[scoring.physics], (truth.groups, -1)), np.nan)
    good = {"physics": -error, "sharpness": -np.abs(sharpness - truth.sharpness[:, None])}
    scores = scoring.suite.score(clips, truth.asked, truth.reference) | {PHYSICS: float(np.nanmean(error))}
    return {
        "student": _that_count(scoring, regime, scores),
        "teacher": truth.scores,
        "judges": {name: judge_quality(judge, truth, rollouts, good) for name, judge in judges.items()},
    }


def judge_quality(
    judge: Judge, truth: Truth, rollouts: Videos, good: Mapping[str, np.ndarray[Any, Any]]
) -> dict[str, float]:
    """How well a judge judges.

    Args:
        good: by name, (P, G) of what is measured of the rollouts, more is better.
    Returns:
        Over all pairs of a teacher's clip and a rollout of its prompt: `pair_accuracy`, `calibration_error`, `brier`,
        `logit_gap`. `agreement/...`: rank correlation within the rollouts of a prompt, the mean over prompts.
        `prompt_right/...`: how often a teacher's clip has a higher logit under its prompt than with one attribute's
        word changed; `prompt_right` is the mean over attributes. What nothing can be said of is left out.
    """
    real, fake = ask(judge, truth.videos), ask(judge, rollouts)
    teacher, student = real.reshape(truth.groups, -1), fake.reshape(truth.groups, -1)
    margins = teacher[:, :, None] - student[:, None, :]
    right = {
        attribute: right_pairs([real - ask(judge, truth.videos.under(prompts)) for prompts in others])
        for attribute, others in truth.swapped.items()
    }
    return finite({
        "pair_accuracy": right_pairs(margins),
        "calibration_error": calibration_error(margins),
        "brier": brier_score(margins),
        "logit_gap": float(margins.mean()),
        **{f"agreement/{name}": group_agreement(student, values) for name, values in good.items()},
        "prompt_right": float(np.mean(list(right.values()))),
        **{f"prompt_right/{attribute}": share for attribute, share in right.items()},
    })  # fmt: skip


@torch.no_grad()
def ask(judge: Judge, videos: Videos) -> np.ndarray[Any, Any]:
    """(N,) logits."""
    if judge.frames is not None:
        videos = videos.windows([0] * len(videos), judge.frames)
    return torch.cat([judge.engine(videos[rows]) for rows in pieces(len(videos), AT_ONCE)]).double().numpy()


@lru_cache(maxsize=16)  # those of all runs of a world
def truth_of(world: str, regime: Regime, clips: int, text_length: int) -> Truth:
    """What the teacher shows in a regime.

    Args:
        clips: see `measure_checkpoint`.
        text_length: rows of an embedding with its padding.
    Raises:
        ConfigError: clips do not divide.
    """
    there, form, scoring = WORLDS[world], form_of(world), SCORINGS[world]
    prompts, codec = there.part(regime.prompts), IdentityCodec.of_form(form)
    if clips % len(prompts) or clips < 2 * len(prompts):
        raise ConfigError(f"clips ({clips}) must be a multiple of the {len(prompts)} {regime.prompts} prompts, and at "
                          "least twice as many: each has as many rollouts, which are ranked")  # fmt: skip
    group = clips // len(prompts)
    rows = [(number, prompt) for number, prompt in enumerate(prompts) for _ in range(group)]
    time = {"begin": (regime.times - 1) * there.frames, "frames": there.frames}

    def said(asked: Sequence[tuple[int, Any]]) -> Prompts:
        texts = [there.paraphrase(prompt, number) if regime.paraphrased else prompt.sentence
                 for number, prompt in asked]  # fmt: skip
        return embedded(codec, texts, text_length)

    def changed(number: int, prompt: Any, attribute: int, step: int) -> Any:
        table, words = list(there.prompt.vocabulary[attribute]), list(astuple(prompt))
        words[attribute] = table[(table.index(words[attribute]) + step) % len(table)]
        return number, type(prompt)(*words)

    asked = [prompt for _, prompt in rows]
    frames = there.render(asked, seed=TEACHER_SEED, **time)
    latents = torch.from_numpy(np.stack([encode_frames(codec, clip[..., None]) for clip in frames])).float()
    reference = reference_tracks(world, prompts, REFERENCE_SEED, time["begin"], REFERENCE_CLIPS)
    tracks = track(frames)
    error = scoring.suite.score_each(frames, asked, reference)[scoring.physics].reshape(len(prompts), -1).mean(axis=1)
    flies = error <= FLYING
    scores = scoring.suite.score(frames, asked, reference) | {PHYSICS: float(error[flies].mean())}
    return Truth(
        groups=len(prompts), asked=asked,
        videos=Videos(said(rows), latents, fps=form.fps, decode=codec.decode),
        swapped={
            name: [said([changed(*row, attribute, step) for row in rows]) for step in range(1, len(table))]
            for attribute, (name, table) in enumerate(zip(vars(prompts[0]), there.prompt.vocabulary, strict=True))
        },
        sharpness=tracks.sharpness.mean(axis=1).reshape(len(prompts), -1).mean(axis=1),
        flies=flies, reference=reference, scores=_that_count(scoring, regime, scores),
    )  # fmt: skip


def embedded(codec: Codec, texts: Sequence[str], text_length: int) -> Prompts:
    """Sentences as the student reads them, keyed by their place."""
    return prompts_of([{"prompt": text, "prompt_id": text, "sample": place, "text_embedding": codec.embed(text)}
                       for place, text in enumerate(texts)], text_length)  # fmt: skip


def _that_count(scoring: Scoring, regime: Regime, scores: Mapping[str, float]) -> dict[str, float]:
    """Without metrics that mean nothing in this window."""
    return finite({name: value for name, value in scores.items() if regime.times == 1 or name not in scoring.early})


def _frames(pixels: Tensor) -> FrameArray:
    return to_uint8(pixels)[..., 0]
