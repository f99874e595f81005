"""Small datasets in place of a run's: cut out of its own where they are here, else of noise."""

from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from afd_scale.config import ConfigError, LostInputError, RunConfig
from afd_scale.data.reader import read_rows
from afd_scale.data.schema import DatasetFacts, PromptSample, TeacherSample
from afd_scale.data.storage import Location, evaluation_prompts, extra_prompts, teacher_data
from afd_scale.data.teachers.prompts import prompt_id_of
from afd_scale.data.validate import load_beside
from afd_scale.data.writer import write_dataset

IDENTITY_PIXELS = 48  # channels of the toy world's codec: 3 frames of 4 x 4 pixels
COLOURS = ("red", "blue")
TEACHER = "stand-in"

Made = tuple[str, str, str, str, bool]  # field, what it names, form in words, path, whether the real one is here


def make_shards_small(small: RunConfig, config: RunConfig, folder: Path) -> Iterator[Made]:
    """Write a small dataset for each that a run reads; the toy world's is made by the run itself.

    Args:
        small: the shrunk config, with the places of the real datasets.
        config: as it runs on the cluster.
        folder: gets them.
    """
    if small.data.source is not None:
        yield ("data.shards", small.data.shards, "the toy world's clips", str(folder / "shards"), False)
    else:
        yield _small(teacher_data(config), small, config, folder / "shards")
    extra = extra_prompts(config)
    if extra is not None:
        yield _small(extra, small, config, folder / "prompts", with_videos=False)
    if config.evaluation.prompts is not None:
        with_videos = config.data.start_frames > 0  # which give the clips their starts
        yield _small(evaluation_prompts(config), small, config, folder / "evaluation", with_videos=with_videos)


def _small(real: Location, small: RunConfig, config: RunConfig, folder: Path, with_videos: bool = True) -> Made:
    count = max(8, 2 * small.data.global_batch, 2 * small.data.prompts_per_step)
    cut = _cut(real, small, config, count, folder.with_name(f".{folder.name}.copies"))
    facts, samples = cut or _noise(small, count, with_videos)
    write_dataset(samples, facts, folder)
    there = len(samples)
    form = f"{there} of its samples, cut to size" if cut else f"{there} samples of noise"
    return real.field, real.shards, form, str(folder), cut is not None


def _cut(
    real: Location, small: RunConfig, config: RunConfig, count: int, copies: Path
) -> tuple[DatasetFacts, list[PromptSample]] | None:
    """Corners of a dataset's own samples; None where it is elsewhere, or not of the config's shapes.

    Args:
        copies: folder for the shards that they are read from, so that nothing is written beside the real ones.
    """
    if real.is_remote or not Path(real.shards).is_dir():
        return None
    try:
        facts, prompts, _ = load_beside(real)
        data, student = config.data, config.student
        shape = (data.latent_frames, student.latent_channels, data.latent_height, data.latent_width)
        if facts.latent_shape not in (None, shape) or facts.text_shape != (student.text_length, student.text_dim):
            return None
        is_evaluated = real.shards == evaluation_prompts(config).shards
        split = config.evaluation.split if is_evaluated else None
        wanted = [entry.sample for entry in prompts if split in (None, entry.split)]
        positions = list(islice(cycle(sorted(wanted)[:count]), count))
        copy = Location(f"file://{Path(real.shards).absolute()}", copies, real.field)
        load_beside(copy)
        rows = list(read_rows(copy, positions))
    except (ConfigError, LostInputError):  # the checks at full size say why
        return None
    return _facts(small, facts.codec, facts.teacher, facts.latent_shape is not None), _corners(rows, small)


def _corners(rows: Sequence[dict[str, Any]], small: RunConfig) -> list[PromptSample]:
    data, student = small.data, small.student
    samples: list[PromptSample] = []
    for row in rows:
        text = row["text_embedding"][: student.text_length, : student.text_dim]
        said = {name: row[name] for name in ("prompt", "prompt_id", "meta")}
        if "latents" in row:
            latents = row["latents"][: data.latent_frames, :, : data.latent_height, : data.latent_width]
            said |= {"latents": latents, "teacher": row["teacher"], "fps": row["fps"]}
        samples.append((TeacherSample if "latents" in row else PromptSample)(text_embedding=text, **said))
    return samples


def _noise(small: RunConfig, count: int, with_videos: bool) -> tuple[DatasetFacts, list[PromptSample]]:
    data, student, random = small.data, small.student, np.random.default_rng(small.seed)
    shape = (data.latent_frames, student.latent_channels, data.latent_height, data.latent_width)
    is_identity = small.codec.name == "identity" and student.latent_channels % IDENTITY_PIXELS == 0
    meta = {} if small.evaluation.split is None else {"split": small.evaluation.split}
    samples: list[PromptSample] = []
    for number in range(count):
        prompt = f"a {COLOURS[number % len(COLOURS)]} ball falls on {number}"
        text = random.standard_normal((min(5, student.text_length), student.text_dim)).astype(np.float16)
        said: dict[str, Any] = {
            "prompt": prompt, "prompt_id": prompt_id_of(prompt), "text_embedding": text, "meta": meta,
        }  # fmt: skip
        if with_videos:
            latents = random.standard_normal(shape).astype(np.float16)
            samples.append(TeacherSample(**said, latents=latents, teacher=TEACHER, fps=8.0 if is_identity else 16.0))
        else:
            samples.append(PromptSample(**said))
    return _facts(small, "identity:3x4x4" if is_identity else "wan:4x8x8", TEACHER, with_videos), samples


def _facts(small: RunConfig, codec: str, teacher: str, with_videos: bool) -> DatasetFacts:
    data, student = small.data, small.student
    shape = (data.latent_frames, student.latent_channels, data.latent_height, data.latent_width)
    return DatasetFacts(
        shape if with_videos else None, (student.text_length, student.text_dim), codec, teacher, 1,
        {"source": {"name": TEACHER}},
    )  # fmt: skip
