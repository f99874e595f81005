"""Make videos with a trained student.

    tools/generate.py runs/toy-afd --prompts prompts.txt --frames 24 --out videos
    tools/generate.py exported --prompt "a cat on the moon" --models Wan2.1-T2V-1.3B-Diffusers --out videos
    deepspeed --num_accelerators 8 tools/generate.py runs/wan --dataset data/held_out --split test --out videos

SOURCE is a run (its newest checkpoint), a checkpoint, an exported folder or a weights file. Under a launcher, ranks
share the videos, and with --sequence so many of them share each video. Latents of Wan's VAE need --models.

A rate is given twice: frames a second of denoising alone, and with decoding; writing files is in neither.

Exit 0: done. Exit 2: bad input, one line says which.
"""

import argparse
import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from afd_scale.codecs.choose import codec_of
from afd_scale.codecs.codec import Codec, VideoForm
from afd_scale.codecs.identity import FRAMES, PIXELS
from afd_scale.codecs.identity import NAME as IDENTITY
from afd_scale.codecs.wan import WanCodec
from afd_scale.config import ConfigError, one_line
from afd_scale.config.command_line import Parser
from afd_scale.config.presets import ARCHITECTURES, FAMILIES
from afd_scale.data.storage import Location
from afd_scale.generation.generate import Form, Generator
from afd_scale.generation.requests import (
    LAYOUTS,
    DatasetPrompts,
    embedded,
    prompts_of_file,
    read_dataset,
    requests_of,
    start_of_image,
    start_of_video,
    whole_chunks,
    write_contact_sheet,
)
from afd_scale.generation.student import Student, load_student
from afd_scale.parallel.launchers import launched_as
from afd_scale.parallel.ranks import Ranks, start_ranks
from afd_scale.progress import progress
from afd_scale.rollout.sampler import Sampler
from afd_scale.types import pieces

SHEET_VIDEOS = 24  # at most, on the contact sheet
WAN_SIZE, TOY_SIZE = (81, 480, 832), (12, 16, 16)  # frames, height, width of a source that says none


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    is_main = int(os.environ.get("RANK", "0")) == 0
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.INFO if is_main else logging.WARNING)
    try:
        check(options)
        with ranks_of_job(options.sequence) as ranks, tempfile.TemporaryDirectory() as cache:
            found = generate(options, ranks, Path(cache))
    except (ValueError, OSError) as error:
        if is_main:
            print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    if found is not None:
        print(json.dumps(found) if options.json else summary(found))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="run, checkpoint, export or weights file")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    asked = parser.add_argument_group("what is asked for")
    asked.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    asked.add_argument("--prompts", type=Path, metavar="FILE", help=".txt, .jsonl or .csv")
    asked.add_argument("--dataset", metavar="SHARDS", help="folder or URL of a dataset, for its prompts")
    asked.add_argument("--split", help="of the dataset's prompts")
    asked.add_argument("--image", type=Path, metavar="FILE", help="the first chunk, of one frame")
    asked.add_argument("--video", type=Path, metavar="FILE", help="its start is the first chunks")
    asked.add_argument("--video-chunks", type=int, default=1, help="of --video (%(default)s)")
    form = parser.add_argument_group("videos")
    form.add_argument("--num-videos", type=int, help="of each prompt (1; 5 with layout vbench)")
    form.add_argument("--frames", type=int, help="of a video; as trained where the source says it")
    form.add_argument("--size", metavar="HEIGHTxWIDTH", help="pixels; as trained where the source says it")
    form.add_argument("--fps", type=float, help="frames a second of the files (16; 8 in the toy world)")
    form.add_argument("--seed", type=int, default=0, help="of the noise (%(default)s)")
    form.add_argument("--layout", choices=LAYOUTS, default="plain", help="names of the files")
    how = parser.add_argument_group("how")
    how.add_argument("--models", help="folder or hub id of Wan's text encoder and VAE, in diffusers' layout")
    how.add_argument("--batch", type=int, default=1, help="videos made together on a rank (%(default)s)")
    how.add_argument("--sequence", type=int, default=1, help="ranks that share a video (%(default)s)")
    how.add_argument("--precision", choices=("fp32", "bf16", "fp8"), help="bf16 on a GPU, fp32 on a CPU")
    how.add_argument("--architecture", choices=tuple(ARCHITECTURES), help="of a source that states none")
    how.add_argument("--family", choices=tuple(FAMILIES), help="of a source that states none")
    how.add_argument("--json", action="store_true", help="the last line is one JSON object")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    """What needs no weights."""
    if options.out.exists():
        raise ConfigError(f"out ({options.out}) must not exist yet: nothing is overwritten")
    if sum(map(bool, (options.prompt, options.prompts, options.dataset))) != 1:
        raise ConfigError("prompt, prompts or dataset must be given, one of them: they say what is asked for")
    if options.split is not None and options.dataset is None:
        raise ConfigError(f"split ({options.split}) must come with dataset: it is one of its prompts' splits")
    if options.image is not None and options.video is not None:
        raise ConfigError(f"image ({options.image}) must not come with video: a video starts once")
    for name in ("num_videos", "frames", "batch", "sequence", "video_chunks"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} ({value}) must be positive")


@contextmanager
def ranks_of_job(sequence: int) -> Iterator[Ranks]:
    """One process by itself, or those of a launcher."""
    launched = launched_as(os.environ)
    if launched.size == 1:
        if sequence > 1:
            raise ConfigError(f"sequence ({sequence}) must be 1 without a launcher: there is one rank")
        yield Ranks(0, 1, 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    else:
        with start_ranks(launched, timeout_minutes=60, agreed=()) as ranks:
            yield ranks.sharing_videos(sequence, 60)


def generate(options: argparse.Namespace, ranks: Ranks, cache: Path) -> dict[str, Any] | None:
    """All videos of this rank; what was made, on the main rank."""
    began = time.monotonic()
    precision = options.precision or ("bf16" if ranks.device.type == "cuda" else "fp32")
    student = load_student(options.source, ranks, precision=precision, architecture=options.architecture,
                           family=options.family)  # fmt: skip
    dataset = None
    if options.dataset is not None:
        dataset = read_dataset(Location(options.dataset, cache, "dataset"), options.split, student.policy.student)
    codec = find_codec(options, student, dataset, ranks.device)
    pixels = pixel_form(options, student, dataset, codec)
    texts = dataset.prompts.texts if dataset else options.prompt or prompts_of_file(options.prompts)
    num_videos = options.num_videos or (5 if options.layout == "vbench" else 1)
    requests = requests_of(texts, num_videos, options.out, options.layout)
    mine = requests[ranks.data_rank :: ranks.data_size]
    if dataset is not None:
        prompts = dataset.prompts
    else:  # every rank embeds what it is asked for
        asked = sorted({request.prompt for request in mine})
        prompts = embedded([texts[row] for row in asked], codec, student.policy.student)
        mine = [replace(request, prompt=asked.index(request.prompt)) for request in mine]
    form = latent_form(options, student, codec, pixels)
    del codec  # and its text encoder with it, before there are videos
    generator = Generator(
        student.network, Sampler(student.policy.sampler), form, ranks.device, seed=options.seed,
        decoder=find_codec(options, student, dataset, ranks.device).decoder if ranks.leads_sequence else None,
        note=json.dumps({"source": str(options.source), "seed": options.seed}),
    )  # fmt: skip
    parts = pieces(len(mine), options.batch)
    total = len(parts) * (form.latent_shape[0] // student.policy.sampler.chunk_frames)
    with progress("Chunks", shown=ranks.is_main) as show:
        chunks = chain.from_iterable(generator.write(prompts, mine[part]) for part in parts)
        for done, _ in enumerate(chunks, 1):
            show(done, total)
    clock = generator.clock
    times = torch.tensor([[len(mine) * form.frames, clock.denoising, clock.decoding, clock.first_chunk]])
    gathered = times if ranks.size == 1 else ranks.gather_to_main(times)
    if gathered is None:
        return None
    write_contact_sheet({request.path: texts[request.prompt] for request in requests[::num_videos][:SHEET_VIDEOS]},
                        pixels, options.out / "contact_sheet.png")  # fmt: skip
    frames, (denoising, decoding, first) = gathered[:, 0].sum().item(), gathered[:, 1:].max(dim=0).values.tolist()
    return {
        "files": [str(request.path) for request in requests],
        "seconds": round(time.monotonic() - began, 3),
        "frames_per_second": {"denoising": round(frames / denoising, 3),
                              "with_decoding": round(frames / (denoising + decoding), 3)},
        "seconds_to_first_chunk": round(first, 3),
    }  # fmt: skip


def find_codec(
    options: argparse.Namespace, student: Student, dataset: DatasetPrompts | None, device: torch.device
) -> Codec:
    """The dataset's, or the one whose latents the student makes."""
    channels, length = student.policy.student.latent_channels, student.policy.student.text_length
    if dataset is not None and dataset.facts.latent_shape is not None:
        return codec_of(dataset.facts.codec, models=options.models, device=device)
    if options.models is not None:
        return WanCodec(options.models, device=device, text_length=length)
    if channels != FRAMES * PIXELS**2:
        raise ConfigError(f"models must be given for a student of {channels} latent channels: its latents are decoded "
                          "by a VAE")  # fmt: skip
    return codec_of(f"{IDENTITY}:{FRAMES}x{PIXELS}x{PIXELS}", device=device)


def pixel_form(
    options: argparse.Namespace, student: Student, dataset: DatasetPrompts | None, codec: Codec
) -> VideoForm:
    """Of the videos: as asked for, else as the dataset or the run has them, else Wan's or the toy world's own."""
    frames, height, width = WAN_SIZE if codec.colour == "rgb24" else TOY_SIZE
    shape = dataset.facts.latent_shape if dataset else None
    if shape is None and student.run is not None:
        data = student.run.data
        shape = (data.latent_frames, 0, data.latent_height, data.latent_width)
    if shape is not None:
        frames, height, width = codec.frames(shape[0]), shape[2] * codec.spatial, shape[3] * codec.spatial
    if options.size is not None:
        found = re.fullmatch(r"(\d+)x(\d+)", options.size)
        if found is None:
            raise ConfigError(f"size ({options.size}) must be HEIGHTxWIDTH, such as 480x832")
        height, width = int(found[1]), int(found[2])
    fps = options.fps or (16.0 if codec.colour == "rgb24" else 8.0)
    return VideoForm(options.frames or frames, fps, height, width, colour=codec.colour)


def latent_form(options: argparse.Namespace, student: Student, codec: Codec, pixels: VideoForm) -> Form:
    """What is generated for videos of this form: whole chunks, and what they start with."""
    config, sampler = student.policy.student, student.policy.sampler
    latent_frames = whole_chunks(pixels.frames, codec, sampler.chunk_frames)
    shape = codec.latent_shape(replace(pixels, frames=codec.frames(latent_frames)))
    if shape[1] != config.latent_channels:
        raise ConfigError(f"models ({options.models}) must have latents of {config.latent_channels} channels, as the "
                          f"student's: {codec.name} has {shape[1]}")  # fmt: skip
    for axis, size, patch in zip(("height", "width"), shape[2:], config.patch[1:], strict=True):
        if size % patch:
            raise ConfigError(f"size ({pixels.height}x{pixels.width}) must have a {axis} of whole tokens, a multiple "
                              f"of {patch * codec.spatial}")  # fmt: skip
    start = None
    if options.image is not None:
        start = start_of_image(options.image, pixels, codec, sampler)
    elif options.video is not None:
        start = start_of_video(options.video, options.video_chunks, pixels, codec, sampler)
    if start is not None and start.shape[1] > latent_frames:
        raise ConfigError(f"video_chunks ({options.video_chunks}) must fit a video of {pixels.frames} frames")
    return Form(shape, pixels.frames, pixels.fps, start)


def summary(found: dict[str, Any]) -> str:
    rates, files = found["frames_per_second"], found["files"]
    return (f"{len(files)} videos in {Path(files[0]).parent}; {rates['denoising']:g} frames a second denoising alone, "
            f"{rates['with_decoding']:g} with decoding; {found['seconds_to_first_chunk']:g} s to the first chunk"
            )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
