"""What is in a dataset, and whether all of it is as written."""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from afd_scale.config import ConfigError, one_line
from afd_scale.config.plain import UnreadableError
from afd_scale.data.clips import Reject
from afd_scale.data.schema import HASH, INDEX_FILE, REJECTS_FILE, problems
from afd_scale.data.storage import Location, download
from afd_scale.data.validate import contradictions, hash_of, load_beside
from afd_scale.files import checked_json
from afd_scale.torchvision_ops import define_torchvision_ops

_REJECT = TypeAdapter(Reject)


def describe(location: Location) -> dict[str, Any]:
    """Counts and facts of a dataset, from what lies beside its shards; None where that does not say.

    Raises:
        ConfigError: it cannot be read.
    """
    facts, prompts, shards = load_beside(location)
    reasons = _reject_reasons(location)
    return {
        "samples": facts.num_samples,
        "prompts": len(prompts),
        "samples_per_prompt": facts.num_samples / len(prompts) if prompts else None,
        "words_per_prompt": _spread([len(prompt.prompt.split()) for prompt in prompts]),
        "splits": dict(sorted(Counter(prompt.split for prompt in prompts if prompt.split is not None).items())),
        "teacher": facts.teacher,
        "codec": facts.codec,
        "latent_shape": facts.latent_shape,
        "text_shape": facts.text_shape,
        "schema_version": facts.schema_version,
        "shards": len(shards),
        "bytes": _bytes(_written(shard) for shard in shards),
        "bytes_unpacked": _bytes(shard["raw_data"] for shard in shards),
        "rejects": None if reasons is None else len(reasons),
        "reasons": dict(Counter(reason.partition(":")[0] for reason in reasons or ()).most_common(5)),
        "provenance": facts.provenance,
    }


def validate(location: Location, on_shard: Callable[[int, int], None] = lambda done, total: None) -> Iterator[str]:
    """Read everything again: hashes, then every sample against the facts; one line for each thing that is wrong.

    A local dataset's folder is not written to.

    Args:
        on_shard: called after each shard with the shards that are done and those there are in all.
    Raises:
        ConfigError: what lies beside the shards cannot be read.
    """
    facts, listed, shards = load_beside(location)
    prompts = {prompt.prompt_id: prompt.prompt for prompt in listed}
    seen: set[str] = set()
    for number, (begin, shard) in enumerate(_placed(shards), 1):
        name = _written(shard)["basename"]
        try:
            for position, sample in enumerate(read_shard(location, shard), begin):
                for problem in problems(sample, facts):
                    yield f"{name}: sample {position}: {problem}"
                if prompts.get(sample["prompt_id"]) != sample["prompt"]:
                    yield (f"{name}: sample {position}: prompt_id ({sample['prompt_id']}) must be listed in "
                           "prompts.jsonl with its prompt")  # fmt: skip
                seen.add(sample["prompt_id"])
        except Exception as error:  # damage takes any form, and the other shards are to be read
            yield f"{name}: {_reason(error)}"
            seen |= prompts.keys()  # nobody knows which of them are in it
        on_shard(number, len(shards))
    yield from contradictions(facts, listed, shards)
    for prompt_id in sorted(prompts.keys() - seen):
        yield f"prompts.jsonl: {prompt_id} is in no sample"


def samples_at(location: Location, positions: Sequence[int]) -> list[dict[str, Any]]:
    """Samples by their distinct positions, in ascending order; nothing is unpacked into the dataset's folder.

    Raises:
        ConfigError: a shard that holds one is not as it was written.
    """
    rows = []
    for begin, shard in _placed(load_beside(location)[2]):
        if any(begin <= position < begin + shard["samples"] for position in positions):
            try:
                rows += [row for at, row in enumerate(read_shard(location, shard), begin) if at in positions]
            except Exception as error:  # damage takes any form
                name = _written(shard)["basename"]
                raise ConfigError(f"{location.field} ({name}) cannot be shown: {_reason(error)}") from error
    return rows


def fps_of(location: Location) -> float | None:
    """Frames a second of a dataset's videos, as it was made, else as its first sample says; None of prompts alone.

    Raises:
        ConfigError: the dataset cannot be read.
    """
    facts, _, _ = load_beside(location)
    if facts.latent_shape is None:
        return None
    form = facts.provenance.get("form")
    said = form if isinstance(form, dict) and "fps" in form else samples_at(location, [0])[0]
    return float(said["fps"])


def _placed(shards: Sequence[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Shards with the position of their first sample."""
    return zip(accumulate((shard["samples"] for shard in shards), initial=0), shards, strict=False)


def read_shard(location: Location, shard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The samples of a shard one by one, read from its files and nothing that was unpacked before.

    Raises:
        Exception: of any kind, for the file or its entry may be damaged in any way; ValueError where we find it.
    """
    define_torchvision_ops()
    from streaming.base.compression import decompress
    from streaming.base.format import reader_from_json

    with tempfile.TemporaryDirectory() as folder:
        path = _file(location, _written(shard)["basename"], Path(folder))
        _check_file(path, _written(shard))
        if shard["zip_data"]:
            packed, path = path, Path(folder) / shard["raw_data"]["basename"]
            path.write_bytes(decompress(shard["compression"], packed.read_bytes()))
            _check_file(path, shard["raw_data"])
        reader = reader_from_json(str(path.parent), None, deepcopy(shard))  # it takes entries apart
        held = int(np.fromfile(path, np.uint32, 1)[0])  # MDS begins with it
        if held != shard["samples"]:
            raise ValueError(f"must have the {shard['samples']} samples of {INDEX_FILE}, it has {held}")
        if len(shard["column_sizes"]) != len(shard["column_names"]):
            raise ValueError(f"column_sizes ({shard['column_sizes']}) must be one for each of {shard['column_names']}")
        for position in range(held):
            yield reader[position]


def _written(shard: dict[str, Any]) -> Any:
    """The entry of a shard's file as it was written."""
    return shard["zip_data"] or shard["raw_data"]


def _file(location: Location, name: str, copies: Path) -> Path:
    """A file of a dataset; of a remote one a copy."""
    if not location.is_remote:
        return location.folder / name
    download(location, name, copies / name)
    return copies / name


def _check_file(path: Path, part: dict[str, Any]) -> None:
    size, digest = path.stat().st_size, hash_of(path)
    if size != part["bytes"]:
        raise ValueError(f"must have the {part['bytes']} bytes of {INDEX_FILE}, it has {size}")
    if digest != part["hashes"][HASH]:
        raise ValueError(f"must have {HASH} {part['hashes'][HASH]}, it has {digest}: corrupt")


def _reason(error: Exception) -> str:
    """In one line; ours and the system's say what is wrong, others hardly without their type."""
    return one_line(error if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}")


def _spread(counts: Sequence[int]) -> dict[str, float] | None:
    return {"least": min(counts), "mean": sum(counts) / len(counts), "most": max(counts)} if counts else None


def _bytes(parts: Iterable[dict[str, Any]]) -> int | None:
    """Of shards; None where one lacks it, which `validate` names."""
    sizes = [part.get("bytes") for part in parts]
    known = [size for size in sizes if isinstance(size, int)]
    return sum(known) if len(known) == len(sizes) else None


def _reject_reasons(location: Location) -> list[str] | None:
    """Why clips were left out; None without the file, which datasets that were written by other means may lack."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            content = _file(location, REJECTS_FILE, Path(folder)).read_bytes()
        except (ValueError, OSError):  # storages say in many ways that it is absent, and gave the index a moment ago
            return None
    try:
        return [checked_json(line, _REJECT).reason for line in content.splitlines()]
    except UnreadableError as error:
        raise ConfigError(f"{location.field} ({location.folder / REJECTS_FILE}) must be a JSON object with a reason a "
                          f"line: {error}") from error  # fmt: skip
