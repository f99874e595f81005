"""Turn prompts and teacher videos into MDS shards.

    tools/make_shards.py --teacher folder --source DIR --prompts FILE --out DIR --codec wan --models DIR
                         --size 480x832 --frames 81 --fps 16
    tools/make_shards.py --teacher webdataset --source DIR --out DIR ...
    tools/make_shards.py --teacher http --protocol NAME --model NAME --source DIR --prompts FILE --out DIR ...
    tools/make_shards.py --teacher procedural --out DIR --clips 1024 --seed 1
    tools/make_shards.py --teacher none --prompts FILE --out DIR --codec wan --models DIR

`folder` takes videos below --source; the rows of --prompts (.jsonl, .json, .csv, .parquet) name them:
{"video": "a.mp4", "prompt": "..."}. Where columns have other names, --columns prompt=text,video=file_name says so.
Without --prompts a txt lies beside each video. `webdataset` takes videos in tars, each with a txt or json of its key.
`http` asks a video API (--protocol openai, ark, fal, replicate, google) for a video of each prompt, and keeps them in
--source, with a journal: no video is asked for twice. Its key is read from OPENAI_API_KEY, ARK_API_KEY, FAL_KEY,
REPLICATE_API_TOKEN or GEMINI_API_KEY. --dry-run shows the first request and what all cost, and asks for nothing.
--url stub rehearses with a small server on this machine, which wants no key and no money.
`none` makes a dataset of prompts alone. What cannot be used is listed in OUT/rejects.jsonl. The same command again goes
on where a job was stopped. Several processes share the job: torchrun --nproc_per_node 8 tools/make_shards.py ...

Exit 0: done, the last line says what was written. Exit 2: bad input, one line says which; what is finished stays.
"""

import argparse
import json
import logging
import math
import os
import sys
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from afd_scale.codecs.codec import Codec, VideoForm
from afd_scale.codecs.identity import TEXT_SHAPE, IdentityCodec
from afd_scale.codecs.wan import TEXT_LENGTH, WanCodec
from afd_scale.config import ConfigError, LostInputError, one_line
from afd_scale.config.command_line import Parser, count, positive
from afd_scale.config.plain import parse_yaml
from afd_scale.config.run import ProceduralSource
from afd_scale.config.section import first_problem
from afd_scale.data.clips import Teacher
from afd_scale.data.make_shards import ALONE, ShardJob, make_shards
from afd_scale.data.schema import REJECTS_FILE, DatasetFacts
from afd_scale.data.teachers.exchange import STUB, Endpoint
from afd_scale.data.teachers.folder import FolderTeacher
from afd_scale.data.teachers.http import HttpTeacher
from afd_scale.data.teachers.procedural import ProceduralTeacher
from afd_scale.data.teachers.procedural import form_of as form_of_world
from afd_scale.data.teachers.prompts import PromptsAlone, parse_columns
from afd_scale.data.teachers.protocols import PROTOCOLS
from afd_scale.data.teachers.webdataset import WebDatasetTeacher
from afd_scale.data.writer import COMPRESSIONS
from afd_scale.parallel.launchers import Launched, launched_as
from afd_scale.parallel.ranks import start_ranks
from afd_scale.progress import progress
from afd_scale.protocols import Processes


def parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--teacher", default="procedural", choices=("folder", "webdataset", "http", "procedural", "none"),
        help="procedural is the toy world, none is prompts alone (%(default)s)")  # fmt: skip
    add("--source", type=Path, help="folder of videos, for webdataset of tars; for http, where videos are kept")
    add("--prompts", type=Path, help=".jsonl, .json, .csv, .parquet or .txt")
    add("--columns", action="append", default=[], metavar="FIELD=COLUMN,...",
        help="names that --prompts, or a tar's json, has for prompt, video, prompt_id, split")  # fmt: skip
    add("--out", type=Path, required=True, help="folder to write")
    add("--name", help="of the teacher, in the dataset (default: the folder's or the model's)")
    form = parser.add_argument_group("form of the videos")
    form.add_argument("--codec", default="identity", choices=("identity", "wan"),
                      help="identity: the toy world's, grey; wan: Wan's VAE and UMT5 (%(default)s)")  # fmt: skip
    form.add_argument("--models", help="folder or hub id of Wan in diffusers' layout: vae/, text_encoder/, tokenizer/")
    form.add_argument("--size", help="HxW in pixels, such as 480x832")
    form.add_argument("--frames", type=int, help="of a video, from its start")
    form.add_argument("--fps", type=float, help="frames a second")
    form.add_argument("--aspect", default="crop", choices=("crop", "pad", "stretch"),
                      help="what is done to videos of another aspect ratio (%(default)s)")  # fmt: skip
    form.add_argument("--text-length", type=count, help="tokens of a prompt (wan: 512, identity: 16 words)")
    job = parser.add_argument_group("job")
    job.add_argument("--max-rejects", type=int, default=100, help="unusable clips before the job stops (100)")
    job.add_argument("--compression", default="zstd", choices=COMPRESSIONS, help="of the shards (%(default)s)")
    job.add_argument("--local_rank", type=int, help="given by some launchers; the environment says the same")
    http = parser.add_argument_group("teacher http")
    http.add_argument("--protocol", default="openai", choices=tuple(PROTOCOLS), help="that it speaks (%(default)s)")
    http.add_argument(
        "--url",
        help="of the endpoint, such as http://teacher:8000/v1 (the hosted service's, but for openai); "
        "stub rehearses on this machine",
    )
    http.add_argument("--model", help="that is asked")
    http.add_argument("--dry-run", action="store_true", help="print the first request and the cost of all; ask nothing")
    http.add_argument("--request", action="append", default=[], metavar="FIELD=VALUE",
                      help="field of a request, repeatable: seconds=8, size=1280x720, seed={index}, ...")  # fmt: skip
    http.add_argument("--videos-per-prompt", type=count, default=1, help="(1)")
    http.add_argument("--concurrency", type=count, default=4, help="videos asked for at once (4)")
    http.add_argument("--requests-per-minute", type=positive, help="for new videos")
    http.add_argument("--price", type=float, default=0.0, help="of a video")
    http.add_argument("--budget", type=positive, help="that all videos of --source together may cost")
    http.add_argument("--poll-seconds", type=positive, default=5.0, help="between looks at a video (5)")
    http.add_argument("--backoff-seconds", type=positive, default=1.0, help="before a second attempt (1)")
    http.add_argument("--attempts", type=count, default=12, help="at any one exchange (12)")
    http.add_argument("--timeout-seconds", type=positive, default=1800.0, help="until a video must be finished (1800)")
    http.add_argument("--exchange-seconds", type=positive, default=60.0, help="for one request and its answer (60)")
    http.add_argument("--ask-again", action="store_true", help="for what was refused, or paid for and lost")
    toy = parser.add_argument_group("teacher procedural")
    toy.add_argument("--clips", type=int, default=1024, help="to render (1024)")
    toy.add_argument("--world", default="drop", help="drop, or kick: longer clips in which chance decides more (drop)")
    toy.add_argument("--physics", default="teacher", help="teacher, or wrong: what the base is pretrained on")
    toy.add_argument("--seed", type=int, default=0, help="of the clips' random starts (0)")
    toy.add_argument("--combinations", default="all", choices=("all", "seen", "unseen"),
                     help="of the prompts' words; seen leaves a quarter out, unseen is it (%(default)s)")  # fmt: skip
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    launched = None
    try:
        launched = launched_as(os.environ)
        # A whole part is made between two meetings.
        several = start_ranks(launched, timeout_minutes=24 * 60, agreed=(ValueError,))
        with several if launched.size > 1 else nullcontext(ALONE) as processes:
            run(options, launched, processes)
    except ValueError as error:
        if launched is None or launched.rank == 0:
            print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except LostInputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from what is finished", file=sys.stderr)
        return 130
    return 0


def run(options: argparse.Namespace, launched: Launched, processes: Processes) -> None:
    """Check, make, say what was made; ValueError in one line for bad input."""
    if ":/" in str(options.out):
        raise ConfigError(f"out ({options.out}) must be a local folder: copy it to a store when it is complete")
    if options.dry_run:
        if options.teacher != "http":
            raise ConfigError(f"dry_run must be of teacher http, not {options.teacher}: it is what asks and pays")
        given(options, "source", "with teacher http: the folder of its videos")
        if processes.is_main:
            print(http_teacher(options).plan())
        return
    job: ShardJob = processes.run_on_all(job_of, options, launched)  # each process sees other files perhaps
    if isinstance(job.teacher, HttpTeacher):
        with progress("Videos", shown=processes.is_main) as on_video:
            processes.run_on_main(job.teacher.collect, on_video)
    with progress("Clips", shown=processes.is_main) as on_clips:
        facts = make_shards(job, processes, on_clips)
    if processes.is_main:
        print(summary(options.out, facts))


def job_of(options: argparse.Namespace, launched: Launched) -> ShardJob:
    form = None if options.teacher == "none" else form_of(options)
    codec = codec_of(options, form or form_of_world(_source(options).world), launched)
    return ShardJob(teacher_of(options), codec, form, options.out, options.max_rejects, options.compression)


def given(options: argparse.Namespace, name: str, why: str) -> Any:
    """What an option says; ConfigError, the reason, where it was left out."""
    value = getattr(options, name)
    if value is None:
        raise ConfigError(f"{name} must be given {why}")
    return value


def form_of(options: argparse.Namespace) -> VideoForm:
    colour: Any = "gray" if options.codec == "identity" else "rgb24"
    if options.teacher == "procedural":
        form = form_of_world(_source(options).world)
        toy = {"size": f"{form.height}x{form.width}", "frames": form.frames, "fps": form.fps}
        for name, value in toy.items():
            if getattr(options, name) not in (None, value):
                raise ConfigError(f"{name} ({getattr(options, name)}) must be {value}: the toy world is rendered in no "
                                  "other")  # fmt: skip
        return replace(form, aspect=options.aspect, colour=colour)
    why = "with --size HxW --frames N --fps N: all videos are brought to this form"
    size, frames, fps = (given(options, name, why) for name in ("size", "frames", "fps"))
    height, _, width = size.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise ConfigError(f"size ({size}) must be HxW in pixels, such as 480x832")
    return VideoForm(frames, fps, int(height), int(width), options.aspect, colour)


def codec_of(options: argparse.Namespace, form: VideoForm, launched: Launched) -> Codec:
    if options.codec == "identity":
        return IdentityCodec.of_form(form, (options.text_length or TEXT_SHAPE[0], TEXT_SHAPE[1]))
    models = given(options, "models", "with codec wan: a folder or hub id with vae/, text_encoder/, tokenizer/")
    import torch

    device = torch.device("cuda", launched.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return WanCodec(models, device=device, text_length=options.text_length or TEXT_LENGTH)


def teacher_of(options: argparse.Namespace) -> Teacher:
    columns = parse_columns(options.columns)
    if options.teacher == "procedural":
        return ProceduralTeacher(_source(options))
    if options.teacher == "none":
        return PromptsAlone(given(options, "prompts", "with teacher none: they are all there is"), columns)
    given(options, "source", f"with teacher {options.teacher}: where its videos are")
    if options.teacher == "webdataset":
        if options.prompts is not None:
            raise ConfigError(f"prompts ({options.prompts}) must not be given with teacher webdataset: "
                              "they lie beside the videos in the tars")  # fmt: skip
        return WebDatasetTeacher(options.source, options.name, columns)
    if options.teacher == "folder":
        if columns and options.prompts is None:
            raise ConfigError("columns must come with prompts: a txt beside a video has none")
        return FolderTeacher(options.source, options.prompts, options.name, columns)
    return http_teacher(options)


def http_teacher(options: argparse.Namespace) -> HttpTeacher:
    protocol = PROTOCOLS[options.protocol]
    options.url = options.url or protocol.url
    rehearses = options.url == STUB
    if rehearses:
        options.model = options.model or STUB
    for name in ("url", "model", "prompts"):
        given(options, name, "with teacher http")
    if options.budget is not None and not 0 < options.price < math.inf:
        raise ConfigError(f"price ({options.price}) must be positive with a budget: it is what the budget counts")
    url = urlsplit(options.url)
    if not rehearses and (url.scheme not in ("http", "https") or not url.hostname):
        raise ConfigError(f"url ({options.url}) must be one such as http://teacher:8000/v1, or {STUB}")
    if url.username or url.password:
        raise ConfigError(f"url (of {url.hostname}) must hold no user and no password: the key is read from "
                          f"{protocol.key}")  # fmt: skip
    key = None if rehearses else os.environ.get(protocol.key) or None
    if key is not None and not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{protocol.key} must be printable ASCII: it goes into a header")
    settings = {field.name: getattr(options, field.name) for field in fields(Endpoint)}
    endpoint = Endpoint(**settings | {"request": dict(map(request_field, options.request))})
    return HttpTeacher(
        endpoint, options.prompts, options.source, videos_per_prompt=options.videos_per_prompt, key=key,
        name=options.name, columns=parse_columns(options.columns),
    )  # fmt: skip


def _source(options: argparse.Namespace) -> ProceduralSource:
    try:
        return ProceduralSource(world=options.world, clips=options.clips, physics=options.physics, seed=options.seed,
                                prompts=options.combinations)  # fmt: skip
    except ValidationError as error:
        raise ConfigError(first_problem(error)) from error


def request_field(item: str) -> tuple[str, Any]:
    """Name and value of --request FIELD=VALUE."""
    name, equals, value = item.partition("=")
    if not equals or not name:
        raise ConfigError(f"request ({item}) must be FIELD=VALUE")
    if "{index}" in value:
        return name, value
    try:
        parsed = parse_yaml(value)
        json.dumps(parsed, allow_nan=False)
    except ValueError as error:
        raise ConfigError(f"request ({item}) must have a value as JSON has them, a text perhaps in quotes: "
                          f"{error}") from error  # fmt: skip
    return name, parsed


def summary(out: Path, facts: DatasetFacts) -> str:
    size = sum(path.stat().st_size for path in out.iterdir())
    listed = out / REJECTS_FILE  # of a dataset written by other means it may be absent
    rejects = len(listed.read_text().splitlines()) if listed.exists() else 0
    left_out = f", {rejects} rejected (see {listed})" if rejects else ""
    if facts.latent_shape is None:
        held = f"{facts.num_samples} prompts"
    else:
        held = f"{facts.num_samples} clips of {facts.teacher}, latents {facts.latent_shape}"
    return f"{out}: {held}, text {facts.text_shape}, {size / 2**20:.1f} MiB{left_out}"


if __name__ == "__main__":
    sys.exit(main())
