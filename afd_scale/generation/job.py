"""A job: what is to be made of which student, and the ranks that make it."""

import logging
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afd_scale.codecs.choose import codec_of
from afd_scale.codecs.codec import Codec, VideoForm
from afd_scale.codecs.identity import FRAMES, PIXELS
from afd_scale.codecs.identity import NAME as IDENTITY
from afd_scale.codecs.wan import WanCodec
from afd_scale.config import ConfigError, RunConfig, one_line
from afd_scale.config.errors import shown
from afd_scale.data.inspection import fps_of
from afd_scale.data.storage import Location, teacher_data
from afd_scale.evaluation.clip_sets import spread
from afd_scale.generation.generate import Clock, Form, Generator, Request, batches
from afd_scale.generation.requests import (
    DatasetPrompts,
    Script,
    chunks_of_schedule,
    embedded,
    read_dataset,
    requests_of,
    scripts_of_file,
    start_of_image,
    start_of_video,
    whole_chunks,
    write_contact_sheet,
)
from afd_scale.generation.student import Student, load_student
from afd_scale.parallel.ranks import Ranks
from afd_scale.progress import progress
from afd_scale.rollout.sampler import Sampler
from afd_scale.types import Prompts

log = logging.getLogger(__name__)

MOST = 1_000_000  # of anything that is asked for
SHEET_VIDEOS = 24  # at most, on the contact sheet
WAN_SIZE, TOY_SIZE = (81, 480, 832), (12, 16, 16)  # frames, height, width of a source that says none
WAN_FPS, TOY_FPS = 16.0, 8.0


@dataclass(frozen=True)
class Job:
    """Videos to make.

    Attributes:
        source: a run, checkpoint, export or weights file.
        out: folder to make.
        prompt, prompts, dataset: texts or scripts, a file of them, or a dataset's; one of the three.
        split: of the dataset's prompts.
        max_prompts: of all that are named, spread evenly; None takes all.
        image, video: what the first chunks are of.
        video_chunks: how many of them the start of `video` is; None is one.
        starts: by prompt, the video whose start is given to a student that was trained to go on from one; a dataset's
            prompts have theirs in it.
        num_videos: of each prompt; None is one, with layout `vbench` five.
        frames, size, fps: of a video; None as trained, as far as that is known.
        seconds: of a video, in place of `frames`.
        seed: of the noise.
        layout: of the files' names.
        models: folder or hub id of Wan's text encoder and VAE.
        batch: videos made together on a rank.
        precision: None is bf16 on a GPU and fp32 on a CPU.
        architecture, family: of a source that states none.
        window, sink, positions, at_prompt_change: in place of the sampler's own; latent frames.
    """

    source: Path
    out: Path
    prompt: Sequence[str | Script] = ()
    prompts: Path | None = None
    dataset: Location | None = None
    split: str | None = None
    max_prompts: int | None = None
    image: Path | None = None
    video: Path | None = None
    video_chunks: int | None = None
    starts: Mapping[str, Path] = field(default_factory=dict)
    num_videos: int | None = None
    frames: int | None = None
    seconds: float | None = None
    size: str | None = None
    fps: float | None = None
    seed: int = 0
    layout: str = "plain"
    models: str | None = None
    batch: int = 1
    precision: str | None = None
    architecture: str | None = None
    family: str | None = None
    window: int | None = None
    sink: int | None = None
    positions: str | None = None
    at_prompt_change: str | None = None

    def check(self) -> None:
        """Raises ConfigError for what is wrong whatever the weights are."""
        if self.out.exists():
            raise ConfigError(f"out ({self.out}) must not exist yet: nothing is overwritten")
        if sum(map(bool, (self.prompt, self.prompts, self.dataset))) != 1:
            raise ConfigError("prompt, prompts or dataset must be given, one of them: they say what is asked for")
        if self.split is not None and self.dataset is None:
            raise ConfigError(f"split ({self.split}) must come with dataset: it is one of its prompts' splits")
        if self.image is not None and self.video is not None:
            raise ConfigError(f"image ({self.image}) must not come with video: a video starts once")
        if self.video_chunks is not None and self.video is None:
            raise ConfigError(f"video_chunks ({self.video_chunks}) must come with video: they are its start")
        if self.seconds is not None and self.frames is not None:
            raise ConfigError(f"seconds ({self.seconds:g}) must not come with frames: a video has one length")
        for name in ("num_videos", "max_prompts", "frames", "seconds", "fps", "batch", "video_chunks"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= MOST:  # nor NaN
                raise ConfigError(f"{name} ({shown(value)}) must be positive, and at most {MOST}")
        if not -(2**63) <= self.seed < 2**63:
            raise ConfigError(f"seed ({shown(self.seed)}) must be a number of 64 bits")
        for text in (text for script in self.scripts for text in script.texts):
            if not text.isascii() and text != text.encode(errors="replace").decode():
                raise ConfigError(f"prompt ({shown(text)}) must be text, in the terminal's encoding")

    @property
    def scripts(self) -> list[Script]:
        """Those of `prompt`."""
        return [prompt if isinstance(prompt, Script) else Script(prompt) for prompt in self.prompt]

    @property
    def sampler(self) -> dict[str, Any]:
        """Fields of the sampler that are given here."""
        fields = {"window_frames": self.window, "sink_frames": self.sink, "positions": self.positions,
                  "at_prompt_change": self.at_prompt_change}  # fmt: skip
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def videos_of_each(self) -> int:
        """Of each prompt."""
        return self.num_videos or (5 if self.layout == "vbench" else 1)


class UnfinishedError(Exception):
    """This rank cannot go on making videos; one line, which says what is there of them."""


@dataclass(frozen=True)
class Share:
    """What a rank makes.

    Attributes:
        codec: decodes.
        form: of the latents, `pixels` of the videos.
        prompts: that this rank's requests, `mine`, are of.
        texts, requests: of all ranks, prompt by prompt.
    """

    student: Student
    codec: Codec
    form: Form
    pixels: VideoForm
    prompts: Prompts
    mine: list[Request]
    texts: list[str]
    requests: list[Request]


def generate(job: Job, ranks: Ranks) -> dict[str, Any] | None:
    """Make all videos, each rank its share.

    Returns:
        On the main rank: `files`, `seconds` in all, `frames_per_second` of `denoising` alone and `with_decoding`,
        `seconds_to_first_chunk`, `chunk_frames` of the first chunk's video and of every other's.
    Raises:
        ValueError, OSError: the job cannot be done; on all ranks, and nothing is written.
        UnfinishedError: it stopped on the way, on this rank perhaps alone. Finished videos stay in `out`.
    """
    began = time.monotonic()
    share: Share = ranks.run_on_all(prepare, job, ranks)  # so no rank finds an `out` that another has made
    with _finished_ones_kept(job.out, ranks.is_main):
        clock = _make(job, share, ranks)
        made = len(share.mine) * share.form.frames
        gathered = ranks.gather_to_main(torch.tensor([[made, clock.denoising, clock.decoding, clock.first_chunk]]))
        if gathered is None:
            return None
        _write_sheet(job, share)
    first_chunk, two_chunks = map(share.codec.frames, map(share.student.policy.sampler.chunks.start, (1, 2)))
    frames, (denoising, decoding, first) = gathered[:, 0].sum().item(), gathered[:, 1:].max(dim=0).values.tolist()
    return {
        "files": [str(request.path) for request in share.requests],
        "seconds": round(time.monotonic() - began, 3),
        "frames_per_second": {"denoising": round(frames / denoising, 3),
                              "with_decoding": round(frames / (denoising + decoding), 3)},
        "seconds_to_first_chunk": round(first, 3),
        "chunk_frames": [first_chunk, two_chunks - first_chunk],
    }  # fmt: skip


def prepare(job: Job, ranks: Ranks) -> Share:
    """All that can be wrong is found here, before the first video.

    Raises:
        ValueError, OSError: the job cannot be done.
    """
    job.check()
    precision = job.precision or ("bf16" if ranks.device.type == "cuda" else "fp32")
    student = load_student(job.source, ranks, precision=precision, architecture=job.architecture,
                           family=job.family, sampler=job.sampler)  # fmt: skip
    dataset = None
    if job.dataset is not None:
        dataset = read_dataset(job.dataset, job.split, student.policy.student, student.start_frames)
    codec = find_codec(job, student, dataset, ranks.device)
    pixels = pixel_form(job, student, dataset, codec)
    everything = _everything(job, dataset)
    chosen = spread(range(len(everything)), job.max_prompts or len(everything))
    scripts = [everything[row] for row in chosen]
    texts = [script.prompt for script in scripts]
    requests = requests_of(texts, job.videos_of_each, job.out, job.layout)
    chunks = student.policy.sampler.chunks
    changes = [chunks_of_schedule(script, pixels.frames, codec, chunks) for script in scripts]
    mine = requests[ranks.data_rank :: ranks.data_size]
    asked = sorted({request.prompt for request in mine})  # a rank embeds no others
    form = latent_form(job, student, codec, pixels)
    own = None if dataset is None or dataset.starts is None else dataset.starts[[chosen[row] for row in asked]]
    starts = starts_of(job, student, codec, pixels, form, [texts[row] for row in asked], own)
    mine = [replace(request, start=starts[asked.index(request.prompt)]) for request in mine]
    if dataset is not None:
        prompts = dataset.prompts.take([chosen[row] for row in asked], asked)
        mine = [replace(request, prompt=asked.index(request.prompt)) for request in mine]
    else:  # by a codec of its own, whose text encoder goes with it
        read = list(dict.fromkeys(text for row in asked for text in (texts[row], *scripts[row].texts)))
        embedding_codec = find_codec(job, student, dataset, ranks.device)
        prompts = embedded(read, embedding_codec, student.policy.student)
        mine = [_of_script(request, scripts[request.prompt], changes[request.prompt], read) for request in mine]
    return Share(student, codec, form, pixels, prompts, mine, texts, requests)


def _of_script(request: Request, script: Script, starts: Sequence[int], read: Sequence[str]) -> Request:
    """A request whose rows are those of the texts that a rank has read."""
    rows = zip(starts, (read.index(text) for text in script.texts), strict=False)  # without a schedule there are none
    return replace(request, prompt=read.index(script.prompt), texts=tuple(rows))


def _make(job: Job, share: Share, ranks: Ranks) -> Clock:
    """Make this rank's videos."""
    sampler = Sampler(share.student.policy.sampler)
    generator = Generator(
        share.student.network, sampler, share.form, ranks.device, seed=job.seed,
        decoder=share.codec.decoder if ranks.leads_sequence else None,
        note={"source": str(job.source), "seed": job.seed},
    )  # fmt: skip
    parts = batches(share.mine, job.batch)
    total = len(parts) * sampler.config.chunks.count(share.form.latent_shape[0])
    with progress("Chunks", shown=ranks.is_main) as show:
        chunks = chain.from_iterable(generator.write(share.prompts, part) for part in parts)
        for done, _ in enumerate(chunks, 1):
            show(done, total)
    return generator.clock


def _write_sheet(job: Job, share: Share) -> None:
    """The first video of each prompt, as far as they fit."""
    shown = share.requests[:: job.videos_of_each][:SHEET_VIDEOS]
    write_contact_sheet({request.path: share.texts[request.prompt] for request in shown}, share.pixels,
                        job.out / "contact_sheet.png")  # fmt: skip


@contextmanager
def _finished_ones_kept(out: Path, is_main: bool) -> Iterator[None]:
    """Say what is there when it cannot go on; a folder of nothing does not stay."""
    try:
        yield
    except BaseException as error:
        finished = len(list(out.glob("*.mp4")))
        if not finished and is_main:  # others leave it to the main rank, which may be about to write into it
            with suppress(OSError):
                out.rmdir()
        if isinstance(error, ValueError | OSError):
            there = f"finished videos, which stay in {out}: {finished}" if finished else "no video is finished"
            raise UnfinishedError(f"{one_line(error)}; {there}") from error
        raise


def _everything(job: Job, dataset: DatasetPrompts | None) -> Sequence[Script]:
    """All that may be asked for."""
    if dataset is not None:
        return [Script(text) for text in dataset.prompts.texts]
    return job.scripts if job.prompts is None else scripts_of_file(job.prompts)


def find_codec(job: Job, student: Student, dataset: DatasetPrompts | None, device: torch.device) -> Codec:
    """The dataset's, or the one whose latents the student makes."""
    channels, length = student.policy.student.latent_channels, student.policy.student.text_length
    if dataset is not None and dataset.facts.latent_shape is not None:
        return codec_of(dataset.facts.codec, models=job.models, device=device)
    if job.models is not None:
        return WanCodec(job.models, device=device, text_length=length)
    if channels != FRAMES * PIXELS**2:
        raise ConfigError(f"models must be given for a student of {channels} latent channels: its latents are decoded "
                          "by a VAE")  # fmt: skip
    return codec_of(f"{IDENTITY}:{FRAMES}x{PIXELS}x{PIXELS}", device=device)


def pixel_form(job: Job, student: Student, dataset: DatasetPrompts | None, codec: Codec) -> VideoForm:
    """Of the videos: as asked for, else as the student was trained, which its run says, or the dataset's that is given
    for it; else Wan's or the toy world's own."""
    own_fps, (frames, height, width) = (WAN_FPS, WAN_SIZE) if codec.colour == "rgb24" else (TOY_FPS, TOY_SIZE)
    fps, shape = job.fps, dataset.facts.latent_shape if dataset else None
    if student.run is not None:
        data = student.run.data
        shape = (data.latent_frames, 0, data.latent_height, data.latent_width)
        fps = fps or trained_fps(student.run)
    fps = fps or (dataset and dataset.fps) or own_fps
    if shape is not None:
        frames, height, width = codec.frames(shape[0]), shape[2] * codec.spatial, shape[3] * codec.spatial
    if job.size is not None:
        found = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", job.size)
        if found is None:
            raise ConfigError(f"size ({shown(job.size)}) must be HEIGHTxWIDTH, such as 480x832")
        height, width = int(found[1]), int(found[2])
    if job.seconds is not None:
        frames = max(1, math.ceil(job.seconds * fps - 1e-3))
    return VideoForm(job.frames or frames, fps, height, width, colour=codec.colour)


def trained_fps(run: RunConfig) -> float | None:
    """Frames a second of the videos that a run learned from; None where they are elsewhere."""
    try:
        return fps_of(teacher_data(run))
    except ConfigError as error:
        log.warning("frames a second are not known from what the student was trained on: %s", error)
        return None


def latent_form(job: Job, student: Student, codec: Codec, pixels: VideoForm) -> Form:
    """What is generated for videos of this form: whole chunks."""
    config, sampler = student.policy.student, student.policy.sampler
    latent_frames = whole_chunks(pixels.frames, codec, sampler.chunks)
    shape = codec.latent_shape(replace(pixels, frames=codec.frames(latent_frames)))
    if shape[1] != config.latent_channels:
        raise ConfigError(f"models ({job.models}) must have latents of {config.latent_channels} channels, as the "
                          f"student's: {codec.name} has {shape[1]}")  # fmt: skip
    for axis, size, patch in zip(("height", "width"), shape[2:], config.patch[1:], strict=True):
        if size % patch:
            raise ConfigError(f"size ({pixels.height}x{pixels.width}) must have a {axis} of whole tokens, a multiple "
                              f"of {patch * codec.spatial}")  # fmt: skip
    if pixels.height * pixels.width > (limit := codec.whole_frame_pixels):
        shrink = math.sqrt(limit / (pixels.height * pixels.width))
        rows, columns = (patch * codec.spatial for patch in config.patch[1:])
        largest = f"{int(pixels.height * shrink) // rows * rows}x{int(pixels.width * shrink) // columns * columns}"
        raise ConfigError(f"size ({pixels.height}x{pixels.width}) must be {largest} at most, or another of {limit} "
                          "pixels: larger frames are not decoded chunk by chunk")  # fmt: skip
    return Form(shape, pixels.frames, pixels.fps)


def starts_of(
    job: Job, student: Student, codec: Codec, pixels: VideoForm, form: Form, texts: Sequence[str],
    of_dataset: Tensor | None,
) -> Sequence[Tensor | None]:  # fmt: skip
    """(f, C, H, W) clean latents that the videos of prompts begin with; None of those that are generated whole.

    Args:
        of_dataset: (P, f, C, H, W) its videos' of these prompts, for a student that was trained to go on from starts.
    """
    sampler, trained = student.policy.sampler, student.start_frames
    starts: Sequence[Tensor | None] = [None] * len(texts)
    if job.image is not None:
        starts = [start_of_image(job.image, pixels, codec, sampler)[0]] * len(texts)
    elif job.video is not None:
        starts = [start_of_video(job.video, job.video_chunks or 1, pixels, codec, sampler)[0]] * len(texts)
    elif of_dataset is not None:
        starts = list(of_dataset)
    elif trained and job.starts:
        chunks = sampler.chunks.count(trained)
        starts = [start_of_video(job.starts[text], chunks, pixels, codec, sampler)[0] for text in texts]
    elif trained:
        log.warning("the student was trained to go on from the start of a video, latent frames: %d; it is given none, "
                    "as --image or --video would", trained)  # fmt: skip
    first, (latent_frames, *expected) = starts[0] if starts else None, form.latent_shape
    if first is not None and len(first) > latent_frames:
        raise ConfigError(f"video_chunks ({sampler.chunks.count(len(first))}) must fit a video of {form.frames} "
                          "frames")  # fmt: skip
    if first is not None and list(first.shape[1:]) != expected:
        raise ConfigError(f"dataset ({job.dataset and job.dataset.shards}) must have latents of {expected}, as these "
                          "videos: they begin with its own")  # fmt: skip
    return starts
