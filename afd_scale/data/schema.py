"""What a dataset holds: MDS columns, and the facts beside their index.

A folder is `shard.*.mds[.zstd]` and `index.json` (MosaicML Streaming), `prompts.jsonl` (one line a distinct prompt) and
`dataset.json`. The last is written last: where it is, the dataset is complete. What could not be used is listed in
`rejects.jsonl`. A dataset holds videos of a teacher with their prompts, or prompts alone.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from afd_scale.config import ConfigError, one_line
from afd_scale.files import system_errors

SCHEMA_VERSION = 2
INDEX_FILE = "index.json"
FACTS_FILE = "dataset.json"
PROMPTS_FILE = "prompts.jsonl"
REJECTS_FILE = "rejects.jsonl"
HASH = "xxh64"

PROMPT_COLUMNS = {
    "prompt": "str",
    "prompt_id": "str",
    "text_embedding": "ndarray:float16",  # (n, E), without padding
    "meta": "json",
}
VIDEO_COLUMNS = {
    **PROMPT_COLUMNS,
    "latents": "ndarray:float16",  # (F, C, H, W)
    "teacher": "str",
    "fps": "float64",
}


@dataclass(frozen=True)
class PromptSample:
    """A prompt.

    Attributes:
        prompt, prompt_id: what is asked; equal ids share a prompt.
        text_embedding: (n, E) float16, finite, n at most the dataset's text length: readers add the zeros.
        meta: anything JSON holds.
    """

    prompt: str
    prompt_id: str
    text_embedding: NDArray[np.float16]
    meta: dict[str, Any]


@dataclass(frozen=True)
class TeacherSample(PromptSample):
    """A prompt with a video of the teacher.

    Attributes:
        latents: (F, C, H, W) float16, finite.
        teacher: who made the video.
        fps: frames a second of the video, not of its latents.
    """

    latents: NDArray[np.float16]
    teacher: str
    fps: float


@dataclass(frozen=True)
class DatasetFacts:
    """What holds for every sample of a dataset.

    Attributes:
        latent_shape: (F, C, H, W); None where there are prompts alone.
        text_shape: (T, E) of a text embedding with its padding.
        codec: what turned frames into latents.
        teacher: who made the videos.
        num_samples: videos, or prompts.
        provenance: settings of the source, for people and for making it again.
        schema_version: of the columns and of this file.
    """

    latent_shape: tuple[int, ...] | None
    text_shape: tuple[int, ...]
    codec: str
    teacher: str
    num_samples: int
    provenance: dict[str, Any]
    schema_version: int = SCHEMA_VERSION

    @property
    def columns(self) -> dict[str, str]:
        """Of its shards."""
        return PROMPT_COLUMNS if self.latent_shape is None else VIDEO_COLUMNS

    def save(self, folder: Path) -> None:
        (folder / FACTS_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path, field: str) -> "DatasetFacts":
        """Read `dataset.json`.

        Args:
            folder: of the dataset.
            field: the user's setting that names the folder, for the error.
        Raises:
            ConfigError: the file is absent, no JSON, of another schema version, or lacks a fact.
        """
        path = folder / FACTS_FILE
        where = f"{field} ({path}) must"
        with system_errors(f"{field} ({folder}) must hold {FACTS_FILE}, which is written last",
                           "; the dataset is not complete, make it again"):  # fmt: skip
            content = path.read_bytes()
        try:
            facts = json.loads(content)
        except ValueError as error:
            raise ConfigError(f"{where} be JSON: {one_line(error)}") from error
        version = facts.get("schema_version") if isinstance(facts, dict) else None
        if version != SCHEMA_VERSION:
            newer = isinstance(version, int) and version > SCHEMA_VERSION
            remedy = "a newer version of afd_scale wrote it, update this one" if newer else "make the dataset again"
            raise ConfigError(f"{where} have schema_version {SCHEMA_VERSION}: it has {version}; {remedy}")
        names = {item.name for item in fields(cls)}
        if set(facts) != names:
            raise ConfigError(f"{where} have exactly the keys {sorted(names)}: {sorted(names ^ set(facts))} differ")
        for name, fits, kind in (
            ("latent_shape", lambda value: value is None or _is_shape(value), "a list of integers"),
            ("text_shape", _is_shape, "a list of integers"),
            ("codec", lambda value: isinstance(value, str), "a text"),
            ("teacher", lambda value: isinstance(value, str), "a text"),
            ("num_samples", lambda value: isinstance(value, int) and value > 0, "a positive integer"),
        ):
            if not fits(facts[name]):
                raise ConfigError(f"{where} have {kind} as {name}: it has {facts[name]}")
        shapes = {name: facts[name] and tuple(facts[name]) for name in ("latent_shape", "text_shape")}
        return cls(**facts | shapes)


def problems(sample: Mapping[str, Any], facts: DatasetFacts) -> Iterator[str]:
    """What a sample, by its columns, has that contradicts the facts of its dataset."""
    text, (length, width) = sample["text_embedding"], facts.text_shape
    if text.ndim != 2 or len(text) > length or text.shape[1] != width:
        yield f"text_embedding ({text.shape}) must be at most {length} rows of {width} as in the dataset's facts"
    if facts.latent_shape is not None:
        has = {"latents": sample["latents"].shape, "teacher": sample["teacher"]}
        for name, expected in (("latents", facts.latent_shape), ("teacher", facts.teacher)):
            if has[name] != expected:
                yield f"{name} ({has[name]}) must be {expected} as in the dataset's facts"
    for name in ("latents", "text_embedding"):  # training would never get rid of such numbers
        values = sample.get(name)
        if values is not None and not np.isfinite(values).all():
            yield f"{name} must be finite: {int((~np.isfinite(values)).sum())} of {values.size} are not"


@dataclass(frozen=True)
class PromptEntry:
    """A distinct prompt of a dataset.

    Attributes:
        prompt_id, prompt: as in its samples.
        sample: position of the first of them.
        split: name of the group of prompts that it is of; None where the prompts name none.
    """

    prompt_id: str
    prompt: str
    sample: int
    split: str | None = None


def save_prompts(folder: Path, prompts: Sequence[PromptEntry]) -> None:
    """Write `prompts.jsonl`."""
    lines = (json.dumps(asdict(prompt)) + "\n" for prompt in prompts)
    (folder / PROMPTS_FILE).write_text("".join(lines))


def load_prompts(folder: Path, field: str) -> tuple[PromptEntry, ...]:
    """Read `prompts.jsonl`, sorted by prompt_id: the same order for every dataset of the same prompts.

    Raises:
        ConfigError: the file is absent or damaged.
    """
    path = folder / PROMPTS_FILE
    try:
        entries = [PromptEntry(**json.loads(line)) for line in path.read_text().splitlines()]
        kinds = {"sample": int, "prompt_id": str, "prompt": str, "split": str | None}
        if not all(isinstance(getattr(entry, name), kind) for entry in entries for name, kind in kinds.items()):
            raise TypeError("a prompt's sample is an integer, and its prompt_id, prompt and split are texts")
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{field} ({path}) must list the dataset's prompts, a JSON object a line: "
                          f"{one_line(error)}") from error  # fmt: skip
    return tuple(sorted(entries, key=lambda entry: entry.prompt_id))


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(size, int) for size in value)
