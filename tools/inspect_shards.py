"""Look into a dataset of shards.

    tools/inspect_shards.py OUT [--json]              counts, schema, prompts
    tools/inspect_shards.py OUT --validate            read everything, name each corrupt shard
    tools/inspect_shards.py OUT --pictures DIR        a contact sheet and a few mp4
    tools/inspect_shards.py OUT --against PATH        what gives its videos away to a judge, beside what they show

OUT is a folder or a URL. PATH is a folder of videos, their prompts as for tools/evaluate.py; or the folder of a run,
whose base's clips are taken. Both sides are brought to one form, the lesser of the two in size, frame rate and length.
Latents of Wan's codec need its VAE for what looks at frames: --models DIR, as for make_shards.

Exit 0: done, and with --validate nothing is wrong; what gives videos away is not wrong. Exit 2: bad input, or something
is wrong, a line each.
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
from afd_scale.evaluation.clip_sets import ClipSet, FolderClips, ShardClips
from afd_scale.evaluation.run_clips import RunClips, side_by_side
from afd_scale.evaluation.shortcut_check import Checked, check_shortcuts, table
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
    parser.add_argument("--against", type=Path, metavar="PATH", help="videos or run to be told apart from")
    parser.add_argument("--clips", type=int, default=64, help="of a side at most, spread evenly (64)")
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
    if options.against is not None:
        check_against(options)
    found = describe(location)
    if not options.json:
        show(found)
    corrupt: list[str] = []
    more: dict[str, Any] = {}
    if options.validate:
        with progress("Shards") as on_shard:
            more["corrupt"] = corrupt = list(validate(location, on_shard))
        if not options.json:
            print("", *corrupt or ["everything was read and is as it was written"], sep="\n")
    if options.against is not None and not corrupt:
        checked = told_apart(options, location)
        more["against"] = checked.as_json()
        if not options.json:
            print("", table(checked), sep="\n")
    if options.json:
        print(json.dumps(found | more))
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


def check_against(options: argparse.Namespace) -> None:
    """Likewise."""
    against = options.against
    if options.clips < 1:
        raise ConfigError(f"clips ({options.clips}) must be at least 1: they are told apart")
    if not against.is_dir():
        raise ConfigError(f"against ({against}) must be a folder of videos, or of a run: there is none")
    if side_by_side(against):
        raise ConfigError(f"against ({against}) must hold videos of one side: a run's samples show several next to "
                          "each other; give the run's folder")  # fmt: skip


def told_apart(options: argparse.Namespace, location: Location) -> Checked:
    """What tells the dataset's videos from those of a folder, or of a run's base."""
    teacher, against = ShardClips(location, options.models), options.against
    other: ClipSet
    if (against / "config.yaml").is_file():
        other = RunClips(against, teacher.form.fps, location.cache, "against")
    else:
        other = FolderClips(against, "against")
    return check_shortcuts(teacher, other, options.clips)


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
