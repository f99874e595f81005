"""How fast one process reads shards, as training reads them, and how fast a large job must be fed."""

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from afd_scale.benchmarks.object_storage import object_storage, upload
from afd_scale.config import RunConfig
from afd_scale.data.check import check_dataset
from afd_scale.data.environment import in_environment
from afd_scale.data.reader import Ahead, TeacherStream
from afd_scale.data.schema import DatasetFacts, TeacherSample
from afd_scale.data.writer import write_dataset

LATENTS, TEXT = (21, 16, 60, 104), (512, 4096)  # 81 frames of 832x480, and UMT5-XXL
_WAIT_STEPS, _WAIT_STEP_SECONDS = 8, 0.25  # steps that only sleep, while the next batch is drawn
GPUS, GLOBAL_BATCH = 256, 256


def benchmark_data(
    samples: int, repeats: int, step_seconds: float, text_rows: int,
    latents: tuple[int, ...] = LATENTS, text: tuple[int, int] = TEXT,
) -> dict[str, Any]:  # fmt: skip
    """Read a dataset of random latents, by variants in turns; every reading starts with an empty cache.

    Local shards are unpacked and hashed before the clock runs, as at the start of training, and so lie in the page
    cache. Shards on S3 (moto's server, on this machine) are downloaded, unpacked and validated while it runs.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        storage = stack.enter_context(object_storage()) if find_spec("moto") else None
        stack.enter_context(in_environment(storage or {}))
        shards = {
            name: _write(Path(folder) / name, samples, latents, (text_rows, text[1]), text, name)
            for name in ("zstd", "none")
        }
        on_disk = {name: sum(path.stat().st_size for path in at.glob("shard.*")) for name, at in shards.items()}
        urls = {f"local, {name}": str(at) for name, at in shards.items()}
        if storage is not None:
            urls |= {f"s3, {name}": upload(storage, at, name) for name, at in shards.items()}
        seconds: dict[str, list[float]] = {name: [] for name in urls}
        waits: dict[str, list[float]] = {name: [] for name in urls}
        for _ in range(repeats):
            for name, url in urls.items():
                for measure, found in ((_seconds, seconds), (_wait_share, waits)):
                    with tempfile.TemporaryDirectory(dir=folder) as cache:
                        found[name].append(measure(_config(url, Path(cache), latents, text), samples))
    rates = {name: samples / statistics.median(times) for name, times in seconds.items()}
    needed = GLOBAL_BATCH / step_seconds
    return {
        "samples_per_second": rates,
        "bytes_per_sample": {name: size / samples for name, size in on_disk.items()},
        "needed_by_job": {"gpus": GPUS, "global_batch": GLOBAL_BATCH, "step_seconds": step_seconds,
                          "samples_per_second": needed, "samples_per_second_per_gpu": needed / GPUS},
        "wait_share_of_step": {name: statistics.median(shares) for name, shares in waits.items()},
        "wait_step_seconds": _WAIT_STEP_SECONDS,
        "available_to_needed": {name: rate / (needed / GPUS) for name, rate in rates.items()},
        "shape": {"latents": list(latents), "text": list(text), "text_rows": text_rows, "samples": samples},
        "s3": "moto on this machine" if storage is not None else "left out: moto is not installed",
    }  # fmt: skip


def _write(
    folder: Path, samples: int, latents: tuple[int, ...], embedding: tuple[int, int], text: tuple[int, int],
    compression: str,
) -> Path:  # fmt: skip
    generator = np.random.default_rng(0)

    def make() -> Iterator[TeacherSample]:
        for number in range(samples):
            yield TeacherSample(
                prompt=f"prompt {number}", prompt_id=f"p{number}", meta={}, teacher="random", fps=16.0,
                text_embedding=generator.standard_normal(embedding).astype(np.float16),
                latents=generator.standard_normal(latents).astype(np.float16),
            )  # fmt: skip

    facts = DatasetFacts(latents, text, "none", "random", 0, {})
    write_dataset(make(), facts, folder, compression=compression)
    return folder


def _config(url: str, cache: Path, latents: tuple[int, ...], text: tuple[int, int]) -> RunConfig:
    """A run that reads a sample a step."""
    frames, channels, height, width = latents
    return RunConfig.model_validate({
        "method": "sft", "out": cache,
        "student": {"architecture": "toy", "latent_channels": channels, "text_dim": text[1], "text_length": text[0]},
        "data": {"shards": url, "cache": cache, "global_batch": 1, "latent_frames": frames, "latent_height": height,
                 "latent_width": width},
    })  # fmt: skip


def _seconds(config: RunConfig, samples: int) -> float:
    """For all samples, as fast as they come."""
    check_dataset(config)
    stream = TeacherStream(config)
    began = time.perf_counter()
    for _ in islice(stream, samples):
        pass
    seconds = time.perf_counter() - began
    stream.close()
    return seconds


def _wait_share(config: RunConfig, samples: int) -> float:
    """The share of steps that only sleep spent waiting for the next sample."""
    check_dataset(config)
    stream = Ahead(TeacherStream(config), pinned=torch.cuda.is_available())
    next(stream)
    began, stream.waited_seconds = time.perf_counter(), 0.0
    for _ in range(min(_WAIT_STEPS, samples - 1)):
        time.sleep(_WAIT_STEP_SECONDS)
        next(stream)
    share = stream.waited_seconds / (time.perf_counter() - began)
    stream.close()
    return share
