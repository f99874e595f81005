"""Look into a dataset of shards.

    tools/inspect_shards.py OUT [--json]              counts, schema, prompts
    tools/inspect_shards.py OUT --validate            read everything, name each corrupt shard
    tools/inspect_shards.py OUT --pictures DIR        a contact sheet and a few mp4

OUT is a folder or a URL. Latents of Wan's codec need its VAE for pictures: --models DIR, as for make_shards.

Exit 0: done, and with --validate nothing is wrong. Exit 2: bad input, or something is wrong, a line each.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import filesize

from afd_scale.codecs.choose import codec_of
from afd_scale.codecs.conversions import to_uint8
from afd_scale.config import ConfigError, one_line
from afd_scale.config.command_line import Parser
from afd_scale.data.inspection import describe, samples_at, validate
from afd_scale.data.storage import Location
from afd_scale.evaluation.video import write_comparison_mp4, write_grid
from afd_scale.files import system_errors
from afd_scale.progress import progress


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("out", metavar="OUT", help="folder or URL of a dataset")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--validate", action="store_true", help="read everything")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="write a contact sheet and mp4 there")
    parser.add_argument("--samples", type=int, default=12, help="on the contact sheet, spread over the dataset (12)")
    parser.add_argument("--videos", type=int, default=4, help="of them as mp4 (4)")
    parser.add_argument("--models", help="folder or hub id of Wan in diffusers' layout")
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as cache:
            return inspect(options, Location(options.out, Path(cache), "out"))
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2


def inspect(options: argparse.Namespace, location: Location) -> int:
    if options.pictures is not None:
        check_pictures(options)
    found = describe(location)
    if not options.json:
        show(found)
    corrupt = []
    if options.validate:
        with progress("Shards") as on_shard:
            corrupt = list(validate(location, on_shard))
    if options.json:
        print(json.dumps(found | {"corrupt": corrupt} if options.validate else found))
    elif options.validate:
        print("", *corrupt or ["everything was read and is as it was written"], sep="\n")
    if options.pictures is not None:
        draw(options, location, found)
    if corrupt:
        print(f"error: out ({options.out}) must be as it was written: problems found: {len(corrupt)}", file=sys.stderr)
        return 2
    return 0


def check_pictures(options: argparse.Namespace) -> None:
    """Before anything is read, which may take hours."""
    if options.samples < 1 or options.videos < 0:
        raise ConfigError(f"samples ({options.samples}) must be positive, and videos ({options.videos}) not negative")
    with system_errors(f"pictures ({options.pictures}) must be a folder that can be written to"):
        options.pictures.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=options.pictures).close()


def show(found: dict[str, Any], indent: str = "") -> None:
    """A line for each fact; those that hold others are set out below their name."""
    for name, value in found.items():
        if isinstance(value, dict) and any(isinstance(item, dict) for item in value.values()):
            print(indent + name)
            show(value, indent + "  ")
        else:
            size = name.startswith("bytes") and isinstance(value, int)
            print(f"{indent + name:20} {filesize.decimal(value) if size else readable(value)}")


def readable(value: Any) -> str:
    if value is None or value == {}:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{key} {readable(item)}" for key, item in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def draw(options: argparse.Namespace, location: Location, found: dict[str, Any]) -> None:
    """A contact sheet and mp4 of samples spread over the dataset."""
    if found["latent_shape"] is None:
        raise ConfigError(f"out ({location.shards}) must hold videos for --pictures: it holds prompts alone")
    codec = codec_of(found["codec"], models=options.models)
    count = min(options.samples, found["samples"])
    positions = np.linspace(0, found["samples"] - 1, count).round().astype(int).tolist()
    rows = samples_at(location, positions)
    frames = np.concatenate([to_uint8(codec.decode(torch.tensor(row["latents"])[None])) for row in rows])
    frames = frames[..., 0] if frames.shape[-1] == 1 else frames
    captions = [row["prompt"] for row in rows]
    name = found["teacher"]
    # Fewer than asked for where num_samples is wrong.
    numbered = [f"{position}: {caption}" for position, caption in zip(positions, captions, strict=False)]
    write_grid({name: frames}, numbered, options.pictures / "contact_sheet.png")
    shown = min(options.videos, count)
    if shown:
        write_comparison_mp4({name: frames[:shown]}, captions[:shown], options.pictures, fps=rows[0]["fps"])
    print(f"pictures are in {options.pictures}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
