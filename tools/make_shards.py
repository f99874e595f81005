"""Turn prompts and teacher videos into MDS shards.

    tools/make_shards.py --teacher procedural --out runs/toy-shards/teacher --clips 1024 --seed 1

Exit 0: done, the last line says what was written. Exit 2: bad input, one line says which.
"""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress

from afd_scale.config import ConfigError
from afd_scale.config.run import ProceduralSource
from afd_scale.data.procedural import make_procedural_shards


class Parser(argparse.ArgumentParser):
    """Bad usage in one line, like all other bad input."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="procedural", help="procedural: the toy world")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must not exist")
    parser.add_argument("--clips", type=int, default=1024, help="clips to render (1024)")
    parser.add_argument("--physics", default="teacher", help="teacher, or wrong: what the base is pretrained on")
    parser.add_argument("--seed", type=int, default=0, help="of the clips' random starts (0)")
    parser.add_argument("--codec", default="identity", help="identity: the toy world's, which loses nothing")
    options = parser.parse_args(arguments)
    try:
        make_shards(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def make_shards(options: argparse.Namespace) -> None:
    """Check, render, write; ValueError in one line for bad input."""
    if options.teacher in ("folder", "http"):
        raise ConfigError(f"teacher ({options.teacher}) must be procedural: folders of videos and HTTP APIs come later")
    if options.teacher != "procedural":
        raise ConfigError(f"teacher ({options.teacher}) must be procedural: there is no other yet")
    if options.codec != "identity":
        raise ConfigError(f"codec ({options.codec}) must be identity: the procedural teacher has no other")
    try:
        source = ProceduralSource(clips=options.clips, physics=options.physics, seed=options.seed)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ConfigError(f"{problem['loc'][0]} ({problem['input']}): {problem['msg']}") from error
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("Rendering", total=source.clips)
        facts = make_procedural_shards(source, options.out, on_clip=lambda: progress.advance(task))
    size = sum(path.stat().st_size for path in options.out.iterdir())
    megabytes = f"{size / 2**20:.1f} MiB"
    print(f"{options.out}: {facts.num_samples} clips of {facts.teacher}, latents {facts.latent_shape}, {megabytes}")


if __name__ == "__main__":
    sys.exit(main())
