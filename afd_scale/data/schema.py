"""What a dataset holds: MDS columns, and the facts beside their index.

A folder is `shard.*.mds[.zstd]` and `index.json` (MosaicML Streaming), `prompts.jsonl` (one line a distinct prompt) and
`dataset.json`. The last is written last: where it is, the dataset is complete. What could not be used is listed in
`rejects.jsonl`. A dataset holds videos of a teacher with their prompts, or prompts alone.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, TypeAdapter

from afd_scale.config import ConfigError
from afd_scale.config.plain import UnreadableError, parse_json
from afd_scale.files import checked, read_json_lines, system_errors

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

    __pydantic_config__ = ConfigDict(extra="forbid")

    latent_shape: tuple[int, ...] | None
    text_shape: tuple[int, ...]
    codec: str
    teacher: str
    num_samples: Annotated[int, Field(gt=0)]
    provenance: dict[str, Any]
    schema_version: int = SCHEMA_VERSION

    @property
    def columns(self) -> dict[str, str]:
        """Of its shards."""
        return PROMPT_COLUMNS if self.latent_shape is None else VIDEO_COLUMNS

    @classmethod
    def load(cls, folder: Path, field: str) -> "DatasetFacts":
        """Read `dataset.json`.

        Args:
            field: the user's setting that names the folder, for the error.
        Raises:
            ConfigError: the file is absent, of another schema version, or damaged.
        """
        path = folder / FACTS_FILE
        where = f"{field} ({path}) must"
        with system_errors(f"{field} ({folder}) must hold {FACTS_FILE}, which is written last",
                           "; the dataset is not complete, make it again"):  # fmt: skip
            content = path.read_bytes()
        try:
            facts = parse_json(content)
            version = facts.get("schema_version") if isinstance(facts, dict) else None
            if version == SCHEMA_VERSION:
                return checked(facts, _FACTS)
        except UnreadableError as error:
            raise ConfigError(f"{where} hold the facts of a dataset: {error}") from error
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        remedy = "a newer version of afd_scale wrote it, update this one" if newer else "make the dataset again"
        raise ConfigError(f"{where} have schema_version {SCHEMA_VERSION}: it has {version}; {remedy}")


_FACTS = TypeAdapter(DatasetFacts)


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

    __pydantic_config__ = ConfigDict(extra="forbid")

    prompt_id: str
    prompt: str
    sample: int
    split: str | None = None


_PROMPT = TypeAdapter(PromptEntry)


def load_prompts(folder: Path, field: str) -> tuple[PromptEntry, ...]:
    """Read `prompts.jsonl`, sorted by prompt_id: the same order for every dataset of the same prompts.

    Raises:
        ConfigError: the file is absent or damaged.
    """
    path = folder / PROMPTS_FILE
    entries = read_json_lines(path, field, "list the dataset's prompts, a JSON object a line", _PROMPT)
    return tuple(sorted(entries, key=lambda entry: entry.prompt_id))
