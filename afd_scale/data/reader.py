"""Read datasets of teacher videos: check one before training, stream its batches, look samples up.

Batches come from MosaicML Streaming, which keeps shards, downloads and shuffles. Its order is one list of samples an
epoch, dealt to ranks one by one, so the samples of a step are the same for every number of ranks. What it leaves to us:
cutting every epoch at the same step (it pads an epoch to the number of ranks), a position that belongs to no process,
and validating local shards.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash

from afd_scale.config import ConfigError, RunConfig
from afd_scale.config.run import DataConfig
from afd_scale.data.procedural import make_procedural_shards
from afd_scale.data.schema import COLUMNS, FACTS_FILE, HASH, INDEX_FILE, DatasetFacts, load_prompts
from afd_scale.data.storage import (
    FIELD,
    dataset_folder,
    download_lock,
    fetch_facts,
    is_remote,
    open_shards,
    open_stream,
)
from afd_scale.data.torchvision_ops import define_torchvision_ops
from afd_scale.types import Batch

_READ_BYTES = 1 << 24


def ensure_dataset(config: DataConfig) -> None:
    """Make the dataset of `config.source` where there is none; call it on one rank.

    Raises:
        ConfigError: there is no dataset and no source, the folder cannot be made, or its dataset is of another source.
    """
    if is_remote(config.shards):
        return
    folder = Path(config.shards)
    if not folder.exists():
        if config.source is None:
            raise _absent(folder)
        make_procedural_shards(config.source, folder, field=FIELD)
    elif config.source is not None:
        made_from = DatasetFacts.load(folder, FIELD).provenance.get("source")
        if made_from != config.source.model_dump(mode="json"):
            raise ConfigError(f"data.source ({config.source}) must be what {folder} was made from, {made_from}: "
                              "to read the folder as it is, give data.source=null")  # fmt: skip


def check_dataset(config: RunConfig) -> DatasetFacts:
    """Check that the run's dataset is complete, undamaged and of the run's shapes; call it on one rank.

    Every shard that is on this machine is hashed, for reading it again validates nothing, and local ones are unpacked
    here, where no other process does the same. Remote shards are validated as they arrive.

    Raises:
        ConfigError: names the first thing that is wrong.
    """
    folder = dataset_folder(config)
    fetch_facts(config)
    if not folder.is_dir():
        raise _absent(folder)
    facts = DatasetFacts.load(folder, FIELD)
    load_prompts(folder, FIELD)
    _check_fits(facts, config)
    shards = _load_index(folder)
    num_samples = sum(shard["samples"] for shard in shards)
    if num_samples != facts.num_samples:
        raise ConfigError(f"{FIELD} ({folder}) must have the {facts.num_samples} samples of {FACTS_FILE}: "
                          f"{INDEX_FILE} has {num_samples}; make it again")  # fmt: skip
    for shard in shards:
        if is_remote(config.data.shards):
            _check_cached(folder, shard)
        else:
            _check_shard(folder, shard)
    return facts


class TeacherStream:
    """This rank's share of one global batch after another, over epochs, without end.

    The samples of a step depend on the dataset, `data.global_batch`, `data.canonical_nodes` and `seed`, not on the
    number of ranks. The rest of an epoch that fills no batch is dropped. Every rank makes one and draws from it in
    step with the others; ranks come from torch.distributed, without it there is one.
    """

    def __init__(self, config: RunConfig) -> None:
        """Open the dataset; a collective.

        Args:
            config: whose dataset passed `check_dataset`.
        Raises:
            ConfigError: the global batch or the canonical nodes do not divide among the ranks.
        """
        data = config.data
        ranks = (dist.get_world_size() if dist.is_initialized() else 1) // config.parallel.sequence
        if data.global_batch % ranks:
            raise ConfigError(f"data.global_batch ({data.global_batch}) must be a multiple of the number of data ranks "
                              f"({ranks}): each takes an equal share")  # fmt: skip
        self._batch = data.global_batch // ranks
        self._global_batch = data.global_batch
        self._dataset = open_stream(config, self._batch)
        self._order = {
            "seed": config.seed,
            "data.global_batch": data.global_batch,
            "data.canonical_nodes": data.canonical_nodes,
            "data.shards": self._dataset.size,
        }
        self._steps_per_epoch = self._dataset.size // data.global_batch
        assert self._steps_per_epoch, "check_dataset refuses a global batch larger than the dataset"
        self._epoch = 0
        self._step_in_epoch = 0
        self._samples: Iterator[dict[str, Any]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of an epoch."""
        return self._steps_per_epoch

    def __iter__(self) -> "TeacherStream":
        return self

    def __next__(self) -> Batch:
        if self._step_in_epoch == self._steps_per_epoch:
            self._epoch, self._step_in_epoch, self._samples = self._epoch + 1, 0, None
        if self._samples is None:
            self._samples = self._start_epoch()
        rows = list(islice(self._samples, self._batch))
        assert len(rows) == self._batch, "an epoch holds whole batches up to steps_per_epoch"
        self._step_in_epoch += 1
        return _batch(rows)

    def state_dict(self) -> dict[str, int]:
        """The position after the last batch drawn, the same on every rank, and what the order depends on."""
        return {"epoch": self._epoch, "step_in_epoch": self._step_in_epoch, **self._order}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue behind the last batch drawn when `state` was taken, on any number of ranks; on every rank.

        Raises:
            ConfigError: the order of samples is not the one that the state is a position of.
        """
        for name, value in self._order.items():
            if state[name] != value:
                what = "samples" if name == "data.shards" else "the value"
                raise ConfigError(f"{name} ({value}) must be {state[name]}, {what} of the checkpoint: "
                                  "a position is resumed in the same order")  # fmt: skip
        self._epoch, self._step_in_epoch = state["epoch"], state["step_in_epoch"]
        self._samples = None

    def _start_epoch(self) -> Iterator[dict[str, Any]]:
        # The position is given anew for each epoch, so that nothing depends on the counter in shared memory. Every rank
        # writes the same; the iterator's first sample waits for all ranks of the machine.
        self._dataset.next_epoch = 0
        self._dataset.load_state_dict({
            "epoch": self._epoch,
            "sample_in_epoch": self._step_in_epoch * self._global_batch,
            "num_canonical_nodes": self._order["data.canonical_nodes"],
            "shuffle_seed": self._order["seed"],
            "initial_physical_nodes": None,
        })  # fmt: skip
        return iter(self._dataset)


def distinct_prompts(config: RunConfig) -> Batch:
    """Each prompt of the dataset with the first of its teacher videos, sorted by prompt_id.

    Raises:
        ConfigError: the dataset lists no prompts.
    """
    fetch_facts(config, again=False)
    prompts = load_prompts(dataset_folder(config), FIELD)
    return read_samples(config, [prompt.sample for prompt in prompts])


def read_samples(config: RunConfig, samples: Sequence[int]) -> Batch:
    """Look samples up by their position in the dataset, whatever else is reading it.

    Args:
        config: whose dataset passed `check_dataset`.
        samples: positions in [0, num_samples).
    """
    stream, shards = open_shards(config)
    ends = np.cumsum([shard.samples for shard in shards])
    prepared = set()
    rows = []
    for sample in samples:
        assert 0 <= sample < ends[-1], f"sample {sample} is outside of the dataset's {ends[-1]}"
        number = int(np.searchsorted(ends, sample, side="right"))
        shard = shards[number]
        if number not in prepared:
            with download_lock(config):
                stream.prepare_shard(shard)
            prepared.add(number)
        rows.append({**shard[sample - int(ends[number]) + shard.samples], "sample": sample})
    return _batch(rows)


def _batch(rows: Sequence[dict[str, Any]]) -> Batch:
    return Batch(
        prompts=tuple(row["prompt"] for row in rows),
        prompt_ids=tuple(row["prompt_id"] for row in rows),
        samples=tuple(row["sample"] for row in rows),
        text=torch.from_numpy(np.stack([row["text_embedding"] for row in rows]).astype(np.float32)),
        latents=torch.from_numpy(np.stack([row["latents"] for row in rows]).astype(np.float32)),
    )


def _absent(folder: Path) -> ConfigError:
    return ConfigError(f"{FIELD} ({folder}) must be an MDS dataset with {FACTS_FILE}: nothing is there; "
                       "make it with tools/make_shards.py")  # fmt: skip


def _check_fits(facts: DatasetFacts, config: RunConfig) -> None:
    data, student = config.data, config.student
    latent_shape = (data.latent_frames, student.latent_channels, data.latent_height, data.latent_width)
    if facts.latent_shape != latent_shape:
        raise ConfigError(f"{FIELD} ({data.shards}) must hold latents of shape {latent_shape} (data.latent_frames, "
                          "student.latent_channels, data.latent_height, data.latent_width): "
                          f"its {FACTS_FILE} says {facts.latent_shape}")  # fmt: skip
    text_shape = (student.text_length, student.text_dim)
    if facts.text_shape != text_shape:
        raise ConfigError(f"{FIELD} ({data.shards}) must hold text embeddings of shape {text_shape} "
                          "(student.text_length, student.text_dim): "
                          f"its {FACTS_FILE} says {facts.text_shape}")  # fmt: skip
    if data.global_batch > facts.num_samples:
        raise ConfigError(f"data.global_batch ({data.global_batch}) must be at most {facts.num_samples}, the samples "
                          f"of {data.shards}: an epoch is at least one batch")  # fmt: skip


def _load_index(folder: Path) -> list[dict[str, Any]]:
    path = folder / INDEX_FILE
    try:
        shards: list[dict[str, Any]] = json.loads(path.read_text())["shards"]
        for shard in shards:
            if set(shard["column_names"]) != set(COLUMNS):
                raise ValueError(f"a shard has the columns {shard['column_names']} instead of {sorted(COLUMNS)}")
            for part in (shard["raw_data"], shard["zip_data"]):
                if part and HASH not in part["hashes"]:
                    raise ValueError(f"{part['basename']} has no {HASH}")
    except OSError as error:
        raise ConfigError(f"{FIELD} ({path}) must be readable: {error.strerror}; make the dataset again") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{FIELD} ({path}) must be an MDS index of teacher videos: "
                          f"{' '.join(str(error).split())}; make the dataset again") from error  # fmt: skip
    return shards


def _check_shard(folder: Path, shard: dict[str, Any]) -> None:
    """Check what was written and, where that is compressed, what is or will be unpacked beside it."""
    written, unpacked = shard["zip_data"] or shard["raw_data"], shard["raw_data"]
    _check_file(folder / written["basename"], written["hashes"][HASH], "make the dataset again")
    if unpacked is written:
        return
    path = folder / unpacked["basename"]
    if not path.exists():
        _unpack(folder / written["basename"], path, shard["compression"])
    _check_file(path, unpacked["hashes"][HASH], "delete it, it is unpacked again")


def _check_cached(folder: Path, shard: dict[str, Any]) -> None:
    """Check what an earlier run has downloaded and unpacked."""
    path = folder / shard["raw_data"]["basename"]
    if path.exists():
        _check_file(path, shard["raw_data"]["hashes"][HASH], "delete it, it is downloaded again")


def _unpack(packed: Path, path: Path, compression: str) -> None:
    define_torchvision_ops()
    from streaming.base.compression import decompress

    growing = path.with_name(f".{path.name}.incomplete")
    try:
        growing.write_bytes(decompress(compression, packed.read_bytes()))
        growing.rename(path)
    except OSError as error:
        raise ConfigError(f"{FIELD} ({path.parent}) must be writable, for shards are unpacked in their folder: "
                          f"{error.strerror}; as file://{path.parent.absolute()} it is copied to data.cache"
                          ) from error  # fmt: skip


def _check_file(path: Path, expected: str, remedy: str) -> None:
    digest = xxhash.xxh64()
    try:
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
    except OSError as error:
        raise ConfigError(f"{FIELD} ({path}) must be readable: {error.strerror}; {remedy}") from error
    if digest.hexdigest() != expected:
        raise ConfigError(f"{FIELD} ({path}) must have {HASH} {expected}, it has {digest.hexdigest()}: "
                          f"the file is corrupt or truncated; {remedy}")  # fmt: skip
