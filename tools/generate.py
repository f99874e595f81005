"""Make videos with a trained student.

    tools/generate.py runs/toy-afd --prompts prompts.txt --frames 24 --out videos
    tools/generate.py exported --prompt "a cat on the moon" --models Wan2.1-T2V-1.3B-Diffusers --out videos
    deepspeed --num_accelerators 8 tools/generate.py runs/wan --dataset data/held_out --split test --out videos

A row of a .jsonl may have a "schedule" beside its "prompt", which then names the file: [[0, "a cat sits"], [81, "it
runs"]] are frames of the video and the prompts that begin there, or with the next chunk.

SOURCE is a run (its newest checkpoint), a checkpoint, an exported folder or a weights file. Under a launcher, ranks
share the videos, and with --sequence so many of them share each video. Latents of Wan's VAE need --models.

A rate is given twice: frames a second of denoising alone, and with decoding; writing files is in neither.

Exit 0: done. Exit 2: bad input, one line says which, and nothing is made; or it stopped on the way, of a full disk
perhaps, and the line says how many videos are finished.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from afd_scale.config import ConfigError, LostInputError, one_line
from afd_scale.config.command_line import Parser
from afd_scale.data.storage import Location
from afd_scale.generation.command_line import add_student_options
from afd_scale.generation.job import Job, UnfinishedError, generate
from afd_scale.generation.requests import LAYOUTS
from afd_scale.parallel.launchers import Launched, launched_as
from afd_scale.parallel.ranks import Ranks, alone, start_ranks


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    is_main = True
    try:
        launched = launched_as(os.environ)
        is_main = launched.rank == 0
        logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.INFO if is_main else logging.WARNING)
        with tempfile.TemporaryDirectory() as cache, ranks_of_job(launched, options.sequence) as ranks:
            found = generate(job_of(options, Path(cache)), ranks)
    except (UnfinishedError, LostInputError) as error:  # the other ranks do not know of it; their launcher ends them
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:  # on all ranks
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
    asked.add_argument("--prompts", type=Path, metavar="FILE", help=".txt, .jsonl, .json, .csv or .parquet")
    asked.add_argument("--dataset", metavar="SHARDS", help="folder or URL of a dataset, for its prompts")
    asked.add_argument("--split", help="of the dataset's prompts")
    asked.add_argument("--max-prompts", type=int, metavar="N", help="of them, spread evenly")
    asked.add_argument(
        "--image",
        type=Path,
        metavar="FILE",
        help="the first chunk, where that is one frame: sampler.first_chunk_frames",
    )
    asked.add_argument("--video", type=Path, metavar="FILE", help="its start is the first chunks")
    asked.add_argument("--video-chunks", type=int, help="of --video (1)")
    form = parser.add_argument_group("videos")
    form.add_argument("--num-videos", type=int, help="of each prompt (1; 5 with layout vbench)")
    form.add_argument("--frames", type=int, help="of a video; as trained where the source says it")
    form.add_argument("--seconds", type=float, help="of a video, in place of --frames")
    form.add_argument("--size", metavar="HEIGHTxWIDTH", help="pixels; as trained where the source says it")
    form.add_argument("--fps", type=float, help="of the files; as trained where the source says it (16; 8 in the toy "
                                                "world)")  # fmt: skip
    form.add_argument("--seed", type=int, default=0, help="of the noise (%(default)s)")
    form.add_argument("--layout", choices=LAYOUTS, default="plain", help="names of the files")
    how = parser.add_argument_group("how")
    add_student_options(how)
    how.add_argument("--batch", type=int, default=1, help="videos made together on a rank (%(default)s)")
    how.add_argument("--sequence", type=int, default=1, help="ranks that share a video (%(default)s)")
    how.add_argument("--local_rank", type=int, help="given by some launchers; the environment says the same")
    how.add_argument("--json", action="store_true", help="the last line is one JSON object")
    return parser.parse_args(arguments)


def job_of(options: argparse.Namespace, cache: Path) -> Job:
    settings = {field.name: getattr(options, field.name) for field in fields(Job) if field.name in options}
    dataset = None if options.dataset is None else Location(options.dataset, cache, "dataset")
    return Job(**settings | {"dataset": dataset})


@contextmanager
def ranks_of_job(launched: Launched, sequence: int) -> Iterator[Ranks]:
    """One process by itself, or those of a launcher."""
    if launched.size == 1:
        if sequence != 1:
            raise ConfigError(f"sequence ({sequence}) must be 1 without a launcher: there is one rank")
        yield alone()
    else:
        if sequence < 1 or launched.size % sequence:
            raise ConfigError(f"sequence ({sequence}) must divide the {launched.size} ranks: as many share each video")
        with start_ranks(launched, timeout_minutes=60, agreed=(ValueError, OSError)) as ranks:
            yield ranks.sharing_videos(sequence, 60)


def summary(found: dict[str, Any]) -> str:
    rates, files = found["frames_per_second"], found["files"]
    return (f"{len(files)} videos in {Path(files[0]).parent}; {rates['denoising']:g} frames a second denoising alone, "
            f"{rates['with_decoding']:g} with decoding; {found['seconds_to_first_chunk']:g} s to the first chunk"
            )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
