"""Write a dataset: all of it, or nothing that reads.

A dataset grows in a hidden folder beside its place and is renamed when it is complete. Its shards are written one by
one, so that several processes can share them, and a job that was killed goes on with the next.
"""

import json
import shutil
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from afd_scale.config import ConfigError
from afd_scale.data.clips import Reject
from afd_scale.data.schema import (
    FACTS_FILE,
    HASH,
    INDEX_FILE,
    PROMPTS_FILE,
    REJECTS_FILE,
    DatasetFacts,
    PromptEntry,
    PromptSample,
    problems,
)
from afd_scale.files import sync, system_errors
from afd_scale.torchvision_ops import define_torchvision_ops

SHARD_BYTES = 1 << 26
COMPRESSIONS = ("zstd", "none")


@dataclass(frozen=True)
class Shard:
    """What is known of a written shard.

    Attributes:
        entry: its entry of the index; None where every clip was rejected, and there is no file.
        prompts: first samples of its distinct prompts; positions are within the shard.
        rejects: what could not be used.
    """

    entry: dict[str, Any] | None
    prompts: tuple[PromptEntry, ...]
    rejects: tuple[Reject, ...] = ()

    @property
    def samples(self) -> int:
        return 0 if self.entry is None else int(self.entry["samples"])


def write_shard(
    samples: Iterable[PromptSample], facts: DatasetFacts, folder: Path, number: int, compression: str = "zstd"
) -> Shard:
    """Write samples as one shard; a file of its name is there when it is complete.

    Args:
        folder: gains `shard.<number>.mds`, with a suffix where it is compressed.
        compression: one of COMPRESSIONS.
    Raises:
        ValueError: a sample contradicts the facts, or one prompt_id has two prompts.
    """
    define_torchvision_ops()
    from streaming import MDSWriter

    entry: dict[str, Any] | None = None
    prompts: dict[str, PromptEntry] = {}
    growing = folder / f".{number:05d}.{uuid.uuid4().hex[:8]}.incomplete"
    try:
        with MDSWriter(
            out=str(growing), columns=facts.columns, hashes=[HASH], size_limit=None,
            compression=None if compression == "none" else compression,
        ) as writer:  # fmt: skip
            for position, sample in enumerate(samples):
                for problem in problems(vars(sample), facts):
                    raise ValueError(f"sample {position}: {problem}")
                _note(prompts, PromptEntry(sample.prompt_id, sample.prompt, position, sample.meta.get("split")))
                writer.write(vars(sample))
        for entry in json.loads((growing / INDEX_FILE).read_text())["shards"]:  # one, or none without samples
            for part in filter(None, (entry["raw_data"], entry["zip_data"])):
                written = growing / part["basename"]
                part["basename"] = part["basename"].replace("00000", f"{number:05d}", 1)
                if written.exists():  # of a compressed shard the raw file is gone
                    sync(written)
                    written.replace(folder / part["basename"])
    finally:
        shutil.rmtree(growing, ignore_errors=True)
    return Shard(entry, tuple(prompts.values()))


def finish_dataset(
    shards: Sequence[Shard], facts: DatasetFacts, growing: Path, folder: Path, field: str
) -> DatasetFacts:
    """Make a dataset of a folder's shards: write what lies beside them, and give the folder its name.

    Args:
        shards: in their order.
        facts: are returned with `num_samples` set to what is there.
        growing: holds the shards' files and nothing else of a name that datasets have.
        folder: does not exist.
        field: the user's setting that names the folder, for errors.
    Raises:
        ConfigError: the folder exists.
        ValueError: there is no sample, or one prompt_id has two prompts.
    """
    prompts: dict[str, PromptEntry] = {}
    begin = 0
    for shard in shards:
        for prompt in shard.prompts:
            _note(prompts, replace(prompt, sample=begin + prompt.sample))
        begin += shard.samples
    if not begin:
        raise ValueError("samples must not be empty: a dataset of nothing trains nothing")
    index = {"version": 2, "shards": [shard.entry for shard in shards if shard.entry is not None]}
    (growing / INDEX_FILE).write_text(json.dumps(index, sort_keys=True))
    _write_lines(growing / PROMPTS_FILE, prompts.values())
    _write_lines(growing / REJECTS_FILE, (reject for shard in shards for reject in shard.rejects))
    written = replace(facts, num_samples=begin)
    (growing / FACTS_FILE).write_text(json.dumps(asdict(written), indent=2) + "\n")
    check_new_folder(folder, field)  # another run may have made it meanwhile; a rename replaces an empty folder
    growing.rename(folder)
    return written


def write_dataset(
    samples: Iterable[PromptSample],
    facts: DatasetFacts,
    folder: Path,
    shard_bytes: int = SHARD_BYTES,
    compression: str = "zstd",
) -> DatasetFacts:
    """Write samples that are at hand.

    Args:
        samples: of the facts' shapes and teacher.
        facts: are returned with `num_samples` set to what was written.
        folder: does not exist yet.
        shard_bytes: of latents and text, before compression.
        compression: one of COMPRESSIONS.
    Raises:
        ConfigError: the folder exists or cannot be made.
        ValueError: there is no sample, a sample contradicts the facts, or one prompt_id has two prompts.
    """
    check_new_folder(folder, "out")
    growing = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.incomplete")
    make_folder(growing, folder, "out")
    try:
        source, shards = iter(samples), list[Shard]()
        while block := list(islice(source, clips_of_shard(facts, shard_bytes))):
            shards.append(write_shard(block, facts, growing, len(shards), compression))
        return finish_dataset(shards, facts, growing, folder, "out")
    except BaseException:
        shutil.rmtree(growing, ignore_errors=True)
        raise


def clips_of_shard(facts: DatasetFacts, shard_bytes: int = SHARD_BYTES) -> int:
    """Samples that fill a shard."""
    latents = 0 if facts.latent_shape is None else int(np.prod(facts.latent_shape))
    return max(1, shard_bytes // (2 * (latents + int(np.prod(facts.text_shape)))))


def check_new_folder(folder: Path, field: str) -> None:
    """Raise ConfigError if there is something at `folder`."""
    if folder.exists() or folder.is_symlink():
        raise ConfigError(
            f"{field} ({folder}) must not exist yet: a dataset is written once; delete it or name another"
        )


def make_folder(folder: Path, out: Path, field: str) -> None:
    """Make a folder beside `out` and those above it; ConfigError where that cannot be."""
    with system_errors(f"{field} ({out}) must be in a writable folder"):
        folder.mkdir(parents=True, exist_ok=True)


def _write_lines(path: Path, rows: Iterable[PromptEntry | Reject]) -> None:
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))


def _note(prompts: dict[str, PromptEntry], entry: PromptEntry) -> None:
    first = prompts.setdefault(entry.prompt_id, entry)
    if first.prompt != entry.prompt:
        raise ValueError(f"sample {first.sample}: prompt_id ({first.prompt_id}) must name one prompt: "
                         f"it names {first.prompt!r} and {entry.prompt!r}")  # fmt: skip
