"""Read datasets of teacher videos: stream their batches, look samples up.

Batches come from MosaicML Streaming, which keeps shards, downloads and shuffles. Its order is one list of samples an
epoch, dealt to ranks one by one, so the samples of a step are the same for every number of ranks. What it leaves to us:
cutting every epoch at the same step (it pads an epoch to the number of ranks), and a position that belongs to no
process.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from afd_scale.config import ConfigError, RunConfig
from afd_scale.data.schema import load_prompts
from afd_scale.data.storage import Location, extra_prompts, fetch_facts, teacher_data
from afd_scale.data.validate import shards_digest
from afd_scale.types import Batch, Prompts, Videos


class SampleStream:
    """This rank's share of one global batch of samples after another, over epochs, without end.

    The samples of a step depend on the dataset, the global batch, `data.canonical_nodes` and `seed`, not on the number
    of ranks. The rest of an epoch that fills no batch is dropped. Every rank makes one and draws from it in step with
    the others; ranks come from torch.distributed, without it there is one.
    """

    def __init__(self, location: Location, config: RunConfig, global_batch: int, batch_field: str) -> None:
        """Open the dataset; a collective.

        Args:
            batch_field: the user's setting that is the global batch, for errors.
        Raises:
            ConfigError: the global batch or the canonical nodes do not divide among the ranks.
        """
        ranks = (dist.get_world_size() if dist.is_initialized() else 1) // config.parallel.sequence
        if global_batch % ranks:
            raise ConfigError(f"{batch_field} ({global_batch}) must be a multiple of the number of data ranks "
                              f"({ranks}): each takes an equal share")  # fmt: skip
        self._batch, self._global_batch = global_batch // ranks, global_batch
        from afd_scale.data.streams import open_stream

        self._dataset = open_stream(location, config, self._batch)
        self._order = {
            "seed": config.seed,
            batch_field: global_batch,
            "data.canonical_nodes": config.data.canonical_nodes,
            location.field: shards_digest(location),
        }
        self.size: int = self._dataset.size
        self.steps_per_epoch = self.size // global_batch
        assert self.steps_per_epoch, "checks refuse a global batch larger than the dataset"
        self._epoch = 0
        self._step_in_epoch = 0
        self._samples: Iterator[dict[str, Any]] | None = None

    def __next__(self) -> list[dict[str, Any]]:
        if self._step_in_epoch == self.steps_per_epoch:
            self._epoch, self._step_in_epoch, self._samples = self._epoch + 1, 0, None
        if self._samples is None:
            self._check_failure()
            self._samples = self._start_epoch()
        rows = list(islice(self._samples, self._batch))
        self._check_failure()
        assert len(rows) == self._batch, "an epoch holds whole batches up to steps_per_epoch"
        self._step_in_epoch += 1
        return rows

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch drawn, the same on every rank, and what the order depends on."""
        return {"epoch": self._epoch, "step_in_epoch": self._step_in_epoch, **self._order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the last batch drawn when `state` was taken, on any number of ranks; on every rank.

        Raises:
            ConfigError: the order of samples is not the one that the state is a position of.
        """
        for name, value in self._order.items():
            if state.get(name) != value:
                what = "the hash of its shards in" if name in ("data.shards", "data.prompts") else "the value of"
                raise ConfigError(f"{name} ({value}) must be {state.get(name)}, {what} the checkpoint: "
                                  "a position is resumed in the same order")  # fmt: skip
        self._epoch, self._step_in_epoch = state["epoch"], state["step_in_epoch"]
        self._samples = None

    def close(self) -> None:
        """End the threads that prepare shards."""
        self._dataset.close()

    def _check_failure(self) -> None:
        if self._dataset.failure is not None:
            raise self._dataset.failure

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


class TeacherStream:
    """This rank's share of one step's batch after another: prompts with teacher videos, then extra prompts.

    Every rank makes one and draws from it in step with the others; see `SampleStream`.

    Attributes:
        steps_per_epoch: global batches of an epoch of the teacher's videos.
    """

    def __init__(self, config: RunConfig) -> None:
        """Open the datasets of a config that passed `check_dataset`; raises what `SampleStream` does."""
        data, extra = config.data, extra_prompts(config)
        self._text_length = config.student.text_length
        self._teacher = SampleStream(teacher_data(config), config, data.global_batch, "data.global_batch")
        self.steps_per_epoch = self._teacher.steps_per_epoch
        self._extra = None
        if extra is not None:
            self._extra = SampleStream(extra, config, data.prompts_per_step, "data.prompts_per_step")

    def __iter__(self) -> "TeacherStream":
        return self

    def __next__(self) -> Batch:
        rows, extra = next(self._teacher), [] if self._extra is None else next(self._extra)
        teacher = videos_of(rows, self._text_length)
        if not extra:
            return Batch(teacher, teacher.prompts[:0])
        # Positions of extra prompts go on behind the videos', so that randomness is theirs alone.
        extra = [{**row, "sample": self._teacher.size + row["sample"]} for row in extra]
        return Batch(teacher, prompts_of(extra, self._text_length))

    def state_dict(self) -> dict[str, Any]:
        """As of `SampleStream`."""
        extra = {} if self._extra is None else {"extra_prompts": self._extra.state_dict()}
        return {**self._teacher.state_dict(), **extra}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As of `SampleStream`."""
        self._teacher.load_state_dict(state)
        if self._extra is not None:
            self._extra.load_state_dict(state.get("extra_prompts", {}))

    def close(self) -> None:
        """End the threads that read ahead."""
        self._teacher.close()
        if self._extra is not None:
            self._extra.close()


class Ahead:
    """A stream that draws its next batch while the last one is trained on.

    A `pinned` one lays batches into memory that a GPU copies from by itself.

    Attributes:
        waited_seconds: for batches, in all.
    """

    def __init__(self, stream: TeacherStream, pinned: bool):
        self._stream, self._pinned = stream, pinned
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._coming: Future[tuple[Batch, dict[str, Any]]] | None = None
        self._state = stream.state_dict()
        self.waited_seconds = 0.0

    def __next__(self) -> Batch:
        began = time.monotonic()
        coming = self._coming or self._pool.submit(self._draw)
        batch, self._state = coming.result()
        self._coming = self._pool.submit(self._draw)
        self.waited_seconds += time.monotonic() - began
        return batch

    def _draw(self) -> tuple[Batch, dict[str, Any]]:
        batch = next(self._stream)
        return batch.pin_memory() if self._pinned else batch, self._stream.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch handed out."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As of `SampleStream`."""
        if self._coming is not None:
            self._coming.result()
            self._coming = None
        self._stream.load_state_dict(state)
        self._state = state

    def close(self) -> None:
        """Let the batch that is being drawn end, and the stream."""
        self._pool.shutdown()
        self._stream.close()


def distinct_prompts(location: Location, text_length: int, split: str | None = None) -> Prompts:
    """Each prompt of a dataset, sorted by id, under the position of its first sample; no video is kept in memory.

    Args:
        location: of a dataset that is checked.
        text_length: rows of an embedding with its padding.
        split: of the prompts; None takes all.
    Raises:
        ConfigError: the dataset lists no prompts, or none of this split.
    """
    fetch_facts(location, again=False)
    prompts = load_prompts(location.folder, location.field)
    chosen = [prompt.sample for prompt in prompts if split in (None, prompt.split)]
    if not chosen:
        there = sorted({prompt.split for prompt in prompts if prompt.split is not None})
        raise ConfigError(f"evaluation.split ({split}) must be one of {there}, the splits of {location.shards}: "
                          "no prompt is of another")  # fmt: skip
    rows = ({name: value for name, value in row.items() if name != "latents"} for row in read_rows(location, chosen))
    return prompts_of(list(rows), text_length)


def read_rows(location: Location, samples: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Samples by their position, as columns and `sample`, the position, one by one, whatever else is reading them.

    Args:
        location: of a dataset that is checked.
        samples: positions in [0, num_samples).
    Raises:
        LostInputError: a shard is not as it was written.
    """
    from afd_scale.data.streams import open_shards

    stream, shards = open_shards(location)
    prepare = cache(stream.prepare_shard)  # once each
    ends = np.cumsum([shard.samples for shard in shards])
    for sample in samples:
        assert 0 <= sample < ends[-1], "check_files refuses other positions"
        number = int(np.searchsorted(ends, sample, side="right"))
        shard = shards[number]
        prepare(shard)
        yield {**shard[sample - int(ends[number]) + shard.samples], "sample": sample}


def videos_of(rows: Sequence[dict[str, Any]], text_length: int) -> Videos:
    """Samples with a video."""
    latents = torch.from_numpy(np.stack([row["latents"] for row in rows])).float()
    return Videos(prompts_of(rows, text_length), latents, fps=rows[0]["fps"])


def prompts_of(rows: Sequence[dict[str, Any]], text_length: int) -> Prompts:
    """What samples ask for, at least one; keyed by their positions."""
    embeddings = torch.zeros(len(rows), text_length, rows[0]["text_embedding"].shape[1])
    for place, row in zip(embeddings, rows, strict=True):
        place[: len(row["text_embedding"])] = torch.from_numpy(row["text_embedding"].astype(np.float32))
    texts, ids, keys = (tuple(row[column] for row in rows) for column in ("prompt", "prompt_id", "sample"))
    return Prompts(texts, ids, keys, embeddings)
