"""What is in a dataset, and whether all of it is as written."""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from afd_scale.config import ConfigError, one_line
from afd_scale.data.schema import HASH, REJECTS_FILE, DatasetFacts, load_prompts
from afd_scale.data.storage import Location, fetch_facts
from afd_scale.data.torchvision_ops import define_torchvision_ops
from afd_scale.data.validate import load_index


def describe(location: Location) -> dict[str, Any]:
    """Counts and facts of a dataset, from what lies beside its shards.

    Raises:
        ConfigError: it cannot be read.
    """
    fetch_facts(location)
    facts = DatasetFacts.load(location.folder, location.field)
    prompts = load_prompts(location.folder, location.field)
    shards = load_index(location, facts)
    words = [len(prompt.prompt.split()) for prompt in prompts]
    rejects = _rejects(location.folder)
    return {
        "samples": facts.num_samples,
        "prompts": len(prompts),
        "samples_per_prompt": facts.num_samples / len(prompts),
        "words_per_prompt": {"least": min(words), "mean": sum(words) / len(words), "most": max(words)},
        "splits": dict(sorted(Counter(prompt.split for prompt in prompts if prompt.split is not None).items())),
        "teacher": facts.teacher,
        "codec": facts.codec,
        "latent_shape": facts.latent_shape,
        "text_shape": facts.text_shape,
        "schema_version": facts.schema_version,
        "shards": len(shards),
        "bytes": sum((shard["zip_data"] or shard["raw_data"])["bytes"] for shard in shards),
        "bytes_unpacked": sum(shard["raw_data"]["bytes"] for shard in shards),
        "rejects": len(rejects),
        "reasons": dict(Counter(reject["reason"].partition(":")[0] for reject in rejects).most_common(5)),
        "provenance": facts.provenance,
    }


def validate(location: Location) -> Iterator[str]:
    """Read everything again: hashes, then every sample against the facts; one line for each thing that is wrong.

    A local dataset's folder is not written to.

    Raises:
        ConfigError: what lies beside the shards cannot be read.
    """
    fetch_facts(location)
    facts = DatasetFacts.load(location.folder, location.field)
    prompts = {prompt.prompt_id: prompt.prompt for prompt in load_prompts(location.folder, location.field)}
    seen: set[str] = set()
    found = 0
    for shard in load_index(location, facts):
        name = (shard["zip_data"] or shard["raw_data"])["basename"]
        try:
            samples = list(read_shard(location, shard))
        except (ValueError, OSError) as error:
            yield f"{name}: {one_line(error)}"
            found += shard["samples"]
            seen = seen | prompts.keys()  # nobody knows which of them are in it
            continue
        for position, sample in enumerate(samples):
            for problem in _problems(sample, facts, prompts):
                yield f"{name}: sample {found + position}: {problem}"
            seen.add(sample["prompt_id"])
        found += len(samples)
    if found != facts.num_samples:
        yield f"dataset.json: num_samples is {facts.num_samples}, the shards have {found}"
    for prompt_id in sorted(prompts.keys() - seen):
        yield f"prompts.jsonl: {prompt_id} is in no sample"


def samples_at(location: Location, positions: Sequence[int]) -> list[dict[str, Any]]:
    """Samples by their position, in ascending order; nothing is unpacked into the dataset's folder.

    Raises:
        ConfigError: a shard that holds one is not as it was written.
    """
    facts = DatasetFacts.load(location.folder, location.field)
    begin, rows = 0, []
    for shard in load_index(location, facts):
        end = begin + shard["samples"]
        wanted = [position - begin for position in positions if begin <= position < end]
        if wanted:
            try:
                samples = list(read_shard(location, shard))
            except (ValueError, OSError) as error:
                name = shard["raw_data"]["basename"]
                raise ConfigError(f"{location.field} ({name}) cannot be shown: {one_line(error)}"
                                  ) from error  # fmt: skip
            rows += [samples[position] for position in wanted]
        begin = end
    return rows


def read_shard(location: Location, shard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The samples of a shard, read from its files and nothing that was unpacked before.

    Raises:
        ValueError: a file is not what was written.
        OSError: it cannot be read.
    """
    define_torchvision_ops()
    from streaming.base.compression import decompress
    from streaming.base.format import reader_from_json

    stored = shard["zip_data"] or shard["raw_data"]
    content = _stored(location, stored["basename"])
    _check_hash(content, stored)
    if shard["zip_data"]:
        content = decompress(shard["compression"], content)
        _check_hash(content, shard["raw_data"])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / shard["raw_data"]["basename"]).write_bytes(content)
        # reader_from_json takes entries apart.
        reader = reader_from_json(folder, None, json.loads(json.dumps(shard)))
        for position in range(shard["samples"]):
            yield reader[position]


def _stored(location: Location, name: str) -> bytes:
    if not location.is_remote:
        return (location.folder / name).read_bytes()
    from streaming.base.storage import CloudDownloader

    remote = location.opening()["remote"].rstrip("/")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        try:
            CloudDownloader.get(remote).download(f"{remote}/{name}", str(path), 600.0)
        except Exception as error:  # every storage has its own
            raise ValueError(f"cannot be downloaded: {error}") from error
        return path.read_bytes()


def _check_hash(content: bytes, part: dict[str, Any]) -> None:
    digest = xxhash.xxh64(content).hexdigest()
    if digest != part["hashes"][HASH]:
        raise ValueError(f"must have {HASH} {part['hashes'][HASH]}, it has {digest}: corrupt or truncated")


def _problems(sample: dict[str, Any], facts: DatasetFacts, prompts: dict[str, str]) -> Iterator[str]:
    text = sample["text_embedding"]
    if text.ndim != 2 or len(text) > facts.text_shape[0] or text.shape[1] != facts.text_shape[1]:
        yield f"text_embedding ({text.shape}) must be at most {facts.text_shape}"
    if prompts.get(sample["prompt_id"]) != sample["prompt"]:
        yield f"prompt_id ({sample['prompt_id']}) must be listed in prompts.jsonl with its prompt"
    arrays = {"text_embedding": text}
    if facts.latent_shape is not None:
        arrays["latents"] = sample["latents"]
        if sample["latents"].shape != facts.latent_shape:
            yield f"latents ({sample['latents'].shape}) must be {facts.latent_shape}"
        if sample["teacher"] != facts.teacher:
            yield f"teacher ({sample['teacher']}) must be {facts.teacher}"
    for name, values in arrays.items():
        if not np.isfinite(values).all():
            yield f"{name} must be finite"


def _rejects(folder: Path) -> list[dict[str, str]]:
    path = folder / REJECTS_FILE
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except OSError:  # of a remote dataset, or written by other means
        return []
    except ValueError as error:
        raise ConfigError(f"out ({path}) must be a JSON object a line: {one_line(error)}") from error
