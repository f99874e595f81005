"""What a dataset holds: MDS columns, and the facts beside their index.

A folder is `shard.*.mds[.zstd]` and `index.json` (MosaicML Streaming), `prompts.jsonl` (one line a distinct prompt) and
`dataset.json`. The last is written last: where it is, the dataset is complete. What could not be used is listed in
`rejects.jsonl`. A dataset holds videos of a teacher with their prompts, or prompts alone.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from afd_scale.config import ConfigError, one_line

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
        try:
            facts = json.loads(path.read_text())
        except OSError as error:
            raise ConfigError(f"{field} ({folder}) must hold {FACTS_FILE}, which is written last: {error.strerror}; "
                              "the dataset is not complete, make it again") from error  # fmt: skip
        except ValueError as error:
            raise ConfigError(f"{field} ({path}) must be JSON: {one_line(error)}") from error
        _check_version(facts.get("schema_version") if isinstance(facts, dict) else None, f"{field} ({path})")
        names = {item.name for item in fields(cls)}
        if set(facts) != names:
            raise ConfigError(f"{field} ({path}) must have exactly the keys {sorted(names)}: "
                              f"{sorted(names ^ set(facts))} differ")  # fmt: skip
        for name in ("latent_shape", "text_shape"):
            if facts[name] is not None or name == "text_shape":
                facts[name] = _shape(facts[name], f"{field} ({path})", name)
        for name in ("codec", "teacher"):
            if not isinstance(facts[name], str):
                raise ConfigError(f"{field} ({path}) must have a text as {name}: it has {facts[name]}")
        if not isinstance(facts["num_samples"], int) or facts["num_samples"] < 1:
            raise ConfigError(f"{field} ({path}) must have a positive num_samples: it has {facts['num_samples']}")
        return cls(**facts)


def _check_version(version: Any, where: str) -> None:
    if version == SCHEMA_VERSION:
        return
    newer = isinstance(version, int) and version > SCHEMA_VERSION
    remedy = "a newer version of afd_scale wrote it, update this one" if newer else "make the dataset again"
    raise ConfigError(f"{where} must have schema_version {SCHEMA_VERSION}: it has {version}; {remedy}")


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


def _shape(value: Any, where: str, name: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(isinstance(size, int) for size in value):
        raise ConfigError(f"{where} must have a list of integers as {name}: it has {value}")
    return tuple(value)
