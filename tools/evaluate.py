"""Measure videos against the teacher's: motion, flicker, sharpness, drift, jumps at chunk borders.

    tools/evaluate.py runs/toy-afd --teacher SHARDS --out DIR
    tools/evaluate.py SOURCE --teacher FOLDER --out DIR

SOURCE is a folder of videos; or a run, checkpoint or export, which makes videos of the teacher's prompts first, as
tools/generate.py does, and leaves them in DIR/videos. A folder's prompts are in its prompts.jsonl
({"video": "a.mp4", "prompt": "...", "split": "..."}), else in the titles of its videos.

Both sides are brought to one form, the lesser of the two in size, frame rate and length; where both have clips of
the same prompts, these are compared. Latents of Wan's codec need its VAE: --models DIR, as for make_shards.
Jumps at chunk borders are measured of what is made here, and of a folder where --chunk-frames says how many frames a
chunk has (Wan with chunks of 3 latent frames: --chunk-frames 12 --first-chunk-frames 9). --reward-model asks a
video-language model of transformers, by path, whether each clip shows its prompt. --vbench runs VBench on folders, in
its own environment.

--lengths 8 measures the source's videos, which then are 8 times as long as the teacher's, in each of these lengths,
too: what gets worse beyond the teacher's length shows. --frames N says the same in frames at the teacher's rate.

DIR gets evaluation.json (everything), table.md, evaluation.html and samples/. docs/evaluation.md defines the measures.

Exit 0: done. Exit 2: bad input, one line says which, and DIR is not made; videos that were made before it was noticed
stay in DIR.videos.
"""

import logging
import os
import sys
from dataclasses import fields
from pathlib import Path

from afd_scale.config import one_line
from afd_scale.config.command_line import Parser, count
from afd_scale.generation.evaluation_job import EvaluationJob, evaluate_source
from afd_scale.generation.job import UnfinishedError


def parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="folder of videos, or a student that makes them")
    add("--teacher", required=True, metavar="SHARDS|FOLDER", help="dataset (folder or URL), or folder of videos")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write; must not exist")
    add("--models", help="folder or hub id of Wan in diffusers' layout, for shards of its codec")
    add("--chunk-frames", type=count, help="of a chunk of a folder's videos, in frames")
    add("--first-chunk-frames", type=count, help="of the first, where it has others")
    add("--reward-model", type=Path, metavar="PATH", help="folder of a video-language model that is asked as well")
    add("--vbench", metavar="PYTHON", help="Python of an environment that has VBench, which judges folders as well")
    add("--seed", type=int, help="of what is generated (0)")
    add("--lengths", type=count, help="of the teacher's videos, that the source is measured for (1)")
    add("--frames", type=count, help="the same in frames at the teacher's rate")
    add("--clips", type=count, default=512, help="of a side at most, spread evenly (%(default)s)")
    add("--samples", type=count_or_none, default=4, help="of them side by side on the page (%(default)s)")
    add("--workers", type=count, default=os.cpu_count(), help="processes that measure (%(default)s)")
    add("--json", action="store_true", help="print evaluation.json, not the table")
    return parser


def count_or_none(text: str) -> int:
    return 0 if text == "0" else count(text)


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    try:
        evaluate_source(EvaluationJob(**{field.name: getattr(options, field.name) for field in fields(EvaluationJob)}))
    except (ValueError, OSError, UnfinishedError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    print((options.out / ("evaluation.json" if options.json else "table.md")).read_text(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
